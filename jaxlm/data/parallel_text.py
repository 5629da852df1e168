"""Parallel text: segments that say the same in Korean and English.

    {"ko": "도시들은 그리 깨끗하지 않았다.", "en": "Cities were not very clean."}      other fields may filter rows
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.data.rows import BadRow, Document, RowReader, missing_field
from jaxlm.data.sample import statements
from jaxlm.data.sample_facts import facts
from jaxlm.data.sources import MIXED, open_source, parse_source

SIDES = ("ko", "en")
# The two wordings of such a fact say different things: each names the word of the other language.
_ONE_SIDED = ("name", "word")


class Pair(NamedTuple):
    ko: str
    en: str


class ParallelReader(RowReader):
    """Rows to documents: both sides as a JSON list."""

    def fields(self) -> list[str]:
        """Both sides, and what filters rows."""
        return list(dict.fromkeys([*SIDES, *super().fields()[1:]]))

    def _document(self, row: Mapping[str, Any], path: str, line: int) -> Document:
        for side in SIDES:
            if side not in row:
                raise BadRow(missing_field(side, row))
            if not isinstance(row[side], str) or not row[side].strip():
                raise BadRow(f"{side!r} must be a text with something in it, got {row[side]!r:.60}")
        return Document(json.dumps([row[side] for side in SIDES], ensure_ascii=False))


def open_parallel(spec: str, *, max_bad_rows: int = 0) -> list[Pair]:
    """The pairs of a file or glob (`PATH?include=field:value&exclude=...`), or with the word `sample` generated ones.

    ValueError in one sentence: what `open_source` says; a row without one side counts as bad and is named by file and
    line.
    """
    if spec == "sample":
        return sample_pairs()
    config = parse_source(spec, unread=MIXED)
    if config.path.startswith("sample:"):
        raise ValueError(f"parallel text {spec!r}: the embedded pairs are called just 'sample'")
    for name, default in (("text", None), ("text_field", "text"), ("language", None), ("language_field", None),
                          ("source_field", None)):
        if getattr(config, name) != default:
            raise ValueError(f"parallel text {spec!r}: {name} has no effect; the sides are the fields ko and en")
    source = open_source(config, max_bad_rows=max_bad_rows, reader=ParallelReader)
    # A lazy format has its bad rows found only now.
    pairs = [Pair(*json.loads(document.text)) for i in range(len(source)) if (document := source[i])]
    return pairs


def sample_pairs() -> list[Pair]:
    """Embedded: every held-out fact as a statement, and as a question with its answer, in both languages."""
    chosen = [fact for fact in facts(True) if fact.kind not in _ONE_SIDED]
    said = [[statements(fact, side) for side in SIDES] for fact in chosen]
    return [Pair(korean[which], english[which]) for korean, english in said for which in (0, -1)]
