"""Least time that collectives need on the links of a torus and between slices, for `jaxlm.train.plan`."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.train.chips import Topology
from jaxlm.train.hlo_groups import groups, pairs
from jaxlm.train.plan_cost import BETWEEN, Collective


class Exchange(NamedTuple):
    """All collectives of one kind along the same axes, per device and step."""

    kind: str
    axes: str      # of the mesh; "" where nothing but other chips of the same index are asked
    network: str   # ICI, the links of a slice, or DCN, between slices
    count: int
    bytes: int     # of whole arrays, see `plan_cost.Collective`


def exchanges(collectives: Counter[Collective], mesh: Mesh) -> tuple[Exchange, ...]:
    """Collectives by kind, axes and network, most bytes first."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for collective, count in collectives.items():
        network = "DCN" if collective.members == BETWEEN else "ICI"
        total = totals.setdefault((collective.kind, _axes(collective, mesh), network), [0, 0])
        total[0] += count
        total[1] += count * collective.bytes
    rows = (Exchange(*key, *total) for key, total in totals.items())
    return tuple(sorted(rows, key=lambda row: row.bytes, reverse=True))


def _axes(collective: Collective, mesh: Mesh) -> str:
    if collective.members == BETWEEN:
        return "data"  # `core.mesh.make_mesh` joins slices along it
    members = next(pairs(collective.members)) if collective.kind == "collective-permute" else \
        groups(collective.members)[0]
    places = np.stack(np.unravel_index(members, mesh.devices.shape))
    return " ".join(name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along.tolist())) > 1)


def network_seconds(collectives: Counter[Collective], mesh: Mesh, topology: Topology) -> tuple[float, float]:
    """Seconds on the busiest ICI link, and on the network cards between slices.

    Full links, no latency. A collective of a group uses the links of every torus axis that the group spans: both
    directions where its members close a ring, one of a line, whose ends have no other; groups that interleave share
    them. Of S bytes among n chips each
    passes on S (n-1)/n in all-gather and reduce-scatter, twice that in all-reduce; in all-to-all a link of an axis of n
    carries S n/8 on a ring and S n/4 on a line. A collective-permute goes the shortest way, axis by axis; links that
    several pairs share add up. Between s slices an all-reduce sends 2 S (s-1)/s.
    """
    # A program of several slices is written for one of them: its indices are those of the first.
    devices = mesh.devices.reshape(-1)[:mesh.size // topology.slices]
    places = np.array([device.coords for device in devices])[:, :len(topology.shape)]
    rings = [side % topology.chip.ring == 0 for side in topology.shape]
    if topology.chip.ring == 4 and not all(rings):  # v5p: whole cubes or none
        rings = [False] * len(rings)
    along = np.zeros(len(topology.shape))                       # bytes on each link of an axis, from groups
    links = np.zeros((*topology.shape, len(topology.shape), 2))  # bytes on each link by chip, axis, direction
    dcn = 0.0
    for collective, count in collectives.items():
        if collective.members == BETWEEN:
            share = (topology.slices - 1) / topology.slices
            dcn += count * collective.bytes * share * (2 if collective.kind == "all-reduce" else 1)
        elif collective.kind == "collective-permute":
            _permute(links, count * collective.bytes, collective.members, places, topology.shape, rings)
        else:
            along += count * _group_load(collective, places, topology.shape, rings)
    busiest = (links.max(axis=tuple(range(len(topology.shape)))) + along[:, None]).max()
    return float(busiest) / topology.chip.link, dcn / topology.chip.dcn


def _group_load(collective: Collective, places: np.ndarray, shape: tuple[int, ...], rings: list[bool]) -> np.ndarray:
    """Bytes on each link of every torus axis; groups that lie between each other's members share the links."""
    members = places[list(groups(collective.members)[0])]
    at = [sorted(set(members[:, axis].tolist())) for axis in range(len(shape))]
    extents = [len(found) for found in at]
    strides = np.array([found[1] - found[0] if len(found) > 1 else 1 for found in at])  # so many groups share a link
    closed = [ring and n * stride == side for ring, n, stride, side in zip(rings, extents, strides, shape, strict=True)]
    if collective.kind == "all-to-all":
        return strides * np.array([collective.bytes * n / (8 if ring else 4) * (n > 1)
                                   for n, ring in zip(extents, closed, strict=True)])
    used = np.array([(2 if ring else 1) if n > 1 else 0 for n, ring in zip(extents, closed, strict=True)]) / strides
    if not used.any():
        return np.zeros(len(shape))
    count = math.prod(extents)
    traffic = collective.bytes * (count - 1) / count * (2 if collective.kind == "all-reduce" else 1)
    return traffic / used.sum() * (used > 0)


def _permute(links: np.ndarray, size: int, members: str, places: np.ndarray, shape: tuple[int, ...],
             rings: list[bool]) -> None:
    """Adds `size` bytes to every link on the way from each source to its target."""
    for source, target in pairs(members):
        at = places[source].copy()
        for axis, side in enumerate(shape):
            distance = int(places[target][axis] - at[axis])
            if rings[axis] and abs(distance) > side // 2:
                distance -= int(math.copysign(side, distance))
            for _ in range(abs(distance)):
                links[(*at, axis, int(distance > 0))] += size
                at[axis] = (at[axis] + (1 if distance > 0 else -1)) % side
