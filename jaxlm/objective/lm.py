"""Next-token cross-entropy: arrays in, per-token losses out. Reduction is `core.masked.aggregate`."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

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
