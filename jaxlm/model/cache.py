"""The key-value cache of autoregressive decoding: an argument and a result, never state."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

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


def write(cache: Cache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """The cache with T tokens of one layer at the slots from `length` on, which stays; beyond the last slot they fall.

    Each row has its own slots, so this is a scatter; XLA writes it in place.
    """
    slots_BT = cache.length[:, None] + jnp.arange(k_BTKH.shape[1])[None]

    def put(old: jax.Array, new_BTK: jax.Array) -> jax.Array:
        def row(old_LKS, new_TK, slots):
            return old_LKS.at[layer, :, slots].set(new_TK, mode="drop", unique_indices=True)

        return jax.vmap(row, in_axes=(1, 0, 0), out_axes=1)(old, new_BTK.astype(old.dtype), slots_BT)

    if cache.k_scale is None:
        return cache._replace(k=put(cache.k, k_BTKH), v=put(cache.v, v_BTKH))
    (k, k_scale), (v, v_scale) = quantize_vectors(k_BTKH), quantize_vectors(v_BTKH)
    return cache._replace(k=put(cache.k, k), v=put(cache.v, v),
                          k_scale=put(cache.k_scale, k_scale), v_scale=put(cache.v_scale, v_scale))


def read(cache: Cache, layer: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer, [B, S, K, H] each in `dtype`."""
    def get(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
        x_BKSH = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
        if scale is not None:
            x_BKSH = x_BKSH.astype(jnp.float32) * jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)[..., None]
        return x_BKSH.astype(dtype).transpose(0, 2, 1, 3)  # a view: the products in attention take K before S again

    return get(cache.k, cache.k_scale), get(cache.v, cache.v_scale)


def keep_path(cache: Cache, start: jax.Array, nodes: jax.Array) -> Cache:
    """Moves the kept tokens of a tree together: what is in slot `start + nodes[j]` comes to `start + 1 + j`.

    Args:
      start: [B], the slot of the tree's root, which stays.
      nodes: [B, J], numbers in the tree, which increase: a token only ever moves down. Worked example, start 5: with
        nodes [2, 3] slots 7 and 8 come to 6 and 7. Where nodes[j] = j + 1 nothing moves.
    """
    source_BJ = start[:, None] + nodes
    target_BJ = start[:, None] + 1 + jnp.arange(nodes.shape[1])[None]

    def row(x_LKS: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
        taken = jnp.take(x_LKS, source, axis=2, mode="clip")
        return x_LKS.at[:, :, target].set(taken, mode="drop", unique_indices=True)

    def move(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jax.vmap(row, in_axes=(1, 0, 0), out_axes=1)(x, source_BJ, target_BJ)

    return cache._replace(k=move(cache.k), v=move(cache.v), k_scale=move(cache.k_scale), v_scale=move(cache.v_scale))


def cached_view(
    cache: Cache, num_new: int, tree: jax.Array | None, window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Where T new tokens stand and what they see: positions [B, T] and mask [B, T, S].

    Worked example, length 2, a tree with two children of its root, S=6 (x: seen):

        position 2 (root)     x x x . . .
        position 3            x x x x . .
        position 3            x x x . x .
    """
    length, slots = cache.length[:, None], jnp.arange(cache.k.shape[3])[None]
    if tree is None:
        at = length + jnp.arange(num_new)[None]
        mask = slots[:, None] <= at[:, :, None]
        stands = slots
    else:
        at = length + jnp.sum(tree, axis=2, dtype=jnp.int32) - 1
        new = slots - length                                                    # [B, S]: the number in the tree
        inside = (new >= 0) & (new < num_new)
        number = jnp.clip(new, 0, num_new - 1)
        seen = jnp.take_along_axis(tree, number[:, None].repeat(num_new, axis=1), axis=2)
        mask = jnp.where(inside[:, None], seen, (new < 0)[:, None])
        stands = jnp.where(inside, jnp.take_along_axis(at, number, axis=1), slots)
    if window is not None:
        mask &= at[:, :, None] - stands[:, None, :] < window
    return at, mask


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 numbers of the shape of x and float32 scales without its last axis: x is about `numbers * scale`."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    numbers = jnp.round(x / jnp.maximum(scale, 1e-30)[..., None])
    return numbers.astype(jnp.int8), scale

