"""Packing: examples of any length to rows of T+1 tokens, and those rows to inputs and targets.

`concat` joins the examples of a source and cuts every T+1 tokens: no padding, a document may straddle rows.
`first_fit` puts whole examples where there is room: documents stay together up to T+1 tokens, the rest is padding.
Either way a document number travels with each token, and attention never crosses it (unless `mask_documents` is off).
"""

from typing import Literal

import grain
import numpy as np

from jaxlm.core.batch import LMBatch
from jaxlm.data.examples import Example, windows

Packing = Literal["concat", "first_fit"]


def concat(examples: grain.IterDataset, width: int, num_bins: int, seed: int) -> grain.IterDataset:
    """Concatenates and splits; `num_bins` and `seed` have no effect."""
    return grain.experimental.ConcatThenSplitIterDataset(examples, length_struct=_lengths(width))


def first_fit(examples: grain.IterDataset, width: int, num_bins: int, seed: int) -> grain.IterDataset:
    """First-fit into `num_bins` open rows, emitted in random order when an example fits into none of them."""
    cut = _Windows(width - 1)
    return grain.experimental.FirstFitPackIterDataset(
        grain.experimental.FlatMapIterDataset(examples, cut),
        length_struct=_lengths(width), num_packing_bins=num_bins, seed=seed)


def pack(
    examples: grain.IterDataset, *, packing: Packing, seq_len: int, num_bins: int = 64, seed: int = 0
) -> grain.IterDataset:
    """Rows of T+1: the fields of an example and `segments`, 0 where padded."""
    rows = PACKINGS[packing](examples, seq_len + 1, num_bins, seed)
    return rows.map(_keep)


def to_inputs(
    row: dict[str, np.ndarray], *, boundary_targets: bool = False, reset_positions: bool = True,
    mask_documents: bool = True,
) -> LMBatch:
    """Shifts rows [..., T+1] to an `LMBatch` of [..., T]; see there for a worked example.

    Args:
      boundary_targets: also predict the first token of a document from the last one of the document before it,
        which the attention cannot see: KORMo's rule. Without `mask_documents` it sees that document, and all before.
      reset_positions: count positions from the start of each document, not of the row (KORMo does not reset).
      mask_documents: attention stays within a document; else a token sees all before it in its row, whose segments
        are then 1, and 0 still where padded. What is a target does not depend on it.
    """
    assert mask_documents or not reset_positions, "two documents that see each other need positions of their own"
    tokens, segments = row["tokens"], row["segments"]
    same = segments[..., 1:] == segments[..., :-1]
    counted = (segments[..., 1:] > 0) & (same | boundary_targets)
    positions = np.broadcast_to(np.arange(tokens.shape[-1] - 1, dtype=np.int32), tokens[..., :-1].shape)
    if reset_positions:
        starts = np.concatenate((np.ones_like(same[..., :1]), ~same[..., :-1]), axis=-1)
        positions = positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=-1)
    return LMBatch(
        tokens=tokens[..., :-1],
        targets=tokens[..., 1:],
        loss_mask=(counted & (row["loss"][..., 1:] > 0)).astype(np.float32),
        segments=segments[..., :-1] if mask_documents else (segments[..., :-1] > 0).astype(np.int32),
        positions=np.ascontiguousarray(positions),
    )


class _Windows(grain.experimental.FlatMapTransform):
    """`windows` as grain wants it."""

    max_fan_out = 1 << 20

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def flat_map(self, example: Example) -> list[Example]:
        return windows(example, self._seq_len)


def _lengths(width: int) -> dict[str, int]:
    return dict.fromkeys(("tokens", "loss", "draw"), width)


def _keep(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {name: row[name] for name in ("tokens", "loss", "draw")}
    return kept | {"segments": row["tokens_segment_ids"].astype(np.int32)}


PACKINGS = {"concat": concat, "first_fit": first_fit}
