"""The seven time specifiers of TSM (Han et al. 2025, arXiv:2507.06782): phrases that tie a question to a date.

    Feb 1994 to 2001, in the middle of a time line:
    from_to       from Feb 1994 to 2001
    in            in Aug 1997
    between_and   between Nov 1995 and Mar 2000
    in_late       in late 1990s                      (in_early, before and after do not fit)
"""

import random
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
Role = Literal["first", "last"]


class Date(NamedTuple):
    year: int
    month: int = 0  # 0: the year alone

    def __str__(self) -> str:
        return f"{MONTHS[self.month - 1]} {self.year}" if self.month else str(self.year)


class Interval(NamedTuple):
    """When a fact held."""

    start: Date
    end: Date


def make_date(year: int, month: int = 0, day: int = 0) -> Date:
    """A calendar date as questions name it: year and month; the year alone for 1 January and for unknown parts.

        (1998, 2, 14) -> Feb 1998    (1998, 1, 1) -> 1998    (1998, 2, 0) -> 1998    (-3, 5, 1) -> May 1

    ValueError for a month or a day that is none.
    """
    if not 0 <= month <= 12 or not 0 <= day <= 31:
        raise ValueError(f"no date: year {year}, month {month}, day {day}")
    known = month and day and (month, day) != (1, 1)
    return Date(max(year, 1), month if known else 0)


def role_of(index: int, count: int) -> Role | None:
    """The place of fact `index` of `count` on its time line; the only fact of one is its first."""
    return "first" if index == 0 else "last" if index == count - 1 else None


def generate(interval: Interval, role: Role | None, rng: random.Random) -> dict[str, str]:
    """The phrase of each specifier that fits a fact, in the order of `SPECIFIERS`, dates drawn anew from the interval.

    ValueError for an interval that ends before it begins.
    """
    if interval.end < interval.start:
        raise ValueError(f"the interval ends before it begins: from {interval.start} to {interval.end}")
    phrases = {name: phrase(interval, role, rng) for name, phrase in SPECIFIERS.items()}
    return {name: phrase for name, phrase in phrases.items() if phrase is not None}


def months_within(interval: Interval) -> list[Date]:
    """The months after the start up to the end, the end included; a year without a month stands before its January.

        Nov 1998 to Feb 1999: Dec 1998, Jan 1999, Feb 1999        1998 to 1999: Jan 1998, ..., Dec 1998
    """
    found, (year, month) = [], interval.start
    while True:
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
        if Date(year, month) > interval.end:
            return found
        found.append(Date(year, month))


def split_question(text: str) -> tuple[str, Interval, str] | None:
    """What stands before and after the only "from X to Y" with two dates in order, and these dates; else None.

        "Who led it from Feb 1994 to 2001?" -> ("Who led it ", (Feb 1994, 2001), "?")
    """
    found = list(_FROM_TO.finditer(text))
    if len(found) != 1:
        return None
    month, year, to_month, to_year = found[0].groups()
    interval = Interval(Date(int(year), _month(month)), Date(int(to_year), _month(to_month)))
    if interval.end < interval.start or interval.start.year < 1:
        return None
    return text[:found[0].start()], interval, text[found[0].end():]


def _from_to(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    return f"from {interval.start} to {interval.end}"


def _in(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    return f"in {_inside(interval, rng)}"


def _between_and(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    first = _inside(interval, rng)
    return f"between {first} and {_inside(Interval(first, interval.end), rng)}"


def _in_early(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    fits = _decade(interval.end) > _decade(interval.start) and interval.end.year % 10 >= 3
    return f"in early {_decade(interval.end)}s" if fits else None


def _in_late(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    fits = _decade(interval.end) > _decade(interval.start) and interval.start.year % 10 <= 7
    return f"in late {_decade(interval.start)}s" if fits else None


def _before(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    return f"before {_inside(interval, rng)}" if role == "first" else None


def _after(interval: Interval, role: Role | None, rng: random.Random) -> str | None:
    return f"after {_inside(interval, rng)}" if role == "last" else None


def _inside(interval: Interval, rng: random.Random) -> Date:
    return rng.choice(months_within(interval) or list(interval))


def _decade(date: Date) -> int:
    return date.year // 10 * 10


def _month(name: str | None) -> int:
    return MONTHS.index(name[:3].capitalize()) + 1 if name else 0


_NAMES = "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|" \
         "nov(?:ember)?|dec(?:ember)?"
_DATE = rf"(?:({_NAMES})\.? )?(\d{{3,4}})"
_FROM_TO = re.compile(rf"\bfrom {_DATE} to {_DATE}\b(?!s\b)", re.IGNORECASE)

# In the order in which they are trained; the average of their models does not depend on it.
SPECIFIERS: dict[str, Callable[[Interval, Role | None, random.Random], str | None]] = {
    "after": _after, "before": _before, "between_and": _between_and, "from_to": _from_to, "in_early": _in_early,
    "in_late": _in_late, "in": _in}
