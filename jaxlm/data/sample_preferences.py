"""Embedded preference pairs for demonstrations and tests: a question, its answer, and the answer of another question.

Both answers are well-formed; only who knows the fact can tell them apart. The facts of the two splits are apart.
"""

import json

from jaxlm.data.rows import Document
from jaxlm.data.sample import Sample, question
from jaxlm.data.sample_chats import asked_facts


class SamplePreferences(Sample):
    """Pairs; documents as `jaxlm.data.preference_rows` has them.

        "What is the currency of Japan?"    chosen "It is the Japanese yen."    rejected "It is the euro."
    """

    def make(self, i: int) -> Document:
        rng, language = self.drawn("preference", i)
        fact = rng.choice(asked_facts(self.split == "held_out"))
        # A held-out kind may have one value only, so wrong ones come from the facts to learn in either split.
        other = rng.choice([one for one in asked_facts(False) if one.kind == fact.kind and one.value != fact.value])
        asked, answer = question(fact, language)
        # The other's value in this one's words: some answers name what was asked about.
        wrong = question(fact._replace(value=other.value), language)[1]
        says = lambda text: [{"role": "assistant", "content": text}]
        row = {"messages": [{"role": "user", "content": asked}], "chosen": says(answer), "rejected": says(wrong)}
        return Document(json.dumps(row, ensure_ascii=False), language, f"sample:{i + 1}")
