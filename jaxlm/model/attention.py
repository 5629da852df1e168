"""Grouped-query attention: one function, several ways to compute it, and the rule that chooses between them.

`BACKENDS` at the end: `xla` computes everything on every device; `splash` (TPU), `cudnn`, `cudnn_packed` and `triton`
(NVIDIA) are fused kernels that never hold the scores of all heads, and are refused where they would not compute the
same function. Only `xla` has run on its device, a CPU; `attention_splash` and `attention_gpu` say what is proven of the
others.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.config import nearest
from jaxlm.model.attention_call import Call, Case, Labels, context_shards
from jaxlm.model.attention_gpu import (
    cudnn,
    cudnn_obstacle,
    cudnn_packed,
    cudnn_packed_obstacle,
    triton,
    triton_obstacle,
)
from jaxlm.model.attention_splash import splash, splash_obstacle
from jaxlm.model.attention_xla import xla


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None, q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None, q_offset: jax.Array | int = 0, causal: bool = True,
    window: int | None = None, scale: float | None = None, backend: str = "auto", query_chunk: int | None = None,
) -> jax.Array:
    """Scaled dot-product attention; query head n reads key-value head `n // (N / K)`.

        y[t, n] = sum_s softmax_s(scale * q[t, n] . k[s, n // (N / K)] over the keys that t sees) v[s, n // (N / K)]

    The softmax is float32. A query that sees no key gets zeros, and gives zero gradients. Worked example, T=S=5,
    window 2, causal; x marks the keys (columns) that a query (row) sees:

        segments  1 1 1 2 0        x . . . .
                                   x x . . .
                                   . x x . .     the first key is 2 positions away
                                   . . . x .     another document
                                   . . . . x     padding, segment 0, sees padding

    Where the mesh of the context splits time (axis `context`) and the queries are those of the keys (q_offset 0, T=S),
    each device computes its T/c queries against all keys of the row; see `attention_call.per_device`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: one dtype; K divides N. 1 < K < N is grouped-query attention (Ainslie et al. 2023,
        arXiv:2305.13245).
      q_segments, kv_segments: [B, T] and [B, S] integers, both or neither: a query sees the keys of its own segment.
      q_positions, kv_positions: [B, T] and [B, S] integers, both or neither, for the window; None: the indices.
      q_offset: index of the first query among the keys, as in decoding with a cache; may be traced.
      causal: a query sees the keys at or before its own index.
      window: keys are seen if `q_position - k_position < window`; without `causal`, `|difference| < window`.
      scale: of the scores; None is `H ** -0.5`.
      backend: see `resolve_backend`.
      query_chunk: xla only: queries are taken this many at a time and recomputed in the backward pass, so that
        memory is `B * N * query_chunk * S` and not `B * N * T * S`.

    Returns:
      [B, T, N, H], dtype of the queries.

    Raises:
      ValueError: shapes or types that do not fit, or a backend that cannot compute this exactly.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, q_segments, kv_segments, q_positions, kv_positions, window, query_chunk)
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    offset = q_offset if isinstance(q_offset, int) else None
    shards = context_shards() if offset == 0 and num_queries == num_keys else 1
    name = resolve_backend(
        backend, platform=current_platform(), dtype=str(q_BTNH.dtype), head_dim=q_BTNH.shape[3], q_len=num_queries,
        kv_len=num_keys, decoding=offset != 0, segments=q_segments is not None, positions=q_positions is not None,
        causal=causal, window=window, query_chunk=query_chunk, context=shards)
    if window is None:
        q_positions = kv_positions = None
    call = Call(
        Labels(q_offset + jnp.arange(num_queries)[None], q_segments, q_positions),
        Labels(jnp.arange(num_keys)[None], kv_segments, kv_positions),
        offset, causal, window, q_BTNH.shape[3] ** -0.5 if scale is None else scale, query_chunk, shards)
    return BACKENDS[name].compute(q_BTNH, k_BSKH, v_BSKH, call)


def resolve_backend(
    backend: str, *, platform: str, dtype: str, head_dim: int, q_len: int, kv_len: int | None = None,
    decoding: bool = False, segments: bool = False, positions: bool = False, causal: bool = True,
    window: int | None = None, query_chunk: int | None = None, context: int = 1,
) -> str:
    """The backend that `attention` uses: `auto` chooses an exact one, any other name is itself or an error.

    Args:
      backend: "auto" or a key of `BACKENDS`. "auto" is splash on TPU and cudnn on GPU where they are exact, else xla;
        cudnn_packed and triton must be named until they have been measured on a GPU.
      platform: "cpu", "gpu" or "tpu", see `current_platform`.
      dtype, head_dim: of queries, keys and values.
      q_len, kv_len: T and S; None: S = T.
      decoding: the queries do not start at index 0, or start at a traced one.
      segments, positions: whether they are given, not their values.
      context: parts into which the mesh splits the time axis, `mesh.context` in training.

    Raises:
      ValueError: an unknown name, or a named backend that cannot compute this exactly, with reason and remedy.
    """
    if backend != "auto" and backend not in BACKENDS:
        known = ["auto", *BACKENDS]
        raise ValueError(f"unknown attention backend '{backend}'{nearest(backend, known)}; known: {', '.join(known)}")
    case = Case(platform, str(jnp.dtype(dtype)), head_dim, q_len, q_len if kv_len is None else kv_len, decoding,
                segments, positions, causal, window, query_chunk, context)
    if backend == "auto":
        return next(name for name in ("splash", "cudnn", "xla") if BACKENDS[name].obstacle(case) is None)
    obstacle = BACKENDS[backend].obstacle(case)
    if obstacle:
        raise ValueError(f"attention backend '{backend}' {obstacle}; 'auto' and 'xla' compute this case")
    return backend


def current_platform() -> str:
    """Where a program traced now will run: the devices of the context's mesh, else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _check(q, k, v, q_segments, kv_segments, q_positions, kv_positions, window, query_chunk) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q [B, T, N, H] and k, v [B, S, K, H], got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries {q.shape} and keys {k.shape} differ in batch or head dimension")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key-value heads")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v must share a floating point type, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, of_q, of_kv in (("segments", q_segments, kv_segments), ("positions", q_positions, kv_positions)):
        if (of_q is None) != (of_kv is None):
            raise ValueError(f"{name} of queries and keys must be given together")
        for side, x, shape in (("q", of_q, q.shape[:2]), ("kv", of_kv, k.shape[:2])):
            if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)):
                raise ValueError(f"{side}_{name} must be integers of shape {shape}, got {x.dtype} {x.shape}")
    for name, value in (("window", window), ("query_chunk", query_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive or None, got {value}")


class Backend(NamedTuple):
    """One way to compute attention."""

    compute: Callable[..., jax.Array]          # q, k, v, Call -> [B, T, N, H]
    obstacle: Callable[[Case], str | None]     # what it cannot do exactly, and what would; None: it can


BACKENDS = {
    "xla": Backend(xla, lambda case: None),
    "splash": Backend(splash, splash_obstacle),
    "cudnn": Backend(cudnn, cudnn_obstacle),
    "cudnn_packed": Backend(cudnn_packed, cudnn_packed_obstacle),
    "triton": Backend(triton, triton_obstacle),
}
