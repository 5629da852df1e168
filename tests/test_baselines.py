"""The byte trigram is a probability distribution, and both baselines order texts as they should."""

import math
import random

from tools.baselines import trigram_bits, trigram_counts, xz_bits


def test_trigram_sums_to_one():
    counts = trigram_counts(b"the cat sat on the mat. the dog sat.")
    for history in (b"th", b"zz", b"at"):
        total = sum(2 ** -(trigram_bits(counts, history + bytes([c])) - trigram_bits(counts, history))
                    for c in range(256))
        assert math.isclose(total, 1, rel_tol=1e-9)


def test_trigram_by_hand():
    """`aaaa`: one kind after each history, so p(a | aa) = (2 + p2) / 3, p2 = (3 + p1) / 4, p1 = (4 + 1/256) / 5."""
    counts = trigram_counts(b"aaaa")
    p1 = (4 + 1 / 256) / 5
    p2 = (3 + p1) / 4
    p3 = (2 + p2) / 3
    got = trigram_bits(counts, b"aaa") - trigram_bits(counts, b"aa")
    assert math.isclose(got, -math.log2(p3), rel_tol=1e-12)


def test_counts_do_not_depend_on_blocks(monkeypatch):
    text = bytes(random.Random(0).choices(b"abc", k=1000))
    (a, b, c) = trigram_counts(text)
    assert (a.sum(), b.sum(), c.sum()) == (1000, 999, 998)


def test_xz_of_a_known_text_is_nearly_free():
    text = bytes(random.Random(0).randbytes(5000))
    assert xz_bits(text) > 8 * 5000
    assert xz_bits(text, before=text) < 1000
