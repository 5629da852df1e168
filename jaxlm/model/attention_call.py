"""What every attention backend is given: labels of queries and keys, the mask they mean, the part of each device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import ROWS, split_axes
from jaxlm.model.partition import HEADS


class Labels(NamedTuple):
    """What the mask knows of each query or key."""

    index: jax.Array              # [1, T] slot in the row
    segments: jax.Array | None    # [B, T]
    positions: jax.Array | None   # [B, T]; None: the index


class Call(NamedTuple):
    """The arguments of `attention` besides queries, keys and values, as a backend reads them."""

    q: Labels
    kv: Labels
    offset: int | None            # index of the first query among the keys; None: traced
    causal: bool
    window: int | None
    scale: float
    query_chunk: int | None
    shards: int = 1               # parts of the time axis of queries and keys, over the `context` axis of the mesh


class Case(NamedTuple):
    """What decides whether a backend computes the same function; the fields of `resolve_backend`."""

    platform: str
    dtype: str
    head_dim: int
    q_len: int      # of the whole row
    kv_len: int
    decoding: bool
    segments: bool
    positions: bool
    causal: bool
    window: int | None
    query_chunk: int | None
    context: int


def visible(q: Labels, kv: Labels, causal: bool, window: int | None) -> jax.Array | None:
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


def split_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the context where it has several devices and the program is not already that of one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def context_shards() -> int:
    """Parts into which the mesh of the context splits the time axis of activations."""
    mesh = split_mesh()
    return 1 if mesh is None else mesh.shape.get("context", 1)


def per_device(
    compute: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call,
    table: Any = None, table_spec: Any = None,
) -> jax.Array:
    """`compute(q, k, v, call, table)` on each device, on its rows and heads; the compiler cannot split a kernel.

    Context parallelism: with c = `call.shards` > 1 a device holds T/c queries, and the keys and values of its rows
    are gathered over `context`, as in Llama 3 (arXiv:2407.21783, section 3.3.2); the gradient of that is a
    reduce-scatter. Queries and scores never travel. `call.q.index` then says where the queries stand in the row, and
    `call.offset` is None. Worked example, T=8 over c=2, causal; device 1 holds queries 4 to 7:

        keys      0 1 2 3 4 5 6 7
        query 4   x x x x x . . .        device 0 sees the left half of this square only:
        query 7   x x x x x x x x        T^2/8 pairs, device 1 3 T^2/8

    The parts are contiguous, and all devices wait for the last one: it has (2 - 1/c) times the average of causal
    pairs. Memory divides by c all the same, and so do the products outside attention, which are most of the work
    until T nears 6 times the model dimension.

    Args:
      table: arrays that `compute` takes besides, with `table_spec` as their layout.

    Raises ValueError: rows, heads or time that the mesh does not divide.
    """
    mesh = split_mesh()
    if mesh is None:
        return compute(q_BTNH, k_BSKH, v_BSKH, call, table)
    sizes = {"rows": q_BTNH.shape[0], "tokens a row": q_BTNH.shape[1], "key-value heads": k_BSKH.shape[2]}
    for (name, size), axes in zip(sizes.items(), HEADS[:3], strict=True):
        axes, parts = split_axes(axes, mesh)
        if size % parts:
            raise ValueError(f"attention cannot be split: {size} {name} do not divide by {parts} (mesh axes "
                             f"{', '.join(axes)})")

    def local(q_BTNH, k_BTKH, v_BTKH, q: Labels, kv: Labels, table):
        own = call._replace(q=q, kv=kv)
        if call.shards > 1:
            k_BTKH, v_BTKH = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
            own = own._replace(offset=None)
        return compute(q_BTNH, k_BTKH, v_BTKH, own, table)

    # The labels of keys are a few integers a token: they come whole.
    of_q, of_kv = Labels(P(None, "context"), P(*HEADS[:2]), P(*HEADS[:2])), Labels(P(), P(ROWS), P(ROWS))
    return jax.shard_map(
        local, in_specs=(HEADS, HEADS, HEADS, of_q, of_kv, table_spec), out_specs=HEADS, check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, call.q, call.kv, table)
