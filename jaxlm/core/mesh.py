"""Device meshes, and rule tables from parameter names to shardings.

Axes: `data` replicates parameters and splits the rows of a batch; `fsdp` splits both; `context` splits the time axis of
a batch, `tensor` heads, feed-forward columns and the vocabulary; both read the same rows. The compiler (GSPMD,
`AxisType.Auto`) inserts the collectives.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.tree import path_name

AXES = ("data", "fsdp", "context", "tensor")  # slowest network first: neighbours exchange most
ROWS = ("data", "fsdp")                       # the axes that split the rows of a batch
BATCH = P(ROWS, "context")                    # a batch leaf, [B, T]; of one without time, [B], its first entry

Rules = Sequence[tuple[str, P]]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis gets."""

    data: int = -1   # -1: all devices that the other axes leave
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all).

    Several TPU slices are joined along `data`, so that only gradients cross the network between them.

    Raises ValueError: sizes that do not multiply to the number of devices, `data` that the slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, and -1 (the rest) at most once; got {sizes}")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(_wrong_count(sizes, free, taken, len(devices)))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % num_slices:
        raise ValueError(f"mesh.data {sizes['data']} does not divide over {num_slices} slices, which only this axis "
                         f"may span; use a multiple of {num_slices}")
    shape, kinds = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    if num_slices == 1:
        # An axis of the mesh may take a part of an axis of the torus, as data 2 of v5p:4x4x8 does.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=kinds)
    across = (num_slices,) + (1,) * (len(AXES) - 1)
    within = (sizes["data"] // num_slices, *shape[1:])
    return Mesh(mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True), AXES, axis_types=kinds)


def _wrong_count(sizes: dict[str, int], free: list[str], taken: int, count: int) -> str:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    wanted = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis not in free)
    if free:
        return (f"mesh axes {wanted} take {taken} devices, which do not divide the {count} here; their product must be "
                f"one of {', '.join(map(str, divisors))}")
    return (f"mesh axes {wanted} need {math.prod(sizes.values())} devices, but {count} are here; set one axis to -1 "
            "to give it the rest")


def match_rule(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    """The spec of the first rule whose pattern is found in `name`; scalars are always replicated.

    Raises ValueError when no rule matches, or when a dimension does not divide by its mesh axes.
    """
    if not shape:
        return P()
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"no sharding rule matches parameter '{name}' of shape {shape}")
    if len(spec) > len(shape):
        raise ValueError(f"the sharding rule of parameter '{name}', {spec}, has more dimensions than its shape {shape}")
    for i, (size, axes) in enumerate(zip(shape, spec, strict=False)):  # a shorter spec leaves the last ones whole
        axes, parts = split_axes(axes, mesh)
        if size % parts:
            fitting = [n for n in range(1, parts + 1) if size % n == 0]
            raise ValueError(
                f"parameter '{name}' of shape {shape} cannot be split: dimension {i} of size {size} does not divide by "
                f"{parts} (mesh axes {', '.join(axes)}); {', '.join(map(str, fitting))} would")
    return spec


def split_axes(entry: str | Sequence[str] | None, mesh: Mesh | AbstractMesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes in one entry of a spec, and into how many parts they split a dimension."""
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree of arrays or shape structs.

    Optimizer moments carry their parameter's name at the end of their own path, so one table serves both.
    """
    def shard(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, match_rule(path_name(path), leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(shard, tree)


class DataShard(NamedTuple):
    """The part of every batch that one process loads: part `index` of `count` equal ones."""

    index: int
    count: int


def data_shard(mesh: Mesh, process: int | None = None) -> DataShard:
    """Which rows of a batch the devices of a process (default: this one) hold.

    Processes whose devices differ only along `tensor` or `context` hold the same rows and load them alike.
    ValueError when the rows of two processes overlap but are not the same.
    """
    process = jax.process_index() if process is None else process
    owners = np.moveaxis(mesh.devices, [AXES.index(axis) for axis in ROWS], [0, 1]).reshape(
        math.prod(mesh.shape[axis] for axis in ROWS), -1)
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(owners):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != len(owners) or len(set(map(len, parts))) != 1:
        raise ValueError(f"mesh {dict(mesh.shape)} gives the {len(rows)} processes overlapping parts of a batch; make "
                         "mesh.tensor * mesh.context divide, or be a multiple of, the devices of a process")
    return DataShard(parts.index(tuple(sorted(rows[process]))), len(parts))


@functools.lru_cache
def _num_loaders(mesh: Mesh) -> int:
    """`data_shard(mesh).count`, which looks at every device of the mesh: once, not at every step."""
    return data_shard(mesh).count


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The rows that this process loaded (its `data_shard`), [B / count, T], as global arrays [B, T]."""
    count = _num_loaders(mesh)

    def put(leaf: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, P(*BATCH[: leaf.ndim]))
        shape = (leaf.shape[0] * count, *leaf.shape[1:])
        held = sorted({index[0].indices(shape[0])[:2]
                       for index in sharding.addressable_devices_indices_map(shape).values()})
        first, offset = {}, 0  # of each block of rows: where it begins in the batch, and in this leaf
        for start, stop in held:
            first[start], offset = offset, offset + stop - start

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop = index[0].indices(shape[0])[:2]
            return leaf[(slice(first[start], first[start] + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def put_whole(batch: Any, mesh: Mesh) -> Any:
    """A batch [B, T] that every process holds whole, as global arrays; each device takes its part."""
    def put(leaf: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, P(*BATCH[: leaf.ndim]))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, batch)


def place_leaf(path: str, leaf: np.ndarray, *, mesh: Mesh, rules: Rules) -> jax.Array:
    """One host array, the same in every process, on the devices that its rule names."""
    sharding = NamedSharding(mesh, match_rule(path, leaf.shape, rules, mesh))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`with_sharding_constraint` under the mesh of the context (`jax.set_mesh`); identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)
