"""Embedded conversations for demonstrations and tests: questions about the facts of the embedded text, with answers.

The facts of the two splits are apart, as in `jaxlm.data.sample`: a held-out conversation asks what no other answers.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence

from jaxlm.data.rows import Document
from jaxlm.data.sample import question
from jaxlm.data.sample_facts import Fact, facts

MAX_QUESTIONS = 3
# What has few answers, some of which follow from others: a small model can learn it, and guess what was held out.
KINDS = ("language", "currency", "script", "first_day", "decimal", "day_after", "month_after")


class SampleChats(Sequence):
    """`count` conversations of 1 to 3 questions in `language` ko, en or both (one each), made when indexed from
    (seed, split, index); documents as `jaxlm.data.conversations` has them.
    """

    def __init__(self, language: str, count: int, split: str, seed: int) -> None:
        self._language, self._count, self._split, self._seed = language, count, split, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Document:
        if not -self._count <= i < self._count:
            raise IndexError(f"the sample has {self._count} conversations, asked for {i}")
        i = int(i) % self._count
        # A string seeds by its SHA-512, the same on every platform and Python.
        rng = random.Random(f"chat {self._seed} {self._language} {self._split} {i}")
        language = rng.choice(("ko", "en")) if self._language == "both" else self._language
        messages = []
        for fact in rng.sample(asked_facts(self._split == "held_out"), rng.randint(1, MAX_QUESTIONS)):
            asked, answer = question(fact, language)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Document(json.dumps({"messages": messages}, ensure_ascii=False), language, f"sample:{i + 1}")


@functools.cache
def asked_facts(held_out: bool) -> tuple[Fact, ...]:
    """Facts of these kinds whose question has one answer; a country may have several languages."""
    answers = Counter((fact.kind, fact.entity) for fact in (*facts(True), *facts(False)))
    return tuple(fact for fact in facts(held_out) if fact.kind in KINDS and answers[fact.kind, fact.entity] == 1)
