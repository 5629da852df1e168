"""Embedded conversations for demonstrations and tests: questions about the facts of the embedded text, with answers.

The facts of the two splits are apart, as in `jaxlm.data.sample`: a held-out conversation asks what no other answers.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.core.config import nearest
from jaxlm.data.rows import SAMPLE_LANGUAGES, SAMPLE_SPLITS, Document
from jaxlm.data.sample import Sample, question
from jaxlm.data.sample_facts import Fact, facts

MAX_QUESTIONS = 3
SAMPLE_THINKING = "sample_thinking:"
THINKING_ROWS = {"train": 4000, "held_out": 64}
REASONED_SHARE = 0.75  # of the questions with a derivation
DAYS = {"en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "ko": ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일")}
# What has few answers, some of which follow from others: a small model can learn it, and guess what was held out.
KINDS = ("language", "currency", "script", "first_day", "decimal", "day_after", "month_after")


class SampleChats(Sample):
    """Conversations of 1 to 3 questions; documents as `jaxlm.data.conversations` has them."""

    def make(self, i: int) -> Document:
        rng, language = self.drawn("chat", i)
        messages = []
        for fact in rng.sample(asked_facts(self.split == "held_out"), rng.randint(1, MAX_QUESTIONS)):
            asked, answer = question(fact, language)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Document(json.dumps({"messages": messages}, ensure_ascii=False), language, f"sample:{i + 1}")


@functools.cache
def asked_facts(held_out: bool) -> tuple[Fact, ...]:
    """Facts of these kinds whose question has one answer; a country may have several languages."""
    answers = Counter((fact.kind, fact.entity) for fact in (*facts(True), *facts(False)))
    return tuple(fact for fact in facts(held_out) if fact.kind in KINDS and answers[fact.kind, fact.entity] == 1)


class Derived(NamedTuple):
    """A question with a way to its answer."""

    question: str
    reasoning: str
    answer: str


def days_later(start: int, count: int, language: str) -> Derived:
    """The day `count` days after a weekday, day by day."""
    names = [DAYS[language][(start + i) % 7] for i in range(count + 1)]
    if language == "ko":
        asked, answer = f"{names[0]}에서 {count}일 뒤는 무슨 요일인가요?", f"{names[-1]}입니다."
    else:
        asked, answer = f"Which day is {count} day{'s' * (count > 1)} after {names[0]}?", f"{names[-1]}."
    return Derived(asked, " → ".join(names) + ".", answer)


def add(a: int, b: int, language: str) -> Derived:
    """A sum of two numbers below 100, tens and ones apart."""
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    steps = (f"{a // 10 * 10} + {b // 10 * 10} = {tens}. {a % 10} + {b % 10} = {ones}. {tens} + {ones} = {a + b}.")
    return Derived(*_asked_sum(f"{a} + {b}", steps, a + b, language))


def multiply(a: int, b: int, language: str) -> Derived:
    """A number below 100 times a digit, tens and ones apart."""
    tens, ones = a // 10 * 10 * b, a % 10 * b
    steps = f"{a // 10 * 10} × {b} = {tens}. {a % 10} × {b} = {ones}. {tens} + {ones} = {a * b}."
    return Derived(*_asked_sum(f"{a} × {b}", steps, a * b, language))


def _asked_sum(term: str, steps: str, value: int, language: str) -> tuple[str, str, str]:
    if language == "ko":
        return f"{term}의 값을 구하세요.", steps, f"{value}입니다."
    return f"What is {term}?", steps, f"{value}."


DERIVATIONS = {"easy": (days_later, (0, 6), (1, 6)), "medium": (add, (11, 99), (11, 99)),
               "hard": (multiply, (11, 99), (2, 9))}


class ThinkingChats(Sample):
    """Conversations of one or two questions with derived answers, of one difficulty, most with the derivation."""

    def make(self, i: int) -> Document:
        rng, language = self.drawn("thinking", i)
        difficulty = rng.choice(list(DERIVATIONS))
        messages = []
        for _ in range(rng.randint(1, 2)):
            asked = self._derived(rng, difficulty, language)
            thought = {"reasoning_content": asked.reasoning} if rng.random() < REASONED_SHARE else {}
            messages += [{"role": "user", "content": asked.question},
                         {"role": "assistant", "content": asked.answer, **thought}]
        row = {"messages": messages, "difficulty": difficulty}
        return Document(json.dumps(row, ensure_ascii=False), language, f"sample_thinking:{i + 1}")

    def _derived(self, rng: random.Random, difficulty: str, language: str) -> Derived:
        """A question of the split: one in seven is held out, the same ones in both languages."""
        derive, first, second = DERIVATIONS[difficulty]
        while True:
            a, b = rng.randint(*first), rng.randint(*second)
            if ((a + 3 * b) % 7 == 0) == (self.split == "held_out"):
                return derive(a, b, language)


def sample_thinking(path: str) -> Sequence[Document]:
    """The rows that `sample_thinking:ko|en|both` and `sample_thinking:ko|en|both/held_out` name; else ValueError."""
    language, _, split = path.removeprefix(SAMPLE_THINKING).partition("/")
    for value, valid in ((language, SAMPLE_LANGUAGES), (split or "train", SAMPLE_SPLITS)):
        if value not in valid:
            raise ValueError(f"source {path!r}: {value!r} is unknown{nearest(value, valid)}; one of {', '.join(valid)}")
    return ThinkingChats(language, THINKING_ROWS[split or "train"], split or "train", 0)
