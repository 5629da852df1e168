"""The block-sparse flash kernel of jax for TPUs. Run in interpret mode and lowered for TPU, never run on one here."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.model.attention_call import Call, Case, per_device, split_mesh
from jaxlm.model.layers import PRODUCT


def splash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call, interpret: bool = False) -> jax.Array:
    """See `attention`. The kernel's list of blocks to visit is split like the queries."""
    length, window, mesh = q_BTNH.shape[1], call.window, split_mesh()
    size = next(size for size in (512, 256, 128) if length // call.shards % size == 0)
    blocks = kernels.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size))
    parts = call.shards
    if window is not None:
        mask = kernels.LocalMask((length, length), (window - 1, 0 if call.causal else window - 1), 0)
    elif call.causal:
        mask = kernels.CausalMask((length, length))
    else:  # the same for every part, and jax cannot split a list of full blocks
        mask, parts = kernels.FullMask((length // call.shards, length)), 1
    heads = q_BTNH.shape[2] if mesh is None else q_BTNH.shape[2] // mesh.shape["tensor"]
    kernel = kernels.make_splash_mha(  # every head has the same mask, so the heads of one device stand for all
        kernels.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=parts,
        residual_checkpoint_name=PRODUCT,  # a remat policy that keeps products keeps its result too, and runs it once
        interpret=interpret)
    split = P(None, "context" if parts > 1 else None)
    spec = None if mesh is None else kernel.manual_sharding_spec(NamedSharding(mesh, split))
    return per_device(_one_device, q_BTNH, k_BSKH, v_BSKH, call, kernel, spec)


def _one_device(q_BTNH, k_BSKH, v_BSKH, call: Call, kernel: Any) -> jax.Array:
    scaled = (q_BTNH.astype(jnp.float32) * call.scale).astype(q_BTNH.dtype)  # the kernel does not scale
    segments = None if call.q.segments is None else kernels.SegmentIds(call.q.segments, call.kv.segments)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (scaled, k_BSKH, v_BSKH))
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments).transpose(0, 2, 1, 3)


def splash_obstacle(case: Case) -> str | None:
    """What it cannot compute exactly, and what would help; None: it can."""
    if case.platform != "tpu":
        return f"runs on TPU, not on {case.platform}"
    if case.query_chunk is not None:
        return "ignores query_chunk: leave it None"
    if case.decoding or case.q_len != case.kv_len:
        return "needs queries and keys of the same tokens, not decoding with a cache"
    if case.q_len % (128 * case.context):
        parts = f" on each of {case.context} devices of mesh.context" if case.context > 1 else ""
        return f"needs a length that divides by 128{parts}, got {case.q_len}"
    if case.window is not None and case.positions:
        return "takes a window by index, and cannot know that given positions follow the index: leave positions out"
    return None
