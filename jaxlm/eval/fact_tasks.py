"""What a model knows of the embedded facts, as tasks of lm-evaluation-harness: facts_ko, facts_en and their controls.

A document is a statement up to its value and four ways to go on: the true value and three others of its kind and of
things of the same sort, none of them true of the same thing. Chance is a quarter. `facts_ko_unseen` asks for facts that
no training document of the sample states (`Fact.held_out`), so what it has above chance is no knowledge but the look of
names.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.data.sample import cloze
from jaxlm.data.sample_facts import facts

TASKS = {f"facts_{language}{suffix}": (language, held_out)
         for held_out, suffix in ((False, ""), (True, "_unseen")) for language in ("ko", "en")}
NUM_CHOICES = 4
MAX_ITEMS = 500
# Scores as the harness makes them: the likeliest continuation (acc), and the likeliest per byte (acc_norm).
_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
- {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


class Item(NamedTuple):
    """One question."""

    text: str
    choices: tuple[str, ...]  # NUM_CHOICES, all different
    answer: int


def fact_items(language: str, *, held_out: bool = False, count: int = MAX_ITEMS, seed: int = 0) -> list[Item]:
    """At most `count` questions in `language` ko or en about facts of one side of the split, kinds as they come.

    Kinds with fewer than four values (decimal marks) are left out.
    """
    everything = (*facts(False), *facts(True))
    true, values = defaultdict(set), defaultdict(set)
    for fact in everything:
        true[fact.kind, fact.entity].add(fact.value)
        values[fact.kind, fact.entity[0]].add(fact.value)  # a city's name is no guess for a language's
    rng = random.Random(f"{seed} {language} {held_out}")
    asked = list(facts(held_out))
    rng.shuffle(asked)
    items: list[Item] = []
    for fact in asked:
        begun, rest = cloze(fact, language)
        # By what is said: two currencies of one name are one answer.
        said = {cloze(fact._replace(value=value), language) for value in true[fact.kind, fact.entity]}
        same_sort = values[fact.kind, fact.entity[0]]
        others = sorted({cloze(fact._replace(value=value), language) for value in same_sort} - said)
        if len(others) >= NUM_CHOICES - 1:
            choices = [rest, *(wrong for _, wrong in rng.sample(others, NUM_CHOICES - 1))]
            rng.shuffle(choices)
            items.append(Item(begun, tuple(choices), choices.index(rest)))
        if len(items) == count:
            break
    return items


def write_fact_tasks(folder: Path, names: Sequence[str]) -> None:
    """Task files and their data for `names` of `TASKS`, where `harness.open_tasks` finds them."""
    for name in names:
        language, held_out = TASKS[name]
        data = folder.resolve() / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n"
                                for item in fact_items(language, held_out=held_out)), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(_YAML.format(
            name=name, data=json.dumps(str(data)), cache=json.dumps(str(folder.resolve() / "cache"))), encoding="utf-8")
