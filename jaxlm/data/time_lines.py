"""Invented people and ships with dated facts: passages and questions to train and test temporal retrieval on.

Embedded, so that a run needs no download. Each fact has one passage; what makes a question hard is that the other
passages about the same name differ in little but the dates, which passages and questions write in different ways.
"""

import random
from typing import NamedTuple

from jaxlm.data.time_questions import Question, TimedFact, share_at
from jaxlm.data.time_specifiers import Date, Interval, role_of

SHARES = {"train": 0.7, "dev": 0.15, "test": 0.15}  # of the names
FIRST = ("Ada Bruno Clara Dorian Edith Felix Greta Hugo Ines Jonas Karin Leopold Marta Nils Olga Pavel Rosa Simon "
         "Tilda Ulrich Vera Walter Yvonne Zeno Agnes Boris Celia Dmitri Elsa Frank")
LAST = ("Abendroth Birkeland Castellan Dunmore Eskola Fairweather Galanis Hollander Ivarsson Jelinek Kestrel Lindqvist "
        "Marchetti Novarro Okonjo Pemberton Quist Rosenthal Sandoval Tamura Ulvestad Vantongeren Whitlock Yardley "
        "Zawadzki Arkwright Brandauer Corrigan Delacroix Engstrom")
TOWNS = ("Ashcombe Belmora Carrowick Dunhaven Elmsford Farlough Grenvale Hartsmere Invermoor Kilbrook Larkhill "
         "Mossbury Northwold Oakridge Penvale Quarrington Ravensby Stonebridge Thornbury Umberleigh Velden Westmarch "
         "Yarrowdale Zellerau")
CRAFTS = ("a cartographer", "an organist", "a beekeeper", "a translator", "a geologist", "a watchmaker", "a botanist",
          "a stonemason", "a glassblower", "an archivist")
LOVES = ("chess", "mountain walking", "old maps", "rowing", "choral music", "rose gardens", "kite flying", "clockwork",
         "folk dance", "sea shanties")
REMARKS = ("Letters from those days survive in the county archive.", "The local paper reported on it more than once.",
           "Little else is recorded of that time.", "Colleagues later spoke of it with warmth.",
           "The work was hard and the pay modest.", "A photograph hangs in the town hall.",
           "Several anecdotes are told about it.", "It was not an easy decision.", "A plaque recalls it today.", "")


class Relation(NamedTuple):
    values: tuple[str, ...]     # {t} is a town
    questions: tuple[str, ...]  # {a} who or what; {when} the time
    passages: tuple[str, ...]   # {a}; {b} the value; {s} and {e} when it began and ended


PEOPLE = {
    "team": Relation(
        ("{t} Rovers", "{t} United", "{t} Athletic", "{t} Wanderers"),
        ("Which team did {a} play for {when}?", "{a} was a player of which club {when}?"),
        ("{a} played for {b} from {s} to {e}.", "In {s} {a} signed for {b}, and left the club in {e}.",
         "Between {s} and {e}, the shirt of {b} was worn by {a}.",
         "{b} had {a} under contract until {e}; the transfer dates from {s}.")),
    "employer": Relation(
        ("the {t} Gazette", "{t} Instruments", "the {t} Savings Bank", "{t} Shipyards"),
        ("Who was the employer of {a} {when}?", "Which company did {a} work for {when}?"),
        ("{a} worked for {b} from {s} until {e}.", "Hired by {b} in {s}, {a} stayed there until {e}.",
         "{b} employed {a} between {s} and {e}.", "The post of {a} at {b} began in {s} and ended in {e}.")),
    "position": Relation(
        ("mayor of {t}", "treasurer of {t}", "harbour master of {t}", "postmaster of {t}"),
        ("Which position did {a} hold {when}?", "What was the office of {a} {when}?"),
        ("{a} was {b} from {s} to {e}.", "Appointed {b} in {s}, {a} resigned in {e}.",
         "As {b}, {a} served between {s} and {e}.", "The term of {a} as {b} ended in {e}, after it had begun in {s}.")),
    "residence": Relation(
        ("{t}", "Upper {t}", "{t} Heath", "Port {t}"),
        ("Where did {a} live {when}?", "In which place was {a} at home {when}?"),
        ("{a} lived in {b} from {s} to {e}.", "In {s} {a} moved to {b}, to leave it again in {e}.",
         "The home of {a} was in {b} until {e}, from {s} on.", "Between {s} and {e} {a} rented rooms in {b}.")),
}
SHIPS = Relation(
    ("the {t} Line", "the {t} Trading Company", "the port of {t}", "the {t} Fishery"),
    ("Who owned the ship {a} {when}?", "To whom did the ship {a} belong {when}?"),
    ("The ship {a} belonged to {b} from {s} to {e}.", "{b} bought the ship {a} in {s} and sold her in {e}.",
     "Between {s} and {e} the ship {a} sailed for {b}.", "Until {e} {b} owned the ship {a}, acquired in {s}."))
PLAIN = (  # of what is true at any time: what is asked, what the passage says, its value
    ("Where was {a} born?", "{a} was born in {b} as the child of a miller.", tuple(TOWNS.split())),
    ("What was the craft of {a}?", "By training, {a} was {b}, and proud of it.", CRAFTS),
    ("What did {a} love to do in free hours?", "All who knew {a} remember a great love of {b}.", LOVES),
)


class TimeLines(NamedTuple):
    corpus: dict[str, str]                # of all splits: what belongs to one distracts in the others
    facts: dict[str, list[TimedFact]]     # split to its facts; no name is in two splits
    plain: dict[str, list[Question]]      # split to questions without a time, half of them about names without facts


def make_time_lines(entities: int = 400, seed: int = 0) -> TimeLines:
    """Time lines of so many names, and as many other names that only questions without a time are about.

    ValueError for fewer than 10 entities, of which a split might get none, or more than there are names.
    """
    names = [f"{first} {last}" for first in FIRST.split() for last in LAST.split()]
    if not 10 <= entities <= len(names) // 2:
        raise ValueError(f"entities must be 10 to {len(names) // 2}, got {entities}")
    rng = random.Random(seed)
    rng.shuffle(names)
    corpus: dict[str, str] = {}
    facts, plain = ({split: [] for split in SHARES} for _ in range(2))
    for i, name in enumerate(names[:2 * entities]):
        # Names with and without facts are split alike.
        split = share_at((i // 2 + 0.5) / entities, SHARES)
        ship = i % 8 == 0
        if i % 2 == 0:
            kinds = ["ship"] if ship else rng.sample(sorted(PEOPLE), rng.choice((1, 1, 2)))
            for kind in kinds:
                facts[split] += _time_line(name, kind, SHIPS if ship else PEOPLE[kind], corpus, rng)
        if not ship:
            plain[split] += _plain(name, corpus, rng)
    return TimeLines(corpus, facts, plain)


def _time_line(name: str, kind: str, relation: Relation, corpus: dict[str, str], rng: random.Random
               ) -> list[TimedFact]:
    """Three to six facts one after the other, a passage each, and the questions about them in one wording."""
    count = rng.randint(3, 6)
    question = rng.choice(relation.questions)
    before, _, after = question.replace("{a}", name).partition("{when}")
    values = rng.sample([value.format(t=town) for value in relation.values for town in TOWNS.split()], count)
    start, facts = Date(rng.randint(1900, 1985), rng.choice((0, 0, rng.randint(2, 12)))), []
    for i, value in enumerate(values):
        end = Date(start.year + rng.randint(1, 9), rng.choice((0, 0, rng.randint(2, 12))))
        doc = f"{name.replace(' ', '_')}-{kind}{i}"
        sentence = rng.choice(relation.passages).format(a=name, b=value, s=_written(start), e=_written(end))
        corpus[doc] = f"{sentence[0].upper()}{sentence[1:]} {rng.choice(REMARKS)}".strip()
        facts.append(TimedFact(doc, name, before, after, Interval(start, end), role_of(i, count), (doc,)))
        start = end if rng.random() < 0.7 else Date(end.year + rng.randint(1, 3))
    return facts


def _plain(name: str, corpus: dict[str, str], rng: random.Random) -> list[Question]:
    questions = []
    for i, (question, passage, values) in enumerate(PLAIN):
        doc = f"{name.replace(' ', '_')}-plain{i}"
        corpus[doc] = f"{passage.format(a=name, b=rng.choice(values))} {rng.choice(REMARKS)}".strip()
        questions.append(Question(doc, question.format(a=name), (doc,), "plain"))
    return questions


def _written(date: Date) -> str:
    """As passages write it: with the whole name of the month, which questions shorten."""
    return f"{_MONTH_NAMES[date.month - 1]} {date.year}" if date.month else str(date.year)


_MONTH_NAMES = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
                "November", "December")
