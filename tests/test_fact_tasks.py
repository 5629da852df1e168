"""Questions about embedded facts: one true answer, plausible others, and the two sides of the split apart."""

import json
import re
from collections import Counter

import pytest

from jaxlm.data.sample import cloze, sample_documents, statements
from jaxlm.data.sample_facts import Fact, facts
from jaxlm.eval.fact_tasks import NUM_CHOICES, TASKS, fact_items, write_fact_tasks


def test_a_statement_is_cut_where_its_value_begins():
    japan = Fact("currency", ("territory", "JP"), ("currency", "JPY"))
    assert cloze(japan, "en") == ("The currency of Japan is ", "the Japanese yen.")
    assert cloze(japan, "ko") == ("일본의 통화는 ", "일본 엔화다.")
    for fact in facts(False)[::7]:
        for language in ("ko", "en"):
            assert "".join(cloze(fact, language)) == statements(fact, language)[0]


@pytest.mark.parametrize("name", TASKS)
def test_one_answer_is_true_and_the_others_are_not(name):
    language, held_out = TASKS[name]
    items = fact_items(language, held_out=held_out)
    asked, everything = ({"".join(cloze(fact, language)) for fact in some}
                         for some in (facts(held_out), (*facts(False), *facts(True))))
    assert len(items) > 300 and items == fact_items(language, held_out=held_out)
    for item in items:
        assert len(set(item.choices)) == NUM_CHOICES
        said = [item.text + choice for choice in item.choices]
        assert said[item.answer] in asked
        assert not everything & {one for i, one in enumerate(said) if i != item.answer}
    places = Counter(item.answer for item in items)
    assert max(places.values()) < 0.32 * len(items), "always choosing one place would be above chance"


def test_training_text_states_what_is_asked_and_never_the_control():
    text = "\n".join(document.text for language in ("ko", "en") for document in sample_documents(language, 3000))
    sentences = set(re.split(r"(?<=[.?]) |\n", text))
    for language in ("ko", "en"):
        known, control = ([item.text + item.choices[item.answer] in sentences for item in
                           fact_items(language, held_out=held_out)] for held_out in (False, True))
        assert sum(known) > 0.2 * len(known) and not any(control)


def test_task_files(tmp_path):
    write_fact_tasks(tmp_path, ["facts_ko"])
    rows = [json.loads(line) for line in (tmp_path / "facts_ko.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 500 and rows[0].keys() == {"text", "choices", "answer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts_ko.jsonl", "facts_ko.yaml"]
