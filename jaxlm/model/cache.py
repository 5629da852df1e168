"""The key-value cache of autoregressive decoding: an argument and a result, never state."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model.attention_call import split_mesh
from jaxlm.model.config import ModelConfig

CacheDtype = Literal["float32", "bfloat16", "int8"]


class Cache(NamedTuple):
    """Keys and values of the tokens so far: row b holds `length[b]` of them, in its first slots, without gaps.

    A slot is a position. What lies beyond a row's length is garbage that nothing sees and the next tokens
    overwrite, so that taking tokens back is `cache._replace(length=shorter)`, and a padded prompt needs no labels:
    pads follow the tokens and are not counted.

    With int8 a vector of H numbers is stored as `round(127 x / max|x|)` and its scale `max|x| / 127`.
    """

    k: jax.Array                        # [L, B, K, S, H], rotated
    v: jax.Array                        # [L, B, K, S, H]
    length: jax.Array                   # [B] int32
    k_scale: jax.Array | None = None    # [L, B, K, S] float32, with int8
    v_scale: jax.Array | None = None


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: CacheDtype = "float32") -> Cache:
    """An empty cache for `batch` rows of `slots` tokens."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    empty, length = jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32)
    if dtype != "int8":
        return Cache(empty, empty, length)
    scale = jnp.zeros(shape[:-1], jnp.float32)
    return Cache(empty, empty, length, scale, scale)


def stored(cache: Cache, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Keys and values of T new tokens of one layer as `cache` holds them: a cache of T slots, leaves without L.

    What a token sees must not depend on how many were fed at once, so the new ones see each other in this form.
    """
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
    if cache.k_scale is None:
        if cache.k.dtype == jnp.bfloat16:  # rounded first: a cast and its way back might be optimised away
            k, v = (jax.lax.reduce_precision(x, 8, 7) for x in (k, v))
        return cache._replace(k=k.astype(cache.k.dtype), v=v.astype(cache.v.dtype))
    (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
    return Cache(k, v, cache.length, k_scale, v_scale)


def append(cache: Cache, new: Cache) -> Cache:
    """The cache with T more tokens in every row, of all layers; what finds no slot is dropped. `new`: see `stored`."""
    length = cache.length
    put = lambda old, new: None if old is None else _put(old, length, new)
    return Cache(put(cache.k, new.k), put(cache.v, new.v), length + new.k.shape[3],
                 put(cache.k_scale, new.k_scale), put(cache.v_scale, new.v_scale))


def keep_path(cache: Cache, start: jax.Array, nodes: jax.Array) -> Cache:
    """Moves the kept tokens of a tree together: what is in slot `start + nodes[j]` comes to `start + 1 + j`.

    Args:
      start: [B], the slot of the tree's root, which stays.
      nodes: [B, J], numbers in the tree. Worked example, start 5: with nodes [2, 3] slots 7 and 8 come to 6 and 7.
    """
    source_BJ = start[:, None] + nodes

    def move(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        taken = jax.vmap(partial(jnp.take, axis=2, mode="clip"), in_axes=(1, 0), out_axes=1)(x, source_BJ)
        return _put(x, start + 1, taken)

    return cache._replace(k=move(cache.k), v=move(cache.v), k_scale=move(cache.k_scale), v_scale=move(cache.v_scale))


def _put(x_LBKS: jax.Array, start_B: jax.Array, new_LBKT: jax.Array) -> jax.Array:
    """Writes T slots of each row from its own start on; slots from S on are dropped.

    On one device row by row in a loop, since XLA on CPU copies the whole array for a scatter and updates a slice in
    place. On a mesh as a scatter, since a loop over rows that are split would gather them.
    """
    slots, count = x_LBKS.shape[3], new_LBKT.shape[3]
    # A window that would pass the end begins earlier, and keeps what lies before the row's start.
    first_B = jnp.minimum(start_B, slots - count)
    late_B = start_B - first_B

    def window(old: jax.Array, new: jax.Array, late: jax.Array, axis: int) -> jax.Array:
        keep = jnp.arange(count).reshape((count,) + (1,) * (new.ndim - axis - 1)) < late
        return jnp.where(keep, old, jnp.roll(new, late, axis=axis))

    def row(x_LKS: jax.Array, new_LKT: jax.Array, first: jax.Array, late: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_slice_in_dim(x_LKS, first, count, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(x_LKS, window(old, new_LKT, late, 2), first, axis=2)

    if split_mesh() is not None:
        return jax.vmap(row, in_axes=(1, 1, 0, 0), out_axes=1)(x_LBKS, new_LBKT, first_B, late_B)

    def one(b: jax.Array, x: jax.Array) -> jax.Array:
        at = (0, b, 0, first_B[b]) + (0,) * (x.ndim - 4)
        old = jax.lax.dynamic_slice(x, at, (x.shape[0], 1, x.shape[2], count, *x.shape[4:]))
        new = jax.lax.dynamic_slice_in_dim(new_LBKT, b, 1, axis=1)
        return jax.lax.dynamic_update_slice(x, window(old, new, late_B[b], 3), at)

    return jax.lax.fori_loop(0, x_LBKS.shape[1], one, x_LBKS)


def cached_view(
    cache: Cache, num_new: int, tree: jax.Array | None, window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Where T new tokens stand and what they see: positions [B, T], mask [B, T, S + T] of slots and new tokens.

    Worked example, length 2, a tree with two children of its root, S=4 (x: seen):

        position 2 (root)     x x . .   x . .
        position 3            x x . .   x x .
        position 3            x x . .   x . x
    """
    length, slots = cache.length[:, None], jnp.arange(cache.k.shape[3])[None]
    if tree is None:
        tree = jnp.broadcast_to(jnp.tril(jnp.ones((num_new, num_new), bool))[None],
                                (length.shape[0], num_new, num_new))
    at = length + jnp.sum(tree, axis=2, dtype=jnp.int32) - 1
    stored = jnp.broadcast_to((slots < length)[:, None], (*at.shape, slots.shape[1]))
    mask = jnp.concatenate((stored, tree), axis=2)
    if window is not None:
        stands = jnp.concatenate((jnp.broadcast_to(slots, stored.shape[::2]), at), axis=1)
        mask &= at[:, :, None] - stands[:, None, :] < window
    return at, mask


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 numbers of the shape of x and float32 scales without its last axis: x is about `numbers * scale`."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    numbers = jnp.round(x / jnp.maximum(scale, 1e-30)[..., None])
    return numbers.astype(jnp.int8), scale
