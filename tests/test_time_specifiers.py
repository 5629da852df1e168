"""Time specifiers by hand, and the questions that files and invented time lines give."""

import itertools
import random
import re

import pytest

from jaxlm.data.beir import BeirSet
from jaxlm.data.time_lines import make_time_lines
from jaxlm.data.time_questions import (
    TimedFact,
    question_qrels,
    question_rows,
    read_timed_facts,
    split_pages,
    with_specifiers,
)
from jaxlm.data.time_specifiers import (
    MONTHS,
    SPECIFIERS,
    Date,
    Interval,
    generate,
    make_date,
    months_within,
    role_of,
    split_question,
)


@pytest.mark.parametrize("parts, text", [
    ((1998, 2, 14), "Feb 1998"), ((1998, 1, 1), "1998"), ((1998, 2, 0), "1998"), ((1998, 0, 0), "1998"),
    ((1998, 1, 2), "Jan 1998"), ((-3, 12, 5), "Dec 1"),
])
def test_dates_as_questions_write_them(parts, text):
    assert str(make_date(*parts)) == text


def test_months_after_the_start_up_to_the_end():
    assert [str(one) for one in months_within(Interval(Date(1998, 11), Date(1999, 2)))] == [
        "Dec 1998", "Jan 1999", "Feb 1999"]
    # A year is stepped from its month 0: January first, and the year 1999 itself is before Jan 1999.
    assert [str(one) for one in months_within(Interval(Date(1998), Date(1999)))][::11] == ["Jan 1998", "Dec 1998"]
    assert months_within(Interval(Date(1998), Date(1998))) == []


def phrases(start, end, role=None):
    """All that are drawn, by specifier."""
    drawn = [generate(Interval(start, end), role, random.Random(seed)) for seed in range(400)]
    return {name: {one[name] for one in drawn} for name in drawn[0]}


def test_phrases_by_hand():
    found = phrases(Date(1989, 11), Date(1990, 1))
    assert found == {"from_to": {"from Nov 1989 to Jan 1990"}, "in": {"in Dec 1989", "in Jan 1990"},
                     # Nothing lies after Jan 1990 in this interval: both ends of the rest are the same.
                     "between_and": {"between Dec 1989 and Jan 1990", "between Jan 1990 and Jan 1990"}}
    assert phrases(Date(1998), Date(1998), "first") == {
        "from_to": {"from 1998 to 1998"}, "in": {"in 1998"}, "between_and": {"between 1998 and 1998"},
        "before": {"before 1998"}}
    assert phrases(Date(1998, 3), Date(1998, 4), "last")["after"] == {"after Apr 1998"}
    assert set(SPECIFIERS) == set(phrases(Date(1987), Date(1993), "first")) | {"after"}


@pytest.mark.parametrize("start, end, early, late", [
    (1987, 1993, "in early 1990s", "in late 1980s"), (1988, 1993, "in early 1990s", None),
    (1987, 1992, None, "in late 1980s"), (1981, 1989, None, None), (1975, 1994, "in early 1990s", "in late 1970s"),
])
def test_early_and_late_need_a_change_of_decade(start, end, early, late):
    found = generate(Interval(Date(start), Date(end)), None, random.Random(0))
    assert (found.get("in_early"), found.get("in_late")) == (early, late)


def test_the_only_fact_is_the_first():
    assert [role_of(i, 3) for i in range(3)] == ["first", None, "last"] and role_of(0, 1) == "first"


@pytest.mark.parametrize("text, expected", [
    ("Who led it from Feb 1994 to 2001?", ("Who led it ", ((1994, 2), (2001, 0)), "?")),
    ("Who, from 811 to September 827 , ruled?", ("Who, ", ((811, 0), (827, 9)), " , ruled?")),
    ("Who led it in 1994 to 1995?", None), ("Which train goes from Rome to 1994 Street?", None),
    ("Who from 1994 to 1993?", None), ("Who from 1990 to 1991 and from 1992 to 1993?", None),
    ("Who from 1990 to 1990s?", None),
])
def test_questions_are_split_at_their_dates(text, expected):
    found = split_question(text)
    assert (found and (found[0], tuple(map(tuple, found[1])), found[2])) == expected


def test_facts_of_a_file_have_their_place_on_the_time_line(caplog):
    texts = {"q1": "Who led X from 1990 to 1995?", "q2": "Who led X from 1985 to 1990?", "q4": "Who led X in 1999?"}
    fields = {name: {"link": "/wiki/X", "relation": "P1"} for name in ("q1", "q2", "q3", "q4")}
    data = BeirSet({"d1": "one", "d2": "two"}, texts, {"q3": "Who led X from 1980 to 1985?"},
                   {"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}, "q4": {"d1": 1}}, fields, 0)
    facts = read_timed_facts(data)
    # q3 is answered nowhere, but the time line begins with it.
    assert [(fact.id, fact.role, fact.positives) for fact in facts] == [("q2", None, ("d2",)), ("q1", "last", ("d1",))]
    assert "1 of 3 judged queries are left out" in caplog.text
    questions = with_specifiers(facts)
    assert [one.text for one in questions["from_to"]] == [texts["q2"], texts["q1"]]
    assert [one.id for one in questions["after"]] == ["q1-after"] and not questions["before"]
    assert question_qrels(questions["after"]) == {"q1-after": {"d1": 1}}
    assert question_rows(questions["in"], data.corpus)[0].positives[0].text == "two"
    with pytest.raises(ValueError, match="query 'q1' has no field 'relation'; a time line needs"):
        read_timed_facts(data._replace(fields=fields | {"q1": {"link": "/wiki/X"}}))
    with pytest.raises(ValueError, match="no judged query has the form"):
        read_timed_facts(data._replace(queries={"q4": texts["q4"]}, unjudged={}))


def test_a_page_is_in_one_split():
    facts = [TimedFact(str(i), f"page {i // 4}", "", "", Interval(Date(1990), Date(1991)), None, ("d",))
             for i in range(800)]
    splits = split_pages(facts, {"train": 0.75, "dev": 0.25})
    pages = {name: {fact.page for fact in own} for name, own in splits.items()}
    assert not pages["train"] & pages["dev"] and sum(map(len, splits.values())) == 800
    assert 0.15 < len(pages["dev"]) / 200 < 0.35
    assert split_pages(facts[::-1], {"train": 0.75, "dev": 0.25}) == {name: own[::-1] for name, own in splits.items()}
    assert splits != split_pages(facts, {"train": 0.75, "dev": 0.25}, seed=1)
    with pytest.raises(ValueError, match="must add up to 1"):
        split_pages(facts, {"train": 0.75, "dev": 0.5})


def test_time_lines_state_what_their_questions_ask():
    lines = make_time_lines(60)
    assert lines == make_time_lines(60) and lines.corpus != make_time_lines(60, seed=1).corpus
    names = {split: {fact.page for fact in facts} for split, facts in lines.facts.items()}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 60
    assert [len(names[split]) for split in ("train", "dev", "test")] == [42, 9, 9]
    for facts in lines.facts.values():
        for fact in facts:
            text = lines.corpus[fact.positives[0]]
            assert fact.page in text and fact.page in fact.before + fact.after
            for date in fact.interval:
                month = re.search(rf"(?:({'|'.join(MONTHS)})[a-z]* )?{date.year}", text).group(1)
                assert month == (MONTHS[date.month - 1] if date.month else None)
    line = [fact for fact in lines.facts["train"] if fact.page == lines.facts["train"][0].page]
    assert all(a.interval.end <= b.interval.start for a, b in itertools.pairwise(line) if b.role != "first")
    for split, questions in lines.plain.items():
        known = [one for one in questions if any(name in one.text for name in names[split])]
        assert 0 < len(known) < len(questions)  # about names with facts and about others
        assert all(set(one.positives) <= set(lines.corpus) for one in questions)
        assert not any(name in one.text for one in questions for other in names if other != split
                       for name in names[other])
    specifiers = with_specifiers(lines.facts["train"])
    assert all(len(specifiers[name]) >= 20 for name in SPECIFIERS)
    assert not any("{" in text for text in (*lines.corpus.values(), *(one.text for one in specifiers["in"])))
    with pytest.raises(ValueError, match="entities must be 10 to 450, got 5"):
        make_time_lines(5)
