"""Search over a corpus in memory as tools: by keywords (BM25) and by embeddings (inner product)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.json_rows import field, read_rows
from jaxlm.data.retrieval_rows import titled
from jaxlm.retrieval.bm25 import bm25_index, bm25_scores
from jaxlm.retrieval.embed import embed_texts, unit_length
from jaxlm.retrieval.towers import Towers, find_towers, load_towers
from jaxlm.rl.tools import Tool, tool_of

KEYWORD_SEARCH, DENSE_SEARCH = "keyword_search", "dense_search"
MAX_RESULTS, MAX_QUERY = 20, 1000


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What every task also offers to search in, and how."""

    corpus: str = ""  # JSONL of {id, title, text}: `keyword_search` over these passages
    model: str = ""   # a folder of sentence-transformers: `dense_search` over them too, by its vectors

    def __post_init__(self) -> None:
        if self.model and not self.corpus:
            raise ValueError("search.model says how to search, but search.corpus names nothing to search in")


class Passage(NamedTuple):
    title: str
    text: str


def read_passages(path: str | Path) -> list[Passage]:
    """The passages of a JSONL file, plain or gzipped; other fields of its lines are not read.

        {"id": "seoul", "title": "Seoul", "text": "The capital of Korea lies on the Han river."}

    ValueError names the file, and the line with what is missing, empty, or an id that was seen before.
    """
    passages, lines = [], {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        name, title, text = (field(row, key, str, where) for key in ("id", "title", "text"))
        if not text.strip():
            raise ValueError(f"{where}: field 'text' is empty")
        if name in lines:
            raise ValueError(f"{where}: the id {name!r} is that of line {lines[name]}")
        lines[name] = number
        passages.append(Passage(title, text))
    if not passages:
        raise ValueError(f"{path}: holds no passage")
    return passages


def keyword_search_tool(passages: Sequence[Passage], *, passage_chars: int = 600) -> Tool:
    """The tool `keyword_search(query, top_n)`: BM25 of the words in title and text (Robertson; Lucene's variant).

    Passages that share no word with the query are not shown. Words are runs of letters and digits in lower case, and
    nothing is stemmed. Needs the extra `rl`.
    """
    _check(passages, passage_chars)
    index = bm25_index([f"{one.title} {one.text}" for one in passages])

    def keyword_search(query: str, top_n: int = 5) -> str:
        """Finds passages that contain the words of a query.

        Args:
            query: words to look for
            top_n: how many passages to return
        """
        _check_query(query, top_n)
        return _listed(passages, bm25_scores(index, query), top_n, passage_chars, least=0.0)

    return tool_of(keyword_search, trusted=True)


def search_tools(config: SearchConfig) -> tuple[Tool, ...]:
    """The tools of a configuration; none without a corpus. Errors: `read_passages`, `encoder_search_tool`."""
    if not config.corpus:
        return ()
    passages = read_passages(config.corpus)
    by_words = keyword_search_tool(passages)
    return (by_words, encoder_search_tool(passages, config.model)) if config.model else (by_words,)


def encoder_search_tool(passages: Sequence[Passage], folder: str | Path, *, passage_chars: int = 600) -> Tool:
    """`dense_search_tool` with the vectors of a retriever, compared as it wants: by cosine, or by inner product.

    The model lies on one device of this process, whatever the mesh of a run: processes search at different times.
    ValueError for sparse vectors, and as `load_towers` has it.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])

    def check(towers: Towers) -> None:
        if towers.vectors != "dense":
            raise ValueError(f"{folder}: dense_search compares dense vectors, these are {towers.vectors}")

    towers = load_towers(find_towers(folder), mesh, check=check)

    def embed(texts: Sequence[str], kind: Literal["query", "passage"]) -> np.ndarray:
        with jax.set_mesh(mesh):
            vectors = embed_texts(*towers.at_work(kind), texts, kind)
        return np.asarray(unit_length(vectors)) if towers.similarity == "cosine" else vectors

    vectors = embed([titled(one.title, one.text) for one in passages], "passage")
    return dense_search_tool(passages, vectors, lambda texts: embed(texts, "query"), passage_chars=passage_chars)


def dense_search_tool(passages: Sequence[Passage], embeddings: np.ndarray, embed: Callable[[list[str]], np.ndarray], *,
                      passage_chars: int = 600) -> Tool:
    """The tool `dense_search(query, top_n)`: the passages with the largest inner products <embeddings[p], embed(q)>.

    Args:
      embeddings: [P, D], one row a passage.
      embed: texts to [len(texts), D]; called in this process with one query at a time.
    """
    _check(passages, passage_chars)
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(passages) or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings must be finite and of shape [{len(passages)}, D], got {embeddings.shape}")

    def dense_search(query: str, top_n: int = 5) -> str:
        """Finds passages whose meaning is closest to a query.

        Args:
            query: what to look for
            top_n: how many passages to return
        """
        _check_query(query, top_n)
        vector = np.asarray(embed([query]), np.float32)
        assert vector.shape == (1, embeddings.shape[1]), f"embed gave {vector.shape} for one text"
        return _listed(passages, embeddings @ vector[0], top_n, passage_chars, least=-np.inf)

    return tool_of(dense_search, trusted=True)


def _check(passages: Sequence[Passage], passage_chars: int) -> None:
    if not passages:
        raise ValueError("a search needs at least one passage")
    if passage_chars < 1:
        raise ValueError(f"passage_chars must be at least 1, got {passage_chars}")


def _check_query(query: str, top_n: int) -> None:
    if not 1 <= top_n <= MAX_RESULTS:
        raise ValueError(f"top_n must be between 1 and {MAX_RESULTS}")
    if not query.strip() or len(query) > MAX_QUERY:
        raise ValueError(f"the query must have between 1 and {MAX_QUERY} characters")


def _listed(passages: Sequence[Passage], scores: np.ndarray, top_n: int, passage_chars: int, least: float) -> str:
    """The best passages with a score above `least`, of equals the first; "[1] Title", a line break, the text."""
    found = np.flatnonzero(scores > least)
    if len(found) > top_n:
        found = found[scores[found] >= np.partition(scores[found], -top_n)[-top_n]]
    best = [passages[i] for i in found[np.argsort(-scores[found], kind="stable")[:top_n]]]
    return "\n\n".join(f"[{n}] {one.title}\n{one.text[:passage_chars]}{'...' * (len(one.text) > passage_chars)}"
                       for n, one in enumerate(best, 1)) or "no passage was found"
