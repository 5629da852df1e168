"""Embedded preference pairs for demonstrations and tests: a question, its answer, and the answer of another question.

Both answers are well-formed; only who knows the fact can tell them apart. The facts of the two splits are apart.
"""

import json
import random
from collections.abc import Sequence

from jaxlm.data.rows import Document
from jaxlm.data.sample import question
from jaxlm.data.sample_chats import asked_facts


class SamplePreferences(Sequence):
    """`count` pairs in `language` ko, en or both (one each), made when indexed from (seed, split, index); documents as
    `jaxlm.data.preference_rows` has them.

        "What is the currency of Japan?"    chosen "It is the Japanese yen."    rejected "It is the euro."
    """

    def __init__(self, language: str, count: int, split: str, seed: int) -> None:
        self._language, self._count, self._split, self._seed = language, count, split, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Document:
        if not -self._count <= i < self._count:
            raise IndexError(f"the sample has {self._count} pairs, asked for {i}")
        i = int(i) % self._count
        # A string seeds by its SHA-512, the same on every platform and Python.
        rng = random.Random(f"preference {self._seed} {self._language} {self._split} {i}")
        language = rng.choice(("ko", "en")) if self._language == "both" else self._language
        fact = rng.choice(asked_facts(self._split == "held_out"))
        # A held-out kind may have one value only, so wrong ones come from the facts to learn in either split.
        other = rng.choice([one for one in asked_facts(False) if one.kind == fact.kind and one.value != fact.value])
        asked, answer = question(fact, language)
        # The other's value in this one's words: some answers name what was asked about.
        wrong = question(fact._replace(value=other.value), language)[1]
        says = lambda text: [{"role": "assistant", "content": text}]
        row = {"messages": [{"role": "user", "content": asked}], "chosen": says(answer), "rejected": says(wrong)}
        return Document(json.dumps(row, ensure_ascii=False), language, f"sample:{i + 1}")
