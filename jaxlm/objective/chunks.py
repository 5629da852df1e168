"""Per-token functions of logits, without the logits of all tokens in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import BATCH, ROWS


def map_chunks(
    f: Callable[..., Any], tokens: tuple[jax.Array, ...], heads: tuple[jax.Array, ...], num_chunks: int = 1
) -> Any:
    """`f(*tokens, *heads)`, computed for 1/num_chunks of the tokens at a time, again in the backward pass.

    Chunk i takes the tokens i, i + num_chunks, ... of a row, so that devices which split T cut what they hold already.
    Values equal the unchunked ones up to float rounding.

    Args:
      f: to leaves [B, t, ...] from leaves [B, t, ...] for any t; must not mix tokens.
      tokens: leaves [B, T, ...].
      heads: [D, V] each, the mesh axis `fsdp` along D.
      num_chunks: must divide the T of a device.
    """
    time = tokens[0].shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape["context"]
    if time % (num_chunks * context):
        raise ValueError(f"loss chunks: {num_chunks}{f' times mesh.context {context}' if context > 1 else ''} does not "
                         f"divide the sequence length {time}")
    if mesh.empty or mesh.size == 1:
        return _chunks(f, tokens, heads, num_chunks)

    def local(tokens: tuple, heads: tuple) -> Any:
        heads = tuple(jax.lax.all_gather(head, "fsdp", tiled=True) for head in heads)
        return _chunks(f, tokens, heads, num_chunks)

    # By hand, so that the head is gathered once and its gradient reduced once, not chunk by chunk. `tensor` is left to
    # the compiler.
    return jax.shard_map(local, in_specs=(BATCH, P("fsdp")), out_specs=BATCH, axis_names={*ROWS, "context"},
                         check_vma=False)(tokens, heads)


def _chunks(f: Callable[..., Any], tokens: tuple, heads: tuple, num_chunks: int) -> Any:
    """On one device, with whole heads."""
    if num_chunks == 1:
        return f(*tokens, *heads)
    batch, time = tokens[0].shape[:2]
    split = lambda x: jnp.moveaxis(x.reshape(batch, time // num_chunks, num_chunks, *x.shape[2:]), 2, 0)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, time, *x.shape[3:])
    parts = jax.lax.map(jax.checkpoint(lambda chunk: f(*chunk, *heads)), tuple(split(x) for x in tokens))
    return jax.tree.map(join, parts)
