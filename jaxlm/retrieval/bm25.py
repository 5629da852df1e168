"""Search by keywords: BM25 (Robertson; the variant of Lucene, Kamphuis et al. 2020) through the package bm25s."""

import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxlm.core.extras import extra
from jaxlm.retrieval.index import NO_ROW, Hits, descending_places

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; nothing is stemmed, and no word is left out."""
    return _WORD.findall(text.lower())


def bm25_index(texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> Any:
    """The index of a corpus (`bm25s.BM25`), with `idf = ln(1 + (N - n + 0.5) / (n + 0.5))`, in memory.

    ValueError: no text, texts without any word, `bm25s` is not installed (the extra `rl`).
    """
    corpus = [words(text) for text in texts]
    if not any(corpus):
        raise ValueError("keyword search needs at least one text with a word")
    index = _bm25s().BM25(k1=k1, b=b)
    index.index(corpus, show_progress=False)
    return index


def bm25_scores(index: Any, query: str) -> np.ndarray:
    """The score of every document, [N] float32; 0 for those that share no word with the query."""
    known = [word for word in words(query) if word in index.vocab_dict]
    return index.get_scores(known) if known else np.zeros(index.scores["num_docs"], np.float32)


def bm25_search(index: Any, queries: Sequence[str], k: int, *, ids: Sequence[str] | None = None) -> Hits:
    """The k documents of highest score for each query, k wide; documents that share no word with it are never found.

    Documents of equal score stand in descending order of their ids, or without ids in the order of the corpus, as in
    `jaxlm.retrieval.index.search`. ValueError: k below 1, ids that are not one a document.
    """
    count = index.scores["num_docs"]
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ids is not None and len(ids) != count:
        raise ValueError(f"the corpus has {count} documents, but there are {len(ids)} ids")
    places = np.arange(count) if ids is None else descending_places(ids)
    hits = Hits(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), NO_ROW, np.int64))
    for i, query in enumerate(queries):
        # bm25s may not choose the k best: it would do so with JAX, on the accelerator, in its own order among equals.
        scores = bm25_scores(index, query)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:  # those as good as the k-th one; few are sorted
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = found[np.lexsort((places[found], -scores[found]))][:k]
        hits.scores[i, :len(best)], hits.rows[i, :len(best)] = scores[best], best
    return hits


def _bm25s() -> ModuleType:
    # Not at the top: the import computes something with JAX, and after that no distributed run can begin.
    bm25s = extra("bm25s", "rl")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG, on the terminal of every run
    return bm25s
