"""Compositions f(g(x)) of functions on short texts: known functions in pairs that training never showed.

A chain lists functions in the order of their calls. Some ordered pairs of functions are held out: in the split "train"
none of them stands next to each other in a chain, in the split "held_out" every chain has at least one. The pair
(repeat, reverse) is held out, (reverse, repeat) is not:

    train       repeat(reverse(x), 2), reverse(mirror(x))
    held_out    reverse(repeat(x, 2)), mirror(reverse(repeat(x, 2)))
"""

import itertools
import random
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from jaxlm.core.config import nearest
from jaxlm.rl.demonstration import boxed, call_turn
from jaxlm.rl.task import Task
from jaxlm.rl.tools import tool_of

Split = Literal["train", "held_out"]
Form = Literal["nested", "words"]

MAX_RESULT = 1000     # characters that a function may return
MAX_LETTERS = 24      # of any text in a task
MAX_DEPTH = 4
HELD_OUT_SHARE = 4    # one pair in so many
_VOWELS = "aeiou"


def reverse(text: str) -> str:
    """The text from back to front."""
    return text[::-1]


def repeat(text: str, times: int) -> str:
    """The text so many times."""
    # Known before it is built: it could fill memory.
    if times < 0 or times * len(text) > MAX_RESULT:
        raise ValueError(f"times must not be negative and the result not longer than {MAX_RESULT} characters")
    return text * times


def take_first(text: str, count: int) -> str:
    """The first letters of the text."""
    return text[:_natural(count)]


def drop_first(text: str, count: int) -> str:
    """The text without its first letters."""
    return text[_natural(count):]


def rotate(text: str, count: int) -> str:
    """Moves the first letters of the text to its end."""
    return text[_natural(count):] + text[:count]


def remove_vowels(text: str) -> str:
    """The text without a, e, i, o and u."""
    return "".join(letter for letter in text if letter.lower() not in _VOWELS)


def sort_letters(text: str) -> str:
    """The letters of the text in the order of the alphabet."""
    return "".join(sorted(text))


def double_letters(text: str) -> str:
    """Each letter of the text twice."""
    return "".join(letter * 2 for letter in text)


def swap_ends(text: str) -> str:
    """The text with its first and last letter exchanged."""
    return text if len(text) < 2 else text[-1] + text[1:-1] + text[0]


def mirror(text: str) -> str:
    """The text and then the text from back to front."""
    return text + text[::-1]


class Phrase(NamedTuple):
    """How a function is asked for; {k} is its number."""

    words: str
    largest: int | None = None  # its number is from 2 to this; None: it has none


# Case alone tells no answers apart (the judge "exact" does not see it), so no function changes only that.
STRING_TOOLS = tuple(tool_of(function, trusted=True) for function in (
    reverse, repeat, take_first, drop_first, rotate, remove_vowels, sort_letters, double_letters, swap_ends, mirror))
TOOLS = {tool.name: tool for tool in STRING_TOOLS}
PHRASES = {
    "reverse": Phrase("reverse it"),
    "repeat": Phrase("repeat it {k} times", 3),
    "take_first": Phrase("take its first {k} letters", 3),
    "drop_first": Phrase("drop its first {k} letters", 3),
    "rotate": Phrase("move its first {k} letters to the end", 3),
    "remove_vowels": Phrase("remove its vowels"),
    "sort_letters": Phrase("sort its letters"),
    "double_letters": Phrase("double each letter"),
    "swap_ends": Phrase("swap its first and last letter"),
    "mirror": Phrase("append its mirror image"),
}
Chain = tuple[tuple[str, int | None], ...]  # names and numbers of functions, in the order of their calls


@dataclass(frozen=True, kw_only=True)
class StringFunctionConfig:
    """Which compositions, and how many."""

    split: Split = "train"
    count: int = 1000
    seed: int = 0
    min_depth: int | None = None  # functions in a chain; None: 1, of "held_out" 2
    max_depth: int = 2
    letters: int = 6              # of the text at most
    form: Form | None = None      # None: either

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"{self.split!r} is no split of string functions{nearest(self.split, get_args(Split))}; "
                             f"one of {', '.join(get_args(Split))}")
        if self.form is not None and self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        least = 1 if self.split == "train" else 2
        for name, value, low, high in (
            ("count", self.count, 1, None), ("letters", self.letters, 4, 12),
            ("min_depth", self.least_depth(), least, MAX_DEPTH), ("max_depth", self.max_depth, least, MAX_DEPTH),
        ):
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if self.least_depth() > self.max_depth:
            raise ValueError(f"min_depth {self.least_depth()} is above max_depth {self.max_depth}")

    def least_depth(self) -> int:
        return self.min_depth if self.min_depth is not None else 1 if self.split == "train" else 2


def string_functions(config: StringFunctionConfig) -> list[Task]:
    """Tasks 0 to count - 1; each is `string_function` of its index."""
    return [string_function(config, index) for index in range(config.count)]


def string_function(config: StringFunctionConfig, index: int) -> Task:
    """The task of an index, whatever the count."""
    rng = random.Random(f"strings {config.seed} {config.split} {index}")
    chain, text = _draw(rng, config)
    form = config.form or rng.choice(get_args(Form))
    messages, value = [], text
    for i, (name, number) in enumerate(chain):
        arguments = {"text": value} | _argument(name, number)
        said = f"{'Then' if i else 'First'} {_phrase(name, number)}."
        messages += call_turn(said, [(name, arguments)], TOOLS)
        value = TOOLS[name].call(**arguments)
    return Task(
        id=f"strings-{config.split}-{config.seed}-{index}", question=QUESTIONS[form](chain, text),
        tools=tuple(TOOLS), answers=(value,), judge="exact", domain=f"strings-{len(chain)}",
        teacher=(*messages, boxed(value)))


def held_out_pair(first: str, then: str) -> bool:
    """Whether training never calls `then` on what `first` returned."""
    return zlib.crc32(f"{first} {then}".encode()) % HELD_OUT_SHARE == 0


def has_held_out(names: list[str]) -> bool:
    return any(itertools.starmap(held_out_pair, itertools.pairwise(names)))


def _draw(rng: random.Random, config: StringFunctionConfig) -> tuple[Chain, str]:
    depth = rng.randint(config.least_depth(), config.max_depth)
    while True:
        names = rng.sample(list(TOOLS), depth)
        if has_held_out(names) != (config.split == "held_out"):
            continue
        chain = tuple((name, _number(rng, name)) for name in names)
        text = "".join(rng.choice(("bcdfghklmnprst", _VOWELS)[i % 2]) for i in range(rng.randint(4, config.letters)))
        if _sensible(chain, text):
            return chain, text


def _sensible(chain: Chain, text: str) -> bool:
    """Every step changes the text, and leaves one of a readable length."""
    for name, number in chain:
        value = TOOLS[name].call(text=text, **_argument(name, number))
        if value == text or not 2 <= len(value) <= MAX_LETTERS:
            return False
        text = value
    return True


def _number(rng: random.Random, name: str) -> int | None:
    largest = PHRASES[name].largest
    return None if largest is None else rng.randint(2, largest)


def _argument(name: str, number: int | None) -> dict[str, Any]:
    return {} if number is None else {"times" if name == "repeat" else "count": number}


def _phrase(name: str, number: int | None) -> str:
    return PHRASES[name].words.format(k=number)


def _nested(chain: Chain, text: str) -> str:
    """`What is repeat(reverse("tulo"), 2)?`"""
    written = f'"{text}"'
    for name, number in chain:
        written = f"{name}({written}{'' if number is None else f', {number}'})"
    return f"What is {written}?"


def _words(chain: Chain, text: str) -> str:
    """`Take the text "tulo" and reverse it, then repeat it 2 times. What is the result?`"""
    return f'Take the text "{text}" and {", then ".join(_phrase(*one) for one in chain)}. What is the result?'


def _natural(count: int) -> int:
    if count < 0:
        raise ValueError("count must not be negative")
    return count


QUESTIONS = {"nested": _nested, "words": _words}
