"""Sources that are used up: by epochs, by tokens, over shards, workers and resumes."""

import itertools
import json
import logging
from dataclasses import replace

import grain
import numpy as np
import pytest

from jaxlm.data.mixture import FiniteMixture
from jaxlm.data.pipeline import EndOfData, PipelineConfig, make_pipeline
from jaxlm.data.sources import open_source, parse_source
from jaxlm.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def source(name, texts, **options):
    opened = open_source(texts)
    opened.name, opened.config = name, replace(opened.config, path=name, **options)
    return opened


def two(epochs=1.5, cap=480):
    return [source("a", [f"a{i:02d} " + "x" * (i % 7) for i in range(90)], epochs=epochs),
            source("b", [f"b{i:02d} " + "y" * (i * 17 % 211) for i in range(30)], cap=cap, weight=3.0)]


def rest(pipeline):
    """All batches that are left."""
    found = []
    with pytest.raises(EndOfData):
        while True:
            found.append(next(pipeline))
    return found


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def test_an_ended_stream_leaves_its_share_to_the_others():
    """Shares 3:1:2 by stride scheduling; when c ends after 2 rows, a and b go on 3 to 1; the last one ends alone."""
    streams = [grain.MapDataset.source([{"x": name}] * count).to_iter_dataset()
               for name, count in (("a", 9), ("b", 4), ("c", 2))]
    rows = list(FiniteMixture(streams, [3.0, 1.0, 2.0]))
    assert "".join(row["x"] for row in rows) == "acaabcaaabaaabb"
    assert [row["ended"].tolist() for row in rows][-1] == [True, False, True]
    # As often as grain's own, up to a row, while all are there.
    plain = grain.IterDataset.mix([grain.MapDataset.source([i]).repeat().to_iter_dataset() for i in range(3)],
                                  weights=[3.0, 1.0, 2.0])
    assert np.bincount(list(itertools.islice(plain, 6))).tolist() == [3, 1, 2] == [
        sum(row["x"] == name for row in rows[:6]) for name in "abc"]


@pytest.mark.parametrize(("packing", "shards"), [("concat", 1), ("concat", 4), ("first_fit", 2)])
def test_limits_hold_and_resume_is_bit_identical(packing, shards, caplog):
    config = PipelineConfig(batch_size=4, seq_len=48, packing=packing, shards=shards)
    pipeline, states, batches = make_pipeline(two(), TOKENIZER, config, seed=3), [], []
    with caplog.at_level(logging.WARNING, "jaxlm.data.pipeline"), pytest.raises(EndOfData):
        while True:
            states.append(json.loads(json.dumps(pipeline.get_state())))
            batches.append(next(pipeline))
    stats = pipeline.stats()
    assert stats["tokens/b"] == 48 * (10 // shards * shards) and stats["used_up/b"] == 1
    assert 1.2 < stats["epoch/a"] <= 1.5
    assert stats["tokens/a"] + stats["tokens/b"] == 4 * 48 * len(batches)
    assert ["source b is used up" in record.message for record in caplog.records] == [True]  # once
    for cut in (1, len(batches) - 1, len(batches)):
        resumed = make_pipeline(two(), TOKENIZER, config, seed=3)
        resumed.set_state(states[cut])
        assert same(rest(resumed), batches[cut:])
        assert resumed.stats()["tokens/a"] == stats["tokens/a"]


def test_processes_share_the_limits_and_end_where_one_would():
    config = PipelineConfig(batch_size=4, seq_len=48, shards=2)
    whole = rest(make_pipeline(two(), TOKENIZER, config))
    parts = [rest(make_pipeline(two(), TOKENIZER, config, loader=i, loaders=2)) for i in range(2)]
    assert len(whole) == min(map(len, parts))
    joined = [[np.concatenate(leaves) for leaves in zip(*both, strict=True)] for both in zip(*parts, strict=False)]
    assert same(joined, whole)


def test_workers_share_the_limits_and_resume():
    config = PipelineConfig(batch_size=4, seq_len=48, workers=2)
    pipeline = make_pipeline(two(), TOKENIZER, config)
    first, state = [next(pipeline) for _ in range(6)], json.loads(json.dumps(pipeline.get_state()))
    batches = first + rest(pipeline)
    stats = pipeline.stats()
    pipeline.close()
    assert stats["tokens/b"] == 480 and stats["epoch/a"] <= 1.5
    resumed = make_pipeline(two(), TOKENIZER, config)
    resumed.set_state(state)
    assert same(rest(resumed), batches[6:])
    resumed.close()


def test_each_document_is_drawn_as_often_as_epochs_says():
    """Documents of 4 tokens fill rows of 80 exactly: 2.5 epochs of 40 are 100 documents, 20 of them three times."""
    texts = [f"{i:02d}" for i in range(40)]
    for shards in (1, 5):
        pipeline = make_pipeline([source("n", texts, epochs=2.5)], TOKENIZER,
                                 PipelineConfig(batch_size=5, seq_len=79, shards=shards), seed=1)
        rows = np.concatenate([np.append(batch.tokens, batch.targets[:, -1:], axis=1) for batch in rest(pipeline)])
        seen = [TOKENIZER.decode(row[i + 1 : i + 3].tolist()) for row in rows for i in range(0, 80, 4)]
        counts = np.array([seen.count(text) for text in texts])
        assert len(seen) == 100 and counts.min() == 2 and (counts == 3).sum() == 20
        assert pipeline.stats()["epoch/n"] == 2.5


def test_what_is_known_before(caplog):
    config = PipelineConfig(batch_size=4, seq_len=48)
    with pytest.raises(ValueError, match="end after 5 steps at most, since every source has a cap"):
        make_pipeline([source("a", ["x" * 50] * 9, cap=1000)], TOKENIZER, config, steps=6)
    make_pipeline([source("a", ["x" * 50] * 9, cap=1000)], TOKENIZER, config, steps=5)
    make_pipeline([*two(), source("c", ["z"])], TOKENIZER, config, steps=10**9)  # one without end is enough
    assert not caplog.records
    make_pipeline(two(), TOKENIZER, config, steps=100)
    assert "the data will end after about 8 of 100 steps" in caplog.text
    with pytest.raises(ValueError, match=r"cap 95 is less than a row of 48 tokens in each of 2 parts .* at least 96"):
        make_pipeline(two(cap=95), TOKENIZER, replace(config, shards=2))


def test_options_of_a_source():
    found = parse_source("x.jsonl?epochs=0.5&cap=1e9&weight=2")
    assert (found.epochs, found.cap, found.weight) == (0.5, 1e9, 2.0)
    for spec in ("epochs=0", "cap=-1", "epochs=nan", "cap=inf"):
        with pytest.raises(ValueError, match="must be a positive number"):
            parse_source(f"x.jsonl?{spec}")
