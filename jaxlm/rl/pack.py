"""Attempts of any length to rows of fixed length, and values of attempts to values of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.rl.episode import Episode


class Rows(NamedTuple):
    """Packed attempts, [R, T] each. Two attempts of 4 and 3 ids (s: sampled) in a row of T=6:

        ids        a b s s | a s s
        tokens     a b s   a s   0      inputs
        targets    b s s   s s   0      the next id of the attempt
        mask       0 1 1   1 1   0      the policy sampled the target
        segments   1 1 1   2 2   0
        positions  0 1 2   0 1   0
        episode    0 0 0   1 1  -1
    """

    tokens: np.ndarray        # int32
    targets: np.ndarray       # int32
    mask: np.ndarray          # float32
    segments: np.ndarray      # int32
    positions: np.ndarray     # int32
    sampler_logp: np.ndarray  # float32, of the target; 0 where it was not sampled
    kept: np.ndarray          # float32
    episode: np.ndarray       # int32, number among those that were packed; -1 is padding


def pack_rows(episodes: Sequence[Episode], seq_len: int, multiple: int = 1, first: int = 0) -> Rows:
    """First-fit in the given order; the number of rows is the next in 1, 2, 3, 4, 6, 8, 12, ... times `multiple`.

    Few numbers of rows are few programs. `first`: the number of the first of these attempts. ValueError for an attempt
    of more than T + 1 ids.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for number, episode in enumerate(episodes):
        need = len(episode.ids) - 1
        if need > seq_len:
            raise ValueError(f"an attempt at task {episode.task} has {len(episode.ids)} tokens, which a row of "
                             f"{seq_len} cannot hold")
        at = next((i for i, free in enumerate(room) if free >= need), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room.append(seq_len)
        bins[at].append(number)
        room[at] -= need
    count = _size(-(-max(len(bins), 1) // multiple)) * multiple
    rows = Rows(*(np.zeros((count, seq_len), dtype) for dtype in (
        np.int32, np.int32, np.float32, np.int32, np.int32, np.float32, np.float32, np.int32)))
    rows.kept[:], rows.episode[:] = 1, -1
    for row, members in enumerate(bins):
        start = 0
        for segment, number in enumerate(members, 1):
            one = episodes[number]
            stop = start + len(one.ids) - 1
            for array, values in zip(rows, (
                    one.ids[:-1], one.ids[1:], one.sampled[1:], segment, np.arange(stop - start), one.logprobs[1:],
                    one.kept[1:], first + number), strict=True):
                array[row, start:stop] = values
            start = stop
    return rows


def pad_rows(rows: Rows, count: int) -> Rows:
    """The rows with padding below, up to `count`."""
    missing = count - len(rows.tokens)
    padded = Rows(*(np.pad(array, ((0, missing), (0, 0))) for array in rows))
    padded.kept[count - missing:], padded.episode[count - missing:] = 1, -1
    return padded


def spread(values: jax.Array, episode: jax.Array) -> jax.Array:
    """Values of attempts [E, ...] at each of their tokens [R, T, ...], 0 on padding."""
    found = values[jnp.maximum(episode, 0)]
    return jnp.where((episode >= 0).reshape(episode.shape + (1,) * (found.ndim - 2)), found, 0)


def _size(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half of the rows are padding, mostly much less."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power >= 4 else power
