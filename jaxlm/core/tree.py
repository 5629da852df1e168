"""Pytrees by path: names, counts and comparisons."""

import math
from typing import Any

import jax


def path_name(path: tuple) -> str:
    """A jax key path as `a/b/0/c`."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in tree order; `None` leaves are absent, as everywhere in jax."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def count_parameters(tree: Any) -> int:
    """Number of elements of all leaves; works on `jax.ShapeDtypeStruct` trees as well."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
