"""Merging checkpoints larger than memory: a few tensors at a time, the next ones read while one is computed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig, check_models, depths, switches
from jaxlm.merge.tensors import check_same, labelled, merge_tensor

BASE = -1       # the index under which `read` is asked for the base
ALIGNMENT = 64  # bytes; from such addresses a CPU device reads without a copy of its own

Read = Callable[[int, str], np.ndarray]


def merge_stream(
    names: Sequence[str], read: Read, config: MergeConfig, *, num_models: int, has_base: bool,
    labels: Sequence[str] = (), mesh: Mesh | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and merged tensors, in the order of `names`; equal to `merge_trees` of the same tensors.

    `read(model, name)` is called in another thread, for the base with model `BASE`; it may return views of a file. In
    memory at once are the tensors of two names of all models, one result and what the method needs beside it. Compare
    the headers of the files first (`check_same`): here a difference is found when its tensor's turn comes.

    On a `mesh` every device merges a part of each tensor; the result is the same up to the order of float32 sums.
    Raises ValueError as `merge_trees` does.
    """
    check_models(config, num_models, has_base)
    depth = depths(names, config.rules)
    models = [*range(num_models), *([BASE] if has_base else [])]
    buffers: dict[tuple[int, int], np.ndarray] = {}

    def load(i: int) -> list[np.ndarray]:
        # Two sets of buffers: one is filled while the other is read from.
        return [_aligned(read(model, names[i]), buffers, (i % 2, model)) for model in models]

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(load, 0) if names else None
        for i, name in enumerate(names):
            loaded = following.result()
            following = pool.submit(load, i + 1) if i + 1 < len(names) else None
            yield name, _merge(name, loaded, config, depth[name], num_models, labels, mesh)


def _aligned(array: np.ndarray, buffers: dict[tuple[int, int], np.ndarray], slot: tuple[int, int]) -> np.ndarray:
    """The array at an aligned address: itself, or a copy in a buffer that is kept, which spares fresh pages."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or (
            array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0):
        return array
    if slot not in buffers or buffers[slot].nbytes < array.nbytes + ALIGNMENT:
        buffers[slot] = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffers[slot].ctypes.data % ALIGNMENT
    copy = buffers[slot][start: start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def _merge(
    name: str, loaded: list[np.ndarray], config: MergeConfig, depth: float, num_models: int, labels: Sequence[str],
    mesh: Mesh | None,
) -> np.ndarray:
    tensors, base = loaded[:num_models], loaded[num_models] if len(loaded) > num_models else None
    named = labelled(base, tensors, labels)
    check_same({label: {name: tensor} for label, tensor in named.items()}, config)
    first = tensors[0]
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return first
    if not METHODS[config.method].random and not dict(switches(config)).get("row_wise"):
        # Tensors of one size share a compiled program whatever their shapes, where the axes do not matter.
        base, tensors = None if base is None else base.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    if mesh is not None:
        base, tensors = jax.device_put((base, tensors), _split(tensors[0].shape, mesh))
    # Done before the buffers it reads from are filled again.
    merged = np.asarray(jax.block_until_ready(merge_tensor(name, base, tensors, config, depth=depth)))
    return merged.reshape(first.shape).astype(jnp.dtype(config.dtype or first.dtype), copy=False)


def _split(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The first axis that the devices divide is split over all of them; a tensor without one lies on every device."""
    for axis, size in enumerate(shape):
        if size and size % mesh.size == 0:
            return NamedSharding(mesh, P(*[None] * axis, mesh.axis_names))
    return NamedSharding(mesh, P())
