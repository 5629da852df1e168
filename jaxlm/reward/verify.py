"""Judges on the host: is a predicted answer one of the accepted ones?

A judge is `(prediction, answers) -> bool | None`: answers are JSON values of which one suffices, and None means that
the answers leave nothing to compare with. What a model wrote cannot make a judge take long; at worst it raises, which
`judge_rows` counts as not equal and reports.
"""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.core.config import nearest
from jaxlm.reward.call_match import match_calls, read_calls
from jaxlm.reward.math_answer import check_math_verify, extract_boxed, symbolic_equal

JudgeName = Literal["math", "numeric", "exact", "set", "calls"]

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"[+-]?{_DIGITS}")
_CURRENCY = "$€£¥₩"
_UNIT = rf"[%°‰{_CURRENCY}]|[^\W\d_][^\d+*=<>(){{}}\\^]*(?:\^?[23])?"
_NUMBER = re.compile(rf"([+-]?)(?:[{_CURRENCY}]\s*([+-]?))?({_DIGITS}(?:[eE][+-]?\d{{1,4}})?)"
                     rf"(?:\s*/\s*({_DIGITS}))?\s*(?:{_UNIT})?\s*\.?")
_LATEX = ((r"\\[!,;: ]|\\left|\\right|(?<!\\)\$(?=\s*$)", ""), (r"\{,\}", ","), (r"\\([%$])", r"\1"),
          (r"\^\{?\\circ\}?", "°"), (r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r" \1 "))
_MAX_NUMBER = 200  # characters


class Judged(NamedTuple):
    """What the judges said of B rows."""

    correct: np.ndarray             # [B] float32: 1, 0, or NaN where it could not be judged; `Trajectory.correct`
    errors: tuple[str | None, ...]  # why a judge failed on a row, which counts as not equal


def judge_rows(
    judges: Sequence[JudgeName], predictions: Sequence[str | None], answers: Sequence[Sequence[Any]]
) -> Judged:
    """The verdicts of one judge a row.

    Args:
      judges: names in `JUDGES`.
      predictions: None where there is no answer, which is wrong.
      answers: JSON values of which one suffices.

    Raises:
      ValueError: an unknown judge, or one whose package is missing.
    """
    for name in set(judges):
        if name not in JUDGES:
            raise ValueError(f"unknown judge {name!r}{nearest(name, JUDGES)}")
    if "math" in judges:
        check_math_verify()
    correct, errors = np.zeros(len(judges), np.float32), [None] * len(judges)
    for b, (name, prediction, accepted) in enumerate(zip(judges, predictions, answers, strict=True)):
        try:
            equal = JUDGES[name]("" if prediction is None else prediction, accepted)
            correct[b] = np.nan if equal is None else equal
        except Exception as error:
            errors[b] = f"{type(error).__name__}: {error}"
    return Judged(correct, tuple(errors))


def math_equal(prediction: str, answers: Sequence[Any]) -> bool | None:
    r"""Whether two answers are the same mathematics, by math-verify; both may stand in a box.

    Equal texts and plain numbers are decided without it. Raises as `symbolic_equal` does.
    """
    texts = [_text(one) for one in answers]
    golds = [gold for gold in (extract_boxed(text, fbox=True) or text.strip() for text in texts) if gold]
    if not golds:
        return None
    prediction = extract_boxed(prediction, fbox=True) or prediction.strip()
    if not prediction:
        return False
    if any(prediction.split() == gold.split() for gold in golds):
        return True
    if all(_PLAIN.fullmatch(text) for text in (prediction, *golds)):
        return numeric_equal(prediction, golds)
    return symbolic_equal(prediction, golds)


def numeric_equal(prediction: str, answers: Sequence[Any]) -> bool | None:
    """Whether two numbers differ by less than 1e-6 of the larger; integers must be the same.

    Read as numbers: 1,234.5, -$3, 3e-4, 1/4, 12 apples, 5 km/h, 50% (as 50). Units and signs of currency are dropped.
    """
    golds = [gold for gold in map(_number, map(_text, answers)) if gold is not None]
    if not golds:
        return None
    number = _number(prediction)
    return number is not None and any(_close(number, gold) for gold in golds)


def exact_equal(prediction: str, answers: Sequence[Any]) -> bool | None:
    """Whether two texts are equal but for case, width (NFKC), runs of spaces, outer quotes and a last full stop."""
    golds = [gold for gold in (_normal(_text(one)) for one in answers) if gold]
    return _normal(prediction) in golds if golds else None


def set_equal(prediction: str, answers: Sequence[Any]) -> bool | None:
    """Whether two lists have the same elements, as often, in any order. An answer is a JSON list, or text as below.

    In a text, commas, semicolons, line ends and "and" separate, outside of brackets; outer brackets do not matter:
    "{1, 2}", "2 and 1" and "[2.0; 1]" are equal. Elements are equal as numbers (`numeric_equal`), else as texts.
    """
    golds = [[_text(one) for one in gold] if isinstance(gold, list) else _elements(_text(gold)) for gold in answers]
    if not any(golds):
        return None
    ours = _elements(prediction)
    return any(_same_elements(ours, gold) for gold in golds if gold)


def calls_equal(prediction: str, answers: Sequence[Any]) -> bool | None:
    """Whether calls, as JSON (`read_calls`), match one of the accepted lists of calls (`match_calls`)."""
    if not answers:
        return None
    calls = read_calls(prediction)
    return calls is not None and any(match_calls(calls, accepted) for accepted in answers)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _normal(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'` ").removesuffix(".").strip("\"'` ")


def _number(text: str) -> int | float | None:
    """The number that a text is."""
    text = text.strip()
    if len(text) > _MAX_NUMBER:
        return None
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    *signs, number, denominator = match.groups()
    sign = -1 if "-" in signs else 1
    number = number.replace(",", "").removesuffix(".")
    if denominator is None and number.isdecimal():
        return sign * int(number)
    value = sign * float(number)
    if denominator is not None:
        below = float(denominator.replace(",", ""))
        value = value / below if below else math.inf
    return value if math.isfinite(value) else None


def _close(a: int | float, b: int | float) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


def _elements(text: str) -> list[str]:
    """The elements of a list in a text."""
    text = re.sub(r"\\left|\\right|\\(?=[{}])", "", text).strip().strip("$").strip()
    if len(text) > 1 and text[0] + text[-1] in ("{}", "[]", "()") and _one_bracket(text):
        text = text[1:-1]
    found, start, depth = [], 0, 0
    for match in re.finditer(r"[([{]|[)\]}]|[,;\n]|\band\b", text):
        if match.group() in "([{":
            depth += 1
        elif match.group() in ")]}":
            depth -= 1
        elif depth == 0:
            found.append(text[start:match.start()])
            start = match.end()
    return [one.strip() for one in (*found, text[start:]) if one.strip()]


def _one_bracket(text: str) -> bool:
    """Whether the first bracket is closed by the last character: not so in "(1)(2)"."""
    depth = 0
    for match in re.finditer(r"[([{]|[)\]}]", text):
        depth += 1 if match.group() in "([{" else -1
        if depth == 0:
            return match.end() == len(text)
    return False


def _same_elements(ours: Sequence[str], gold: Sequence[str]) -> bool:
    if len(ours) != len(gold):
        return False
    left = list(ours)
    for one in gold:
        for i, other in enumerate(left):
            if numeric_equal(other, [one]) or _normal(other) == _normal(one):
                del left[i]
                break
        else:
            return False
    return True


JUDGES = {
    "math": math_equal, "numeric": numeric_equal, "exact": exact_equal, "set": set_equal, "calls": calls_equal,
}
