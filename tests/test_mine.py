"""Hard negatives and BM25: each filter alone, by hand, and what is counted."""

import re

import numpy as np
import pytest

from jaxlm.retrieval.index import Hits, search
from jaxlm.retrieval.mine import MineConfig, contains_answer, mine, score_rows

TEXTS = ["zero", "one", "two", "the  positive", "four", "the positive", "two", "seven", "eight", "nine"]


def hits_of(*queries):
    """Each query as row and score in turn."""
    rows, scores = zip(*(zip(*query, strict=True) for query in queries), strict=True)
    return Hits(np.array(scores, np.float32), np.array(rows))


#            positive 3                                 copies: 5 of 3, 6 of 2
HITS = hits_of([(4, 2.0), (3, 1.0), (5, 0.75), (2, 0.5), (6, 0.25), (0, -0.5), (7, -1.0), (-1, -np.inf)])


def mined(answers=None, positives=((3,),), positive_scores=((1.0,),), hits=HITS, queries=("q",), **config):
    return mine(hits, queries, positives, TEXTS.__getitem__, MineConfig(**({"num_negatives": 9} | config)),
                positive_scores=positive_scores, answers=answers)


@pytest.mark.parametrize("settings, rows, skipped", [
    ({}, [4, 2, 0, 7], {"positive": 1, "duplicate": 2}),
    ({"num_negatives": 2}, [4, 2], {"positive": 1, "duplicate": 1}),
    ({"range_min": 2}, [2, 0, 7], {"positive": 1, "duplicate": 1}),  # ranks without the positive
    ({"range_min": 2, "range_max": 5, "num_negatives": 3}, [2, 0], {"positive": 1, "duplicate": 1}),
    ({"max_score": 0.75}, [2, 0, 7], {"positive": 1, "max_score": 1, "duplicate": 2}),
    ({"min_score": 0.5}, [4, 2], {"positive": 1, "duplicate": 1, "min_score": 3}),
    ({"absolute_margin": 0.5}, [2, 0, 7], {"positive": 1, "absolute_margin": 2, "duplicate": 1}),
    ({"relative_margin": 0.5}, [2, 0, 7], {"positive": 1, "relative_margin": 2, "duplicate": 1}),
    ({"relative_margin": 0.5, "positive_scores": [[-0.5]]}, [7], {"positive": 1, "relative_margin": 5}),
    ({"answers": [["Zero", "seventh"]]}, [4, 2, 7], {"positive": 1, "duplicate": 2, "answer": 1}),
    ({"positives": [(3, 2)], "positive_scores": [[1.0, 0.5]], "absolute_margin": 0.1}, [0, 7],
     {"positive": 2, "absolute_margin": 2, "duplicate": 1}),  # row 6 has the text of the positive 2
])
def test_each_filter_by_hand(settings, rows, skipped):
    result = mined(**settings)
    assert result.rows == [rows] and result.skipped == skipped
    scores = dict(zip(HITS.rows[0].tolist(), HITS.scores[0].tolist(), strict=True))
    assert result.scores == [[scores[row] for row in rows]]


def test_queries_with_too_few_negatives_are_counted(caplog):
    result = mined(num_negatives=4, min_score=0.5)
    assert result.num_short == 1 and "1 of 1 queries have fewer than 4 negatives, 0 of them none" in caplog.text
    assert mined(num_negatives=2).num_short == 0


def test_random_negatives_depend_on_seed_and_query_alone():
    names = [f"q{i}" for i in range(60)]
    hits = Hits(np.tile(np.arange(9, 0, -1, dtype=np.float32), (60, 1)), np.tile([0, 1, 2, 3, 4, 6, 7, 8, 9], (60, 1)))
    drawn = mined(hits=hits, queries=names, positives=[(3,)] * 60, positive_scores=None, num_negatives=3,
                  sampling="random")
    counts = np.bincount(np.concatenate(drawn.rows), minlength=10)
    assert counts[[3, 5, 6]].tolist() == [0, 0, 0] and np.all(counts[[0, 1, 2, 4, 7, 8, 9]] > 10)
    assert all(rows == sorted(rows) for rows in drawn.rows)  # the best first
    turned = mined(hits=hits, queries=names[::-1], positives=[(3,)] * 60, positive_scores=None, num_negatives=3,
                   sampling="random")
    assert turned.rows == drawn.rows[::-1]
    assert drawn.rows != mined(hits=hits, queries=names, positives=[(3,)] * 60, positive_scores=None, num_negatives=3,
                               sampling="random", seed=1).rows


@pytest.mark.parametrize("text, answer, expected", [
    ("Born in the U.S.A. (1998)!", "u s a", True), ("in 1998", "99", False), ("the Kansas team", "Kansas  Team", True),
    ("Annual report", "Ann", False), ("서울은 수도이다", "서울", True), ("부산은 항구이다", "서울", False),
    ("costs 5 %", "%", True), ("anything", " ", False), ("Ströme", "STRÖME", True),
])
def test_contains_answer(text, answer, expected):
    assert contains_answer(text, answer) is expected


def test_positives_are_scored_as_the_search_scores_them():
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(20, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    for similarity in ("dot", "cosine"):
        hits = search(queries, [vectors], 20, similarity=similarity)
        scores = score_rows(queries, vectors.__getitem__, hits.rows.tolist(), similarity=similarity)
        np.testing.assert_allclose(scores, hits.scores, atol=1e-6)


@pytest.mark.parametrize("settings, error", [
    ({"num_negatives": 0}, "num_negatives must be at least 1"),
    ({"range_min": 3, "range_max": 5}, "ranks 3 to 5 hold fewer than num_negatives=9"),
    ({"range_max": 20}, "range_max 20 lies beyond the 8 hits of a query"),
    ({"absolute_margin": -1.0}, "a margin must not be negative"),
    ({"sampling": "best"}, "sampling is top or random"),
    ({"seed": 1}, "seed has no effect with sampling top"),
    ({"relative_margin": 0.05, "positive_scores": None}, "relative_margin needs positive_scores"),
    ({"positive_scores": [[1.0, 2.0]]}, "query 'q' has 1 positives and 2 scores"),
    ({"positives": [()], "positive_scores": None}, "query 'q' has 0 positives"),
    ({"queries": ["a", "b"]}, "there are hits of 1 queries, but 2 queries"),
])
def test_mining_refuses(settings, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        mined(**settings)
