"""Data of retrieval: rows of JSON lines, BEIR folders, and batches that resume exactly."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest

from jaxlm.data.beir import beir_rows, read_beir
from jaxlm.data.retrieval_batches import RetrievalBatchConfig, RetrievalBatches, plan_epoch
from jaxlm.data.retrieval_rows import Passage, RetrievalRow, read_retrieval_rows


def write(path, *rows):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_all_forms_of_a_row_are_read(tmp_path, caplog):
    path = write(
        tmp_path / "rows.jsonl.gz",
        {"query": "q", "positive": "p", "negative": "n"}, "",
        {"question": "q", "positive_ctxs": [{"title": "T", "text": "p", "id": 7}, {"title": " ", "text": "p2"}],
         "negative_ctxs": []},
        {"anchor": "q", "pos": ["p", " ", "r"], "neg": ["n"], "pos_scores": [3, 2, 1.5], "neg_scores": [-1]},
        {"query": "q", "positives": [""]}, {"query": " ", "positive": "p"},
        {"query_id": "1", "query": "q", "positive_passages": [{"docid": "8", "text": "p"}, {"docid": "", "text": "r"}],
         "negative_passages": []},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "negative_10": "l", "pos_score": 1},
        {"question": "q", "positive_ctxs": ["p"], "negative_ctxs": ["m"], "hard_negative_ctxs": ["n"], "answers": []})
    data = read_retrieval_rows(path)
    assert data.rows == [
        RetrievalRow("q", (Passage("p", "p"),), (Passage("n", "n"),)),
        RetrievalRow("q", (Passage("7", "T p"), Passage("p2", "p2"))),
        RetrievalRow("q", (Passage("p", "p"), Passage("r", "r")), (Passage("n", "n"),), (3.0, 1.5), (-1.0,)),
        RetrievalRow("q", (Passage("8", "p"), Passage("r", "r"))),
        RetrievalRow("q", (Passage("p", "p"),), tuple(Passage(x, x) for x in "nml")),
        RetrievalRow("q", (Passage("p", "p"),), (Passage("n", "n"), Passage("m", "m")))]
    assert data.dropped == {"empty positives": 2, "rows without a positive": 1, "rows with an empty query": 1}
    assert "left out 2 empty positives" in caplog.text and "fields that are not read: pos_score (1 rows)" in caplog.text


@pytest.mark.parametrize("line, error", [
    ("{", ":2: not JSON"),
    ("[1]", ":2: a row must be an object, got [1]"),
    ({"qery": "q", "positive": "p"}, ":2: no field 'query' (did you mean 'qery'?)"),
    ({"query": "q"}, ":2: no field 'positive'"),
    ({"query": 1, "positive": "p"}, ":2: field 'query' must be a text, got 1"),
    ({"query": "q", "question": "q", "positive": "p"}, ":2: fields 'query' and 'question' mean the same"),
    ({"query": "q", "pos": ["p", 3]}, ":2: field 'pos', passage 2: must be text or an object with 'text', got 3"),
    ({"query": "q", "pos": [{"body": "p"}]}, ":2: field 'pos', passage 1: no field 'text'"),
    ({"query": "q", "pos": ["p"], "pos_scores": [1, 2]}, ":2: field 'pos_scores' has 2 scores for 1 passages"),
    ({"query": "q", "pos": ["p"], "pos_scores": [True]}, ":2: field 'pos_scores' must hold finite numbers"),
    ('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', ":2: field 'pos_scores' must hold finite numbers"),
    ({"query": "q", "positive": "p", "neg": "n", "negative_1": "n"}, ":2: fields 'negative_1' and 'neg' mean the same"),
    ({"query": "q", "pos": [{"id": 1, "text": "b"}, {"id": "1", "text": "c"}]}, ":2: the id '1' stands for 'c' here"),
    ({"query": "q", "pos": "p", "neg": "n", "pos_scores": 1}, ":2: teacher scores need to be given for positives and"),
])
def test_a_bad_row_is_named(tmp_path, line, error):
    path = write(tmp_path / "rows.jsonl", {"query": "q", "positive": "p"}, line)
    with pytest.raises(ValueError, match=re.escape(f"{path}{error}")):
        read_retrieval_rows(path)


def test_files_without_rows_or_cut_off_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"query": "q", "positive": ""})
    with pytest.raises(ValueError, match=r"no row left \(1 empty positives, 1 rows without a positive\)"):
        read_retrieval_rows(path)
    path = write(tmp_path / "rows.jsonl.gz", *({"query": str(i), "positive": "p"} for i in range(99)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"ends in the middle of the gzip stream"):
        read_retrieval_rows(path)


QRELS = ("query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td3\t1")


def beir(folder, corpus=(), queries=(), qrels=QRELS):
    write(folder / "corpus.jsonl.gz", {"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"},
          {"_id": "d3", "title": "", "text": ""}, *corpus)
    write(folder / "queries.jsonl", {"_id": "q1", "text": "who", "kind": "in"}, {"_id": "q2", "text": "what"},
          {"_id": "q3", "text": "not judged"}, *queries)
    write(folder / "qrels" / "test.tsv", *qrels)
    return folder


def test_a_beir_folder_is_read(tmp_path, caplog):
    data = read_beir(beir(tmp_path))
    assert data.corpus == {"d1": "T one", "d2": "two", "d3": ""}
    assert data.queries == {"q1": "who", "q2": "what"} and data.unjudged == {"q3": "not judged"}
    assert data.fields == {"q1": {"kind": "in"}, "q2": {}, "q3": {}}
    assert data.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
    assert data.num_empty == 1
    assert beir_rows(data) == [RetrievalRow("who", (Passage("d1", "T one"),), (Passage("d2", "two"),))]
    assert "1 of 2 queries have no relevant document with text" in caplog.text


@pytest.mark.parametrize("change, error", [
    ({"qrels": (*QRELS, "q9\td1\t1")}, "qrels/test.tsv:5: judges the unknown query 'q9'"),
    ({"qrels": (*QRELS, "q1\td9\t1")}, "qrels/test.tsv:5: judges the unknown document 'd9'"),
    ({"qrels": (*QRELS, "q1\td1\t1")}, "qrels/test.tsv:5: document 'd1' is judged twice for query 'q1'"),
    ({"qrels": (*QRELS, "q2\td1\tyes")}, "qrels/test.tsv:5: the gain must be a whole number, got 'yes'"),
    ({"qrels": (*QRELS, "q2 d1 1")}, "qrels/test.tsv:5: 1 columns, the header has 3"),
    ({"qrels": QRELS[1:]}, "qrels/test.tsv:1: the first line must name the columns query-id, corpus-id, score"),
    ({"qrels": QRELS[:1]}, "qrels/test.tsv: holds no judgement"),
    ({"corpus": [{"_id": "d1", "text": "x"}]}, "corpus.jsonl.gz:4: the id 'd1' is that of"),
    ({"corpus": [{"_id": "d4"}]}, "corpus.jsonl.gz:4: no field 'text'"),
    ({"corpus": [{"_id": 4, "text": "x"}]}, "corpus.jsonl.gz:4: field '_id' must be a text, got 4"),
    ({"queries": [{"_id": "q4", "text": " "}], "qrels": (*QRELS, "q4\td1\t1")},
     "queries.jsonl:4: query 'q4' is judged but has no text"),
])
def test_a_bad_beir_folder_is_refused(tmp_path, change, error):
    folder = beir(tmp_path, **change)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/{error}")):
        read_beir(folder)


def test_missing_files_of_a_beir_folder_are_named(tmp_path):
    folder = beir(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'dev'; there are: test"):
        read_beir(folder, "dev")
    write(folder / "queries.jsonl.gz", {"_id": "q1", "text": "x"})
    with pytest.raises(ValueError, match=r"and one of them; there are queries.jsonl, queries.jsonl.gz"):
        read_beir(folder)


def dataset(rows, positives=2, negatives=4, name="d", scores=False, shared=0):
    """Rows whose passages say where they come from; the first `shared` rows have a positive in common."""
    def passages(kind, i, count):
        return tuple(Passage(f"{name}{kind}{i}.{j}", f"{name} {kind} {i} {j}") for j in range(count))

    return [RetrievalRow(f"{name}{i}", passages("p", i, positives) + (Passage("same", "same"),) * (i < shared),
                         passages("n", i, negatives), tuple(map(float, range(positives))) if scores else None,
                         tuple(10.0 + j for j in range(negatives)) if scores else None) for i in range(rows)]


def test_an_epoch_has_every_row_once_in_batches_of_one_data_set():
    datasets = [dataset(11), dataset(6, name="e")]
    config = RetrievalBatchConfig(batch_size=3, num_negatives=2, drop_last=False)
    epochs = [plan_epoch(datasets, config, epoch) for epoch in range(2)]
    for plan in epochs:
        seen = [(own, row) for own, rows in plan.batches for row in rows]
        assert sorted(seen) == [(0, i) for i in range(11)] + [(1, i) for i in range(6)] and plan.num_dropped == 0
    assert epochs[0].batches != epochs[1].batches and epochs[0] == plan_epoch(datasets, config, 0)
    own = [one for one, _ in epochs[0].batches]
    assert own not in (sorted(own), sorted(own, reverse=True))  # the sets take turns
    full = plan_epoch(datasets, RetrievalBatchConfig(batch_size=3), 0)
    assert full.num_dropped == 2 and {len(rows) for _, rows in full.batches} == {3}


def test_batches_hold_passages_of_their_rows_and_their_scores():
    data = dataset(8, scores=True)
    config = RetrievalBatchConfig(batch_size=4, num_negatives=3)
    drawn = list(itertools.islice(RetrievalBatches([data], config), 60))
    for batch in drawn:
        for place, index in enumerate(batch.rows):
            row, negatives = data[index], batch.negatives[place]
            assert batch.queries[place] == row.query and batch.positives[place] in row.positives
            assert set(negatives) <= set(row.negatives) and len(set(negatives)) == 3
            assert batch.positive_ids[place] == {one.id for one in row.positives}
            expected = [row.positives.index(batch.positives[place]), *(10 + row.negatives.index(n) for n in negatives)]
            np.testing.assert_array_equal(batch.scores[place], expected)
    chosen = {batch.positives[batch.rows.index(0)] for batch in drawn if 0 in batch.rows}
    assert chosen == set(data[0].positives)  # another one in other epochs


@pytest.mark.parametrize("unique", [False, True])
def test_a_resumed_iterator_goes_on_exactly(unique):
    datasets = [dataset(11, shared=5), dataset(7, name="e")]
    config = RetrievalBatchConfig(batch_size=3, num_negatives=2, unique_positives=unique, seed=3)
    whole = list(itertools.islice(RetrievalBatches(datasets, config), 20))
    for cut in (1, 5, 13):
        first = RetrievalBatches(datasets, config)
        list(itertools.islice(first, cut))
        second = RetrievalBatches(datasets, config)
        list(itertools.islice(second, 17))  # also backwards
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert list(itertools.islice(second, 20 - cut)) == whole[cut:]
    assert list(itertools.islice(RetrievalBatches(datasets, RetrievalBatchConfig(batch_size=3, num_negatives=2)), 20)
                ) != whole


def test_unique_positives_keep_common_ones_apart():
    data = dataset(12, shared=4)
    config = RetrievalBatchConfig(batch_size=4, drop_last=False, unique_positives=True)
    plan = plan_epoch([data], config, 0)
    for _, rows in plan.batches:
        ids = [{one.id for one in data[i].positives} for i in rows]
        assert len(set().union(*ids)) == sum(map(len, ids))
    assert sorted(i for _, rows in plan.batches for i in rows) == list(range(12)) and plan.num_moved > 0
    assert plan_epoch([dataset(12)], config, 0).num_moved == 0
    # All alike: one row a batch, and all but the first wait.
    alone = plan_epoch([dataset(4, shared=4)], config, 0)
    assert [len(rows) for _, rows in alone.batches] == [1] * 4 and alone.num_moved == 3


@pytest.mark.parametrize("datasets, config, error", [
    ([], {}, "there is no data set"),
    ([dataset(4)], {}, "no data set has 32 rows for a full batch (sizes: 4)"),
    ([dataset(40), dataset(4)], {}, "data set 1 with 4 rows gives no full batch of 32"),
    ([dataset(40, negatives=1)], {"num_negatives": 2}, "data set 0: 40 of 40 rows have fewer than num_negatives=2"),
    ([dataset(20) + dataset(20, scores=True)], {}, "data set 0: 20 of 40 rows have teacher scores"),
    ([dataset(40)], {"batch_size": 0}, "batch_size must be at least 1"),
])
def test_batches_that_cannot_be_are_refused(datasets, config, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        RetrievalBatches(datasets, RetrievalBatchConfig(**config))


def test_dropped_rows_are_told(caplog):
    RetrievalBatches([dataset(11)], RetrievalBatchConfig(batch_size=4))
    assert "leave out 3 of 11 rows (drop_last: True)" in caplog.text
