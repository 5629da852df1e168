"""Ask a corpus from the shell.

    python -m recipes.search --model all-MiniLM-L6-v2 --corpus corpus.jsonl --cache vectors --query "who wrote Emma"
    python -m recipes.search --model runs/retriever/exported --corpus scifact --cache vectors       # asks until the end
    python -m recipes.search --model passages --query-model queries --corpus big.jsonl --cache vectors \\
      --index.kind faiss_hnsw --index.file big.index

The model may be a SparseEncoder (SPLADE), with `--vectors late` one whose tokens are compared (MaxSim), and two towers
as `recipes.train_retriever` exports them. Prompts before the texts are what the folder says, or `--query-prompt` and
`--passage-prompt`. The corpus is a JSONL file of `{"_id", "title"?, "text"}`, plain or compressed, or a folder of BEIR.
`--cache` keeps its dense vectors: an interrupted run goes on, the next one only reads them (memory-mapped), and vectors
of another model, prompt or corpus are refused. Search is exact, or with `--index.kind` that of FAISS (`jaxlm[faiss]`),
whose index `--index.file` keeps; sparse and late vectors are searched exactly, from memory. About a minute for 10,000
passages with MiniLM on a laptop CPU the first time.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jaxlm.core.command import run_command
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import read_corpus
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.faiss_index import IndexConfig
from jaxlm.retrieval.index import NO_ROW
from jaxlm.retrieval.representations import Vectors
from jaxlm.retrieval.searcher import open_searcher
from jaxlm.retrieval.towers import find_towers

PROG = "recipes.search"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where to look, with what."""

    model: str = ""                   # a folder of sentence-transformers or transformers
    query_model: str = ""             # another one that encodes the queries, of two towers
    vectors: Vectors | None = None    # of the model; None: as the folder says, which none says of late ones
    corpus: Path = Path("corpus.jsonl")
    cache: Path | None = None         # a folder that keeps the dense vectors of the corpus
    query: tuple[str, ...] = ()       # none: asked for on the terminal, a line each
    k: int = 5                        # passages of each query
    chars: int = 300                  # of a passage that are shown
    pooling: Pooling | None = None    # of a folder without modules.json
    query_prompt: str | None = None   # before every query, "query: " for E5; None: as the folder says
    passage_prompt: str | None = None
    batch_tokens: int = 8192
    index: IndexConfig = field(default_factory=IndexConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if min(self.k, self.chars, self.batch_tokens) < 1:
            raise ValueError("--k, --chars and --batch-tokens must be at least 1")
        if not all(query.strip() for query in self.query):
            raise ValueError("--query must have text; leave it out to be asked")


def questions(config: Config) -> Iterator[str]:
    """Those of the flags, or lines of the terminal until it ends."""
    if config.query:
        yield from config.query
        return
    while True:
        print("query> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return
        if line.strip():
            yield line.strip()


def ask(config: Config) -> None:
    """Encodes or opens the corpus, then answers."""
    if not config.model:
        raise ValueError("--model names a folder of sentence-transformers or transformers")
    corpus = read_corpus(config.corpus)
    ids, texts = list(corpus), list(corpus.values())
    mesh = make_mesh(config.mesh)
    towers = find_towers(config.model, config.query_model, vectors=config.vectors, pooling=config.pooling,
                         query_prompt=config.query_prompt, passage_prompt=config.passage_prompt)
    searcher = open_searcher(towers, mesh, texts, ids=ids, index=config.index, folder=config.cache,
                             batch_tokens=config.batch_tokens)
    with jax.set_mesh(mesh):
        for query in questions(config):
            hits = searcher.search(searcher.encode([query]), config.k)
            print(f"# {query}")
            found = hits.rows[0] != NO_ROW  # an approximate index may find fewer
            for rank, (row, score) in enumerate(zip(hits.rows[0][found], hits.scores[0][found], strict=True), 1):
                text = " ".join(texts[row].split())
                cut = text if len(text) <= config.chars else text[:config.chars] + " ..."
                print(f"{rank}. {score:.4f}  {ids[row]}  {cut}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(ask, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
