"""What each step of curation asks of a document. Each threshold names its source; Korean values name their reason."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

Language = Literal["ko", "en"]
OutputFormat = Literal["parquet", "array_record"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of the heuristic filters for one language; the defaults are those of the papers, for English.

    Words are what spaces separate, in Korean the eojeol. Sources: Gopher (arXiv:2112.11446, A.1.1), C4
    (arXiv:1910.10683, 2.2) as FineWeb applies it, FineWeb (arXiv:2406.17557, 3.6).
    """

    min_words: int = 50                  # Gopher
    max_words: int = 100_000             # Gopher
    min_mean_word_length: int = 3        # Gopher, characters
    max_mean_word_length: int = 10       # Gopher
    max_symbol_ratio: float = 0.1        # Gopher: "#" or ellipses to words
    max_bullet_lines: float = 0.9        # Gopher
    max_ellipsis_lines: float = 0.3      # Gopher
    min_alpha_words: float = 0.8         # Gopher: words with a letter
    min_stop_words: int = 2              # Gopher: of the, be, to, of, and, that, have, with
    max_duplicate_lines: float = 0.3     # Gopher, table A1; its n-gram limits hold for both languages
    min_sentences: int = 5               # C4
    min_words_per_line: int = 3          # C4
    c4_end_punctuation: bool = False     # C4 has it; FineWeb left it out since it removed 30 % of all text
    min_punctuated_lines: float = 0.12   # FineWeb
    max_short_lines: float = 0.67        # FineWeb
    short_line_length: int = 30          # FineWeb, characters
    max_duplicate_line_chars: float = 0.01  # FineWeb
    max_new_lines: float = 0.3           # FineWeb: line breaks to words
    min_hangul: float = 0.0              # Hangul among the letters
    min_particles: float = 0.0           # Hangul words that end in a particle or an inflection
    min_distinct_particles: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{one.name} must be a number from 0 up, got {value}")
        if self.min_words > self.max_words or self.min_mean_word_length > self.max_mean_word_length:
            raise ValueError("min_words and min_mean_word_length must not be above their max_ counterparts")


# The 600 first facts of jaxlm.data.sample need in Korean 0.59 as many words and 0.47 as many characters as in English.
KOREAN = Thresholds(
    min_words=30,                  # 50 * 0.59
    max_words=60_000,              # 100,000 * 0.59
    min_mean_word_length=2,        # an eojeol has about three syllables; one-syllable words alone are broken spacing
    max_mean_word_length=8,        # text whose spaces were lost lies above
    min_stop_words=0,              # function words are particles inside the eojeol: min_particles instead
    min_words_per_line=2,          # 3 * 0.59; subject and verb make a sentence
    short_line_length=15,          # 30 * 0.47
    max_new_lines=0.5,             # 0.3 / 0.59: the same lines hold fewer words
    min_hangul=0.5,                # as much foreign script is a glossary, a listing or Chinese; Latin names stay below
    min_particles=0.2,             # prose has 0.5 and more, lists of key words next to none
    min_distinct_particles=2,      # as Gopher asks for two different stop words
)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which heuristic filters are applied, and their limits by language."""

    gopher_repetition: bool = True
    gopher_quality: bool = True
    c4: bool = True                # also removes lines (policy, javascript) from documents it keeps
    fineweb: bool = True
    particles: bool = True         # Hangul share and particles
    ko: Thresholds = field(default_factory=lambda: KOREAN)
    en: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Which languages stay, by py3langid; `min_confidence` is FineWeb's 0.65."""

    keep: tuple[Language, ...] = ("ko", "en")
    min_confidence: float = 0.65

    def __post_init__(self) -> None:
        if not self.keep or len({*self.keep}) < len(self.keep):
            raise ValueError(f"language.keep names each language once and at least one, got {self.keep}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"language.min_confidence must be from 0 to 1, got {self.min_confidence}")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Exact duplicates by hash, near-duplicates by MinHash: 14 * 8 hashes of word 5-grams as in FineWeb.

    Two documents of Jaccard similarity s meet with probability `1 - (1 - s^hashes)^buckets`: 0.92 at s = 0.8.
    """

    exact: bool = True
    minhash: bool = True
    ngram: int = 5
    buckets: int = 14
    hashes: int = 8                # per bucket
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("ngram", "buckets", "hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"dedup.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """A linear classifier of n-grams and where it cuts. `labelled` trains `model` first unless the file is there.

    Corpora after DCLM and FineWeb-Edu keep the top 10 to 20 %; `keep_share` cuts in each language on its own.
    """

    model: Path | None = None      # .safetensors of `jaxlm.curate.quality.train`
    labelled: Path | None = None   # JSONL rows {"label", "text"}
    positive: str = "1"            # the label of good text
    threshold: float | None = None # keeps scores from here up
    keep_share: float | None = None
    held_out: float = 0.2          # of the labelled rows, for the evaluation
    word_ngrams: int = 2
    min_chars: int = 2             # character n-grams, so that a Korean noun is one word under all its particles
    max_chars: int = 4
    features: int = 2**18          # hashed, for words and for characters each; 4 bytes each in the model
    inverse_regularization: float = 10.0

    def __post_init__(self) -> None:
        if self.model is None and any(value is not None for value in (self.labelled, self.threshold, self.keep_share)):
            raise ValueError("quality.labelled, threshold and keep_share have no effect without quality.model FILE.bin")
        if self.model is not None and (self.threshold is None) == (self.keep_share is None):
            raise ValueError("quality.model needs one of quality.threshold and quality.keep_share")
        for name in ("threshold", "keep_share", "held_out"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"quality.{name} must be above 0 and below 1, got {value}")
        for name in ("word_ngrams", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"quality.{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError("quality.min_chars must be from 1 to quality.max_chars")
        if not 0 < self.inverse_regularization < math.inf:
            raise ValueError(f"quality.inverse_regularization must be above 0, got {self.inverse_regularization}")


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """n-grams of benchmarks that must not occur; GPT-3 (arXiv:2005.14165, C) uses 13 words, and 8 for short texts."""

    benchmarks: tuple[str, ...] = ()   # JSONL files; all strings of a row, unless `fields` names some
    fields: tuple[str, ...] = ()
    ngram: int = 13
    min_ngram: int = 8                 # a text shorter than `ngram` is searched as a whole from here up
    max_share: float = 0.0             # of a document's words inside such n-grams; above, the document goes

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.ngram:
            raise ValueError(f"decontaminate.min_ngram must be from 1 to ngram {self.ngram}, got {self.min_ngram}")
        if not 0 <= self.max_share < 1:
            raise ValueError(f"decontaminate.max_share must be from 0 to below 1, got {self.max_share}")
        if self.fields and not self.benchmarks:
            raise ValueError("decontaminate.fields has no effect without decontaminate.benchmarks")


@dataclass(frozen=True, kw_only=True)
class RawConfig:
    """How raw files are read: .jsonl, .txt (plain, .gz, .zst) and .parquet."""

    text_field: str = "text"
    txt_documents: Literal["file", "line"] = "file"  # what is one document of a .txt
    min_chars: int = 1             # shorter texts count as empty

    def __post_init__(self) -> None:
        if self.min_chars < 1:
            raise ValueError(f"raw.min_chars must be at least 1, got {self.min_chars}")
