"""Batch structures and sizes, and the axis letters of the whole project.

Axis legend: `B` batch, `T` time, `V` vocabulary, `D` model, `N` query heads, `K` key-value heads, `H` head
dim, `F` feed-forward, `G` samples per prompt, `P` passages, `L` layers, `S` key positions (cache length).

This module must not import jax: data workers use it.
"""

from typing import NamedTuple

import numpy as np


class LMBatch(NamedTuple):
    """One batch for next-token training; a NamedTuple, hence a pytree without importing jax.

    Worked example, one row of T=6 made of two documents and one pad (`b`=BOS, `e`=EOS):

        row of T+1     b  x  e  b  y  e  0
        tokens         b  x  e  b  y  e
        targets        x  e  b  y  e  0
        loss_mask      1  1  0  1  1  0      no loss across documents or on padding
        segments       1  1  1  2  2  2      0 would be padding
        positions      0  1  2  0  1  2
    """

    tokens: np.ndarray      # [B, T] int32, input ids
    targets: np.ndarray     # [B, T] int32, the next id of each input
    loss_mask: np.ndarray   # [B, T] float32, weight of each target; 0 where it does not count
    segments: np.ndarray    # [B, T] int32, document number within the row from 1; 0 is padding
    positions: np.ndarray   # [B, T] int32, position for the rotary embedding


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both: few sizes are few compiled programs. 0 gives 1, 5 gives 8."""
    return 1 << (max(count, least, 1) - 1).bit_length()
