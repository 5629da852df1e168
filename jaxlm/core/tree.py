"""Pytrees by path: names, counts and comparisons."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: tuple) -> str:
    """A jax key path as `a/b/0/c`."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in tree order; `None` leaves are absent, as everywhere in jax."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def select(tree: dict[str, Any], chosen: Callable[[str], bool]) -> dict[str, Any]:
    """The leaves of nested dicts whose path name is chosen; dicts without one are left out.

    With `lambda path: path.endswith("b")`: `{"x": {"a": 1, "b": 2}, "a": 3}` gives `{"x": {"b": 2}}`.
    """
    def part(node: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return node if chosen(path) else None
        found = {key: part(child, f"{path}/{key}" if path else key) for key, child in node.items()}
        return {key: child for key, child in found.items() if child is not None} or None

    return part(tree, "") or {}


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of different leaves as one: the inverse of `select` and its complement. Keys are sorted."""
    result = {}
    for key in sorted({key for tree in trees for key in tree}):
        parts = [tree[key] for tree in trees if key in tree]
        assert len(parts) == 1 or all(isinstance(part, Mapping) for part in parts), f"two leaves called {key}"
        result[key] = combine(*parts) if isinstance(parts[0], Mapping) else parts[0]
    return result


def count_parameters(tree: Any) -> int:
    """Number of elements of all leaves; works on `jax.ShapeDtypeStruct` trees as well."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def digest(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of every leaf's bits and their places, by path name.

    Sums modulo 2^32, which no order of addition changes: the checksum is that of the whole array on any mesh and any
    number of processes. It guards against damage, not against malice.
    """
    names, leaves = zip(*named_leaves(tree).items(), strict=True)
    return dict(zip(names, jax.device_get(_checksums(leaves)).tolist(), strict=True))


@jax.jit
def _checksums(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # Knuth's multiplicative hash of the place, odd so that every bit of a word counts.
    return jnp.sum(words.astype(jnp.uint32) * (place * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)
