"""The byte trigram is a probability distribution, and both baselines order texts as they should."""

import math
import random

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tools import baselines
from tools.baselines import trigram_bits, trigram_counts, xz_bits


def test_trigram_sums_to_one():
    counts = trigram_counts(b"the cat sat on the mat. the dog sat.")
    for history in (b"th", b"zz", b"at"):
        before = trigram_bits(counts, history)
        total = sum(2 ** (before - trigram_bits(counts, history + bytes([c]))) for c in range(256))
        assert math.isclose(total, 1, rel_tol=1e-9)


def test_trigram_by_hand():
    """`aaaa`: one kind after each history, so p(a | aa) = (2 + p2) / 3, p2 = (3 + p1) / 4, p1 = (4 + 1/256) / 5."""
    counts = trigram_counts(b"aaaa")
    p1 = (4 + 1 / 256) / 5
    p2 = (3 + p1) / 4
    p3 = (2 + p2) / 3
    got = trigram_bits(counts, b"aaa") - trigram_bits(counts, b"aa")
    assert math.isclose(got, -math.log2(p3), rel_tol=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 30])
def test_counts_do_not_depend_on_blocks(monkeypatch, length):
    text = bytes(random.Random(0).choices(b"abc", k=length))
    whole = trigram_counts(text)
    assert [counts.sum() for counts in whole] == [max(0, length - n) for n in range(3)]
    monkeypatch.setattr(baselines, "BLOCK", 7)
    for counts, expected in zip(trigram_counts(text), whole, strict=True):
        np.testing.assert_array_equal(counts, expected)


def test_dropped_records_are_left_out(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b'{"text": "one"}', b'{"text": " "}', b'{"text": "two"}'):
        writer.write(record)
    writer.close()
    assert baselines.read((f"{tmp_path}/a.array_record",)) == {"all": b"one\ntwo\n"}


def test_xz_of_a_known_text_is_nearly_free():
    text = bytes(random.Random(0).randbytes(5000))
    assert xz_bits(text) > 8 * 5000
    assert xz_bits(text, before=text) < 1000
