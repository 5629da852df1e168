"""What synthetic text is asked for, in Korean and English, and how much of each kind of whom.

The styles follow KORMo's synthetic corpora (arXiv:2510.09426): rewritten web pages, translations, textbook sections,
instructions with answers, translated reasoning. A template is written in the language that it asks for.
"""

import json
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jaxlm.core.config import nearest

Language = Literal["ko", "en"]
StyleName = Literal["rewrite", "translate", "textbook", "instruction", "reasoning-translate"]
LANGUAGES = ("ko", "en")
TEXT = "text"
_TURNS = {"ko": ("질문:", "답변:"), "en": ("Question:", "Answer:")}


class Style(NamedTuple):
    """One way to make text of a seed."""

    templates: Mapping[str, str]  # by language; `{text}` stands for the seed, other braces are doubled
    translates: bool = False      # the seed is in the other language, and nothing of it may be lost
    asks: bool = False            # a question and its answer: a conversation, see `read_turns`


class Wanted(NamedTuple):
    """One text that is to be written; the first three name it."""

    seed: int
    generator: str
    style: str


STYLES: dict[str, Style] = {
    "rewrite": Style({
        "ko": "다음 글의 내용을 한국 독자에게 맞는 자연스럽고 정확한 한국어 글로 다시 쓰세요. 사실은 바꾸지 말고, "
              "광고와 메뉴처럼 내용이 없는 부분은 빼세요. 다시 쓴 글만 출력하세요.\n\n{text}\n\n다시 쓴 글:",
        "en": "Rewrite the content of the following text as clear, well organised English prose. Change no fact, and "
              "leave out advertisements and menus. Write the new text only.\n\n{text}\n\nNew text:"}),
    "translate": Style({
        "ko": "다음 글을 빠짐없이 한국어로 번역하세요. 숫자와 수식은 그대로 두고 번역문만 출력하세요.\n\n{text}\n\n"
              "번역문:",
        "en": "Translate all of the following text into English. Keep numbers and formulas as they are, and write the "
              "translation only.\n\n{text}\n\nTranslation:"}, translates=True),
    "textbook": Style({
        "ko": "다음 글의 주제를 다루는 교과서의 한 절을 한국어로 쓰세요. 개념을 정의하고, 차근차근 설명하고, 예를 하나 "
              "드세요. 본문만 출력하세요.\n\n{text}\n\n교과서 본문:",
        "en": "Write a section of a textbook in English on the subject of the following text. Define the terms, "
              "explain step by step and give an example. Write the section only.\n\n{text}\n\nSection:"}),
    "instruction": Style({
        "ko": "다음 글을 읽고, 글로 답할 수 있는 질문 하나와 그 답변을 한국어로 쓰세요. 글이 없어도 이해할 수 있는 "
              "질문이어야 합니다. '질문:'과 '답변:'으로 시작하는 두 부분만 출력하세요.\n\n{text}\n\n",
        "en": "Read the following text and write in English one question that it answers, and the answer. The question "
              "must make sense without the text. Write two parts only, which begin with 'Question:' and "
              "'Answer:'.\n\n{text}\n\n"}, asks=True),
    "reasoning-translate": Style({
        "ko": "다음 풀이를 한국어로 번역하세요. 추론의 모든 단계를 순서대로 남기고, 숫자와 LaTeX 수식과 \\boxed{{}} "
              "안의 답은 바꾸지 마세요. 번역한 풀이만 출력하세요.\n\n{text}\n\n번역한 풀이:",
        "en": "Translate the following solution into English. Keep every step of the reasoning in its order, and "
              "change no number, no LaTeX and no answer in \\boxed{{}}. Write the translated solution only."
              "\n\n{text}\n\nTranslated solution:"}, translates=True),
}


def fill(template: str, text: str) -> str:
    r"""The prompt for a seed, whose own braces stay: `fill("{{}} {text}", "\boxed{3}")` is `{} \boxed{3}`."""
    return template.format(**{TEXT: text})


def check_template(template: str, where: str) -> None:
    """ValueError unless `{text}` stands in a template exactly once, and no other placeholder."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write braces that are text doubled") from None
    names = [name for _, name, spec, conversion in parts if name is not None]
    odd = [name for name in names if name != TEXT] or [spec for _, _, spec, conversion in parts if spec or conversion]
    if odd:
        raise ValueError(f"{where}: only {{{TEXT}}} may stand in braces, not {odd[0]!r}; write braces that are text "
                         "doubled")
    if len(names) != 1:
        raise ValueError(f"{where}: {{{TEXT}}} must stand in the template once, it stands there {len(names)} times")


def load_styles(path: Path | None) -> dict[str, Style]:
    """The styles, and those of a JSON file, `{"NAME": {"ko": "... {text} ...", "en": ...}}`, which replace templates of
    the same style and language. A new name has one of the languages at least. ValueError says where it is wrong.
    """
    styles = dict(STYLES)
    if path is None:
        return styles
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(one, dict) and one for one in content.values()):
        raise ValueError(f'{path}: must be an object of objects, {{"NAME": {{"ko": "... {{text}} ..."}}}}')
    for name, templates in content.items():
        for language, template in templates.items():
            where = f"{path}: style {name!r}, language {language!r}"
            if language not in LANGUAGES:
                raise ValueError(f"{where}: the language must be one of {', '.join(LANGUAGES)}")
            if not isinstance(template, str):
                raise ValueError(f"{where}: the template must be a string, not {type(template).__name__}")
            check_template(template, where)
        known = styles.get(name, Style({}))
        styles[name] = known._replace(templates={**known.templates, **templates})
    return styles


def read_turns(text: str, language: str) -> list[dict[str, str]] | None:
    """The question and the answer of an instruction as messages, None if they are not marked as asked or empty.

    `read_turns("Question: a?\\nAnswer: b", "en")` is a user's "a?" and an assistant's "b".
    """
    asked, answered = _TURNS[language]
    before, first, rest = text.partition(asked)
    question, second, answer = rest.partition(answered)
    if before.strip() or not first or not second or not question.strip() or not answer.strip() or asked in answer:
        return None
    return [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]


def quotas(generators: Mapping[str, float], styles: Mapping[str, float], count: int) -> dict[tuple[str, str], int]:
    """How many texts each generator writes in each style: `count` in all, by the products of the shares.

    Largest remainders, the first of equal ones: shares 1 and 2 of 4 texts in one style are 1 and 3.
    """
    cells = {(g, s): a * b for g, a in generators.items() for s, b in styles.items()}
    exact = {cell: count * share / sum(cells.values()) for cell, share in cells.items()}
    found = {cell: int(share) for cell, share in exact.items()}
    # Rounded, so that remainders which are equal but for float rounding go by the order of the cells.
    order = sorted(cells, key=lambda cell: -round(exact[cell] - found[cell], 9))
    for cell in order[:count - sum(found.values())]:
        found[cell] += 1
    return found


def assign(cells: Mapping[tuple[str, str], int], num_seeds: int, seed: int) -> list[Wanted]:
    """Which seeds each cell gets: its quota exactly, no seed twice in a cell, and all seeds as often as one another,
    give or take one.

    The seeds are shuffled once, and the cells take theirs one after the other, round and round. ValueError for a quota
    above the number of seeds.
    """
    order = list(range(num_seeds))
    random.Random(f"{seed} seeds").shuffle(order)
    found, taken = [], 0
    for (generator, style), count in cells.items():
        if count > num_seeds:
            raise ValueError(f"generator {generator} is to write {count} texts in style {style}, each of another seed, "
                             f"but there are {num_seeds} seeds; read more or ask for less")
        found += [Wanted(order[(taken + i) % num_seeds], generator, style) for i in range(count)]
        taken += count
    return found


def parse_shares(given: Sequence[str], known: Mapping[str, object], what: str) -> dict[str, float]:
    """`NAME=SHARE` each, or `NAME` alone for a share of 1. ValueError names what is wrong."""
    shares: dict[str, float] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if name not in known:
            raise ValueError(f"{what} {name!r} is unknown{nearest(name, known)}; known: {', '.join(known)}")
        if name in shares:
            raise ValueError(f"{what} {name} is named twice")
        try:
            shares[name] = float(value) if equals else 1.0
        except ValueError:
            raise ValueError(f"{what} {one!r}: the share must be a number") from None
        if not 0 < shares[name] < float("inf"):
            raise ValueError(f"{what} {one!r}: the share must be above 0")
    return shares


def parse_quotas(given: Sequence[str], generators: Mapping[str, object], styles: Mapping[str, object]
                 ) -> dict[tuple[str, str], int]:
    """`GENERATOR:STYLE=COUNT` each. ValueError names what is wrong."""
    found: dict[tuple[str, str], int] = {}
    for one in given:
        cell, _, count = one.partition("=")
        generator, _, style = cell.partition(":")
        for name, known, what in ((generator, generators, "generator"), (style, styles, "style")):
            if name not in known:
                raise ValueError(f"quota {one!r}: {what} {name!r} is unknown{nearest(name, known)}; known: "
                                 f"{', '.join(known)}")
        if (generator, style) in found:
            raise ValueError(f"quota {one!r}: {cell} is named twice")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"quota {one!r}: write GENERATOR:STYLE=COUNT with a count of at least 1")
        found[generator, style] = int(count)
    return found
