"""Ranked retrieval: measures against trec_eval, run files, and the statistics over queries."""

import itertools
import re

import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from jaxlm.eval.ranking import MEASURES, evaluate_run, group_values, means, ranked, read_run, write_run
from jaxlm.eval.stats import bootstrap_interval, bootstrap_intervals, holm, paired_test

# As trec_eval calls them; its reciprocal rank has no cut-off, so that one is given runs of k documents.
TREC = {"ndcg": "ndcg_cut_{k}", "map": "map_cut_{k}", "recall": "recall_{k}", "precision": "P_{k}",
        "success": "success_{k}", "mrr": "recip_rank"}
CUTS = (1, 3, 10)


def random_run(rng, queries=40):
    """Runs with many ties, of 0 to 20 documents, some unjudged; judgements with grades, zeros and a negative."""
    run, qrels = {}, {}
    for query in (f"q{i}" for i in range(queries)):
        docs = [f"d{i}" for i in rng.permutation(30)]
        run[query] = {doc: float(rng.integers(5)) + 1e-9 * rng.random() for doc in docs[:rng.integers(1, 21)]}
        qrels[query] = {f"d{i}": int(rng.choice([-1, 0, 0, 1, 1, 2, 3])) for i in rng.permutation(30)[:8]}
    return run, qrels


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_trec_eval(name):
    run, qrels = random_run(np.random.default_rng(0))
    names = [f"{name}@{k}" for k in CUTS]
    ours = evaluate_run(run, qrels, names)
    for k, column in zip(CUTS, names, strict=True):
        theirs = TREC[name].format(k=k)
        cut = run if name != "mrr" else {q: {d: run[q][d] for d in ranked(run[q])[:k]} for q in run}
        trec = pytrec_eval.RelevanceEvaluator(qrels, {theirs.replace(f"_{k}", f".{k}")}).evaluate(cut)
        np.testing.assert_allclose(ours.values[column], [trec[query][theirs] for query in ours.queries], atol=1e-12)
        assert ours.values[column].std() > 0.05  # the runs can tell measures apart


def test_equal_scores_stand_in_descending_order_of_ids():
    scores = {"d10": 1.0, "d9": 1.0, "a": 1 + 1e-12, "D": 1.0, "top": 2.0, "last": 0.5}
    assert ranked(scores) == ["top", "d9", "d10", "a", "D", "last"]
    # The same from trec_eval, one document relevant at a time: its reciprocal rank is where the document stands.
    for rank, doc in enumerate(ranked(scores), 1):
        trec = pytrec_eval.RelevanceEvaluator({"q": {doc: 1}}, {"recip_rank"}).evaluate({"q": scores})
        assert trec["q"]["recip_rank"] == pytest.approx(1 / rank)


def test_measures_by_hand():
    run = {"q": {"a": 4.0, "b": 3.0, "c": 2.0}}
    result = evaluate_run(run, {"q": {"b": 2, "c": 1, "z": 3}}, [f"{name}@4" for name in MEASURES])
    dcg, best = 2 / np.log2(3) + 1 / 2, 3 + 2 / np.log2(3) + 1 / 2
    expected = {"ndcg@4": dcg / best, "mrr@4": 1 / 2, "map@4": (1 / 2 + 2 / 3) / 3, "recall@4": 2 / 3,
                "precision@4": 2 / 4, "success@4": 1.0}
    assert means(result) == pytest.approx(expected)


def test_queries_without_results_judgements_or_relevant_documents_are_counted(caplog):
    qrels = {"a": {"d1": 1}, "b": {"d1": 1}, "c": {"d1": 0}, "e": {}}
    result = evaluate_run({"a": {"d1": 1.0}, "c": {"d1": 1.0}, "e": {"d1": 1.0}, "x": {"d1": 1.0}}, qrels, ["mrr@10"])
    assert result.queries == ("a", "b", "c")
    np.testing.assert_array_equal(result.values["mrr@10"], [1, 0, 0])
    assert (result.num_unjudged, result.num_missing, result.num_no_relevant) == (2, 1, 1)
    assert "1 of 3 judged queries have no result" in caplog.text
    parts = group_values(result, {"a": "in", "b": "in", "c": "after"})
    assert [(name, part["mrr@10"].tolist()) for name, part in parts.items()] == [("after", [0]), ("in", [1, 0])]
    with pytest.raises(ValueError, match="2 judged queries have no group, such as 'a'"):
        group_values(result, {"c": "after"})


def test_a_document_with_the_id_of_its_query_is_left_out_on_demand():
    """As BEIR does it: from the run only, so that one that is judged relevant is never found."""
    run = {"d1": {"d1": 2.0, "d2": 1.0}, "d3": {"d3": 1.0}}
    qrels = {"d1": {"d1": 1, "d2": 1}, "d3": {"d2": 1}}
    own = {query: {doc: score for doc, score in scores.items() if doc != query} for query, scores in run.items()}
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"recall.2", "success.1"}).evaluate(own)
    result = evaluate_run(run, qrels, ["recall@2", "success@1"], ignore_identical_ids=True)
    for ours, theirs, values in (("recall@2", "recall_2", [0.5, 0]), ("success@1", "success_1", [1, 0])):
        assert result.values[ours].tolist() == values and [trec[query][theirs] for query in ("d1", "d3")] == values
    assert result.num_missing == 1
    assert means(evaluate_run(run, qrels, ["recall@2", "success@1"])) == {"recall@2": 0.5, "success@1": 0.5}


@pytest.mark.parametrize("run, qrels, measures, error", [
    ({}, {"q": {"d": 1}}, ["ndgc@10"], "unknown measure 'ndgc@10' (did you mean 'ndcg'?); known: ndcg@k,"),
    ({}, {"q": {"d": 1}}, ["ndcg"], "needs a cut-off of 1 or more, as in ndcg@10"),
    ({}, {"q": {"d": 1}}, ["ndcg@0"], "needs a cut-off of 1 or more"),
    ({"q": {"d": 1.0}}, {"q": {}}, ["mrr@10"], "there are no judgements"),
    ({"1": {"d": 1.0}}, {"q1": {"d": 1}}, ["mrr@10"], "no query of the run is judged; one of the run is '1'"),
    ({"q": {"d": float("nan")}}, {"q": {"d": 1}}, ["mrr@10"], "query 'q': the score of document 'd' is not a number"),
])
def test_evaluation_refuses(run, qrels, measures, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        evaluate_run(run, qrels, measures)


def test_a_run_file_gives_the_run_back(tmp_path):
    run, qrels = random_run(np.random.default_rng(1), queries=6)
    write_run(tmp_path / "run.trec", run, "bm25")
    assert (tmp_path / "run.trec").read_text().splitlines()[0].split()[1::2] == ["Q0", "1", "bm25"]
    again = read_run(tmp_path / "run.trec")
    assert {q: ranked(again[q]) for q in again} == {q: ranked(run[q]) for q in run}
    for name, values in evaluate_run(run, qrels).values.items():
        np.testing.assert_array_equal(evaluate_run(again, qrels).values[name], values)
    with pytest.raises(ValueError, match=r"the document 'a b' is empty or has a space"):
        write_run(tmp_path / "run.trec", {"q": {"a b": 1.0}}, "bm25")
    assert read_run(tmp_path / "run.trec") == again


@pytest.mark.parametrize("text, error", [
    ("q Q0 d 1 0.5", ":1: 5 columns; a run has 6"),
    ("q Q0 d 1 0.5 t\n\nq Q0 e 1 high t", ":3: the score 'high' is not a number"),
    ("q Q0 d 1 nan t", ":1: the score 'nan' is not a number"),
    ("q Q0 d 1 0.5 t\nq Q0 d 2 0.4 t", ":2: document 'd' is listed twice for query 'q'"),
])
def test_a_run_file_that_is_none_is_refused(tmp_path, text, error):
    path = tmp_path / "run.trec"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{error}")):
        read_run(path)


def test_bootstrap_intervals_are_those_of_the_normal_law():
    values = np.random.default_rng(0).normal(2, 1, 400)
    interval = bootstrap_interval(values, resamples=4000)
    error = values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    np.testing.assert_allclose(interval[1:], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.1 * error)
    assert interval == bootstrap_interval(values, resamples=4000)
    assert interval != bootstrap_interval(values, resamples=4000, seed=1)
    assert bootstrap_interval(values, level=0.5, resamples=4000).low > interval.low


def test_the_queries_of_bootstrap_intervals_are_drawn_once_for_all_measures():
    """Against the means of drawn values."""
    rng = np.random.default_rng(0)
    measures = [rng.random(50), rng.integers(2, size=50).astype(float)]
    rows = np.random.default_rng(0).integers(50, size=(300, 50))
    for interval, values in zip(bootstrap_intervals(measures, resamples=300), measures, strict=True):
        np.testing.assert_allclose(interval, [values.mean(), *np.quantile(values[rows].mean(axis=1), [0.025, 0.975])])
        np.testing.assert_allclose(interval, bootstrap_interval(values, resamples=300))


def test_paired_test_counts_all_exchanges_of_few_queries():
    first, second = np.array([0.5, 0.7, 0.9, 0.4, 0.8]), np.array([0.4, 0.5, 0.6, 0.5, 0.3])
    difference = first - second
    exchanged = [abs(np.mean(np.multiply(signs, difference))) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean(np.array(exchanged) >= abs(difference.mean()) - 1e-12)
    result = paired_test(first, second)
    assert result.p_permutation == pytest.approx(expected) and 0.05 < expected < 0.5
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(5))
    assert result.p_t == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert paired_test(first, first) == (0, 1, 1)
    assert paired_test(np.ones(4), np.zeros(4)) == (1, 2 / 16, 0)  # no variance


def test_drawn_exchanges_agree_with_the_t_test():
    rng = np.random.default_rng(0)
    first = rng.random(300)
    second = first - 0.02 + rng.normal(0, 0.15, 300)
    result = paired_test(first, second, permutations=4000)
    assert result == paired_test(first, second, permutations=4000)
    assert result.p_permutation == pytest.approx(result.p_t, abs=0.01) and 0.005 < result.p_t < 0.2
    assert paired_test(first, first - 1e-3 * rng.random(300), permutations=999).p_permutation == pytest.approx(2 / 1000)


def test_holm_correction_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("call, error", [
    (lambda: bootstrap_interval(np.array([])), "at least one"),
    (lambda: bootstrap_interval(np.array([np.nan])), "must be finite"),
    (lambda: bootstrap_interval(np.ones(3), level=95), "level must lie between 0 and 1"),
    (lambda: paired_test(np.ones(3), np.ones(2)), "got 3 and 2"),
    (lambda: paired_test(np.ones(1), np.ones(1)), "at least 2 queries"),
    (lambda: holm({"a": 1.2}), "a: a p-value lies between 0 and 1"),
])
def test_statistics_refuse(call, error):
    with pytest.raises(ValueError, match=error):
        call()
