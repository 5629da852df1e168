"""BM25 against its formula, and the order among equals."""

import math
import re

import numpy as np
import pytest

from jaxlm.eval.ranking import ranked
from jaxlm.retrieval.bm25 import bm25_index, bm25_scores, bm25_search, words
from jaxlm.retrieval.index import as_run

TEXTS = ["The cat sat.", "the dog; the DOG barked at a cat", "Seoul 1998", "", "the cat sat", "한강은 서울의 강"]
IDS = ["d10", "d9", "c", "b", "d2", "a"]


def by_formula(query, k1=1.5, b=0.75):
    corpus = [words(text) for text in TEXTS]
    mean = sum(map(len, corpus)) / len(corpus)
    scores = np.zeros(len(corpus))
    for word in words(query):
        n = sum(word in doc for doc in corpus)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        for i, doc in enumerate(corpus):
            tf = doc.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(doc) / mean)) if n else 0
    return scores


def test_scores_follow_the_formula():
    index = bm25_index(TEXTS)
    for query in ("cat", "THE dog", "the the cat", "1998 unknown", "서울의"):
        np.testing.assert_allclose(bm25_scores(index, query), by_formula(query), rtol=1e-5)
    np.testing.assert_array_equal(bm25_scores(index, "unknown ?"), np.zeros(6))
    other = bm25_scores(bm25_index(TEXTS, k1=0.9, b=0.4), "the dog")
    np.testing.assert_allclose(other, by_formula("the dog", 0.9, 0.4), rtol=1e-5)


def test_search_orders_equals_by_descending_id():
    index = bm25_index(TEXTS)
    hits = bm25_search(index, ["cat", "unknown", "the dog"], 4, ids=IDS)
    assert hits.rows.tolist() == [[4, 0, 1, -1], [-1] * 4, [1, 4, 0, -1]]
    assert np.all(np.isneginf(hits.scores[hits.rows == -1]))
    run = as_run(hits, ["q1", "q2", "q3"], IDS)
    assert ranked(run["q1"]) == ["d2", "d10", "d9"] and run["q2"] == {}
    assert bm25_search(index, ["cat"], 1, ids=IDS).rows.tolist() == [[4]]  # the tie is at the cut
    assert bm25_search(index, ["cat"], 2).rows.tolist() == [[0, 4]]        # without ids: the first


@pytest.mark.parametrize("call, error", [
    (lambda: bm25_index([]), "at least one text with a word"),
    (lambda: bm25_index(["", "!"]), "at least one text with a word"),
    (lambda: bm25_search(bm25_index(TEXTS), ["cat"], 0), "k must be at least 1, got 0"),
    (lambda: bm25_search(bm25_index(TEXTS), ["cat"], 1, ids=["a"]), "the corpus has 6 documents, but there are 1 ids"),
])
def test_keyword_search_refuses(call, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        call()
