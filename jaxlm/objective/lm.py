"""Next-token cross-entropy: arrays in, per-token losses out. Reduction is `core.masked.aggregate`."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.matmul import matmul
from jaxlm.core.mesh import BATCH, ROWS


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
    """`cross_entropy(hidden @ head, targets)` with at most 1/num_chunks of the logits in memory.

    Chunk i takes the tokens i, i + num_chunks, ... of a row, so that devices which split T cut what they hold already.
    Each chunk's logits are computed again in the backward pass, which costs one more vocabulary product. Values equal
    the unchunked ones up to float rounding.

    Args:
      hidden: [B, T, D] in the compute type.
      head: [D, V], cast to the type of `hidden`; the product accumulates in float32.
      targets: [B, T] int32.
      num_chunks: must divide T.
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])
    if hidden.shape[1] % num_chunks:
        raise ValueError(f"loss chunks: {num_chunks} does not divide the sequence length {hidden.shape[1]}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _chunks(hidden, head, targets, num_chunks)

    def local(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> TokenLoss:
        return _chunks(hidden, jax.lax.all_gather(head, "fsdp", tiled=True), targets, num_chunks)

    # By hand, so that the head is gathered once and its gradient reduced once, not chunk by chunk. `tensor` is left to
    # the compiler.
    return jax.shard_map(local, in_specs=(BATCH, P("fsdp"), BATCH), out_specs=BATCH, axis_names={*ROWS, "context"},
                         check_vma=False)(hidden, head, targets)


def _chunks(hidden: jax.Array, head: jax.Array, targets: jax.Array, num_chunks: int) -> TokenLoss:
    """On one device, with the whole head."""
    batch, time, _ = hidden.shape

    def one(hidden: jax.Array, targets: jax.Array) -> TokenLoss:
        return cross_entropy(matmul(hidden, head, jnp.float32), targets)

    if num_chunks == 1:
        return one(hidden, targets)
    split = lambda x: jnp.moveaxis(x.reshape(batch, time // num_chunks, num_chunks, *x.shape[2:]), 2, 0)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, time)
    parts = jax.lax.map(lambda chunk: jax.checkpoint(one)(*chunk), (split(hidden), split(targets)))
    return TokenLoss(*(join(part) for part in parts))
