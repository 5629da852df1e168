"""Which generated texts are fit to learn from: rules on text and source first, then whether the answer is still right.

KORMo (arXiv:2510.09426, Algorithm 1) filters translated reasoning in two stages whose details are not published; these
are the usual rules. A rule is `(source, text, language, config) -> reason | None`; None means that the text passes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxlm.reward.math_answer import extract_boxed
from jaxlm.reward.verify import math_equal, numeric_equal

SCRIPTS = {"ko": "hangul", "en": "latin"}
MATHS = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]+`|https?://\S+", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+\*?")
_IN_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{[^{}]*\}")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
# A number that English spells out, a translation may write in digits: these say nothing about loss.
_SMALL = {str(i) for i in range(13)}


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The limits of the rules; shares are from 0 to 1."""

    min_script: float = 0.5       # of the letters outside of formulas, code and addresses: in the language's script
    max_latin: float = 0.35       # of these letters, in a Korean text
    max_han: float = 0.05         # of these letters, Chinese characters
    max_lost: float = 0.1         # of the numbers in source and translation together: in one of them only
    max_lost_latex: float = 0.1   # likewise, of formulas
    max_repeated: float = 0.3     # of the word 4-grams or of the character 16-grams: seen before in the text
    min_ratio: float = 0.3        # characters of a translation, over those of its source
    max_ratio: float = 3.0

    def __post_init__(self) -> None:
        shares = ("min_script", "max_latin", "max_han", "max_lost", "max_lost_latex", "max_repeated")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"filter.{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.min_ratio < self.max_ratio:
            raise ValueError(f"filter.min_ratio {self.min_ratio} must be below max_ratio {self.max_ratio}")


class Shares(NamedTuple):
    """The letters of a text by script, as shares of all its letters."""

    hangul: float
    latin: float
    han: float
    letters: int


def script_shares(text: str) -> Shares:
    """The scripts outside of formulas, code and addresses: "값은 $x$ 입니다 ok" is 5/7 hangul and 2/7 latin."""
    counts, letters = Counter(), 0
    for letter in _COMMAND.sub(" ", CODE.sub(" ", MATHS.sub(" ", text))):
        if letter.isalpha():
            letters += 1
            counts[_script(letter)] += 1
    return Shares(*(counts[name] / max(letters, 1) for name in ("hangul", "latin", "han")), letters)


def empty(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """There is something, and it is no replacement character."""
    if not text.strip():
        return "nothing was written"
    return "it holds U+FFFD, which is no text" if "\ufffd" in text else None


def script(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """Enough letters are in the script of the language. A text of formulas alone passes if its source is one, too."""
    shares = script_shares(text)
    if not shares.letters:
        return "no letters outside of formulas" if script_shares(source).letters else None
    share = getattr(shares, SCRIPTS[language])
    return f"{share:.0%} {SCRIPTS[language]} letters" if share < config.min_script else None


def residue(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """Few letters are left of the other language, or of Chinese, into which models slip."""
    shares = script_shares(text)
    if shares.han > config.max_han:
        return f"{shares.han:.0%} Chinese characters"
    other, limit = ("latin", config.max_latin) if language == "ko" else ("hangul", config.max_han)
    share = getattr(shares, other)
    return f"{share:.0%} {other} letters" if share > limit else None


def repetition(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """The text does not go round in circles, or not more than its source does."""
    for name, count in (("words", 4), ("characters", 16)):
        share = repeated(text, name, count)
        if share > max(config.max_repeated, repeated(source, name, count)):
            return f"{share:.0%} of its {count}-grams of {name} come again"
    return None


def length(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """A translation is neither a summary nor a sequel."""
    ratio = len(text.strip()) / max(len(source.strip()), 1)
    return None if config.min_ratio <= ratio <= config.max_ratio else f"{ratio:.2f} times as long as its source"


def numbers(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """The numbers of both are the same, up to those below 13, which one of them may spell out."""
    ours, theirs = (set(_numbers(one)) for one in (text, source))
    odd = sorted(one for one in ours ^ theirs if one not in _SMALL)
    share = len(odd) / max(len(ours | theirs), 1)
    return f"numbers differ: {', '.join(odd[:5])}" if share > config.max_lost else None


def latex(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """The formulas of both are the same, up to spaces and to words in them."""
    ours, theirs = (Counter(_formulas(one)) for one in (text, source))
    odd = (ours - theirs) + (theirs - ours)
    share = odd.total() / max((ours | theirs).total(), 1)
    return f"formulas differ: {next(iter(odd))[:60]}" if share > config.max_lost_latex else None


def boxed(source: str, text: str, language: str, config: FilterConfig) -> str | None:
    """Both have as many boxes; what is in the last is the matter of `same_answer`."""
    counts = [one.count(r"\boxed") for one in (source, text)]
    return None if counts[0] == counts[1] else f"{counts[0]} boxed answers in the source, {counts[1]} in the text"


RULES = {"empty": empty, "script": script, "residue": residue, "repetition": repetition, "length": length,
         "numbers": numbers, "latex": latex, "boxed": boxed}
PLAIN_RULES = ("empty", "script", "residue", "repetition")  # what every text owes, a translation or not


def first_failure(source: str, text: str, language: str, config: FilterConfig, *, translation: bool
                  ) -> tuple[str, str] | None:
    """The first rule that a text fails, and why; None if it passes all. `language`: ko or en, that of the text."""
    for name in RULES if translation else PLAIN_RULES:
        reason = RULES[name](source, text, language, config)
        if reason is not None:
            return name, reason
    return None


def same_answer(source: str, text: str, *, symbolic: bool = True) -> bool | None:
    r"""Whether the last box of a translation holds the answer of its source; None if the source has no answer in a box.

    Args:
      symbolic: compare as mathematics, which needs math-verify and takes up to a second; else equal texts and numbers.
    """
    gold, answer = extract_boxed(source), extract_boxed(text)
    if gold is None:
        return None
    if answer is None:
        return False
    if "".join(gold.split()) == "".join(answer.split()) or numeric_equal(answer, [gold]):
        return True
    if not symbolic:
        return False
    try:
        return bool(math_equal(answer, [gold]))
    except (RuntimeError, TimeoutError, ValueError):  # what cannot be compared is not known to be the same
        return False


JUDGE = ("Here are a text and its translation. Does the translation say everything that the text says, with the same "
         "numbers, steps and result, and nothing else? Begin your answer with YES or NO.\n\nText:\n{text}\n\n"
         "Translation:\n{translation}\n\nAnswer:")


def judge_prompt(source: str, text: str) -> str:
    """What a judge model is asked about a translation."""
    return JUDGE.format(text=source, translation=text)


def read_verdict(answer: str) -> bool | None:
    """YES or NO at the beginning of what a judge wrote, behind its thoughts if it shows any; None for neither."""
    words = re.findall(r"[A-Za-z]+", answer.rpartition("</think>")[2])
    return {"YES": True, "NO": False}.get(words[0].upper()) if words else None


def repeated(text: str, unit: str, count: int) -> float:
    """The share of n-grams that came before: "a b a b a b" has 5 word bigrams, 2 of them new, so 0.6."""
    items: Sequence[str] = text.split() if unit == "words" else " ".join(text.split())
    grams = [tuple(items[i:i + count]) for i in range(len(items) - count + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    for start, kind in (("HANGUL", "hangul"), ("LATIN", "latin"), ("CJK", "han"), ("FULLWIDTH LATIN", "latin")):
        if name.startswith(start):
            return kind
    return "other"


def _numbers(text: str) -> list[str]:
    return [one.replace(",", "") for one in _NUMBER.findall(unicodedata.normalize("NFKC", text))]


def _formulas(text: str) -> list[str]:
    found = [_IN_WORDS.sub("", match.group()) for match in MATHS.finditer(text)]
    return ["".join(one.split()).strip("$") for one in found]
