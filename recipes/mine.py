"""Find hard negatives for training rows: what a retriever ranks high and is no positive.

    python -m recipes.mine --model all-MiniLM-L6-v2 --data "scifact?split=train" --output rows.jsonl
    python -m recipes.mine --model base --data triples.jsonl --output mined.jsonl --mine.num-negatives 5 \\
      --mine.relative-margin 0.05 --mine.range-max 50
    python -m recipes.mine --source bm25 --data triples.jsonl --output mined.jsonl

The data are a folder of BEIR, whose corpus is searched, or a JSONL file of rows, where all passages of all rows are the
corpus. Candidates come from `--model`, from BM25 (`jaxlm[rl]`), or from both in turn (`--source mixed`). A model, where
one is named, scores them all, those of BM25 too; BM25 alone filters by its own scores. The model may be a SparseEncoder
(SPLADE), with `--vectors late` one whose tokens are compared (MaxSim), and two towers as `recipes.train_retriever`
exports them. Prompts before the texts are what the folder says, or `--query-prompt` and `--passage-prompt`. `--cache`
keeps the dense vectors of the corpus for the next time. Filters: ranks, scores, margins below the positive
(NV-Retriever's 95 %: `--mine.relative-margin 0.05`; they need a model), copies of a positive, passages with an answer
(`--answers`); what each left out is counted. `recipes.train_retriever` reads the result.
Minutes for 10,000 passages with a model, seconds with BM25.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import beir_rows, read_beir, split_of
from jaxlm.data.json_rows import read_rows
from jaxlm.data.retrieval_rows import QUERY, Passage, RetrievalRow, read_retrieval_rows
from jaxlm.retrieval.bm25 import bm25_index, bm25_search
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.faiss_index import IndexConfig
from jaxlm.retrieval.index import Hits
from jaxlm.retrieval.mine import MineConfig, Mined, interleaved, mine, scored
from jaxlm.retrieval.representations import Vectors
from jaxlm.retrieval.searcher import open_searcher
from jaxlm.retrieval.towers import find_towers

PROG = "recipes.mine"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is searched for what."""

    model: str = ""                   # a folder of sentence-transformers or transformers
    query_model: str = ""             # another one that encodes the queries, of two towers
    vectors: Vectors | None = None    # of the model; None: as the folder says, which none says of late ones
    source: Literal["dense", "bm25", "mixed"] = "dense"  # who finds the candidates: the model, BM25, both in turn
    data: str = ""                    # a BEIR folder, `folder?split=train`, or a JSONL file of rows
    answers: str = ""                 # a field of the queries (or rows) with strings that no negative may contain
    output: Path = Path("mined.jsonl")
    mine: MineConfig = field(default_factory=MineConfig)
    depth: int = 100                  # ranks that are looked at
    cache: Path | None = None         # a folder that keeps the dense vectors of the corpus
    pooling: Pooling | None = None    # of a folder without modules.json
    query_prompt: str | None = None   # before every query, "query: " for E5; None: as the folder says
    passage_prompt: str | None = None
    batch_tokens: int = 8192
    index: IndexConfig = field(default_factory=IndexConfig)
    overwrite: bool = False           # replace `output`
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if min(self.depth, self.batch_tokens) < 1:
            raise ValueError("--depth and --batch-tokens must be at least 1")
        if self.source == "bm25" and self.index != IndexConfig():
            raise ValueError("--index has no effect with --source bm25")
        if self.source != "bm25" or self.model:
            return
        for name in ("query_model", "vectors", "cache", "pooling", "query_prompt", "passage_prompt"):
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --source bm25 and no --model")
        for name in ("absolute_margin", "relative_margin"):
            if getattr(self.mine, name) is not None:
                raise ValueError(f"--mine.{name.replace('_', '-')} compares scores with those of the positives, which "
                                 "BM25 does not give: name a --model that scores them")


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


def answers_of(spec: str, name: str) -> dict[str, list[str]]:
    """What a field of each query holds, a text or a list of them, by the text of the query."""
    folder, split = split_of(spec, "train")
    if Path(folder).is_dir():
        data = read_beir(folder, split)
        found = [(f"{folder}: query {one!r}", text, data.fields[one]) for one, text in data.queries.items()]
    else:
        found = [(f"{spec}:{number}", next((row[key] for key in QUERY if key in row), ""), row)
                 for number, row in read_rows(spec)]
    answers: dict[str, list[str]] = {}
    for where, query, fields in found:
        value = fields.get(name)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{where}: field {name!r} must be a text or a list of texts, got {fields.get(name)!r:.80}")
        answers.setdefault(query, []).extend(value)
    return answers


def found_negatives(config: Config, rows: Sequence[RetrievalRow], corpus: Sequence[Passage],
                    answers: dict[str, list[str]] | None = None) -> Mined:
    """Search and filters."""
    place = {one.id: i for i, one in enumerate(corpus)}
    positives = [[place[one.id] for one in row.positives] for row in rows]
    queries, texts = [row.query for row in rows], [one.text for one in corpus]
    by_words = bm25_search(bm25_index(texts), queries, config.depth) if config.source != "dense" else None
    if config.model:
        hits, scores = model_hits(config, queries, texts, by_words and by_words.rows, positives)
    else:
        hits, scores = by_words, None
    return mine(hits, queries, positives, texts.__getitem__, config.mine, positive_scores=scores,
                answers=answers and [answers[query] for query in queries])


def model_hits(config: Config, queries: Sequence[str], texts: Sequence[str], by_words: np.ndarray | None,
               positives: Sequence[Sequence[int]]) -> tuple[Hits, list[list[float]]]:
    """The candidates of the source as the model scores them, and the scores of the positives."""
    mesh, searches = make_mesh(config.mesh), config.source != "bm25"
    towers = find_towers(config.model, config.query_model, vectors=config.vectors, pooling=config.pooling,
                         query_prompt=config.query_prompt, passage_prompt=config.passage_prompt)
    searcher = open_searcher(towers, mesh, texts, index=config.index if searches else None, folder=config.cache,
                             batch_tokens=config.batch_tokens)
    with jax.set_mesh(mesh):
        asked = searcher.encode(queries)
        found = searcher.search(asked, config.depth) if searches else None
        scores = partial(searcher.scores, asked)
        if by_words is not None:
            rows = by_words
            if found is not None:
                rows = interleaved(found.rows, by_words[:, :found.rows.shape[1]])[:, :config.depth]
            found = scored(rows, scores)
        return found, scores(positives)


def run(config: Config) -> None:
    """Reads, mines, writes; rows without any negative are left out and counted."""
    if not config.data or (not config.model and config.source != "bm25"):
        raise ValueError("--model names a folder of sentence-transformers or transformers, and --data the rows")
    if config.output.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    rows, corpus = open_rows(config.data)
    rows = distinct(rows)
    mined = found_negatives(config, rows, corpus, answers_of(config.data, config.answers) if config.answers else None)
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
