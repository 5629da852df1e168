"""Merging one tensor, and trees of them of any architecture."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.rng import derive
from jaxlm.core.tree import named_leaves
from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig, Values, check_models, depths, resolve, switches

VOCABULARY = re.compile(r"embed|wte|head|vocab|predictions")
POSITION = re.compile(r"position|wpe|token_type|norm", re.IGNORECASE)


class Layout(NamedTuple):
    """Which tensors of a checkpoint a leaf holds: what is one tensor to a method, and what its name and axes are.

    Random masks follow names and axes as stored, `row_wise` and DELLA the last axis as stored, and of equal magnitudes
    those stay that are stored first: with the layouts of a checkpoint a merged tree equals the merged checkpoint.
    """

    names: tuple[str, ...]
    layered: bool = False   # the leaf's first axis holds as many tensors as there are names; else there is one
    store: Callable[[jax.Array], jax.Array] = lambda part: part     # our part -> the tensor as stored
    load: Callable[[jax.Array], jax.Array] = lambda stored: stored  # and back


def stacked_layouts(tree: Any, prefix: str = "layers") -> dict[str, Layout]:
    """Layouts of the leaves under `prefix`, whose first axis is the layer.

    Leaf `layers/mlp/up/kernel` [2, D, F]: the tensors `layers/0/mlp/up/kernel` and `layers/1/mlp/up/kernel`.
    """
    return {path: Layout(tuple(f"{prefix}/{i}{path.removeprefix(prefix)}" for i in range(leaf.shape[0])), layered=True)
            for path, leaf in named_leaves(tree).items() if path.startswith(f"{prefix}/")}


def merge_trees(
    base: Any, trees: Sequence[Any], config: MergeConfig, *, weights: jax.Array | None = None,
    layouts: Mapping[str, Layout] | None = None, labels: Sequence[str] = (),
) -> Any:
    """One parameter tree from several, leaf by leaf: float32 inside, then the format of the first model.

    Args:
      base: what task vectors start from, or None (`check_models`).
      weights: [N], in place of those of `config`; may be traced, so that `jax.vmap` and `jax.grad` over them work.
      layouts: by path name, of the leaves that are not one tensor of that name (`stacked_layouts`).
      labels: names of the models in errors.

    Leaves that hold no floats are copied and must be equal. Raises one ValueError for all differences of the trees.
    """
    check_models(config, len(trees), base is not None)
    if weights is not None and (config.weights or any(rule.setting == "weights" for rule in config.rules)
                                or not METHODS[config.method].weighted):
        raise ValueError(f"weights are given beside those of the configuration, or to method {config.method} which "
                         "takes none")
    named = [named_leaves(tree) for tree in trees]
    bases = None if base is None else named_leaves(base)
    check_same(labelled(bases, named, labels), config)
    plan = {path: (layouts or {}).get(path, Layout((path,))) for path in named[0]}
    for path, layout in plan.items():
        if len(layout.names) != (named[0][path].shape[0] if layout.layered else 1):
            raise ValueError(f"the layout of {path} has {len(layout.names)} names, its leaf has shape "
                             f"{named[0][path].shape}")
    depth = depths((name for layout in plan.values() for name in layout.names), config.rules)
    merged = []
    for path, layout in plan.items():
        leaves = [leaves_of[path] for leaves_of in named]
        if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            merged.append(leaves[0])
            continue
        values = [resolve(config, name, depth[name], len(trees)) for name in layout.names]
        if weights is not None:
            values = [own._replace(weights=weights) for own in values]
        merged.append(merge_leaf(layout, None if bases is None else bases[path], leaves, config, values))
    return jax.tree.unflatten(jax.tree.structure(trees[0]), merged)


def merge_tensor(
    name: str, base: Any, leaves: Sequence[Any], config: MergeConfig, *, depth: float = 0.0
) -> jax.Array:
    """One tensor from those of several models; `name` gives its numbers and its random masks, `depth` see `depths`."""
    return merge_leaf(Layout((name,)), base, leaves, config, [resolve(config, name, depth, len(leaves))])


def merge_leaf(
    layout: Layout, base: Any, leaves: Sequence[Any], config: MergeConfig, values: Sequence[Values]
) -> jax.Array:
    """One leaf; `values` are those of each of its tensors."""
    method = METHODS[config.method]
    _, layered, store, load = layout
    dtype = jax.dtypes.canonicalize_dtype(config.dtype or leaves[0].dtype)
    if not leaves[0].size:
        return jnp.asarray(leaves[0], dtype)
    if layered:
        store, load = jax.vmap(store), jax.vmap(load)
    ordered = method.ordered or dict(switches(config)).get("row_wise", False)  # else no axis has a meaning
    if ordered:
        base, leaves = None if base is None else store(base), [store(leaf) for leaf in leaves]
    keys = [derive(config.seed or 0, name) for name in layout.names] if method.random else None
    arguments = [(own.weights, own.numbers) for own in values]
    if layered:
        arguments = jax.tree.map(lambda *parts: jnp.stack(parts), *arguments)
        keys = None if keys is None else jnp.stack(keys)
    else:
        arguments, keys = arguments[0], None if keys is None else keys[0]
    merged = _merge(base, tuple(leaves), *arguments, keys, name=config.method, fixed=switches(config), dtype=dtype,
                    layered=layered)
    return load(merged) if ordered else merged


@partial(jax.jit, static_argnames=("name", "fixed", "dtype", "layered"))
def _merge(
    base: jax.Array | None, leaves: tuple[jax.Array, ...], weights: jax.Array, numbers: dict[str, jax.Array],
    key: jax.Array | None, *, name: str, fixed: tuple[tuple[str, Any], ...], dtype: Any, layered: bool,
) -> jax.Array:
    def one(base, stacked, weights, numbers, key):
        own = {} if key is None else {"key": key}
        return METHODS[name].function(base, stacked, weights, **numbers, **dict(fixed), **own).astype(dtype)

    # XLA never makes the stack: every method reads its models one by one, and casts what it reads.
    stacked = jnp.stack(leaves, axis=1 if layered else 0)
    return (jax.vmap(one) if layered else one)(base, stacked, weights, numbers, key)


def labelled(base: Any | None, models: Sequence[Any], labels: Sequence[str] = ()) -> dict[str, Any]:
    """Models and base by the names that errors call them."""
    assert not labels or len(set(labels)) == len(models)
    named = dict(zip(labels or [f"model {i}" for i in range(len(models))], models, strict=True))
    return named if base is None else {**named, "base": base}


def check_same(models: Mapping[str, Mapping[str, Any]], config: MergeConfig) -> None:
    """One ValueError that lists (the first 40 of) all differences of models, given as tensors by name.

    Tensors need `shape` and `dtype` only; those that hold no floats, when they are arrays, must be equal. Float formats
    may differ if `config.dtype` says which one the result has.
    """
    problems = []
    for name in dict.fromkeys(name for tensors in models.values() for name in tensors):
        problems += _differences(name, {label: tensors.get(name) for label, tensors in models.items()}, config)
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        raise ValueError(f"the models cannot be merged, {len(problems)} difference(s):\n  "
                         + "\n  ".join([*problems[:40], *more]))


def _differences(name: str, tensors: Mapping[str, Any], config: MergeConfig) -> list[str]:
    absent = [label for label, tensor in tensors.items() if tensor is None]
    if absent:
        return [f"{name}: only in {', '.join(label for label in tensors if label not in absent)}, not in "
                f"{', '.join(absent)}"]
    shapes = {label: tuple(tensor.shape) for label, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        return [_shape_difference(name, shapes)]
    formats = {label: jnp.dtype(tensor.dtype) for label, tensor in tensors.items()}
    floats = {jnp.issubdtype(dtype, jnp.floating) for dtype in formats.values()}
    if len(set(formats.values())) > 1 and (floats != {True} or config.dtype is None):
        hint = "; merge.dtype chooses that of the result" if floats == {True} else ""
        return [f"{name}: {', '.join(f'{dtype} in {label}' for label, dtype in formats.items())}{hint}"]
    if floats == {False} and not all(isinstance(tensor, jax.ShapeDtypeStruct) for tensor in tensors.values()):
        return _unequal(name, tensors)
    return []


def _shape_difference(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    first = next(iter(shapes.values()))
    differing = {axis for shape in shapes.values() if len(shape) == len(first)
                 for axis in range(len(first)) if shape[axis] != first[axis]}
    same_rank = all(len(shape) == len(first) for shape in shapes.values())
    if same_rank and len(differing) == 1 and VOCABULARY.search(name) and not POSITION.search(name):
        axis = differing.pop()
        sizes = ", ".join(f"{shape[axis]} tokens in {label}" for label, shape in shapes.items())
        return f"{name}: different vocabulary sizes, {sizes}; merging needs models of one tokenizer"
    return f"{name}: shape {', '.join(f'{shape} in {label}' for label, shape in shapes.items())}"


def _unequal(name: str, tensors: Mapping[str, Any]) -> list[str]:
    if any(isinstance(tensor, jax.core.Tracer) for tensor in tensors.values()):
        return [f"{name}: holds no floats and cannot be compared while jax traces; leave it out of the traced trees"]
    first, *others = tensors
    unequal = [label for label in others if not np.array_equal(tensors[first], tensors[label])]
    return [f"{name}: holds no floats, so it is copied, but differs in {', '.join(unequal)} from {first}"] \
        if unequal else []
