"""Embedded text for demonstrations and tests: true statements about places, languages and money in Korean and English.

Documents are composed from CLDR facts, as many as wanted. The facts of the two splits are apart: what a held-out
document states, no training document states in any wording or language. A new CLDR in babel changes the text.
"""

import functools
import random
from collections import defaultdict
from collections.abc import Sequence

from jaxlm.data.korean import Word
from jaxlm.data.rows import SAMPLE_LANGUAGES, SAMPLE_SPLITS, Document
from jaxlm.data.sample_facts import Fact, facts, spell
from jaxlm.data.sample_templates import ALSO, FOLLOW, INTRO, LIST, QUESTION, STATE

BILINGUAL_SHARE = 0.2  # Of the documents for "both"; their language is None.
MAX_SENTENCES = 6
Composed = tuple[list[Fact], list[str], str]  # Facts, lines, what joins the lines.


def sample_documents(language: str, count: int, *, split: str = "train", seed: int = 0) -> Sequence[Document]:
    """`count` documents of 2 to 6 sentences, `language` ko, en or both, made when indexed from (seed, split, index).

    Documents do not depend on `count`. For "both", `Document.language` says which; None is a bilingual text.
    """
    for value, valid in ((language, SAMPLE_LANGUAGES), (split, SAMPLE_SPLITS)):
        if value not in valid:
            raise ValueError(f"{value!r} is unknown; one of {', '.join(valid)}")
    return SampleDocuments(language, count, split, seed)


class Sample(Sequence):
    """`count` documents in `language` ko, en or both, each made when indexed, from (seed, split, index) alone."""

    def __init__(self, language: str, count: int, split: str, seed: int) -> None:
        self.language, self.count, self.split, self.seed = language, count, split, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Document:
        if not -self.count <= i < self.count:
            raise IndexError(f"the sample has {self.count} documents, asked for {i}")
        return self.make(int(i) % self.count)

    def make(self, i: int) -> Document:
        """The document of an index."""
        raise NotImplementedError

    def drawn(self, what: str, i: int) -> tuple[random.Random, str]:
        """Random numbers for one of them, and its language (for both, one of the two)."""
        # A string seeds by its SHA-512, the same on every platform and Python.
        rng = random.Random(f"{what} {self.seed} {self.language} {self.split} {i}")
        return rng, rng.choice(("ko", "en")) if self.language == "both" else self.language


class SampleDocuments(Sample):
    """See `sample_documents`."""

    def make(self, i: int) -> Document:
        text, language, _ = compose(self.language, i, self.split == "held_out", self.seed)
        return Document(text, language, "sample")


def compose(language: str, index: int, held_out: bool, seed: int) -> tuple[str, str | None, tuple[Fact, ...]]:
    """Text, language (None if bilingual) and the facts it states."""
    # A string seeds by its SHA-512, the same on every platform and Python.
    rng = random.Random(f"{seed} {language} {held_out} {index}")
    written = language if language != "both" else None if rng.random() < BILINGUAL_SHARE else rng.choice(("ko", "en"))
    form = rng.choices((_about_topic, _about_kind, _about_value, _questions), (45, 20, 15, 20))[0]
    chosen, lines, separator = form(rng, held_out, (written,) if written else rng.choice((("ko", "en"), ("en", "ko"))))
    return separator.join(lines), written, tuple(chosen)


def statements(fact: Fact, language: str) -> list[str]:
    """Every wording of one fact that stands on its own."""
    return [*(_fill(form, fact, language) for form in STATE[language][fact.kind]), " ".join(question(fact, language))]


def question(fact: Fact, language: str) -> tuple[str, str]:
    """The question for one fact, and its answer."""
    asked, answer = QUESTION[language][fact.kind]
    return _fill(asked, fact, language), _fill(answer, fact, language)


def cloze(fact: Fact, language: str) -> tuple[str, str]:
    """The first wording of a fact: up to its value, and the rest. ("The currency of Japan is ", "the Japanese yen.")"""
    form = STATE[language][fact.kind][0]
    begun = _fill(form[:form.index("{b")], fact, language)
    return begun, _fill(form, fact, language).removeprefix(begun)


@functools.cache
def _groups(held_out: bool) -> tuple[list[list[Fact]], ...]:
    """Facts by what they are about, by kind, and by the value they share; groups of at least two."""
    topics, kinds, values = defaultdict(list), defaultdict(list), defaultdict(list)
    for fact in facts(held_out):
        topics[_topic(fact)].append(fact)
        kinds[fact.kind].append(fact)
        if fact.kind in LIST["ko"]:
            values[fact.kind, fact.value].append(fact)
    return tuple([group for group in groups.values() if len(group) > 1] for groups in (topics, kinds, values))


def _topic(fact: Fact) -> tuple[str, str]:
    return fact.value if fact.kind == "city" else fact.entity


def _about_topic(rng: random.Random, held_out: bool, languages: Sequence[str]) -> Composed:
    """Several facts about one place, language or currency; later sentences may leave its name out."""
    group = rng.choice(_groups(held_out)[0])
    chosen = rng.sample(group, min(len(group), rng.randint(2, MAX_SENTENCES)))
    # A long list of cities would crowd out what else there is to say.
    chosen = [fact for i, fact in enumerate(chosen)
              if fact.kind != "city" or sum(other.kind == "city" for other in chosen[:i]) < 2]
    lines = []
    for i, fact in enumerate(chosen):
        follows = i > 0 and rng.random() < 0.6
        for language in languages:
            forms = (FOLLOW if follows and fact.kind in FOLLOW[language] else STATE)[language][fact.kind]
            # The first wording names the topic first; "English is spoken in Rwanda. Its code ..." would mislead.
            form = rng.choice(forms) if i > 0 else forms[0]
            repeated = follows and chosen[i - 1].kind == fact.kind
            lines.append((ALSO[language] if repeated else "") + _fill(form, fact, language))
    return chosen, lines, _separator(rng, languages)


def _about_kind(rng: random.Random, held_out: bool, languages: Sequence[str]) -> Composed:
    """The same kind of fact about several things, perhaps after a general remark."""
    group = rng.choice(_groups(held_out)[1])
    chosen = rng.sample(group, min(len(group), rng.randint(2, MAX_SENTENCES - 1)))
    with_intro = rng.random() < 0.5
    lines = [rng.choice(INTRO[language][chosen[0].kind]) for language in languages] if with_intro else []
    lines += [_fill(rng.choice(STATE[language][fact.kind]), fact, language)
              for fact in chosen for language in languages]
    return chosen, lines, _separator(rng, languages)


def _about_value(rng: random.Random, held_out: bool, languages: Sequence[str]) -> Composed:
    """What several things have in common, in one sentence, then one or two of them alone."""
    group = rng.choice(_groups(held_out)[2])
    chosen = rng.sample(group, min(len(group), rng.randint(2, 4)))
    lines = [rng.choice(INTRO[language][chosen[0].kind]) for language in languages]
    lines += [_fill_list(chosen, language) for language in languages]
    lines += [_fill(rng.choice(STATE[language][fact.kind]), fact, language)
              for fact in chosen[:rng.randint(0, 2)] for language in languages]
    return chosen, lines, _separator(rng, languages)


def _questions(rng: random.Random, held_out: bool, languages: Sequence[str]) -> Composed:
    """Two or three questions with their answers."""
    group = rng.choice(_groups(held_out)[rng.randint(0, 1)])
    chosen = rng.sample(group, min(len(group), rng.randint(2, 3)))
    lines = []
    for fact in chosen:
        for language in languages:
            lines.append(" ".join(question(fact, language)))
    return chosen, lines, "\n"


def _separator(rng: random.Random, languages: Sequence[str]) -> str:
    return "\n" if len(languages) > 1 or rng.random() < 0.1 else " "


def _fill(form: str, fact: Fact, language: str) -> str:
    if fact.kind in ("name", "word"):
        # Such a fact is a pair of names: one's own and the other language's.
        other = "en" if language == "ko" else "ko"
        own, foreign = spell(fact.entity, language, plain=fact.kind == "word"), spell(fact.value, other, plain=True)
    else:
        own, foreign = spell(fact.entity, language), spell(fact.value, language)
    return _sentence(form.format(a=Word(own), b=Word(foreign)), language)


def _fill_list(chosen: list[Fact], language: str) -> str:
    items = [spell(fact.entity, language) for fact in chosen]
    joined = ", ".join(items) if language == "ko" else ", ".join(items[:-1]) + " and " + items[-1]
    return _sentence(LIST[language][chosen[0].kind].format(
        a=Word(joined), b=Word(spell(chosen[0].value, language))), language)


def _sentence(text: str, language: str) -> str:
    return text[0].upper() + text[1:] if language == "en" else text
