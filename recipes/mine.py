"""Find hard negatives for training rows: what a retriever ranks high and is no positive.

    python -m recipes.mine --model all-MiniLM-L6-v2 --data "scifact?split=train" --output rows.jsonl
    python -m recipes.mine --model base --data triples.jsonl --output mined.jsonl --mine.num-negatives 5 \\
      --mine.relative-margin 0.05 --mine.range-max 50

The data are a folder of BEIR, whose corpus is searched, or a JSONL file of rows, where all passages of all rows are the
corpus. Filters: ranks, scores, margins below the positive (NV-Retriever's 95 %: `--mine.relative-margin 0.05`), copies
of a positive; what each left out is counted. `recipes.train_retriever` reads the result. Minutes for 10,000 passages.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import beir_rows, read_beir, split_of
from jaxlm.data.retrieval_rows import Passage, RetrievalRow, read_retrieval_rows
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.retrieval.embed import Pooling, embed_texts
from jaxlm.retrieval.folder import load_text_encoder
from jaxlm.retrieval.index import search
from jaxlm.retrieval.mine import MineConfig, Mined, mine, score_rows
from jaxlm.retrieval.rank import corpus_blocks
from jaxlm.train.state import place_leaf

PROG = "recipes.mine"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is searched for what."""

    model: str = ""                   # a folder of sentence-transformers or transformers
    data: str = ""                    # a BEIR folder, `folder?split=train`, or a JSONL file of rows
    output: Path = Path("mined.jsonl")
    mine: MineConfig = field(default_factory=MineConfig)
    depth: int = 100                  # ranks that are looked at
    vectors: Path | None = None       # a folder that keeps the vectors of the corpus
    pooling: Pooling | None = None    # of a folder without modules.json
    batch_tokens: int = 8192
    overwrite: bool = False           # replace `output`
    mesh: MeshConfig = field(default_factory=MeshConfig)


def open_rows(spec: str) -> tuple[list[RetrievalRow], list[Passage]]:
    """The rows, and the passages among which their negatives are looked for."""
    folder, split = split_of(spec, "train")
    if Path(folder).is_dir():
        data = read_beir(folder, split)
        return beir_rows(data), [Passage(name, text) for name, text in data.corpus.items() if text.strip()]
    rows = read_retrieval_rows(spec).rows
    return rows, list({one.id: one for row in rows for one in (*row.positives, *row.negatives)}.values())


def distinct(rows: Sequence[RetrievalRow]) -> list[RetrievalRow]:
    """Rows of one query as one, so that a positive of the one is no negative of the other."""
    merged: dict[str, list[Passage]] = {}
    for row in rows:
        known = merged.setdefault(row.query, [])
        known += [one for one in row.positives if one not in known]
    if len(merged) < len(rows):
        log.info("%d rows ask %d different queries; their positives are put together", len(rows), len(merged))
    return [RetrievalRow(query, tuple(positives)) for query, positives in merged.items()]


def found_negatives(config: Config, rows: Sequence[RetrievalRow], corpus: Sequence[Passage]) -> Mined:
    """Search and filters."""
    mesh = make_mesh(config.mesh)
    encoder, params = load_text_encoder(
        config.model, pooling=config.pooling,
        put=lambda path, leaf: place_leaf(path, leaf, mesh=mesh, rules=ENCODER_RULES))
    place = {one.id: i for i, one in enumerate(corpus)}
    positives = [[place[one.id] for one in row.positives] for row in rows]
    texts = [row.query for row in rows]
    with jax.set_mesh(mesh):
        blocks = corpus_blocks(encoder, params, [one.text for one in corpus], config.vectors,
                               batch_tokens=config.batch_tokens)
        queries = embed_texts(encoder, params, texts, "query", batch_tokens=config.batch_tokens)
        hits = search(queries, blocks, config.depth, similarity=encoder.similarity)
    starts = np.cumsum([0, *map(len, blocks)])

    def vectors(chosen: np.ndarray) -> np.ndarray:
        block = np.searchsorted(starts, chosen, side="right") - 1
        return np.stack([blocks[b][row - starts[b]] for b, row in zip(block, chosen, strict=True)])

    scores = score_rows(queries, vectors, positives, similarity=encoder.similarity)
    return mine(hits, texts, positives, lambda row: corpus[row].text, config.mine, positive_scores=scores)


def run(config: Config) -> None:
    """Reads, mines, writes; rows without any negative are left out and counted."""
    if not config.model or not config.data:
        raise ValueError("--model names a folder of sentence-transformers or transformers, and --data the rows")
    if config.output.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    rows, corpus = open_rows(config.data)
    rows = distinct(rows)
    mined = found_negatives(config, rows, corpus)
    kept = [(row, own) for row, own in zip(rows, mined.rows, strict=True) if own]
    if not kept:
        raise ValueError("no query has a negative left; filter less, or search deeper with --depth")
    with replacing(config.output) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row, own in kept:
            values = {"query": row.query, "positives": [one._asdict() for one in row.positives],
                      "negatives": [corpus[i]._asdict() for i in own]}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    log.info("%d rows in %s, %d without a negative left out", len(kept), config.output, len(rows) - len(kept))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
