"""Rows that are given for each time specifier, as the authors of TSM (Han et al. 2025, arXiv:2507.06782) keep them.

    before.jsonl    {"question": "... before Feb 2000?", "positive_ctxs": [{"text": "..."}], "negative_ctxs": [...]}

See `jaxlm.data.retrieval_rows` for the fields. A row does not say which page it is about.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.core.config import nearest
from jaxlm.core.files import replacing
from jaxlm.data.beir import BeirSet
from jaxlm.data.retrieval_rows import Passage, RetrievalRow, read_retrieval_rows
from jaxlm.data.time_questions import Question
from jaxlm.data.time_specifiers import SPECIFIERS


class GivenQuestion(NamedTuple):
    """A question to measure on, or to train on with the negatives that came with it."""

    page: str                   # the same for questions that are linked by a positive or by their text
    question: Question
    negatives: tuple[str, ...]  # documents


class GivenRows(NamedTuple):
    corpus: dict[str, str]      # the passages of all rows; one that is given twice, spaces apart, is one document
    questions: list[GivenQuestion]


def specifier_files(pairs: Sequence[str]) -> dict[str, str]:
    """Files by specifier, in the order of `SPECIFIERS`.

        in_late=b.jsonl, before=a.jsonl    ->    {"before": "a.jsonl", "in_late": "b.jsonl"}

    ValueError for a pair that is none, an unknown specifier, and one with two files.
    """
    files: dict[str, str] = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if name not in SPECIFIERS or not file:
            raise ValueError(f"{pair!r} is not SPECIFIER=FILE{nearest(name, SPECIFIERS)}; specifiers: "
                             f"{', '.join(SPECIFIERS)}")
        if name in files:
            raise ValueError(f"{name} has two files, {files[name]} and {file}; put them into one")
        files[name] = file
    return {name: files[name] for name in SPECIFIERS if name in files}


def read_specifier_rows(files: Mapping[str, str | Path]) -> GivenRows:
    """The rows of a file for each specifier, over one corpus. ValueError: as `read_retrieval_rows`."""
    rows = [(name, row) for name, path in files.items() for row in read_retrieval_rows(path).rows]
    corpus: dict[str, str] = {}
    ids: dict[str, str] = {}
    for _, row in rows:
        for one in (*row.positives, *row.negatives):
            corpus.setdefault(ids.setdefault(_spaced(one.text), f"p{len(ids)}"), one.text)
    documents = lambda passages: tuple(dict.fromkeys(ids[_spaced(one.text)] for one in passages))
    pages = linked([[_spaced(row.query), *(_spaced(one.text) for one in row.positives)] for _, row in rows])
    return GivenRows(corpus, [
        GivenQuestion(page, Question(f"q{number}-{name}", row.query, documents(row.positives), name),
                      documents(row.negatives))
        for number, ((name, row), page) in enumerate(zip(rows, pages, strict=True))])


def linked(keys: Sequence[Sequence[str]]) -> list[str]:
    """For each set of keys the least one of all that it is linked to: sets with a key in common are linked.

        (c, b), (d,), (b, a)    ->    a, d, a
    """
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while above.setdefault(key, key) != key:
            key = above[key]
        return key

    for own in keys:
        tops = {top(key) for key in own}
        above |= dict.fromkeys(tops, min(tops))
    return [top(own[0]) for own in keys]


def given_rows(questions: Sequence[GivenQuestion], corpus: Mapping[str, str]) -> dict[str, list[RetrievalRow]]:
    """Rows to train on, by specifier."""
    rows: dict[str, list[RetrievalRow]] = {}
    passages = lambda names: tuple(Passage(name, corpus[name]) for name in names)
    for _, one, negatives in questions:
        rows.setdefault(one.group, []).append(RetrievalRow(one.text, passages(one.positives), passages(negatives)))
    return rows


def rows_by_specifier(rows: Sequence[RetrievalRow], questions: BeirSet) -> dict[str, list[RetrievalRow]]:
    """Rows by the field `specifier` of the questions that they are of; a text with two specifiers is in both."""
    texts: dict[str, set[str]] = {}
    for name, text in questions.queries.items():
        texts.setdefault(questions.fields[name]["specifier"], set()).add(text)
    return {name: [row for row in rows if row.query in own] for name, own in texts.items()}


def write_rows(path: Path, rows: Sequence[RetrievalRow]) -> None:
    """A file that `read_retrieval_rows` reads, whole or not at all; teacher scores are not among what it holds."""
    values = [{"query": row.query, "positives": [one._asdict() for one in row.positives],
               "negatives": [one._asdict() for one in row.negatives]} for row in rows]
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in values), encoding="utf-8")


def _spaced(text: str) -> str:
    return " ".join(text.split())
