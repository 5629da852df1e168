"""Grouped-query attention: one function, three ways to compute it, and the rule that chooses between them.

`BACKENDS` at the end: `xla` computes everything on every device; `splash` (TPU) and `cudnn` (NVIDIA) are fused kernels
that never hold the scores of all heads, and are refused where they would not compute the same function.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from jaxlm.model.partition import HEADS

MASKED = -1e30  # finite, so that a masked score never gives infinity minus infinity
NUM_BLOCKS = 4  # of queries in causal xla attention


class Labels(NamedTuple):
    """What the mask knows of each query or key."""

    index: jax.Array              # [1, T] slot in the row
    segments: jax.Array | None    # [B, T]
    positions: jax.Array | None   # [B, T]; None: the index


class Call(NamedTuple):
    """The arguments of `attention` besides queries, keys and values, as a backend reads them."""

    q: Labels
    kv: Labels
    offset: int | None            # None: traced
    causal: bool
    window: int | None
    scale: float
    query_chunk: int | None


class Case(NamedTuple):
    """What decides whether a backend computes the same function; the fields of `resolve_backend`."""

    platform: str
    dtype: str
    head_dim: int
    q_len: int
    kv_len: int
    decoding: bool
    segments: bool
    positions: bool
    causal: bool
    window: int | None
    query_chunk: int | None


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
    name = resolve_backend(
        backend, platform=current_platform(), dtype=str(q_BTNH.dtype), head_dim=q_BTNH.shape[3], q_len=num_queries,
        kv_len=num_keys, decoding=offset != 0, segments=q_segments is not None, positions=q_positions is not None,
        causal=causal, window=window, query_chunk=query_chunk)
    call = Call(
        Labels(q_offset + jnp.arange(num_queries)[None], q_segments, q_positions),
        Labels(jnp.arange(num_keys)[None], kv_segments, kv_positions),
        offset, causal, window, q_BTNH.shape[3] ** -0.5 if scale is None else scale, query_chunk)
    return BACKENDS[name].compute(q_BTNH, k_BSKH, v_BSKH, call)


def resolve_backend(
    backend: str, *, platform: str, dtype: str, head_dim: int, q_len: int, kv_len: int | None = None,
    decoding: bool = False, segments: bool = False, positions: bool = False, causal: bool = True,
    window: int | None = None, query_chunk: int | None = None,
) -> str:
    """The backend that `attention` uses: `auto` chooses an exact one, any other name is itself or an error.

    Args:
      backend: "auto" or a key of `BACKENDS`. "auto" is splash on TPU and cudnn on GPU where they are exact, else xla.
      platform: "cpu", "gpu" or "tpu", see `current_platform`.
      dtype, head_dim: of queries, keys and values.
      q_len, kv_len: T and S; None: S = T.
      decoding: the queries do not start at index 0, or start at a traced one.
      segments, positions: whether they are given, not their values.

    Raises:
      ValueError: an unknown name, or a named backend that cannot compute this exactly, with reason and remedy.
    """
    if backend != "auto" and backend not in BACKENDS:
        known = ["auto", *BACKENDS]
        nearest = difflib.get_close_matches(backend, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown attention backend '{backend}', did you mean '{nearest}'? Known: {', '.join(known)}")
    case = Case(platform, str(jnp.dtype(dtype)), head_dim, q_len, q_len if kv_len is None else kv_len, decoding,
                segments, positions, causal, window, query_chunk)
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


def _visible(q: Labels, kv: Labels, causal: bool, window: int | None) -> jax.Array | None:
    """The mask, [B or 1, T, S] bool; None when every key is seen."""
    terms = []
    if causal:
        terms.append(kv.index[:, None, :] <= q.index[:, :, None])
    if q.segments is not None:
        terms.append(q.segments[:, :, None] == kv.segments[:, None, :])
    if window is not None:
        of_q, of_kv = (x.index if x.positions is None else x.positions for x in (q, kv))
        distance = of_q[:, :, None] - of_kv[:, None, :]
        terms.append((distance if causal else jnp.abs(distance)) < window)
    return functools.reduce(jnp.logical_and, terms) if terms else None


def _cut(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[:, start:stop], tree)


def _attend(q_BTNH, k_BSKH, v_BSKH, q: Labels, kv: Labels, call: Call) -> jax.Array:
    """All queries against all keys.

    The query heads of a key-value head are rows of one product: on CPU half the time of a fifth einsum axis, and the
    keys need no copy in decoding. Dividing by the sum after the second product spares a pass over [T, S].
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("BKRH,BSKH->BKRS", q_BKRH, k_BSKH, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, N // K, T, S) * call.scale
    mask_BTS = _visible(q, kv, call.causal, call.window)
    if mask_BTS is not None:
        scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    # Without any visible key the maximum is MASKED: the floor then makes every weight 0, and so the result.
    highest = jnp.maximum(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), MASKED / 2)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)  # at least 1 where a key is seen, or 0
    weights_BKRS = weights.astype(v_BSKH.dtype).reshape(B, K, -1, S)
    y = jnp.einsum("BKRS,BSKH->BKRH", weights_BKRS, v_BSKH, preferred_element_type=jnp.float32)
    y = (y.reshape(B, K, N // K, T, H) / jnp.maximum(total, 0.5)).astype(q_BTNH.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _xla(q_BTNH, k_BSKH, v_BSKH, call: Call) -> jax.Array:
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if call.query_chunk is not None and call.query_chunk < num_queries:
        return _xla_chunked(q_BTNH, k_BSKH, v_BSKH, call)
    if not call.causal or call.offset is None or num_queries < 32 * NUM_BLOCKS:
        return _attend(q_BTNH, k_BSKH, v_BSKH, call.q, call.kv, call)
    # Blocks of queries against the keys up to their end: 5/8 of the scores of the whole square with 4 blocks.
    block, out = -(-num_queries // NUM_BLOCKS), []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        last = min(call.offset + stop, num_keys)
        first = 0
        if call.window is not None and call.q.positions is None:
            first = min(max(call.offset + start - call.window + 1, 0), last - 1)
        out.append(_attend(_cut(q_BTNH, start, stop), *_cut((k_BSKH, v_BSKH), first, last),
                           _cut(call.q, start, stop), _cut(call.kv, first, last), call))
    return jnp.concatenate(out, axis=1)


def _xla_chunked(q_BTNH, k_BSKH, v_BSKH, call: Call) -> jax.Array:
    """`query_chunk` queries at a time; the last chunk is filled up and its surplus cut off."""
    num_queries, size = q_BTNH.shape[1], call.query_chunk
    num_chunks = -(-num_queries // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - num_queries)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop body is not merged with its recomputation
    def one(chunk: tuple[jax.Array, Labels]) -> jax.Array:
        return _attend(chunk[0], k_BSKH, v_BSKH, chunk[1], call.kv, call)

    y = jnp.moveaxis(jax.lax.map(one, jax.tree.map(split, (q_BTNH, call.q))), 0, 1)
    return y.reshape(y.shape[0], num_chunks * size, *y.shape[3:])[:, :num_queries]


def _splash(q_BTNH, k_BSKH, v_BSKH, call: Call, interpret: bool = False) -> jax.Array:
    """The block-sparse flash kernel of jax, per shard of batch and heads when the context has a mesh."""
    length, window = q_BTNH.shape[1], call.window
    size = next(size for size in (512, 256, 128) if length % size == 0)
    blocks = splash.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size))
    if window is not None:
        mask = splash.LocalMask((length, length), (window - 1, 0 if call.causal else window - 1), 0)
    else:
        mask = (splash.CausalMask if call.causal else splash.FullMask)((length, length))

    def local(q_BTNH, k_BSKH, v_BSKH, segments_BT):
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q_BTNH.shape[2]), block_sizes=blocks, head_shards=1, q_seq_shards=1,
            interpret=interpret)
        scaled = (q_BTNH.astype(jnp.float32) * call.scale).astype(q_BTNH.dtype)  # the kernel does not scale
        segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
        q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (scaled, k_BSKH, v_BSKH))
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments).transpose(0, 2, 1, 3)

    # The compiler cannot split a kernel, so each device is given its part.
    if not jax.sharding.get_abstract_mesh().empty:
        local = jax.shard_map(local, in_specs=(HEADS, HEADS, HEADS, P(*HEADS[:2])), out_specs=HEADS, check_vma=False)
    return local(q_BTNH, k_BSKH, v_BSKH, call.q.segments)


def _splash_obstacle(case: Case) -> str | None:
    if case.platform != "tpu":
        return f"runs on TPU, not on {case.platform}"
    if case.query_chunk is not None:
        return "ignores query_chunk: leave it None"
    if case.decoding or case.q_len != case.kv_len:
        return "needs queries and keys of the same tokens, not decoding with a cache"
    if case.q_len % 128:
        return f"needs a length that divides by 128, got {case.q_len}"
    if case.window is not None and case.positions:
        return "takes a window by index, and cannot know that given positions follow the index: leave positions out"
    return None


def _cudnn(q_BTNH, k_BSKH, v_BSKH, call: Call) -> jax.Array:
    """cuDNN's flash attention. What it has no argument for becomes a mask, [B, 1, T, S] in 16 bits."""
    mask, window = None, None
    if _needs_mask(call.q.segments is not None, call.q.positions is not None, call.causal, call.window):
        mask = _visible(call.q, call.kv, call.causal, call.window)
        mask = jnp.broadcast_to(mask[:, None], (q_BTNH.shape[0], 1, *mask.shape[1:]))
    elif call.window is not None:
        window = (call.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=call.scale, is_causal=call.causal, local_window_size=window,
        implementation="cudnn")


def _needs_mask(segments: bool, positions: bool, causal: bool, window: int | None) -> bool:
    return segments or (window is not None and (positions or not causal))


def _cudnn_obstacle(case: Case) -> str | None:
    if case.platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs, not on {case.platform}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16 or float16, not in {case.dtype}"
    if case.query_chunk is not None:
        return "ignores query_chunk: leave it None"
    if case.decoding or case.q_len != case.kv_len:
        return "needs queries and keys of the same tokens, not decoding with a cache"
    if case.head_dim > 128 or case.head_dim % 8:
        return f"needs a head dimension up to 128 that divides by 8, got {case.head_dim}"
    if case.q_len % 2 and _needs_mask(case.segments, case.positions, case.causal, case.window):
        return f"needs an even length with segments or a masked window, got {case.q_len}"
    return None


class Backend(NamedTuple):
    """One way to compute attention."""

    compute: Callable[..., jax.Array]          # q, k, v, Call -> [B, T, N, H]
    obstacle: Callable[[Case], str | None]     # what it cannot do exactly, and what would; None: it can


BACKENDS = {
    "xla": Backend(_xla, lambda case: None),
    "splash": Backend(_splash, _splash_obstacle),
    "cudnn": Backend(_cudnn, _cudnn_obstacle),
}
