"""The key-value cache of autoregressive decoding: an argument and a result, never state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of the tokens so far. All rows write the same slots, `length` onwards.

    Causality goes by slot, so ragged prompts are expressed by segment 0 at their pads, wherever those lie, and
    explicit positions. Two prompts of 2 and 3 tokens, left-padded, after one decoded token, S=5:

        segments    0 1 1 1 0     positions    0 0 1 2 0     length 4
                    1 1 1 1 0                  0 1 2 3 0
    """

    k: jax.Array          # [L, B, S, K, H], rotated
    v: jax.Array          # [L, B, S, K, H]
    segments: jax.Array   # [B, S] int32, 0 is empty or padding
    positions: jax.Array  # [B, S] int32
    length: jax.Array     # scalar int32, slots written


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache for `batch` rows and `slots` tokens. `dtype` is the compute dtype of the model."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.zeros((), jnp.int32))


def reserve(cache: Cache, segments: jax.Array, positions: jax.Array) -> Cache:
    """The cache with T more slots labelled, [B, T] each; the layers fill in their keys and values.

    Raises ValueError when the batch differs or T exceeds S. A traced `length` cannot be checked: who decodes must
    allocate enough slots, for XLA would move a write that does not fit to the last slots.
    """
    (batch, slots), (rows, num_new) = cache.segments.shape, segments.shape
    if rows != batch or num_new > slots:
        raise ValueError(f"{rows} rows of {num_new} tokens do not fit a cache of {batch} rows and {slots} slots")
    start = (jnp.zeros((), jnp.int32), cache.length)
    return cache._replace(
        segments=jax.lax.dynamic_update_slice(cache.segments, segments.astype(jnp.int32), start),
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), start),
        length=cache.length + num_new,
    )
