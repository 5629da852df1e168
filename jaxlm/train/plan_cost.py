"""What one run of a compiled program costs a device: FLOPs of products, HBM bytes, collectives; loops counted in full.

Counted are products (dot, and the convolutions that TPU makes of them) and Pallas kernels; additions and the like are
free beside them. HBM bytes are what instructions outside of fusions read and write there; a slice reads the slice,
an update in place writes the update. Padding to the tiles of the memory is not counted, nor what a kernel reads twice.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxlm.train.hlo import Array, Computation, Frame, Instruction, Module, parse_module, trip_count
from jaxlm.train.hlo_groups import groups

BETWEEN = "slices"  # the members of an exchange between slices
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Products per visible pair of query and key: scores and values forward; the backward kernels make scores again.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "add-dependency", "domain", "get-dimension-size"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_ALIKE = {"bitcast", "reshape", "copy", "convert", "transpose"}


class Collective(NamedTuple):
    """One exchange: what it does with which payload, among whom."""

    kind: str      # of KINDS
    bytes: int     # the whole array on one device: gathered, or before it is reduced, scattered, sent
    members: str   # groups or pairs as in the text, see `groups` and `pairs`; BETWEEN


@dataclass
class Cost:
    """Totals of one run on one device."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[Collective] = field(default_factory=Counter)  # how often each runs
    uncounted: set[str] = field(default_factory=set)  # kernels of unknown cost, loops of unknown length (taken once)

    def add(self, other: "Cost", times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        self.uncounted |= other.uncounted


def count_cost(text: str) -> Cost:
    """The cost of one run of `compiled.as_text()` on one device."""
    module = parse_module(text)
    return _cost(module, Frame(module.computations[module.entry]))


def _cost(module: Module, frame: Frame, fused: bool = False) -> Cost:
    """Of one computation. Inside a fusion nothing touches HBM: its instruction has counted that."""
    total = Cost()
    for i in frame.computation.instructions.values():
        called = [module.computations[name] for name in _called(i)]
        inner = [Frame(computation, i, frame) for computation in called]
        if i.op == "while":
            trips = trip_count(module, i, frame)
            if trips is None:
                total.uncounted.add(f"loop {i.name}")
            total.add(_cost(module, inner[0]), 1 if trips is None else trips)
        elif i.op == "conditional":  # the branch that costs most: an update that is not skipped
            total.add(max((_cost(module, branch) for branch in inner), key=lambda cost: cost.hbm_bytes))
        elif i.op == "fusion":
            part = _cost(module, inner[0], fused=True)
            if called[0].name.startswith("all-reduce-scatter"):  # TPU writes it as all-reduce and slice
                part.collectives = Counter({c._replace(kind="reduce-scatter"): n for c, n in part.collectives.items()})
            total.add(part)
            total.hbm_bytes += 0 if fused else _fusion_bytes(module, frame.computation, i)
        elif i.op in ("call", "async-start"):
            total.add(_cost(module, inner[0], fused))
        else:
            total.add(_own_cost(frame.computation, i, fused))
    return total


def _called(i: Instruction) -> list[str]:
    if i.op == "while":
        return [i.attribute("body")]
    if i.op == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        names = listed[1].split(",") if listed else [i.attribute("true_computation"), i.attribute("false_computation")]
        return [name.strip().lstrip("%") for name in names]
    if i.op in ("fusion", "call", "async-start"):
        return [i.attribute("calls") or i.attribute("to_apply")]
    return []


def _own_cost(computation: Computation, i: Instruction, fused: bool) -> Cost:
    """Of an instruction that calls nothing."""
    if i.op in _FREE or i.op.endswith(("-done", "-update")):
        return Cost()
    operands = [computation.instructions[name] for name in i.operands]
    cost = Cost(hbm_bytes=0 if fused else _own_bytes(i, operands))
    if i.op == "dot":
        contracted = [operands[0].arrays[0].dims[d] for d in _numbers(i.rest, "lhs_contracting_dims")]
        cost.flops = 2 * math.prod(i.arrays[0].dims) * math.prod(contracted)
    elif i.op == "convolution":
        cost.flops = _convolution_flops(i, *(operand.arrays[0].dims for operand in operands))
    elif i.op == "custom-call" and i.attribute("custom_call_target") == "tpu_custom_call":
        flops = _kernel_flops(i, operands)
        cost.flops, cost.uncounted = flops or 0, set() if flops is not None else {f"kernel {i.name}"}
    kind = i.op.removesuffix("-start")
    if "_xla_megascale_transfer_type" in i.rest and kind == "send":  # between slices, through the hosts
        kind = i.attribute("_xla_megascale_transfer_type")
        cost.collectives[Collective(kind.lower().replace("_", "-"), int(operands[0].arrays[0].bytes), BETWEEN)] += 1
    elif kind in ("ragged-all-to-all", "collective-broadcast"):
        cost.uncounted.add(f"{kind} {i.name}")
    elif kind in KINDS:
        members = _members(i)
        size = sum(array.bytes for operand in operands for array in operand.arrays)
        size *= len(groups(members)[0]) if kind == "all-gather" else 1
        cost.collectives[Collective(kind, int(size), members)] += 1
    return cost


# ---- bytes

def _hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


def _own_bytes(i: Instruction, operands: list[Instruction]) -> float:
    if i.op == "custom-call" and "AllocateBuffer" in i.rest:
        return 0
    if i.op in ("copy-start", "collective-permute-start"):
        return _hbm(i.arrays[:2])  # (target, source, flags)
    if i.op in _SLICES:
        return _hbm(i.arrays) * (2 if operands[0].arrays[0].space == 0 else 1)
    if i.op == "dynamic-update-slice":
        return (_hbm(i.arrays) > 0) * operands[1].arrays[0].bytes + _hbm(operands[1].arrays)
    # The tuple of a start names its operands again before its results.
    results = i.arrays[len(operands):] if i.op.endswith("-start") else i.arrays
    return _hbm(results) + sum(_hbm(operand.arrays) for operand in operands)


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> float:
    """Reads of each operand in HBM, as far as the fusion needs it, and the write of the result."""
    inner = module.computations[fusion.attribute("calls")]
    total = 0.0
    for number, name in enumerate(fusion.operands):
        whole = _hbm(computation.instructions[name].arrays)
        total += min(whole, _read(module, inner, inner.parameter(number).name)) if whole else 0
    root = inner.instructions[inner.root]
    results = [inner.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    if len(results) != len(fusion.arrays):
        return total + _hbm(fusion.arrays)
    return total + sum(min(array.bytes, _written(module, inner, result))
                       for array, result in zip(fusion.arrays, results, strict=True) if array.space == 0)


def _read(module: Module, computation: Computation, name: str) -> float:
    """Bytes of value `name` that a fused computation reads; infinite: all of it."""
    total = 0.0
    for user in computation.instructions.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.op in _SLICES and first:
            total += sum(array.bytes for array in user.arrays)
        elif user.op in ("dynamic-update-slice", "scatter") and first:
            pass  # in place
        elif user.op in _ALIKE:
            total += _read(module, computation, user.name) if user.name != computation.root else math.inf
        elif user.op == "fusion":
            inner = module.computations[user.attribute("calls")]
            total += sum(_read(module, inner, inner.parameter(number).name)
                         for number, operand in enumerate(user.operands) if operand == name)
        else:
            return math.inf
    return total


def _written(module: Module, computation: Computation, result: Instruction) -> float:
    """Bytes that a result of a fused computation writes, an update in place only the update; infinite: all of it."""
    while result.op in _ALIKE:
        result = computation.instructions[result.operands[0]]
    if result.op == "dynamic-update-slice":
        return computation.instructions[result.operands[1]].arrays[0].bytes
    if result.op == "scatter":  # reads and writes the rows
        return 2 * computation.instructions[result.operands[2]].arrays[0].bytes
    if result.op == "fusion" and len(result.arrays) == 1:
        inner = module.computations[result.attribute("calls")]
        return _written(module, inner, inner.instructions[inner.root])
    return math.inf


# ---- FLOPs

def _numbers(text: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """`2 * batch * features in * features out * positions`, positions inside the padding only.

    TPU writes the batch dimensions of a product as a window with as much padding, of which one position counts.
    """
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = {key: value.split("x") for key, value in re.findall(
        r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or [""])[0])}
    positions = 1
    for axis in sorted(set(left) - {"b", "f"}):
        at = int(axis)
        get = lambda key, default, at=at: window[key][at] if key in window else default
        positions *= _valid_positions(
            lhs[left.index(axis)], rhs[right.index(axis)], i.arrays[0].dims[out.index(axis)],
            int(get("pad", "0_0").split("_")[0]), int(get("stride", 1)), int(get("lhs_dilate", 1)),
            int(get("rhs_dilate", 1)))
    split = re.findall(r"(?:feature|batch)_group_count=(\d+)", i.rest)
    return 2 * lhs[left.index("b")] * lhs[left.index("f")] * rhs[right.index("o")] * positions / \
        math.prod(map(int, split))


@lru_cache(maxsize=4096)
def _valid_positions(size: int, window: int, out: int, pad: int, stride: int, dilate: int, spread: int) -> int:
    """Pairs of output and window position that meet an element of the input."""
    at = np.arange(out, dtype=np.int64)[:, None] * stride + np.arange(window)[None] * spread - pad
    return int(((at >= 0) & (at % dilate == 0) & (at // dilate < size)).sum())


def _kernel_flops(i: Instruction, operands: list[Instruction]) -> float | None:
    """Of a Pallas kernel: its own estimate, or for splash attention the blocks that the mask leaves, computed whole.

    A kernel with a list of blocks (int8 operands) is taken as causal, with fewer columns in the list under a window;
    one without sees every pair. Where time is split over devices, this is the last, which sees most.
    """
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.rest)
    if estimate:
        return float(estimate[1])
    products = next((n for name, n in SPLASH_PRODUCTS.items() if i.name.startswith(name)), None)
    if products is None:
        return None
    values = [operand.arrays[0].dims for operand in operands if operand.arrays[0].dtype in ("bf16", "f32")]
    *heads, queries, size = values[0]
    keys, seen = values[1][-2], 1.0
    lists = [operand.arrays[0].dims[-2:] for operand in operands if operand.arrays[0].dtype == "s8"]
    if lists:
        block_q, block_kv = (int(re.search(rf"{key}(?:_dkv|_dq)?\W+(\d+)", i.rest)[1])
                             for key in ("block_q", "block_kv"))
        rows, columns = queries // block_q, keys // block_kv
        width = min(*lists[-1]) if min(*lists[-1]) < min(rows, columns) else columns
        seen = sum(min(columns - rows + row + 1, width) for row in range(rows)) / (rows * columns)
    return 2 * products * math.prod(heads) * queries * keys * seen * size


# ---- who takes part

def _members(i: Instruction) -> str:
    key = "source_target_pairs" if i.op.startswith("collective-permute") else "replica_groups"
    return re.search(rf"{key}=(mesh.*?\}}|.*?)(?:, [a-z_]+=|$)", i.rest)[1].strip()
