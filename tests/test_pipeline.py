"""The loader: exact resume, disjoint processes, weights as shares of tokens, epochs, evaluation by the byte."""

import json

import numpy as np
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.data.pipeline import PipelineConfig, eval_batches, make_pipeline
from jaxlm.data.sources import Document, SourceConfig, open_source
from jaxlm.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def write(folder, name, texts, **options):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_source(SourceConfig(path=str(path), **options))


@pytest.fixture
def sources(tmp_path):
    return [write(tmp_path, "short", [f"a{i} " + "x" * (i % 7) for i in range(90)], weight=1.0),
            write(tmp_path, "long", [f"b{i} " + "y" * (i * 17 % 211) for i in range(30)], weight=3.0)]


def take(pipeline, count):
    return [next(pipeline) for _ in range(count)]


def same(a, b):
    return all(np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("position", [0, 1, 5, 23])
def test_resume_is_bit_identical(sources, packing, position):
    config = PipelineConfig(batch_size=4, seq_len=48, packing=packing, num_bins=4 if packing == "first_fit" else None)
    whole = make_pipeline(sources, TOKENIZER, config, seed=3)
    take(whole, position)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 10)
    resumed = make_pipeline(sources, TOKENIZER, config, seed=3)
    resumed.set_state(state)
    assert same(take(resumed, 10), rest)
    assert {k: v for k, v in resumed.stats().items() if "epoch" in k} == \
        {k: v for k, v in whole.stats().items() if "epoch" in k}


def test_workers_resume_bit_identically(sources):
    config = PipelineConfig(batch_size=4, seq_len=48, workers=2)
    whole = make_pipeline(sources, TOKENIZER, config)
    take(whole, 3)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 4)
    whole.close()
    resumed = make_pipeline(sources, TOKENIZER, config)
    resumed.set_state(state)
    assert same(take(resumed, 4), rest)
    resumed.close()


def test_shapes_types_and_shares(sources):
    config = PipelineConfig(batch_size=4, seq_len=48)
    pipeline = make_pipeline(sources, TOKENIZER, config)
    batches = take(pipeline, 50)
    for batch in batches:
        assert isinstance(batch, LMBatch) and all(leaf.shape == (4, 48) for leaf in batch)
        assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    letter = {name: TOKENIZER.encode(name)[0] for name in "xy"}
    rows = np.concatenate([batch.tokens for batch in batches])
    share = np.mean((rows == letter["y"]).any(axis=1))
    assert abs(share - 0.75) < 0.01  # weight 3 of 4, though its documents are several times longer
    stats = pipeline.stats()
    assert stats["padding"] == 0 and 0 < stats["no_target"] < 0.2


def test_each_epoch_shows_each_document_once_in_another_order(tmp_path):
    texts = [f"{i:02d}" for i in range(20)]
    source = write(tmp_path, "numbers", texts)
    pipeline = make_pipeline([source], TOKENIZER, PipelineConfig(batch_size=1, seq_len=79), seed=1)
    seen = []  # a document is BOS, two bytes, EOS: 20 of them fill a row of 80
    for batch in take(pipeline, 3):
        ids = [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
        seen.append([TOKENIZER.decode(ids[i + 1 : i + 3]) for i in range(0, 80, 4)])
    assert all(sorted(epoch) == texts for epoch in seen)
    assert seen[0] != seen[1] != seen[2] != texts
    assert pipeline.stats()["epoch/numbers"] == 3.0


@pytest.mark.parametrize("shards", [0, 4])
def test_processes_load_disjoint_documents(tmp_path, shards):
    source = write(tmp_path, "numbers", [f"{i:02d}" for i in range(80)])
    config = PipelineConfig(batch_size=4, seq_len=79, shards=shards)
    parts = []
    for loader in range(2):
        batch = next(make_pipeline([source], TOKENIZER, config, loader=loader, loaders=2))
        ids = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
        parts.append([TOKENIZER.decode(row[i + 1 : i + 3]) for row in ids.tolist() for i in range(0, 80, 4)])
    assert len(parts[0]) == len(parts[1]) == 40 and not set(parts[0]) & set(parts[1])
    if shards:  # each shard holds a quarter of the epoch, so two of its rows repeat none of its documents
        assert len(set(parts[0])) == len(set(parts[1])) == 40


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_processes_continues_the_same_batches(sources, before, after):
    config = PipelineConfig(batch_size=8, seq_len=48, shards=4)

    def load(loaders, count, states=None):
        """Global batches of all processes together, and their joint state."""
        pipelines = [make_pipeline(sources, TOKENIZER, config, seed=3, loader=i, loaders=loaders)
                     for i in range(loaders)]
        for pipeline in pipelines if states else ():
            pipeline.set_state(states)
        batches = [[np.concatenate(leaf) for leaf in zip(*parts, strict=True)]
                   for parts in zip(*(take(pipeline, count) for pipeline in pipelines), strict=True)]
        merged = {}
        for pipeline in pipelines:
            state = json.loads(json.dumps(pipeline.get_state()))
            assert not merged.keys() & state.keys()
            merged |= state
        return batches, merged

    whole, _ = load(1, 9)
    first, states = load(before, 4)
    rest, _ = load(after, 5, states)
    assert same(first + rest, whole) and len(states) == 4


def test_seed_changes_the_order_and_only_the_seed(sources):
    config = PipelineConfig(batch_size=4, seq_len=48)
    a, b, c = (take(make_pipeline(sources, TOKENIZER, config, seed=seed), 3) for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_padding_is_reported(sources):
    pipeline = make_pipeline(sources, TOKENIZER, PipelineConfig(batch_size=4, seq_len=48, packing="first_fit"))
    batches = take(pipeline, 20)
    padding = np.mean([batch.segments == 0 for batch in batches])
    assert 0 < padding == pytest.approx(pipeline.stats()["padding"])


def test_errors(sources):
    with pytest.raises(ValueError, match=r"pipeline.batch_size 5 does not divide over pipeline.shards 2"):
        make_pipeline(sources, TOKENIZER, PipelineConfig(batch_size=5), loaders=2)
    with pytest.raises(ValueError, match=r"4 processes cannot share pipeline.shards 2; use a number .* divides 2"):
        make_pipeline(sources, TOKENIZER, PipelineConfig(shards=2), loaders=4)
    with pytest.raises(ValueError, match="no position for shard_1"):
        make_pipeline(sources, TOKENIZER, PipelineConfig(shards=2)).set_state({"shard_0": {}})
    with pytest.raises(ValueError, match="same name"):
        make_pipeline([sources[0], sources[0]], TOKENIZER, PipelineConfig())
    with pytest.raises(ValueError, match="must be positive"):
        PipelineConfig(seq_len=0)


def test_evaluation_counts_every_byte_once():
    texts = ["한국어 문장이다.", "x" * 200, "y", "The end.\n\n"]
    batches, num_bytes = eval_batches([Document(text, None, None) for text in texts], TOKENIZER,
                                      batch_size=3, seq_len=32)
    expected = sorted(i for text in texts for i in [*TOKENIZER.encode(text), TOKENIZER.eos_id])
    counted = sorted(int(t) for b in batches for t in b.targets[b.loss_mask > 0])
    assert counted == expected
    assert num_bytes == sum(len(text.encode()) + 1 for text in texts) == len(expected)  # a byte a token, and EOS
    assert all(leaf.shape == (3, 32) for batch in batches for leaf in batch)


def test_evaluation_needs_a_document():
    with pytest.raises(ValueError, match="no document"):
        eval_batches([], TOKENIZER, batch_size=1, seq_len=8)
