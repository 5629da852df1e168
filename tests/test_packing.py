"""Packing: every token kept, inputs and targets as in the worked examples, nothing predicted across documents."""

import grain
import numpy as np
import pytest

from jaxlm.data.examples import ToExample, excluded_ids, windows
from jaxlm.data.packing import PACKINGS, Packing, pack, to_inputs
from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def examples(texts, excluded=()):
    to_example = ToExample(TOKENIZER, excluded)
    return [to_example(i, Document(text, None, None)) for i, text in enumerate(texts)]


def packed(items, packing, seq_len, num_bins=4):
    stream = grain.MapDataset.source(items).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return list(pack(stream, packing=packing, seq_len=seq_len, num_bins=num_bins))


def row(tokens, segments, loss=None):
    tokens = np.array(tokens, np.int32)
    loss = np.ones_like(tokens) if loss is None else np.array(loss)
    return {"tokens": tokens, "segments": np.array(segments, np.int32), "loss": loss}


def test_choices_are_the_table():
    assert set(PACKINGS) == set(Packing.__args__)


def test_worked_example():
    """The one in `jaxlm.core.batch.LMBatch`."""
    batch = to_inputs(row([1, 7, 2, 1, 8, 2, 0], [1, 1, 1, 2, 2, 2, 0]))
    assert batch.tokens.tolist() == [1, 7, 2, 1, 8, 2]
    assert batch.targets.tolist() == [7, 2, 1, 8, 2, 0]
    assert batch.loss_mask.tolist() == [1, 1, 0, 1, 1, 0]
    assert batch.segments.tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]


def test_kormo_rules():
    """Section 3 of the specification: boundary targets count, positions run on, padding never counts."""
    batch = to_inputs(row([1, 7, 2, 1, 8, 2, 0], [1, 1, 1, 2, 2, 2, 0]), boundary_targets=True, reset_positions=False)
    assert batch.loss_mask.tolist() == [1, 1, 1, 1, 1, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]


def test_positions_of_many_rows_at_once():
    rng = np.random.default_rng(0)
    segments = np.cumsum(rng.random((5, 41)) < 0.2, axis=1).astype(np.int32) + 1
    batch = to_inputs(row(np.zeros((5, 41)), segments))
    for r in range(5):
        count, expected = 0, []
        for t in range(40):
            count = count + 1 if t and segments[r, t] == segments[r, t - 1] else 0
            expected.append(count)
        assert batch.positions[r].tolist() == expected


def test_excluded_symbols_are_read_but_not_predicted():
    items = examples(["abba"], excluded=(TOKENIZER.encode("b")[0],))
    batch = to_inputs({**items[0], "segments": np.ones(6, np.int32)})
    assert batch.tokens.tolist() == [TOKENIZER.bos_id, *TOKENIZER.encode("abba")]
    assert batch.loss_mask.tolist() == [1, 0, 0, 1, 1]


def test_unknown_excluded_symbol():
    with pytest.raises(ValueError, match="<think>"):
        excluded_ids(TOKENIZER, ["<think>"])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 10, 33])
def test_windows_predict_each_token_once(length):
    item = {"tokens": np.arange(length)}
    cut = windows(item, 4)
    assert all(len(piece["tokens"]) <= 5 for piece in cut)
    targets = [token for piece in cut for token in piece["tokens"][1:].tolist()]
    assert targets == list(range(1, length))


def test_concat_loses_nothing_and_pads_nothing():
    items = examples([f"document number {i} " + "x" * (i * 7 % 23) for i in range(40)])
    rows = packed(items, "concat", 32)
    stream = np.concatenate([item["tokens"] for item in items])
    joined = np.concatenate([row["tokens"] for row in rows])
    full = len(stream) // 33 * 33
    np.testing.assert_array_equal(joined[:full], stream[:full])
    assert all((row["segments"] > 0).all() for row in rows[: full // 33])


def test_first_fit_keeps_documents_whole():
    items = examples(["y" * (5 + i * 11 % 27) for i in range(40)])
    rows = packed(items, "first_fit", 32)
    found = [tuple(row["tokens"][row["segments"] == s].tolist())
             for row in rows for s in range(1, row["segments"].max() + 1)]
    assert sorted(found) == sorted(tuple(item["tokens"].tolist()) for item in items)


def test_first_fit_predicts_each_token_of_long_documents_once():
    items = examples(["long " * 50, "short", "x" * 31, "y" * 32])
    rows = packed(items, "first_fit", 32)
    batches = [to_inputs(row) for row in rows]
    targets = sorted(int(t) for b in batches for t, m in zip(b.targets, b.loss_mask, strict=True) if m)
    assert targets == sorted(int(t) for item in items for t in item["tokens"][1:])


@pytest.mark.parametrize("packing", PACKINGS)
def test_attention_and_loss_stay_within_a_document(packing):
    """Segments separate exactly what BOS separates, and no counted target is a BOS."""
    rows = packed(examples([chr(97 + i % 26) * (3 + i * 5 % 17) for i in range(60)]), packing, 24)
    for one in rows:
        batch = to_inputs(one)
        bos = np.cumsum(one["tokens"] == TOKENIZER.bos_id)
        real = one["segments"] > 0
        np.testing.assert_array_equal(np.diff(bos)[real[1:]] > 0, np.diff(one["segments"])[real[1:]] > 0)
        assert not (batch.loss_mask[batch.targets == TOKENIZER.bos_id]).any()
