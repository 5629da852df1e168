"""Who takes part in a collective, from the text of a compiled program."""

import math
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def groups(members: str) -> tuple[tuple[int, ...], ...]:
    """Replica groups as tuples of device indices.

    Three spellings: `{{0,1},{2,3}}`, `[2,2]<=[4]` (with `T(1,0)`: transposed first), and over axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}` or a part of an axis, `{'a':(1)2}`: size 2 after what the 1 before it takes; with
    `device_ids=(...)` before the axes, a list or `[2,2]T(1,0)`, which are the devices of the mesh.
    """
    if members.startswith("{"):
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", members))
    if members.startswith("["):
        shape, base, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", members).groups()
        ids = _iota(base, order)
        return tuple(map(tuple, ids.reshape([int(n) for n in shape.split(",")]).tolist()))
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", members)}
    ids = np.arange(math.prod(sizes.values()))
    if listed := re.search(r"device_ids=\((.*?\]?(?:T\([\d,]+\))?)\)", members):
        permuted = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", listed[1])
        ids = _iota(*permuted.groups()) if permuted else np.array([int(n) for n in listed[1].split(",")])
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", members[members.rindex("{"):])
    shape, taken = [], []
    for name, size in sizes.items():
        parts = sorted((int(before or 1), int(part or size)) for axis, before, part in chosen if axis == name)
        at = 1
        for before, part in parts:
            shape += [before // at, part]
            taken.append(len(shape) - 1)
            at = before * part
        shape.append(size // at)
    kept = [axis for axis in range(len(shape)) if axis not in taken]
    ids = ids.reshape(shape).transpose(kept + taken)
    return tuple(map(tuple, ids.reshape(-1, math.prod(shape[axis] for axis in taken)).tolist()))


def _iota(base: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in base.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def pairs(members: str) -> Iterator[tuple[int, int]]:
    """(source, target) of a collective-permute, device indices."""
    return ((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", members))
