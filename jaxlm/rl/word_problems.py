"""Arithmetic word problems over MENTOR's twelve tools, with the trajectory of a teacher, made from a seed and an index.

A problem is a program (which calls), numbers and a domain (which words). Programs with certain numbers, a fifth of
them, are never in the split "train", in any domain or wording: "held_out" has these in the domains of "train", "unseen"
in domains of its own, with other words and forms of questions, and with programs that "train" does not have.
"""

import math
import random
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxlm.core.config import nearest
from jaxlm.rl.arithmetic import ARITHMETIC
from jaxlm.rl.demonstration import boxed, call_turn
from jaxlm.rl.task import Task
from jaxlm.rl.word_problem_domains import (
    PEOPLE,
    PROGRAMS,
    TRAIN_DOMAINS,
    UNSEEN_DOMAINS,
    UNSEEN_PROGRAMS,
    Domain,
    Kind,
    Need,
    Program,
)

Split = Literal["train", "held_out", "unseen"]

TOOLS = {tool.name: tool for tool in ARITHMETIC}
ALL_PROGRAMS = PROGRAMS | UNSEEN_PROGRAMS
DOMAINS: dict[Split, dict[str, Domain]] = {"train": TRAIN_DOMAINS, "held_out": TRAIN_DOMAINS, "unseen": UNSEEN_DOMAINS}
HELD_OUT_SHARE = 5      # one in so many
MAX_DIGITS = 4          # beyond it numbers that fit a program are too rare to be drawn
MAX_DRAWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class WordProblemConfig:
    """Which word problems, and how many."""

    split: Split = "train"
    count: int = 1000
    seed: int = 0
    domains: tuple[str, ...] = ()  # of the split; none: all
    digits: int = 2                # of numbers; what is divided, paid with or a square may have one more
    max_calls: int = 4             # of the teacher
    num_tools: int = len(TOOLS)    # on offer: those needed, and others
    remarks: float = 0.2           # share of problems with a sentence whose number does not matter
    slips: float = 0.0             # share of the teacher's calls to another tool of the same parameters

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"{self.split!r} is no split of word problems{nearest(self.split, get_args(Split))}; one "
                             f"of {', '.join(get_args(Split))}")
        for name in self.domains:
            if name not in DOMAINS[self.split]:
                known = DOMAINS[self.split]
                raise ValueError(f"domains: {name!r} is no domain of {self.split}{nearest(name, known)}; one of "
                                 f"{', '.join(known)}")
        for name, low, high in (("count", 1, None), ("digits", 1, MAX_DIGITS), ("max_calls", 1, None),
                                ("num_tools", 1, len(TOOLS)), ("remarks", 0, 1), ("slips", 0, 1)):
            value = getattr(self, name)
            if not (low <= value and (high is None or value <= high)):
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be {wanted}, got {value!r}")


def word_problems(config: WordProblemConfig) -> list[Task]:
    """Problems 0 to count - 1; each is `word_problem` of its index."""
    return [word_problem(config, index) for index in range(config.count)]


def word_problem(config: WordProblemConfig, index: int) -> Task:
    """The problem of an index, whatever the count."""
    # A string seeds by its SHA-512, the same on every platform and Python.
    rng = random.Random(f"words {config.seed} {config.split} {index}")
    names = config.domains or tuple(DOMAINS[config.split])
    domain_name = rng.choice(names)
    domain = DOMAINS[config.split][domain_name]
    program_name = rng.choice([name for name in domain.questions
                               if len(ALL_PROGRAMS[name].steps()) <= config.max_calls])
    program = ALL_PROGRAMS[program_name]
    numbers = _draw(rng, program_name, config.digits, config.split != "train")
    words = _words(rng, domain, numbers)
    question = rng.choice(domain.questions[program_name]).format(**words)
    if rng.random() < config.remarks:
        question = _insert(rng, question, rng.choice(domain.remarks).format(**words))
    results = run_program(program, numbers)
    assert results is not None, "the numbers were drawn so that they fit"
    needed = {step.tool for step in program.steps()}
    offered = needed | set(rng.sample([name for name in TOOLS if name not in needed],
                                      max(0, config.num_tools - len(needed))))
    # Drawn from numbers of their own, so that slips change what the teacher does and not the problem.
    slips = random.Random(f"slips {config.seed} {config.split} {index}")
    called = _slipped(slips, program, numbers, config.slips, offered)
    return Task(
        id=f"words-{config.split}-{domain_name}-{program_name}-{config.seed}-{index}", question=question,
        tools=tuple(name for name in TOOLS if name in offered), answers=(results[-1],), judge="numeric",
        domain=domain_name, teacher=_teacher(program, numbers, called))


def run_program(program: Program, numbers: Mapping[str, int]) -> list[int | float] | None:
    """The result of each step, whole ones as integers; None if the problem would make no sense."""
    results: list[int | float] = []
    for step in program.steps():
        value = TOOLS[step.tool].call(**_arguments(step.arguments, numbers, results))
        results.append(_plain(value))
        if not NEEDS[step.need](value):
            return None
    return results


def held_out(program: str, numbers: Mapping[str, int]) -> bool:
    """Whether a program with these numbers, in any order, is kept from training; so is a program that is unseen."""
    return program in UNSEEN_PROGRAMS or (
        zlib.crc32(f"{program} {sorted(numbers.values())}".encode()) % HELD_OUT_SHARE == 0)


def _draw(rng: random.Random, name: str, digits: int, held: bool) -> dict[str, int]:
    program = ALL_PROGRAMS[name]
    for _ in range(MAX_DRAWS):
        numbers = {letter: _number(rng, kind, digits) for letter, kind in program.numbers.items()}
        if held_out(name, numbers) == held and run_program(program, numbers) is not None:
            return numbers
    raise AssertionError(f"no numbers of {digits} digits fit the program {name}")


def _number(rng: random.Random, kind: Kind, digits: int) -> int:
    match kind:
        case "small":
            return rng.randint(2, 9)
        case "exponent":
            return rng.randint(2, 6)
        case "square":
            return rng.randint(2, math.isqrt(10 ** (digits + 1) - 1)) ** 2
    # The number of digits first: else nearly all numbers would have as many as they may.
    size = rng.randint(1, digits) if kind == "number" else rng.randint(2, digits + 1)
    return rng.randint(max(2, 10 ** (size - 1)), 10**size - 1)


def _arguments(arguments: Mapping[str, Any], numbers: Mapping[str, int], results: list[int | float]) -> dict[str, Any]:
    def value(one: Any) -> Any:
        if isinstance(one, list):
            return [value(part) for part in one]
        if isinstance(one, str):
            return results[int(one[1:])] if one.startswith("#") else numbers[one]
        return one

    return {name: value(one) for name, one in arguments.items()}


def _words(rng: random.Random, domain: Domain, numbers: Mapping[str, int]) -> dict[str, Any]:
    (n, m), (x, y) = rng.sample(PEOPLE, 2), rng.sample(domain.things, 2)
    return {**numbers, "n": n, "m": m, "x": x, "y": y, "z": rng.randint(2, 99)}


def _insert(rng: random.Random, question: str, remark: str) -> str:
    """The remark at the start or before the last sentence."""
    told, separator, asked = question.rpartition(". ")
    return f"{told}. {remark} {asked}" if separator and rng.random() < 0.5 else f"{remark} {question}"


def _slipped(rng: random.Random, program: Program, numbers: Mapping[str, int], share: float,
             offered: Collection[str]) -> list[tuple[str, dict[str, Any], int | float]]:
    """Tool, arguments and result of each step; a `share` of steps takes another tool, and goes on with its result."""
    while True:  # a slip may leave a later step without a result, say a root of less than nothing
        called: list[tuple[str, dict[str, Any], int | float]] = []
        for step in program.steps():
            arguments = _arguments(step.arguments, numbers, [result for _, _, result in called])
            twins = [name for name in sorted(offered) if name != step.tool and set(arguments) == _parameters(name)]
            found = {name: result for name in (step.tool, *(twins if rng.random() < share else ()))
                     if (result := _short(name, arguments)) is not None}
            if not found:
                break
            wrong = [name for name in found if name != step.tool]
            tool = rng.choice(wrong) if wrong else step.tool
            called.append((tool, arguments, found[tool]))
        else:
            return called


def _parameters(tool: str) -> set[str]:
    return set(TOOLS[tool].parameters["properties"])


def _short(tool: str, arguments: Mapping[str, Any]) -> int | float | None:
    """The result, a whole one as an integer; None if there is none, or it is too long to be copied."""
    try:
        value = TOOLS[tool].call(**arguments)
    except ValueError:
        return None
    return _plain(value) if value == round(value, 3) else None


def _plain(value: int | float) -> int | float:
    """A whole number as an integer."""
    return int(value) if value == int(value) else value


def _teacher(program: Program, numbers: Mapping[str, int],
             called: Sequence[tuple[str, dict[str, Any], int | float]]) -> tuple[dict[str, Any], ...]:
    messages, left = [], iter(called)
    for said, steps in program.turns:
        calls = [next(left)[:2] for _ in steps]
        messages += call_turn(said.format(**numbers), calls, TOOLS)
    return (*messages, boxed(called[-1][2]))


NEEDS = {
    "whole": lambda value: value > 0 and value == int(value),
    "fraction": lambda value: value != int(value) and value == round(value, 3),
    "no_half": lambda value: value * 2 != int(value * 2) and value == round(value, 3),
    "nonzero": lambda value: value != 0,
}
assert set(NEEDS) == set(get_args(Need))
