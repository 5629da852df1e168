"""Optimized HLO text as computations and instructions, and how often each loop runs.

`compiled.cost_analysis()` counts the body of a loop once, and the layers of a model are a loop; so what a step costs is
counted from `compiled.as_text()` (`jaxlm.train.plan_cost`). The grammar is XLA's: one instruction a line,

    %name = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kLoop, calls=%computation, metadata={...}

with the memory space of a value as `S(n)` in its layout: without it the value lies in HBM, S(1) is VMEM on the chip.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element; a type that is not here (token, opaque) has none.
ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
    "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5,
}
MAX_TRIPS = 100_000  # a counter that runs longer is taken as not understood

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_SAME = {"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier"}  # value of their operand


class Array(NamedTuple):
    """One array of a shape; a tuple has several."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # 0: HBM

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line."""

    name: str
    op: str
    arrays: tuple[Array, ...]   # of the result, tuples flattened
    operands: tuple[str, ...]   # names in the same computation
    literal: str                # what stands in the parentheses: the value of a constant, the number of a parameter
    rest: str                   # attributes

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without %."""
        found = re.search(rf'\b{name}=[%"]?([\w.\-]+)', self.rest)
        return found and found[1]


class Computation(NamedTuple):
    """A function of the module; `root` is what it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions.values() if i.op == "parameter" and int(i.literal) == number)


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Frame(NamedTuple):
    """A computation as it is called: by which instruction, in which frame, and with which value of the loop counter."""

    computation: Computation
    caller: Instruction | None = None
    parent: "Frame | None" = None
    counter: tuple[int, int] | None = None  # index in the loop's tuple, value


def parse_module(text: str) -> Module:
    """The computations of `compiled.as_text()`.

    Raises ValueError for a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root, instructions = "", "", "", {}
    for line in _whole_lines(text):
        if header := _HEADER.match(line):
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif line == "}":
            computations[name] = Computation(name, instructions, root)
        elif match := _INSTRUCTION.match(line):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those that continue an attribute (a kernel's metadata) joined to the instruction before them."""
    held = ""
    for line in text.splitlines():
        if held and not (line == "}" or _INSTRUCTION.match(line)):
            held += line
            continue
        if held:
            yield held
        held = line if _INSTRUCTION.match(line) else ""
        if not held:
            yield line
    yield held


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    inside, rest = call[opening + 1:closing], call[closing + 1:]
    arrays = tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n), _space(layout))
                   for dtype, dims, layout in _ARRAY.findall(shape))
    op = call[:opening]
    operands = () if op in ("constant", "parameter") else tuple(
        part.split()[-1].lstrip("%") for part in re.sub(r"/\*.*?\*/|\{.*?\}|\[[\d,]*\]", "", inside).split(",")
        if part.strip())
    return Instruction(name, op, arrays, operands, inside, rest)


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def trip_count(module: Module, loop: Instruction, frame: Frame) -> int | None:
    """How often the body of a `while` in `frame` runs; None when its condition is not a counter's.

    CPU and GPU write `known_trip_count`; for TPU the counter is run: its start, the sum that the body makes of it and
    the comparison are constants of the program.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    body, condition = (module.computations[loop.attribute(key)] for key in ("body", "condition"))
    for index, array in enumerate(module.computations[body.name].parameter(0).arrays):
        if array.dims or array.dtype not in ("s32", "u32", "s64", "u64"):
            continue
        value, trips = evaluate(module, frame, loop.operands[0], (index,)), 0
        while value is not None and trips < MAX_TRIPS:
            at = (index, value)
            more = evaluate(module, Frame(condition, loop, frame, at), condition.root)
            after = evaluate(module, Frame(body, loop, frame, at), body.root, (index,)) if more else None
            if more is False:
                return trips
            if more is None or after in (None, value):
                break
            value, trips = after, trips + 1
    return None


def evaluate(module: Module, frame: Frame, name: str, path: tuple[int, ...] = ()) -> int | bool | None:
    """The value of an integer scalar, element `path` of instruction `name`, if it is a constant of the program."""
    i = frame.computation.instructions[name]
    again = lambda operand, path=path: evaluate(module, frame, operand, path)
    if i.op == "constant":
        return {"true": True, "false": False}.get(i.literal) if not i.literal.lstrip("-").isdigit() else int(i.literal)
    if i.op == "parameter":
        return _argument(module, frame, int(i.literal), path)
    if i.op in _SAME:
        return again(i.operands[0], () if i.op.startswith("copy-") else path)
    if i.op == "get-tuple-element":
        return again(i.operands[0], (int(i.attribute("index")), *path))
    if i.op == "tuple":
        return again(i.operands[path[0]], path[1:])
    if i.op in ("fusion", "call"):
        inner = module.computations[i.attribute("calls") or i.attribute("to_apply")]
        return evaluate(module, Frame(inner, i, frame), inner.root, path)
    if i.op == "while" and path and _invariant(module, i, path[0]):
        return again(i.operands[0])
    if i.op == "compare" or i.op in _ARITHMETIC:
        a, b = (again(operand) for operand in i.operands)
        rule = _COMPARISONS[i.attribute("direction")] if i.op == "compare" else _ARITHMETIC[i.op]
        return None if a is None or b is None else rule(a, b)
    return None


_ARITHMETIC = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
               "and": lambda a, b: a and b}
_COMPARISONS = {"LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
                "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b}


def _argument(module: Module, frame: Frame, number: int, path: tuple[int, ...]) -> int | bool | None:
    if frame.caller is None:
        return None
    if frame.caller.op != "while":
        return evaluate(module, frame.parent, frame.caller.operands[number], path)
    if frame.counter and path == frame.counter[:1]:
        return frame.counter[1]
    if path and _invariant(module, frame.caller, path[0]):
        return evaluate(module, frame.parent, frame.caller.operands[0], path)
    return None


def _invariant(module: Module, loop: Instruction, index: int) -> bool:
    """Whether the body hands element `index` of its tuple on unchanged."""
    body = module.computations[loop.attribute("body")]
    i = body.instructions[body.root]
    if i.op != "tuple":
        return False
    i = body.instructions[i.operands[index]]
    while i.op in _SAME:
        i = body.instructions[i.operands[0]]
    return i.op == "get-tuple-element" and int(i.attribute("index")) == index and \
        body.instructions[i.operands[0]].op == "parameter"
