"""Fused attention on NVIDIA GPUs: `cudnn`, `cudnn_packed`, `triton`. None of them has run on a GPU here.

Proven on CPU instead. `cudnn`, `cudnn_packed`: jax computes the very arguments by its own definition of them, and
their lowering for CUDA is inspected. `triton`: forward and backward in Pallas' interpret mode, and its lowering.
`python -m tools.bench_throughput` checks each of them against float32 on the device at hand before it measures.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp

from jaxlm.model.attention_call import Call, Case, per_device, visible

try:  # not public: it may move
    from jax._src.cudnn import fused_attention_stablehlo as cudnn_private
except ImportError:
    cudnn_private = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # since jax 0.11, in favour of tokamax, which has no segments
    try:
        from jax.experimental.pallas.ops.gpu import attention as pallas_attention
    except ImportError:
        pallas_attention = None

MAX_DOCUMENTS = 32  # in a row, for `cudnn_packed`: softmax statistics take B * 32 * N * T float32
TRITON_BLOCK = 128  # rows are filled up to a multiple


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call) -> jax.Array:
    """cuDNN's flash attention. What it has no argument for becomes a mask, [B, 1, T, S] in 16 bits.

    jax has the compiler split rows and heads; under context parallelism `per_device` does, and the mask is T/c high.
    """
    if call.shards > 1:
        return per_device(_cudnn, q_BTNH, k_BSKH, v_BSKH, call)
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, call)


def _cudnn(q_BTNH, k_BSKH, v_BSKH, call: Call, table: None = None) -> jax.Array:
    mask, window, causal = None, None, call.causal
    if _needs_mask(call.q.segments is not None, call.q.positions is not None, call.causal, call.window, call.shards):
        mask = visible(call.q, call.kv, call.causal, call.window)
        mask = jnp.broadcast_to(mask[:, None], (q_BTNH.shape[0], 1, *mask.shape[1:]))
        causal = causal and call.shards == 1  # cuDNN counts both from 0, the queries of a shard do not begin there
    elif call.window is not None:
        window = (call.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=call.scale, is_causal=causal, local_window_size=window,
        implementation="cudnn")


def _needs_mask(segments: bool, positions: bool, causal: bool, window: int | None, shards: int) -> bool:
    return segments or (window is not None and (positions or not causal)) or (
        shards > 1 and (causal or window is not None))


def cudnn_obstacle(case: Case) -> str | None:
    """What it cannot compute exactly, and what would help; None: it can."""
    masked = _needs_mask(case.segments, case.positions, case.causal, case.window, case.context)
    if masked and case.q_len // case.context % 2 and _gpu_obstacle(case) is None:
        return f"needs an even length with segments or a masked window, got {case.q_len // case.context}"
    return _gpu_obstacle(case)


def cudnn_packed(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call) -> jax.Array:
    """cuDNN's flash attention document by document: no mask exists, and no work is done between documents.

    The lengths of documents are known only to the device, and cuDNN fixes their greatest number beforehand: a row of
    more than `MAX_DOCUMENTS`, or one that `documents` cannot describe, becomes NaN, so that a step is skipped and
    reported, never wrong. Keys and values are repeated for their query heads, because jax before 0.11 computes the
    offsets of keys from the number of query heads (`_fix_seqlen_offsets`).
    """
    repeat = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, repeat, axis=2) for x in (k_BSKH, v_BSKH))
    offsets, lengths, fits = documents(call.q.segments, MAX_DOCUMENTS)
    kinds = cudnn_private.MaskType
    y_BTNH = cudnn_private.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=call.scale, mask_type=kinds.PADDING_CAUSAL if call.causal else kinds.PADDING)
    return jnp.where(fits[:, None, None, None], y_BTNH, jnp.nan)


def documents(segments_BT: jax.Array, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the documents of packed rows begin and how long they are; padding (0) at the end counts as one.

        segments 1 1 1 2 2 0, limit 4        offsets 0 3 5 -1 -1        lengths 3 2 1 -1

    Returns:
      offsets [B, limit + 1] and lengths [B, limit] int32, -1 beyond the last document; and whether they describe the
      row, [B] bool: at most `limit` documents, whose segments ascend, with padding last.
    """
    width = segments_BT.shape[1]
    before, after = segments_BT[:, :-1], segments_BT[:, 1:]
    begins = jnp.pad(after != before, ((0, 0), (1, 0)), constant_values=True)
    offsets = jax.vmap(lambda row: jnp.nonzero(row, size=limit + 1, fill_value=-1)[0])(begins).astype(jnp.int32)
    following = jnp.where(offsets[:, 1:] < 0, width, offsets[:, 1:])
    lengths = jnp.where(offsets[:, :-1] < 0, -1, following - offsets[:, :-1])
    in_order = jnp.all(jnp.where(before == 0, after == 0, (after >= before) | (after == 0)), axis=1)
    return offsets, lengths, in_order & (jnp.sum(begins, axis=1) <= limit)


def cudnn_packed_obstacle(case: Case) -> str | None:
    """What it cannot compute exactly, and what would help; None: it can."""
    wanted = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"}
    if cudnn_private is None or not wanted <= inspect.signature(cudnn_private.dot_product_attention).parameters.keys():
        return f"needs a private function of jax that jax {jax.__version__} does not have"
    if not case.segments:
        return "is for packed rows: without segments use cudnn"
    return _gpu_obstacle(case) or _whole_rows_obstacle(case)


def triton(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call, interpret: bool = False) -> jax.Array:
    """The flash attention of jax in Pallas on Triton, which compares segments block by block and holds no mask."""
    return per_device(functools.partial(_triton, interpret=interpret), q_BTNH, k_BSKH, v_BSKH, call)


def _triton(q_BTNH, k_BSKH, v_BSKH, call: Call, table: None, interpret: bool) -> jax.Array:
    (B, T), repeat = q_BTNH.shape[:2], q_BTNH.shape[2] // k_BSKH.shape[2]
    surplus, segments = -T % TRITON_BLOCK, call.q.segments
    if surplus:  # causal queries never see the surplus; others would, so it is a document of its own
        if segments is None and not call.causal:
            segments = jnp.zeros((B, T), jnp.int32)
        if segments is not None:
            own = jnp.broadcast_to(jnp.min(segments) - 1, (B, surplus))
            segments = jnp.concatenate([segments, own], axis=1)
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, surplus), (0, 0), (0, 0)))
                                  for x in (q_BTNH, k_BSKH, v_BSKH))
    k_BSNH, v_BSNH = (jnp.repeat(x, repeat, axis=2) for x in (k_BSKH, v_BSKH))  # the kernel has no groups
    return pallas_attention.mha(
        q_BTNH, k_BSNH, v_BSNH, segments, sm_scale=call.scale, causal=call.causal, interpret=interpret)[:, :T]


def triton_obstacle(case: Case) -> str | None:
    """What it cannot compute exactly, and what would help; None: it can."""
    if pallas_attention is None:
        return f"needs jax.experimental.pallas.ops.gpu.attention, which jax {jax.__version__} does not have"
    return _gpu_obstacle(case) or _whole_rows_obstacle(case)


def _gpu_obstacle(case: Case) -> str | None:
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
    return None


def _whole_rows_obstacle(case: Case) -> str | None:
    if case.window is not None:
        return "has no window: use cudnn"
    if case.context > 1:
        return f"needs whole rows, but mesh.context {case.context} splits them"
    return None
