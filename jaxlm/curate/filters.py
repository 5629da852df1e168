"""The heuristic filters of Gopher, C4 and FineWeb as datatrove implements them, and the particle rule for Korean.

datatrove's own word tokenizers need models that are large or downloaded (spaCy, NLTK, Kiwi). The filters get one here
that splits at spaces, as Gopher and C4 do, so their English thresholds keep their meaning.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from jaxlm.curate.config import FilterConfig, Thresholds
from jaxlm.curate.extras import extra

# Particles (josa) and inflections that end an eojeol of running text, longest first.
PARTICLES = tuple(sorted((
    "은", "는", "이", "가", "을", "를", "에", "의", "도", "로", "으로", "와", "과", "만", "에서", "에게", "까지",
    "부터", "보다", "처럼", "하고", "이나", "라고", "마다", "한", "할", "된", "될", "인", "던", "고", "며", "면", "서",
    "지", "게", "니다", "다", "요", "지만", "는데", "므로", "려고"), key=len, reverse=True))
# Endings of Korean sentences on the web, where the full stop is often left out.
KOREAN_ENDINGS = ("다", "요", "죠", "까", "음")
_SENTENCE = re.compile(r".+?(?:[.!?。！？…]+[\"'”’)\]]*(?=\s|$)|\n|$)", re.DOTALL)
_HANGUL_WORD = re.compile("[가-힣]+")
_TRAILING = re.compile(r"[^\w]+$")


@functools.cache
def word_tokenizer() -> Any:
    """datatrove's interface: words between spaces, sentences that end in . ! ? or at a line break."""
    base = extra("datatrove.utils.word_tokenizers").WordTokenizer

    class Spaces(base):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [found.span() for found in _SENTENCE.finditer(text) if found[0].strip()]

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    return Spaces()


def hangul_share(text: str) -> float:
    """Syllables of Hangul among all letters; 0 without letters. `"가나 ab"` is 0.5."""
    letters = [char for char in text if char.isalpha()]
    return sum("가" <= char <= "힣" for char in letters) / len(letters) if letters else 0.0


def particle_share(text: str) -> tuple[float, int]:
    """The share of Hangul words that end in a particle or inflection, and how many different ones.

    Only words of two syllables and more count. `"나무가 산에 있다 서울"`: 가, 에, 다 of four words, so (0.75, 3).
    """
    found, words = [], 0
    for word in text.split():
        word = _TRAILING.sub("", word)
        if len(word) < 2 or not _HANGUL_WORD.fullmatch(word):
            continue
        words += 1
        ending = next((one for one in PARTICLES if len(one) < len(word) and word.endswith(one)), None)
        if ending:
            found.append(ending)
    return (len(found) / words if words else 0.0), len({*found})


def particle_rule(text: str, limits: Thresholds) -> str | None:
    """Why a text is dropped: too little Hangul, or no running Korean; None if it stays."""
    if hangul_share(text) < limits.min_hangul:
        return "hangul_share"
    share, distinct = particle_share(text)
    if share < limits.min_particles:
        return "few_particles"
    return "same_particles" if distinct < limits.min_distinct_particles else None


def _gopher_quality(limits: Thresholds, language: str) -> Any:
    return extra("datatrove.pipeline.filters").GopherQualityFilter(
        min_doc_words=limits.min_words, max_doc_words=limits.max_words,
        min_avg_word_length=limits.min_mean_word_length, max_avg_word_length=limits.max_mean_word_length,
        max_symbol_word_ratio=limits.max_symbol_ratio, max_bullet_lines_ratio=limits.max_bullet_lines,
        max_ellipsis_lines_ratio=limits.max_ellipsis_lines, max_non_alpha_words_ratio=limits.min_alpha_words,
        min_stop_words=limits.min_stop_words, language=word_tokenizer())


def _gopher_repetition(limits: Thresholds, language: str) -> Any:
    return extra("datatrove.pipeline.filters").GopherRepetitionFilter(
        dup_line_frac=limits.max_duplicate_lines, dup_para_frac=limits.max_duplicate_lines, language=word_tokenizer())


def _c4(limits: Thresholds, language: str) -> Any:
    return extra("datatrove.pipeline.filters").C4QualityFilter(
        filter_no_terminal_punct=limits.c4_end_punctuation, min_num_sentences=limits.min_sentences,
        min_words_per_line=limits.min_words_per_line, language=word_tokenizer())


def _fineweb(limits: Thresholds, language: str) -> Any:
    marks = tuple(extra("datatrove.utils.text").TERMINAL_PUNCTUATION)
    return extra("datatrove.pipeline.filters").FineWebQualityFilter(
        line_punct_thr=limits.min_punctuated_lines, short_line_thr=limits.max_short_lines,
        short_line_length=limits.short_line_length, char_duplicates_ratio=limits.max_duplicate_line_chars,
        new_line_ratio=limits.max_new_lines, language=word_tokenizer(),
        stop_chars=(*marks, *KOREAN_ENDINGS) if language == "ko" else marks)


def _particles(limits: Thresholds, language: str) -> Any:
    def keeps(document: Any) -> bool | tuple[bool, str]:
        reason = particle_rule(document.text, limits)
        return True if reason is None else (False, reason)

    return extra("datatrove.pipeline.filters").LambdaFilter(keeps)


def build_filter(name: str, config: FilterConfig) -> Any:
    """One datatrove filter that treats each document by the limits of its language (`metadata["language"]`)."""
    by_language = {one: FILTERS[name](getattr(config, one), one) for one in ("ko", "en")}
    return extra("datatrove.pipeline.filters").LambdaFilter(
        lambda document: by_language[document.metadata["language"]].filter(document))


def chosen_filters(config: FilterConfig) -> list[str]:
    """Names of the filters in use, in FineWeb's order."""
    return [name for name in FILTERS if getattr(config, name)]


# Limits and language to a datatrove filter.
FILTERS: dict[str, Callable[[Thresholds, str], Any]] = {
    "gopher_repetition": _gopher_repetition,
    "gopher_quality": _gopher_quality,
    "c4": _c4,
    "fineweb": _fineweb,
    "particles": _particles,
}
