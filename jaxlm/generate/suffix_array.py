"""Suffix arrays of token sequences in numpy, exact for the first tokens of a suffix, which is all a look-up reads."""

import numpy as np


def suffix_array(tokens: np.ndarray, depth: int = 32) -> np.ndarray:
    """Positions [T] int32 of `tokens` [T], sorted by the tokens that stand there; equal ones by position.

    Suffixes are compared by their first `depth` tokens (rounded up to a power of two); the end of the array is below
    every token. Prefix doubling (Manber and Myers 1993): ranks by h tokens, at i and at i + h, give ranks by 2h; only
    groups that are still tied are sorted again. About 30 bytes a token.

        tokens 2 1 2 1:    3 1 2 0, for (1), (1 2 1), (2 1), (2 1 2 1)
    """
    size = len(tokens)
    if size >= 2**31 - 1:
        raise ValueError(f"{size} tokens are more than 32-bit positions can count")
    order = np.argsort(tokens, kind="stable").astype(np.int32)
    rank = np.zeros(size + 1, np.int32)  # place of the group's first suffix, from 1; 0 is the end of the array
    rank[order] = _group_starts(tokens[order], np.arange(1, size + 1, dtype=np.int32))
    tied, known = np.arange(size, dtype=np.int32), 1
    while known < depth:
        tied = tied[_has_equal_neighbour(rank[order[tied]])]
        if not len(tied):
            break
        suffix = order[tied]
        key = rank[suffix].astype(np.int64) * (size + 1) + rank[np.minimum(suffix.astype(np.int64) + known, size)]
        by_key = np.argsort(key, kind="stable")
        order[tied] = suffix = suffix[by_key]
        rank[suffix] = _group_starts(key[by_key], tied + 1)
        known *= 2
    return order


def _group_starts(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For sorted `keys` at ascending `places`: the place of the first equal one."""
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    return places[np.flatnonzero(new)][np.cumsum(new) - 1]


def _has_equal_neighbour(keys: np.ndarray) -> np.ndarray:
    equal = keys[1:] == keys[:-1]
    tied = np.zeros(len(keys), bool)
    tied[1:] |= equal
    tied[:-1] |= equal
    return tied
