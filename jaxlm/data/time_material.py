"""What is learnt and what is measured on in time-specifier model merging, from each source of questions with a time."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.data.beir import BeirSet, read_beir
from jaxlm.data.retrieval_rows import RetrievalRow
from jaxlm.data.specifier_rows import given_rows, read_specifier_rows
from jaxlm.data.time_lines import make_time_lines
from jaxlm.data.time_questions import Question, question_qrels, read_timed_facts, split_pages, with_specifiers

SHARES = {"train": 0.7, "test": 0.3}


class Material(NamedTuple):
    everything: BeirSet                          # the corpus, with the questions of all splits
    asked: dict[str, dict[str, list[Question]]]  # split to specifier to questions
    plain: list[Question]                        # without a time, to measure on
    rows: dict[str, list[RetrievalRow]]          # specifier to the rows of its training questions, where given


def material_of_lives(entities: int, seed: int) -> Material:
    """Generated lives; see `make_time_lines`, whose shares of the names hold here."""
    lines = make_time_lines(entities, seed)
    asked = {split: with_specifiers(lines.facts[split], seed) for split in SHARES}
    plain = lines.plain["test"]
    questions = [*plain, *(one for groups in asked.values() for one in joined(groups))]
    return Material(question_set(lines.corpus, questions), asked, plain, {})


def material_of_pages(folder: str | Path, seed: int) -> Material:
    """A BEIR folder of questions "... from X to Y ..." with a split train; see `read_timed_facts`."""
    data = read_beir(folder, "train")
    split = split_pages(read_timed_facts(data), SHARES, seed)
    return Material(data, {name: with_specifiers(part, seed) for name, part in split.items()}, [], {})


def material_of_rows(files: Mapping[str, str | Path], seed: int) -> Material:
    """Rows by specifier, as they are given; see `read_specifier_rows`."""
    given = read_specifier_rows(files)
    split = split_pages(given.questions, SHARES, seed)
    asked = {name: {specifier: [one.question for one in part if one.question.group == specifier]
                    for specifier in files} for name, part in split.items()}
    return Material(question_set(given.corpus, [one.question for one in given.questions]), asked, [],
                    given_rows(split["train"], given.corpus))


def joined(groups: Mapping[str, Iterable[Question]]) -> list[Question]:
    """The questions of all groups."""
    return [one for group in groups.values() for one in group]


def question_set(corpus: Mapping[str, str], questions: Sequence[Question]) -> BeirSet:
    """Questions to measure on; their field `specifier` is their group."""
    return BeirSet(dict(corpus), {one.id: one.text for one in questions}, {}, question_qrels(questions),
                   {one.id: {"specifier": one.group} for one in questions}, 0)
