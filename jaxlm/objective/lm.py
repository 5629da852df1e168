"""Next-token cross-entropy: arrays in, per-token losses out. Reduction is `core.masked.aggregate`.

And what multi-token prediction predicts: batches in, the tokens further ahead out.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.batch import LMBatch
from jaxlm.core.matmul import matmul
from jaxlm.objective.chunks import map_chunks


class TokenLoss(NamedTuple):
    """Per-token results, each [..., T] float32 with the leading shape of the targets."""

    nll: jax.Array       # -log p(target), nats
    log_z: jax.Array     # log of the partition function, for the z-loss
    correct: jax.Array   # 1 where the target has the largest logit


def cross_entropy(logits: jax.Array, targets: jax.Array) -> TokenLoss:
    """nll_t = logsumexp(logits_t) - logits_t[target_t], in float32.

    Args:
      logits: [..., V], any float type.
      targets: [...] int32 in [0, V).
    """
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Ties count as correct; an argmax would cost a second pass over V.
    correct = (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return TokenLoss(log_z - picked, log_z, correct)


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, num_chunks: int = 1
) -> TokenLoss:
    """`cross_entropy(hidden @ head, targets)` with at most 1/num_chunks of the logits in memory (`map_chunks`).

    Each chunk's logits are computed again in the backward pass, which costs one more vocabulary product.

    Args:
      hidden: [B, T, D] in the compute type.
      head: [D, V], cast to the type of `hidden`; the product accumulates in float32.
      targets: [B, T] int32.
      num_chunks: must divide T.
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])

    def one(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> TokenLoss:
        return cross_entropy(matmul(hidden, head, jnp.float32), targets)

    return map_chunks(one, (hidden, targets), (head,), num_chunks)


class Ahead(NamedTuple):
    """What multi-token prediction reads and predicts, each [K, B, T]; depth k is entry k-1."""

    following: jax.Array  # int32, token t+k
    targets: jax.Array    # int32, token t+k+1
    weights: jax.Array    # float32, 0 where that is no target


def look_ahead(batch: LMBatch, depth: int) -> Ahead:
    """The tokens beyond the next one, with weight where t, t+k and t+k+1 are of one document.

    The weight of token t+k+1 is the one it has as the next token of t+k: what is no target there is none here.
    Worked example, the row of `LMBatch` at depth 1 (0: beyond the row, where nothing is known):

        tokens         b  x  e  b  y  e
        segments       1  1  1  2  2  2
        following      x  e  b  y  e  0      targets
        targets        e  b  y  e  0  0      targets, shifted by 1
        loss_mask      1  1  0  1  1  0
        weights        1  0  0  1  0  0      loss_mask, shifted by 1; not at the e of document 1, which would reach y

    With `boundary_targets` (`data.packing.to_inputs`) the next token may be of the next document, which no depth
    predicts; only of the token after the row the batch does not say it, so that this one counts as it does there.
    Where documents of a row see each other (`pipeline.mask_documents` off) their segments are one, and the end of a
    document predicts into the next.
    """
    chex.assert_equal_shape(list(batch))
    segments, time = batch.segments, batch.segments.shape[1]
    if not 0 < depth < time:
        raise ValueError(f"mtp_depth {depth} must be less than the {time} tokens of a row, and positive")
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    within = jnp.where(same, batch.loss_mask, 0)

    def shift(x: jax.Array, by: int) -> jax.Array:
        return jnp.pad(x[:, by:], ((0, 0), (0, by)))

    return Ahead(
        jnp.stack([shift(batch.targets, k - 1) for k in range(1, depth + 1)]),
        jnp.stack([shift(batch.targets, k) for k in range(1, depth + 1)]),
        jnp.stack([jnp.where(shift(segments, k) == segments, shift(within, k), 0) for k in range(1, depth + 1)]))
