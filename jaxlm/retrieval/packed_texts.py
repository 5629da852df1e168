"""Texts of all lengths in rows that several of them share, so that a training step computes little padding.

Padded to the longest, half of a batch of Wikipedia paragraphs is padding; packed, about a fifth.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import power_of_two
from jaxlm.retrieval.embed import TextEncoder

LEAST = 8  # tokens of a row
PARTS = 4  # of a power of two, for numbers of rows


class Texts(NamedTuple):
    """Texts as an encoder takes them: one a row, or packed.

    Packed, the texts are in groups of equally many, in their order, and a text lies within the rows of its group:
    groups are what goes to other devices, or to other parts of GradCache. Worked example, one group of `a b c`, `d`,
    `e f` in rows of 4:

        tokens    a b c d    segments  1 1 1 2    places  0 1 2 .
                  e f 0 0              1 1 0 0            3 . . .
                                                          4 5 . .    (. is -1)
    """

    tokens: Any          # int32 [n, T], packed [G, R, W]
    segments: Any        # int32, as tokens: the number of the text within the row from 1, 0 is padding
    places: Any = None   # int32 [G, n / G, W], packed only: where a text's tokens lie among those of its group


def pack(ids: Sequence[Sequence[int]], max_length: int, groups: int = 1) -> Texts:
    """Texts of at most `max_length` tokens in rows; all groups have as many as the fullest one needs, or a few more.

    Rows are as wide as a power of two that holds the longest text, or `max_length`, and their numbers are rounded: few
    shapes are few compiled programs. Raises ValueError for texts that do not divide among the groups.
    """
    if len(ids) % groups:
        raise ValueError(f"{len(ids)} texts do not divide into {groups} groups")
    each, width = len(ids) // groups, min(power_of_two(max(map(len, ids)), LEAST), max_length)
    shared = [share_rows([len(one) for one in ids[start:start + each]], width) for start in range(0, len(ids), each)]
    most = max(map(len, shared))
    step = max(1, power_of_two(most) // PARTS)
    num_rows = min(-(-most // step) * step, each)
    tokens, segments = np.zeros((2, groups, num_rows, width), np.int32)
    places = np.full((groups, each, width), -1, np.int32)
    for group, rows in enumerate(shared):
        for row, texts in enumerate(rows):
            start = 0
            for number, text in enumerate(texts, 1):
                own = ids[group * each + text]
                stop = start + len(own)
                tokens[group, row, start:stop], segments[group, row, start:stop] = own, number
                places[group, text, :len(own)] = row * width + np.arange(start, stop)
                start = stop
    return Texts(tokens, segments, places)


def share_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The texts of each row: the longest first, each where it leaves the least room ("best fit decreasing").

    Lengths 3, 1, 2, 4 in rows of 5: [[3, 1], [0, 2]].
    """
    assert max(lengths, default=0) <= width
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row, least first
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[text], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(text)
        insort(room, (left - lengths[text], row))
    return rows


def hidden_states(encoder: TextEncoder, params: Any, texts: Texts, dropout_key: jax.Array | None
                  ) -> tuple[jax.Array, jax.Array]:
    """The hidden states of texts, one a row again, [n, T, D] in the compute dtype, and their mask [n, T] int32.

    What stands in the padding has no meaning. ValueError: see `TextEncoder.hidden`.
    """
    if texts.places is None:
        return encoder.hidden(params, texts.tokens, texts.segments, dropout_key), texts.segments
    num_groups, num_rows, width = texts.tokens.shape
    whole = lambda x: x.reshape(num_groups * num_rows, width)
    packed = encoder.hidden(params, whole(texts.tokens), whole(texts.segments), dropout_key)
    # Within groups, so that no device asks another one for its texts.
    pick = jax.vmap(lambda states, places: states[jnp.maximum(places, 0)])
    hidden = pick(packed.reshape(num_groups, num_rows * width, -1), texts.places.reshape(num_groups, -1))
    return hidden.reshape(-1, width, packed.shape[-1]), (texts.places >= 0).astype(jnp.int32).reshape(-1, width)
