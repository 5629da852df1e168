"""Attention of new tokens over a cache and each other. Stored and new keys are multiplied apart: none is copied."""

import jax
import jax.numpy as jnp

from jaxlm.model.attention_xla import MASKED, by_chunks
from jaxlm.model.cache import Cache


def cached_attention(
    q_BTNH: jax.Array, cache: Cache, new: Cache, mask_BTS: jax.Array, *, query_chunk: int | None = None,
) -> jax.Array:
    """Scaled dot-product attention of T tokens, as `attention`, for any device.

    Args:
      cache, new: of one layer (leaves without L): S' slots of the rows so far, and the T slots of these tokens.
      mask_BTS: bool, S = S' + T: what each token sees; itself at least.
      query_chunk: queries are taken this many at a time, which bounds the memory of a long prompt.

    Returns:
      [B, T, N, H], dtype of the queries.
    """
    def attend(q_BTNH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        B, T, N, H = q_BTNH.shape
        K = cache.k.shape[1]
        q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
        scores = jnp.concatenate([_scores(q_BKRH, part) for part in (cache, new)], axis=-1) * H**-0.5
        scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, K, N // K, T, -1), MASKED)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        known, own = jnp.split(weights.reshape(B, K, -1, weights.shape[-1]), [cache.k.shape[2]], axis=-1)
        y = _mixture(known, cache, q_BTNH.dtype) + _mixture(own, new, q_BTNH.dtype)
        y = (y.reshape(B, K, N // K, T, H) / total).astype(q_BTNH.dtype)
        return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

    if query_chunk is not None and query_chunk < q_BTNH.shape[1]:
        return by_chunks(attend, q_BTNH, mask_BTS, query_chunk)
    return attend(q_BTNH, mask_BTS)


def _scores(q_BKRH: jax.Array, part: Cache) -> jax.Array:
    """Products with the keys of a part, [B, K, R, S] float32."""
    scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, part.k.astype(q_BKRH.dtype), preferred_element_type=jnp.float32)
    return scores if part.k_scale is None else scores * part.k_scale[:, :, None, :]


def _mixture(weights_BKRS: jax.Array, part: Cache, dtype: jnp.dtype) -> jax.Array:
    """Values of a part by their weights, [B, K, R, H] float32."""
    if part.v_scale is not None:
        weights_BKRS = weights_BKRS * part.v_scale[:, :, None, :]
    return jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS.astype(dtype), part.v.astype(dtype),
                      preferred_element_type=jnp.float32)
