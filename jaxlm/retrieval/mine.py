"""Hard negatives: what a retriever ranks high for a query and is not one of its positives, with filters against those
that only nobody has marked as positive."""

import hashlib
import itertools
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.retrieval.bm25 import words
from jaxlm.retrieval.index import NO_ROW, Hits, Similarity

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """Which of the ranked documents become negatives. A filter whose value is None does not filter."""

    num_negatives: int = 3
    range_min: int = 0                     # the first ranks, positives not counted, that are skipped (from 0)
    range_max: int | None = None           # the rank after the last one
    max_score: float | None = None         # s_n above it is dropped
    min_score: float | None = None         # s_n below it is dropped
    absolute_margin: float | None = None   # dropped where s_n + margin > s_p
    relative_margin: float | None = None   # dropped where s_n > s_p - |s_p| margin; .05: NV-Retriever's 95 %
    sampling: Literal["top", "random"] = "top"
    seed: int = 0                          # of random sampling

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.range_min < 0:
            raise ValueError("num_negatives must be at least 1 and range_min not negative, got "
                             f"{self.num_negatives} and {self.range_min}")
        if self.range_max is not None and self.range_max < self.range_min + self.num_negatives:
            raise ValueError(f"ranks {self.range_min} to {self.range_max} hold fewer than num_negatives="
                             f"{self.num_negatives} documents; raise range_max")
        if min(self.absolute_margin or 0, self.relative_margin or 0) < 0:
            raise ValueError("a margin must not be negative")
        if self.sampling not in ("top", "random"):
            raise ValueError(f"sampling is top or random, not {self.sampling!r}")
        if self.seed and self.sampling == "top":
            raise ValueError("seed has no effect with sampling top")


class Mined(NamedTuple):
    rows: list[list[int]]       # of each query its negatives, the best first; fewer than asked for where none are left
    scores: list[list[float]]
    skipped: dict[str, int]     # candidates by the first filter that dropped them
    num_short: int              # queries with fewer negatives than asked for


def mine(
    hits: Hits, queries: Sequence[str], positives: Sequence[Sequence[int]], text: Callable[[int], str],
    config: MineConfig, *, positive_scores: Sequence[Sequence[float]] | None = None,
    answers: Sequence[Sequence[str]] | None = None,
) -> Mined:
    """Negatives of each query among its hits.

    With several positives the margins are kept from the worst of them, s_p = min_i s_i (as sentence-transformers does).
    The relative margin with |s_p| lowers the bound for negative scores too; s_p (1 - m) would raise it.

        hits   rows 4 7 2 9 with scores .9 .8 .7 .5, positive 7 (.8), absolute_margin .05, num_negatives 2
        ->     4 is dropped by the margin, 7 is the positive, negatives 2 and 9

    Args:
      hits: of the queries; deep enough for the ranks asked for.
      queries: ids or texts, all different; random sampling draws by them, so neither order nor company matters.
      positives: rows of the corpus. text: the text of a row.
      positive_scores: of each positive, as the retriever scores it (`score_rows`); for the margins.
      answers: strings that no negative may contain (`contains_answer`).

    A candidate with the text of a positive or of an earlier candidate is dropped as a duplicate. ValueError: arguments
    that do not fit each other, a range beyond the hits, a margin without positive scores, equal queries.
    """
    _check(hits, queries, positives, config, positive_scores, answers)
    rows, scores, skipped = [], [], Counter()
    for i, query in enumerate(queries):
        found = [(int(row), float(score)) for row, score in zip(hits.rows[i], hits.scores[i], strict=True)
                 if row != NO_ROW]
        known = set(positives[i])
        skipped["positive"] += sum(row in known for row, _ in found)
        candidates = [one for one in found if one[0] not in known][config.range_min:config.range_max]
        worst = min(positive_scores[i]) if positive_scores is not None else None
        seen, kept = {_plain(text(row)) for row in known}, []
        needles = list(answers[i]) if answers is not None else []
        for row, score in candidates:
            reason = _score_reason(score, worst, config)
            if reason is None:
                content = text(row)
                if _plain(content) in seen:
                    reason = "duplicate"
                elif any(contains_answer(content, needle) for needle in needles):
                    reason = "answer"
                seen.add(_plain(content))
            if reason is not None:
                skipped[reason] += 1
                continue
            kept.append((row, score))
            if config.sampling == "top" and len(kept) == config.num_negatives:
                break
        chosen = _sampled(kept, query, config)
        rows.append([row for row, _ in chosen])
        scores.append([score for _, score in chosen])
    num_short = sum(len(one) < config.num_negatives for one in rows)
    log.info("mined %d negatives for %d queries; skipped: %s", sum(map(len, rows)), len(rows),
             ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none")
    if num_short:
        log.warning("%d of %d queries have fewer than %d negatives, %d of them none; search deeper or filter less",
                    num_short, len(rows), config.num_negatives, sum(not one for one in rows))
    return Mined(rows, scores, {reason: count for reason, count in skipped.items() if count}, num_short)


def score_rows(queries: np.ndarray, vectors: Callable[[np.ndarray], np.ndarray], rows: Sequence[Sequence[int]], *,
               similarity: Similarity = "dot") -> list[list[float]]:
    """The score of each query [Q, D] with rows of the corpus of its own, such as its positives.

    Args:
      vectors: rows [n] to their vectors [n, D].
    """
    result = []
    for query, own in zip(queries, rows, strict=True):
        found = np.asarray(vectors(np.asarray(own, np.int64)), np.float32)
        scores = found @ np.asarray(query, np.float32)
        if similarity == "cosine":
            scores = scores / np.maximum(np.linalg.norm(found, axis=1) * np.linalg.norm(query), 1e-30)
        result.append(scores.tolist())
    return result


def interleaved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two rankings [Q, k] as one [Q, 2 k], the best of each in turn, no row twice; what is left is filled with -1.

        4 7 2 and 7 9 -1  ->  4 7 9 2 -1 -1
    """
    merged = np.full((len(first), 2 * first.shape[1]), NO_ROW, np.int64)
    for i, pairs in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        found = [row for row in dict.fromkeys(itertools.chain(*zip(*pairs, strict=True))) if row != NO_ROW]
        merged[i, :len(found)] = found
    return merged


def scored(rows: np.ndarray, scores: Callable[[list[list[int]]], list[list[float]]]) -> Hits:
    """A ranking [Q, k] of any origin in its order, with scores of another.

    Args:
      scores: of each query with rows of its own.
    """
    hits = Hits(np.full(rows.shape, -np.inf, np.float32), rows)
    hits.scores[rows != NO_ROW] = np.concatenate(scores([own[own != NO_ROW].tolist() for own in rows]))
    return hits


def contains_answer(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text one after the other, whatever their case and punctuation.

        "U.S.A. 1998!" contains "u s a", not "99"; Korean, Chinese and Japanese answers may be parts of words

    An answer without a word is looked for as it stands; an empty one is in no text.
    """
    needle = _joined(answer)
    if not needle:
        return bool(answer.strip()) and answer.strip() in text
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in needle):  # particles follow without a space
        return needle in _joined(text)
    return f" {needle} " in f" {_joined(text)} "


def _score_reason(score: float, worst: float | None, config: MineConfig) -> str | None:
    if config.max_score is not None and score > config.max_score:
        return "max_score"
    if config.min_score is not None and score < config.min_score:
        return "min_score"
    if config.absolute_margin is not None and score + config.absolute_margin > worst:
        return "absolute_margin"
    if config.relative_margin is not None and score > worst - abs(worst) * config.relative_margin:
        return "relative_margin"
    return None


def _sampled(kept: list[tuple[int, float]], query: str, config: MineConfig) -> list[tuple[int, float]]:
    if config.sampling == "top" or len(kept) <= config.num_negatives:
        return kept
    key = int.from_bytes(hashlib.sha256(query.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    chosen = np.random.default_rng((config.seed, key)).choice(len(kept), config.num_negatives, replace=False)
    return [kept[i] for i in sorted(chosen.tolist())]


def _check(hits: Hits, queries: Sequence[str], positives: Sequence[Sequence[int]], config: MineConfig,
           positive_scores: Sequence[Sequence[float]] | None, answers: Sequence[Sequence[str]] | None) -> None:
    count = len(hits.rows)
    for name, given in (("queries", queries), ("positives", positives), ("positive_scores", positive_scores),
                        ("answers", answers)):
        if given is not None and len(given) != count:
            raise ValueError(f"there are hits of {count} queries, but {len(given)} {name}")
    if len(set(queries)) != count:
        raise ValueError(f"{count - len(set(queries))} queries have the id of another one")
    margins = [name for name in ("absolute_margin", "relative_margin") if getattr(config, name) is not None]
    if margins and positive_scores is None:
        raise ValueError(f"{margins[0]} needs positive_scores")
    for query, own, scores in zip(queries, positives, positive_scores or positives, strict=True):
        if not own or len(own) != len(scores):
            raise ValueError(f"query {query!r} has {len(own)} positives and {len(scores)} scores of them; it needs one "
                             "or more, and a score each")
    if config.range_max is not None and config.range_max > hits.rows.shape[1]:
        raise ValueError(f"range_max {config.range_max} lies beyond the {hits.rows.shape[1]} hits of a query; search "
                         "with a larger k")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _joined(text: str) -> str:
    return " ".join(words(unicodedata.normalize("NFC", text).casefold()))
