"""Device meshes, and rule tables from parameter names to shardings.

Axes: `data` replicates parameters and splits the batch; `fsdp` splits both; `tensor` splits heads and
feed-forward columns. The compiler (GSPMD, `AxisType.Auto`) inserts the collectives.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.tree import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading axis of every batch leaf

Rules = Sequence[tuple[str, P]]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis gets."""

    data: int = -1   # -1: all devices that the other axes leave
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all). ValueError when the axis sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, and -1 (the rest) at most once; got {sizes}")
    if free:
        sizes[free[0]] = max(1, len(devices) // math.prod(size for size in sizes.values() if size != -1))
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {sizes} needs {math.prod(sizes.values())} devices, but {len(devices)} are here")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
    for size, axes in zip(shape, spec, strict=False):  # a shorter spec leaves the last dimensions whole
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts:
            raise ValueError(
                f"parameter '{name}' of shape {shape} cannot be split: {size} does not divide by {parts} "
                f"(mesh axes {axes})"
            )
    return spec


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree of arrays or shape structs.

    Optimizer moments carry their parameter's name at the end of their own path, so one table serves both.
    """
    def shard(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, match_rule(path_name(path), leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(shard, tree)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of this process to global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`with_sharding_constraint` under the mesh of the context (`jax.set_mesh`); identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)
