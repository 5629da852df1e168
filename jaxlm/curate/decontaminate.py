"""Benchmark decontamination: word n-grams of benchmark texts must not stand in the corpus."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core.config import nearest
from jaxlm.curate.config import DecontaminateConfig
from jaxlm.curate.extras import extra
from jaxlm.data.rows import BadRow, decode_json
from jaxlm.data.text_files import numbered_lines

_WORD = re.compile(r"\w+")


class NgramIndex(NamedTuple):
    """The n-grams of benchmarks by length, each with the place it comes from."""

    ngrams: dict[int, dict[str, str]]
    texts: int
    too_short: int       # texts of fewer than `min_ngram` words, which are not searched


class Overlap(NamedTuple):
    """`share` of the words lie in `spans`, half-open word ranges; `places` are the benchmark texts."""

    share: float
    spans: tuple[tuple[int, int], ...]
    places: tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Words without case, punctuation and Unicode variants."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def build_index(texts: Iterable[tuple[str, str]], config: DecontaminateConfig) -> NgramIndex:
    """Of `(place, text)`; a text of `min_ngram` to `ngram` words is one n-gram."""
    ngrams: dict[int, dict[str, str]] = {}
    count = too_short = 0
    for place, text in texts:
        words = words_of(text)
        count += 1
        if len(words) < config.min_ngram:
            too_short += 1
            continue
        n = min(config.ngram, len(words))
        for i in range(len(words) - n + 1):
            ngrams.setdefault(n, {}).setdefault(" ".join(words[i:i + n]), place)
    return NgramIndex(ngrams, count, too_short)


def find_overlap(words: Sequence[str], index: NgramIndex) -> Overlap:
    """Which words lie in an n-gram of the index.

    With the 3-gram "b c d", words a b c d e have the span (1, 4) and the share 0.6.
    """
    covered, places = bytearray(len(words)), []
    for n, known in index.ngrams.items():
        for i in range(len(words) - n + 1):
            place = known.get(" ".join(words[i:i + n]))
            if place is not None:
                covered[i:i + n] = b"\1" * n
                places.append(place)
    spans = tuple(found.span() for found in re.finditer(b"\1+", bytes(covered)))
    return Overlap(sum(covered) / len(words) if words else 0.0, spans, tuple(dict.fromkeys(places)))


@functools.cache
def load_index(config: DecontaminateConfig) -> NgramIndex:
    """The index of the files in a configuration. ValueError for files without a text that can be searched."""
    index = build_index(_benchmark_texts(config), config)
    if not index.ngrams:
        raise ValueError(f"decontaminate.benchmarks: none of {index.texts} texts has {config.min_ngram} words "
                         f"(decontaminate.min_ngram)")
    return index


def build_decontamination(config: DecontaminateConfig) -> Any:
    """A datatrove filter; spans are noted in the document's `detail`."""
    index = load_index(config)

    def keeps(document: Any) -> bool | tuple[bool, str]:
        words = words_of(document.text)
        found = find_overlap(words, index)
        if found.share <= config.max_share:
            return True
        document.metadata["detail"] = {
            "share": round(found.share, 4), "benchmarks": list(found.places[:5]),
            "spans": [" ".join(words[start:end])[:300] for start, end in found.spans[:5]]}
        return False, "benchmark overlap"

    return extra("datatrove.pipeline.filters").LambdaFilter(keeps)


def _benchmark_texts(config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    for name in config.benchmarks:
        for number, line in numbered_lines(Path(name)):
            if not line.strip():
                continue
            try:
                row = decode_json(line)
            except BadRow as error:
                raise ValueError(f"{name}:{number}: {error}; benchmarks are JSONL files") from None
            for key in config.fields:
                if not isinstance(row, dict) or key not in row:
                    hint = nearest(key, row) if isinstance(row, dict) else ""
                    raise ValueError(f"{name}:{number}: no field {key!r}{hint}")
            values = [row[key] for key in config.fields] if config.fields else row
            yield from ((f"{name}:{number}", text) for text in _strings(values))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
