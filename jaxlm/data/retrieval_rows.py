"""Rows to train a retriever on: a query, its positives, its negatives; read from JSON lines.

    {"query": "who wrote Emma", "positive": "Emma is a novel by ...", "negative": "Emma Stone is ..."}
    {"question": "...", "positive_ctxs": [{"title": "", "text": "..."}], "negative_ctxs": [...]}      as DPR and TSM
    {"query": "...", "pos": ["..."], "neg": ["...", "..."], "pos_scores": [9.1], "neg_scores": [2.0, 7.5]}
    {"query": "...", "positive_passages": [{"docid": "3", "title": "", "text": "..."}], "negative_passages": [...]}
    {"anchor": "...", "positive": "...", "negative_1": "...", "negative_2": "..."}    n-tuples of sentence-transformers

A line without negatives is a pair. An id stands for one text in the whole file. BEIR folders: `jaxlm.data.beir`.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.json_rows import field, read_rows
from jaxlm.data.rows import missing_field

QUERY = ("query", "question", "anchor")
POSITIVE = ("positive", "positives", "pos", "positive_ctxs", "positive_passages")
NEGATIVE = ("negative", "negatives", "neg", "hard_negative_ctxs", "negative_ctxs", "negative_passages")
NUMBERED = re.compile(r"negative_\d+")
BOTH = ("hard_negative_ctxs", "negative_ctxs")  # DPR's files have hard negatives and random ones
POSITIVE_SCORES, NEGATIVE_SCORES = ("positive_scores", "pos_scores"), ("negative_scores", "neg_scores")
PASSAGE_ID = ("id", "_id", "passage_id", "docid")
log = logging.getLogger(__name__)


class Passage(NamedTuple):
    id: str    # texts that are one passage share it; without an id in the data, the text itself
    text: str  # title and text, as they are encoded


class RetrievalRow(NamedTuple):
    query: str
    positives: tuple[Passage, ...]                    # at least one
    negatives: tuple[Passage, ...] = ()
    positive_scores: tuple[float, ...] | None = None  # of a teacher, one a passage; both or neither
    negative_scores: tuple[float, ...] | None = None


class RetrievalRows(NamedTuple):
    """A data set with what was left out of it, by reason."""

    rows: list[RetrievalRow]
    dropped: dict[str, int]


def titled(title: str, text: str) -> str:
    """A passage as it is encoded: title, space, text; the text alone where there is no title (BEIR, Contriever)."""
    return f"{title} {text}" if title.strip() else text


def read_retrieval_rows(path: str | Path) -> RetrievalRows:
    """The rows of a JSONL file, plain, gzip or zstd.

    Passages without any text are left out, and rows whose query is empty or that have no positive left; all counted,
    logged and returned; fields that are not read and look like ones that are, too. Of DPR's two lists of negatives the
    hard ones come first. ValueError names file and line: not JSON, a field that is missing, there under two names or of
    a wrong kind, scores that are not one a passage, an id with two texts; and a file with no row left.
    """
    path, dropped, texts, unread = Path(path), Counter(), {}, Counter()
    rows = []
    for number, line in read_rows(path):
        row, where = _row(line, f"{path}:{number}", dropped), f"{path}:{number}"
        unread.update(name for name in line if _looks_read(name))
        for one in () if row is None else (*row.positives, *row.negatives):
            if texts.setdefault(one.id, one.text) != one.text:
                raise ValueError(f"{where}: the id {one.id!r} stands for {one.text!r:.60} here and for "
                                 f"{texts[one.id]!r:.60} before; give every passage of the file an id of its own, or "
                                 "leave the ids out")
        rows += [] if row is None else [row]
    if unread:
        log.warning("%s: fields that are not read: %s", path,
                    ", ".join(f"{name} ({count} rows)" for name, count in unread.items()))
    if not rows:
        raise ValueError(f"{path}: no row left ({_counted(dropped)})")
    if dropped:
        log.warning("%s: left out %s", path, _counted(dropped))
    return RetrievalRows(rows, dict(dropped))


def _row(line: Mapping[str, Any], where: str, dropped: Counter[str]) -> RetrievalRow | None:
    query = field(line, _named(line, QUERY, where, required=True), str, where)
    kept = {}
    for side, names, score_names in (("positive", POSITIVE, POSITIVE_SCORES), ("negative", NEGATIVE, NEGATIVE_SCORES)):
        found = _lists(line, names, where, required=side == "positive")
        passages = [one for name in found for one in _passages(line[name], f"{where}: field {name!r}")]
        scores = _scores(line, score_names, len(passages), where)
        chosen = [i for i, passage in enumerate(passages) if passage.text.strip()]
        if len(chosen) < len(passages):
            dropped[f"empty {side}s"] += len(passages) - len(chosen)
        kept[side] = (tuple(passages[i] for i in chosen), scores and tuple(scores[i] for i in chosen))
    (positives, positive_scores), (negatives, negative_scores) = kept["positive"], kept["negative"]
    if (positive_scores is None) != (negative_scores is None) and negatives:
        raise ValueError(f"{where}: teacher scores need to be given for positives and negatives, or for none")
    if not query.strip():
        dropped["rows with an empty query"] += 1
        return None
    if not positives:
        dropped["rows without a positive"] += 1
        return None
    return RetrievalRow(query, positives, negatives, positive_scores, negative_scores)


def _lists(line: Mapping[str, Any], names: Sequence[str], where: str, required: bool) -> list[str]:
    """Under which names passages are there: one, or those that belong together."""
    numbered = sorted(filter(NUMBERED.fullmatch, line), key=lambda name: int(name.split("_")[1]))
    if names is NEGATIVE and (numbered or all(name in line for name in BOTH)):
        found = numbered or list(BOTH)
        if more := [name for name in names if name in line and name not in found]:
            raise ValueError(f"{where}: fields {found[0]!r} and {more[0]!r} mean the same; give one of them")
        return found
    name = _named(line, names, where, required)
    return [name] if name else []


def _looks_read(name: str) -> bool:
    """Whether a field is nearly one of those that are read."""
    known = (*QUERY, *POSITIVE, *NEGATIVE, *POSITIVE_SCORES, *NEGATIVE_SCORES)
    return name not in known and not NUMBERED.fullmatch(name) and bool(get_close_matches(name, known, cutoff=0.88))


def _named(line: Mapping[str, Any], names: Sequence[str], where: str, required: bool = False) -> str | None:
    """Under which of its names a field is there."""
    found = [name for name in names if name in line]
    if len(found) > 1:
        raise ValueError(f"{where}: fields {found[0]!r} and {found[1]!r} mean the same; give one of them")
    if not found and required:
        raise ValueError(f"{where}: {missing_field(names[0], line)} (also read: {', '.join(names[1:])})")
    return found[0] if found else None


def _passages(value: Any, where: str) -> list[Passage]:
    """Texts, or objects with a text and perhaps title and id; one or a list."""
    result = []
    for number, one in enumerate(value if isinstance(value, list) else [value], 1):
        here = f"{where}, passage {number}"
        if isinstance(one, str):
            result.append(Passage(one, one))
        elif isinstance(one, dict):
            text = field(one, "text", str, here)
            text = titled(field(one, "title", str, here) if one.get("title") is not None else "", text)
            name = _named(one, PASSAGE_ID, here)
            own = one[name] if name else None
            result.append(Passage(text if own in (None, "") else str(own), text))
        else:
            raise ValueError(f"{here}: must be text or an object with 'text', got {one!r:.80}")
    return result


def _scores(line: Mapping[str, Any], names: Sequence[str], count: int, where: str) -> tuple[float, ...] | None:
    name = _named(line, names, where)
    if name is None or line[name] is None:
        return None
    scores = line[name] if isinstance(line[name], list) else [line[name]]
    if len(scores) != count:
        raise ValueError(f"{where}: field {name!r} has {len(scores)} scores for {count} passages")
    # A bool is an int in Python, and json.loads reads NaN.
    if not all(type(x) in (int, float) and math.isfinite(x) for x in scores):
        raise ValueError(f"{where}: field {name!r} must hold finite numbers, got {scores!r:.80}")
    return tuple(map(float, scores))


def _counted(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the file holds none"
