"""MaxSim, the score of texts that keep one vector per token (ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832)."""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import ROWS, constrain


def max_sim(
    query: jax.Array, query_mask: jax.Array, keys: jax.Array, key_mask: jax.Array, num_chunks: int = 1
) -> jax.Array:
    """sum over query tokens i of max over key tokens j of <q_i, k_j>: all queries against all keys, [B, K] float32.

    Token scores are held for 1/num_chunks of the keys at a time, and computed again in the backward pass. A query
    without tokens scores 0, and so does a key without tokens: exclude it.

        tokens of q   (1, 0) (0, 1)       k   (.5, 0) (.2, .4)       score   .5 + .4 = .9

    Args:
      query: [B, T, D]; query_mask: [B, T], nonzero at tokens that count.
      keys: [K, S, D]; key_mask: [K, S].
      num_chunks: must divide K.

    Raises ValueError if it does not.
    """
    chex.assert_rank([query, query_mask, keys, key_mask], [3, 2, 3, 2])
    chex.assert_equal_shape_prefix([query, query_mask], 2)
    chex.assert_equal_shape_prefix([keys, key_mask], 2)
    count = len(keys)
    if num_chunks < 1 or count % num_chunks:
        raise ValueError(f"max_sim: {num_chunks} chunks do not divide {count} passages")
    one = lambda part: _scores(query, query_mask, *part)
    if num_chunks == 1:
        return one((keys, key_mask))

    def split(x: jax.Array) -> jax.Array:
        # Chunk i takes the keys i, i + num_chunks, ...: a device cuts those that it holds.
        parts = x.reshape(count // num_chunks, num_chunks, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, P(None, ROWS))

    # Inside a scan nothing can be merged with its recomputation, so the barrier against that is left out.
    scores = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (split(keys), split(key_mask)))
    return scores.transpose(1, 2, 0).reshape(len(query), count)


def own_max_sim(query: jax.Array, query_mask: jax.Array, passages: jax.Array, passage_mask: jax.Array) -> jax.Array:
    """Each query against its own passages: [B, T, D], [B, T], [B, P, S, D] and [B, P, S] to [B, P] float32."""
    chex.assert_rank([query, query_mask, passages, passage_mask], [3, 2, 4, 3])
    one = lambda q, mask, p, p_mask: _scores(q[None], mask[None], p, p_mask)[0]
    return jax.vmap(one)(query, query_mask, passages, passage_mask)


def _scores(query: jax.Array, query_mask: jax.Array, keys: jax.Array, key_mask: jax.Array) -> jax.Array:
    """[B, T, D], [B, T], [K, S, D], [K, S] to [B, K]."""
    products = jnp.einsum("btd,ksd->bkts", query.astype(jnp.float32), keys.astype(jnp.float32), precision="highest")
    seen = key_mask != 0
    some = jnp.any(seen, axis=1)[None, :, None]
    best = jnp.max(jnp.where(seen[None, :, None], products, -jnp.inf), axis=3)
    counted = (query_mask != 0)[:, None] & some
    return jnp.sum(jnp.where(counted, best, 0), axis=2)
