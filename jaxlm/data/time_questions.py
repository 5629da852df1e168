"""Questions about facts that held for a time: from files like those of TimeQA, written out with every specifier."""

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from jaxlm.data.beir import BeirSet
from jaxlm.data.retrieval_rows import Passage, RetrievalRow
from jaxlm.data.time_specifiers import SPECIFIERS, Interval, Role, generate, role_of, split_question

log = logging.getLogger(__name__)


class OfPage(Protocol):
    """What is about a page."""

    @property
    def page(self) -> str: ...


T = TypeVar("T", bound=OfPage)


class TimedFact(NamedTuple):
    """A question whose time is open: `before + phrase + after`, and the documents that answer it."""

    id: str
    page: str   # what the time line is about; splits keep it together
    before: str
    after: str
    interval: Interval
    role: Role | None
    positives: tuple[str, ...]


class Question(NamedTuple):
    id: str
    text: str
    positives: tuple[str, ...]  # documents
    group: str                  # the specifier, for figures by group


def read_timed_facts(data: BeirSet) -> list[TimedFact]:
    """The facts behind questions "... from X to Y ..." of BEIR data; its queries need the fields `link` and `relation`.

    The questions of a page and relation are one time line; those without judgement, which nothing in the corpus
    answers, have their place on it, and are left out then, as are questions that name no two dates (counted in a
    warning). ValueError: a query without these fields, no question that can be read.
    """
    lines, num_unread = defaultdict(list), 0
    for name, text in (*data.queries.items(), *data.unjudged.items()):
        fields = data.fields[name]
        if missing := [key for key in ("link", "relation") if key not in fields]:
            raise ValueError(f"query {name!r} has no field {missing[0]!r}; a time line needs link and relation")
        parts = split_question(text)
        if parts is None:
            num_unread += name in data.queries
        else:
            lines[str(fields["link"]), str(fields["relation"])].append((parts[1], name, parts))
    facts = []
    for (page, _), line in lines.items():
        line.sort()
        for index, (interval, name, (before, _, after)) in enumerate(line):
            positives = tuple(doc for doc, gain in data.qrels.get(name, {}).items() if gain > 0)
            if positives:
                facts.append(TimedFact(name, page, before, after, interval, role_of(index, len(line)), positives))
    if not facts:
        raise ValueError('no judged query has the form "... from X to Y ..." with two dates in order')
    if num_unread:
        log.warning('%d of %d judged queries are left out: they have no "from X to Y" with two dates in order',
                    num_unread, len(data.queries))
    return facts


def with_specifiers(facts: Iterable[TimedFact], seed: int = 0) -> dict[str, list[Question]]:
    """The question of each fact with every specifier that fits, by specifier; dates depend on seed and id alone."""
    questions: dict[str, list[Question]] = {name: [] for name in SPECIFIERS}
    for fact in facts:
        rng = random.Random(f"{seed} {fact.id}")
        for name, phrase in generate(fact.interval, fact.role, rng).items():
            questions[name].append(Question(f"{fact.id}-{name}", fact.before + phrase + fact.after, fact.positives,
                                            name))
    return questions


def split_pages(facts: Iterable[T], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[T]]:
    """Facts or other things of a page by split; all of a page are in one, which its name and the seed decide.

    Args:
      shares: split to its part of the pages, 1 in sum, as `{"train": 0.8, "dev": 0.2}`.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"the shares of the splits must add up to 1, got {dict(shares)}")
    result: dict[str, list[T]] = {name: [] for name in shares}
    for fact in facts:
        digest = hashlib.sha256(f"{seed} {fact.page}".encode()).digest()
        result[share_at(int.from_bytes(digest[:6], "big") / 2**48, shares)].append(fact)
    return result


def share_at(place: float, shares: Mapping[str, float]) -> str:
    """Whose share holds a place between 0 and 1: with a 0.7 and b 0.3, that of a is [0, 0.7)."""
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return list(shares)[-1]  # a sum of shares may round to less than 1


def question_rows(questions: Sequence[Question], corpus: Mapping[str, str]) -> list[RetrievalRow]:
    """Rows to train on; negatives are to be mined."""
    return [RetrievalRow(one.text, tuple(Passage(doc, corpus[doc]) for doc in one.positives)) for one in questions]


def question_qrels(questions: Sequence[Question]) -> dict[str, dict[str, int]]:
    """Judgements for an evaluation: each positive has gain 1."""
    return {one.id: dict.fromkeys(one.positives, 1) for one in questions}
