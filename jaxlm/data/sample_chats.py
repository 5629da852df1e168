"""Embedded conversations for demonstrations and tests: questions about the facts of the embedded text, with answers.

The facts of the two splits are apart, as in `jaxlm.data.sample`: a held-out conversation asks what no other answers.
"""

import functools
import json
from collections import Counter

from jaxlm.data.rows import Document
from jaxlm.data.sample import Sample, question
from jaxlm.data.sample_facts import Fact, facts

MAX_QUESTIONS = 3
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
