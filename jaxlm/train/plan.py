"""Plan a step for chips that are not here: compile it ahead of time with the TPU compiler, and read what it costs.

The compiler is libtpu (`pip install 'jaxlm[plan]'`), which needs no TPU to compile. It is the one of a real run, so a
step that it refuses would not run, and memory is what it would be. The time is a roofline: products at the peak of the
chip, bytes at the bandwidth of HBM and links, each alone and all overlapped. A real step is slower.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core.log import first_line, human_count
from jaxlm.core.mesh import AXES, MeshConfig, make_mesh
from jaxlm.train.chips import Topology, without_disk_cache
from jaxlm.train.plan_cost import count_cost
from jaxlm.train.plan_network import Exchange, exchanges, network_seconds

# (mesh, micro-batches) -> a jitted step and its arguments, shapes with shardings. ValueError: they do not divide.
Program = Callable[[Mesh, int], tuple[Any, tuple]]
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MAX_COMPILED = 4   # candidates that the search for a mesh compiles
MAX_ACCUMULATE = 1024


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is for, whatever it is computed on."""

    tokens: int          # of a global batch
    model_flops: float   # of a global batch, as MFU counts them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled step. Bytes and FLOPs are per chip and step."""

    topology: Topology
    mesh: dict[str, int]
    accumulate: int
    work: Work
    compile_seconds: float
    arguments: int
    outputs: int         # of which `reused` lie where arguments lay
    reused: int
    temporaries: int
    program: int         # the code itself
    flops: float
    hbm_bytes: float
    exchanges: tuple[Exchange, ...]
    seconds: dict[str, float]   # by resource, each alone
    uncounted: tuple[str, ...]  # kernels and loops of unknown cost

    @property
    def peak(self) -> int:
        """Bytes of HBM in use at once, at most."""
        return self.arguments + self.outputs - self.reused + self.temporaries + self.program

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def step_seconds(self) -> float:
        """Least time of a step: everything overlaps."""
        return self.seconds[self.bound]

    @property
    def mfu(self) -> float:
        """Most model FLOPs utilisation that the roofline allows."""
        chips = math.prod(self.mesh.values())
        return self.work.model_flops / (chips * self.topology.chip.peak * self.step_seconds)


class TooLargeError(ValueError):
    """The step does not fit the memory of a chip; `needed` bytes are what is known to be needed."""

    def __init__(self, message: str, needed: float, temporaries: float) -> None:
        super().__init__(message)
        self.needed, self.temporaries = needed, temporaries


def plan_step(program: Program, topology: Topology, config: MeshConfig, accumulate: int, work: Work) -> Plan:
    """Compiles the step for `topology` and counts.

    Raises ValueError: a mesh or batch that does not divide. TooLargeError: more memory than a chip has.
    """
    mesh = make_mesh(config, topology.devices)
    step, arguments = program(mesh, accumulate)
    _check_arguments(argument_bytes(arguments), topology)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh), without_disk_cache():
            compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(error, topology, argument_bytes(arguments)) from None
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), count_cost(compiled.as_text())
    chip, (ici, dcn) = topology.chip, network_seconds(cost.collectives, mesh, topology)
    return Plan(
        topology=topology, mesh=dict(mesh.shape), accumulate=accumulate, work=work, compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes, outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes, flops=cost.flops, hbm_bytes=cost.hbm_bytes,
        exchanges=exchanges(cost.collectives, mesh),
        seconds={"compute": cost.flops / chip.peak, "HBM": cost.hbm_bytes / chip.bandwidth, "ICI": ici, "DCN": dcn},
        uncounted=tuple(sorted(cost.uncounted)))


def argument_bytes(arguments: Any) -> int:
    """Bytes of arguments on one device, from shapes and shardings alone: less than this no compiler needs."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(arguments))


def _check_arguments(size: int, topology: Topology) -> None:
    if size > topology.chip.hbm:
        raise TooLargeError(f"{topology.text}: the arguments alone are {gib(size)} a chip, and a chip has "
                            f"{gib(topology.chip.hbm)}", size, 0)


def refusal(error: Exception, topology: Topology, arguments: int) -> Exception:
    """The compiler's refusal in one sentence; what is no refusal for memory is returned as it came.

    Args:
      arguments: their bytes on a chip, which some of the compiler's figures include.
    """
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return error
    used = re.search(r"Used ([\d.]+)([BKMGT])|temporaries \(([\d.]+)([BKMGT])\)", message)
    if not used:
        return TooLargeError(f"{topology.text}: the compiler refuses the step: {first_line(error)}", math.inf, 0)
    needed = float(used[1] or used[3]) * UNITS[used[2] or used[4]]
    what = "in all" if used[1] else "for temporaries"
    return TooLargeError(f"{topology.text}: the step needs {gib(needed)} a chip {what}, and a chip has "
                         f"{gib(topology.chip.hbm)}", needed, max(0, needed - arguments) if used[1] else needed)


# ---- the nearest mesh that fits

def nearest_fit(program: Program, topology: Topology, config: MeshConfig, accumulate: int, work: Work,
                refused: TooLargeError, report: Callable[[str], None]) -> Plan | None:
    """The first mesh on the same chips that fits, from the nearest to what was asked; None when none tried does.

    Distance counts doublings and halvings of axes and of `accumulate`. A candidate is skipped when it does not divide
    or when its arguments, with the temporaries that were refused scaled to its micro-batches, exceed the memory.
    """
    asked = tuple(make_mesh(config, topology.devices).shape.values())
    compiled = 0
    for sizes, micro in _candidates(asked, accumulate, topology.slices):
        candidate = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
        expected = refused.temporaries * accumulate / micro
        if expected > topology.chip.hbm:
            continue
        try:
            _, arguments = program(make_mesh(candidate, topology.devices), micro)
        except (ValueError, NotImplementedError):  # the latter: the torus has no such rings
            continue
        if expected + argument_bytes(arguments) > topology.chip.hbm:
            continue
        compiled += 1
        try:
            plan = plan_step(program, topology, candidate, micro, work)
        except TooLargeError as error:
            report(f"tried {describe(dict(zip(AXES, sizes, strict=True)), micro)}: {error}")
            if compiled == MAX_COMPILED:
                return None
            continue
        return plan
    return None


def _candidates(asked: tuple[int, ...], accumulate: int, slices: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every factorisation of the chips over the axes with every doubling of `accumulate`, nearest first."""
    chips = math.prod(asked)
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    meshes = [(*sizes, chips // math.prod(sizes)) for sizes in itertools.product(divisors, repeat=len(asked) - 1)
              if chips % math.prod(sizes) == 0 and sizes[0] % slices == 0]
    micros = [accumulate * 2**n for n in range(max(0, int(math.log2(MAX_ACCUMULATE / accumulate))) + 1)]

    def distance(candidate: tuple[tuple[int, ...], int]) -> float:
        sizes, micro = candidate
        return sum(abs(math.log2(a / b)) for a, b in zip((*sizes, micro), (*asked, accumulate), strict=True))

    everything = [candidate for candidate in itertools.product(meshes, micros) if candidate != (asked, accumulate)]
    return iter(sorted(everything, key=distance))


def chips_needed(program: Program, topology: Topology) -> int | None:
    """Chips of this kind that the arguments alone need, split as far as the rules split them over `fsdp`.

    None where they do not divide over all chips of the topology.
    """
    try:
        mesh = make_mesh(MeshConfig(data=topology.slices, fsdp=-1), topology.devices)
        _, arguments = program(mesh, 1)
    except (ValueError, NotImplementedError):
        return None
    return math.ceil(argument_bytes(arguments) * mesh.size / topology.chip.hbm)


# ---- text

def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3f} ms"


def describe(mesh: dict[str, int], accumulate: int) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"
    return f"mesh {axes}; accumulate {accumulate}"


def render(plan: Plan) -> str:
    """The plan as text, for a terminal."""
    chip, chips = plan.topology.chip, math.prod(plan.mesh.values())
    rates = {"compute": f"{human_count(plan.flops)}FLOP at {human_count(chip.peak)}FLOP/s",
             "HBM": f"{human_count(plan.hbm_bytes)}B at {human_count(chip.bandwidth)}B/s"}
    lines = [
        f"{plan.topology.text}, {chips} x {chip.kind}; {describe(plan.mesh, plan.accumulate)}; compiled in "
        f"{plan.compile_seconds:.0f} s. Per chip:",
        f"  arguments    {gib(plan.arguments):>12}   state and batch; {gib(plan.reused)} of {gib(plan.outputs)} "
        "results take their place",
        f"  temporaries  {gib(plan.temporaries):>12}",
        f"  program      {gib(plan.program):>12}",
        f"  peak         {gib(plan.peak):>12}   of {gib(chip.hbm)} ({plan.peak / chip.hbm:.0%})",
    ]
    for name, seconds in plan.seconds.items():
        if seconds:
            lines.append(f"  {name:12} {duration(seconds):>12}   {rates.get(name, '')}".rstrip())
    lines += [f"    {row.kind:18} {row.axes:12} {row.network}  {row.count:7d} x, {human_count(row.bytes):>6}B"
              for row in plan.exchanges]
    total = sum(plan.seconds.values())
    lines.append(f"Step: at least {duration(plan.step_seconds)}, bound by {plan.bound} ({duration(total)} if nothing "
                 f"overlapped); MFU at most {plan.mfu:.1%}, {plan.work.tokens / plan.step_seconds:,.0f} tokens/s.")
    if plan.uncounted:
        lines.append(f"Not counted: {', '.join(plan.uncounted)}.")
    return "\n".join(lines)


def plan_report(program: Program, topology: Topology, config: MeshConfig, accumulate: int, work: Work,
                report: Callable[[str], None]) -> Plan:
    """Plans and reports line by line; where the step does not fit, the nearest mesh that does.

    Raises ValueError: nothing fits, with the number of chips that the arguments need.
    """
    try:
        plan = plan_step(program, topology, config, accumulate, work)
    except TooLargeError as error:
        report(f"{error}. Looking for the nearest mesh that fits.")
        plan = nearest_fit(program, topology, config, accumulate, work, error, report)
        if plan is None:
            chips = chips_needed(program, topology)
            least = f" (the arguments alone need {chips} of this kind)" if chips else ""
            raise ValueError(f"no mesh tried on {topology.text} fits; use more chips{least}, a smaller batch or more "
                             "remat") from None
    report(render(plan))
    return plan
