"""What a tokenizer costs each language: lengths, cut characters, digits, vocabulary in use, the premium."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.parallel_text import Pair
from jaxlm.data.tokenizer import Tokenizer


class Coverage(NamedTuple):
    """Counts of some texts; `rates` makes the figures of a report of them."""

    texts: int
    bytes: int
    characters: int
    words: int            # between white space
    tokens: int
    digits: int           # characters of a decimal system
    single_digits: int    # those that are a token of their own, and one token
    cut: int              # tokens that stand for a part of a character
    used: frozenset[int]  # the ids that occur


class Overlap(NamedTuple):
    """The vocabulary that two languages use in common."""

    shared: int    # ids that both use
    either: int    # ids that at least one uses
    jaccard: float  # shared / either


class Premium(NamedTuple):
    """Tokens of the Korean side over those of the English side of the same content."""

    ratio: float
    low: float
    high: float
    segments: int
    korean_tokens: int
    english_tokens: int
    bytes_ratio: float  # the same for bytes instead of tokens


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Coverage:
    """Counts over texts, each encoded by itself.

    "2024 한" in UTF-8 bytes, one token each: 8 tokens for 6 characters and 2 words, 4 of 4 digits single, 3 tokens cut.
    ValueError if no text yields a token.
    """
    total, used = np.zeros(8, np.int64), set()
    for text in texts:
        ids, spans = tokenizer.encode_spans(text)
        cut = _cut(spans)
        single = sum(end - start == 1 and text[start].isdecimal() and not part
                     for (start, end), part in zip(spans, cut, strict=True))
        used.update(ids)
        total += (1, len(text.encode("utf-8")), len(text), len(text.split()), len(ids),
                  sum(character.isdecimal() for character in text), single, sum(cut))
    if not used:
        raise ValueError("no text to measure a tokenizer on")
    return Coverage(*total.tolist(), frozenset(used))


def rates(coverage: Coverage, vocab_size: int) -> dict[str, float | int | None]:
    """The figures of a report, by name; None where there is nothing to divide by.

    `cut_rate` is the byte-fallback rate of sentencepiece for characters of several bytes, and the rate of incomplete
    UTF-8 of byte-level BPE: a token that is a part of a character, alone or beside whole ones.
    """
    c = coverage
    over = lambda part, whole: part / whole if whole else None
    return {
        "texts": c.texts, "bytes": c.bytes, "tokens": c.tokens,
        "bytes_per_token": over(c.bytes, c.tokens),
        "characters_per_token": over(c.characters, c.tokens),
        "fertility": over(c.tokens, c.words),
        "single_digit_rate": over(c.single_digits, c.digits),
        "cut_rate": over(c.cut, c.tokens),
        "unused_share": 1 - len(c.used) / vocab_size,
    }


def overlap(first: Coverage, second: Coverage) -> Overlap:
    """Ids {1, 2, 3} and {3, 4}: 1 shared of 4, Jaccard 0.25."""
    shared, either = len(first.used & second.used), len(first.used | second.used)
    return Overlap(shared, either, shared / either)


def premium(tokenizer: Tokenizer, pairs: Sequence[Pair], *, level: float = 0.95, resamples: int = 2000,
            seed: int = 0) -> Premium:
    """The cost of Korean beside English for the same content (the premium of Petrov et al., arXiv:2305.15425),

        sum_i tokens(ko_i) / sum_i tokens(en_i)

    with its percentile bootstrap interval over the segments i (Efron 1979).

    ValueError for no pairs, or a side without a token.
    """
    if not pairs:
        raise ValueError("no parallel text to measure the premium on")
    lengths = np.array([[len(ids) for ids in tokenizer.encode_batch([pair[side] for pair in pairs])]
                        for side in (0, 1)])
    if not lengths.all():
        raise ValueError("a side of the parallel text has no token")
    rng = np.random.default_rng(seed)
    drawn = np.array([lengths[:, rng.integers(len(pairs), size=len(pairs))].sum(axis=1) for _ in range(resamples)])
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - level) / 2, (1 + level) / 2])
    korean, english = lengths.sum(axis=1).tolist()
    sizes = [sum(len(pair[side].encode("utf-8")) for pair in pairs) for side in (0, 1)]
    return Premium(korean / english, float(low), float(high), len(pairs), korean, english, sizes[0] / sizes[1])


def _cut(spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token shares a character with a neighbour: [(0, 1), (1, 2), (1, 2)] gives False, True, True."""
    starts = [start for start, _ in spans] + [spans[-1][1] if spans else 0]
    ends = [0] + [end for _, end in spans]
    return [start < before or end > after
            for (start, end), before, after in zip(spans, ends[:-1], starts[1:], strict=True)]
