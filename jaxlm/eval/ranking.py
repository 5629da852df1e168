"""Measures of ranked retrieval with the semantics of trec_eval, per query, and run files in TREC format.

    run = {"q1": {"d1": 0.9, "d2": 0.4}}   # query to document to score
    qrels = {"q1": {"d2": 1}}              # query to document to gain; a gain of 1 or more is relevant

Scores become float32, as in trec_eval; documents of equal score stand in descending order of their ids (by code points:
"d9" before "d10" before "D9"), so that no system gains from the order in which it was given the corpus.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.core.config import nearest
from jaxlm.core.files import replacing

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
BEIR = ("ndcg@10", "mrr@10", "map@100", "recall@10", "recall@100", "precision@10", "success@1")
log = logging.getLogger(__name__)


class RankingResult(NamedTuple):
    """Each measure of each judged query, and what was left out or had no answer."""

    queries: tuple[str, ...]
    values: dict[str, np.ndarray]  # measure to [Q], in the order of `queries`
    num_unjudged: int              # queries of the run that have no judgements: left out
    num_missing: int               # judged queries without a result: every measure is 0
    num_no_relevant: int           # judged queries without any relevant document: every measure is 0, as in trec_eval


def ndcg(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """`sum_{r<=k} gain_r / log2(r + 1)` over the same sum of the best order (trec_eval's `ndcg_cut`; linear gains)."""
    return _dcg(gains[:k]) / _dcg(ideal[:k]) if len(ideal) else 0.0


def mrr(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """1 / rank of the first relevant document, 0 if none stands among the first k."""
    found = np.flatnonzero(gains[:k] > 0)
    return 1 / (int(found[0]) + 1) if len(found) else 0.0


def average_precision(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """The precisions at the ranks of relevant documents up to k, summed, over the number of relevant documents."""
    ranks = np.flatnonzero(gains[:k] > 0) + 1
    return float(np.sum(np.arange(1, len(ranks) + 1) / ranks)) / len(ideal) if len(ideal) else 0.0


def recall(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """Relevant documents among the first k over all relevant ones."""
    return int(np.sum(gains[:k] > 0)) / len(ideal) if len(ideal) else 0.0


def precision(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """Relevant documents among the first k over k, also where there are fewer than k results."""
    return int(np.sum(gains[:k] > 0)) / k


def success(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """1 if a relevant document stands among the first k, else 0 (top-k accuracy)."""
    return float(np.any(gains[:k] > 0))


def evaluate_run(run: Run, qrels: Qrels, measures: Sequence[str] = BEIR, *,
                 ignore_identical_ids: bool = False) -> RankingResult:
    """Measures such as `ndcg@10` of every judged query.

        run {"q": {"a": 2.0, "b": 1.0}}, qrels {"q": {"b": 1, "c": 1}}: mrr@2 1/2, recall@2 1/2, precision@4 1/4

    Args:
      measures: `name@k`, names as in `MEASURES`.
      ignore_identical_ids: leaves out the document that has the query's id from the run, as BEIR does for sets whose
        queries stand in the corpus (ArguAna). Not from the judgements: where it is relevant, it counts as not found.

    Judged queries without results count with 0 (trec_eval's `-c`). Raises ValueError for an unknown measure, for no
    judgements, for a run and judgements with no query in common, and for scores that are NaN.
    """
    chosen = {name: measure_of(name) for name in measures}
    judged = sorted(query for query, gains in qrels.items() if gains)
    if not judged:
        raise ValueError("there are no judgements")
    if run and not any(query in run for query in judged):
        raise ValueError(f"no query of the run is judged; one of the run is {next(iter(run))!r}, one judged is "
                         f"{judged[0]!r}")
    depth = max((k for _, k in chosen.values()), default=0)
    values = {name: np.zeros(len(judged)) for name in chosen}
    num_no_relevant = num_missing = 0
    for row, query in enumerate(judged):
        gains, scores = qrels[query], run.get(query, {})
        if ignore_identical_ids:
            scores = {doc: score for doc, score in scores.items() if doc != query}
        num_missing += not scores
        ideal = np.array(sorted((gain for gain in gains.values() if gain > 0), reverse=True), np.float64)
        num_no_relevant += not len(ideal)
        ranked = np.array([max(gains.get(doc, 0), 0) for doc in _ranked(scores, query)[:depth]], np.float64)
        for name, (measure, k) in chosen.items():
            values[name][row] = measure(ranked, ideal, k)
    num_unjudged = sum(not qrels.get(query) for query in run)
    if num_missing or num_unjudged:
        log.warning("%d of %d judged queries have no result and count with 0; %d queries of the run have no judgements "
                    "and are left out", num_missing, len(judged), num_unjudged)
    return RankingResult(tuple(judged), values, num_unjudged, num_missing, num_no_relevant)


def measure_of(name: str) -> tuple[Callable[[np.ndarray, np.ndarray, int], float], int]:
    """The function and the cut-off of a measure such as `ndcg@10`. ValueError for an unknown one."""
    kind, _, cut = name.partition("@")
    if kind not in MEASURES:
        raise ValueError(f"unknown measure {name!r}{nearest(kind, MEASURES)}; known: "
                         f"{', '.join(f'{known}@k' for known in MEASURES)}")
    if not cut.isdecimal() or int(cut) < 1:
        raise ValueError(f"measure {name!r} needs a cut-off of 1 or more, as in {kind}@10")
    return MEASURES[kind], int(cut)


def means(result: RankingResult) -> dict[str, float]:
    """Each measure's mean over queries."""
    return {name: float(values.mean()) for name, values in result.values.items()}


def group_values(result: RankingResult, groups: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Each measure of the queries of a group, by group in alphabetical order.

    Args:
      groups: query to group. ValueError for a judged query that has none.
    """
    if without := [query for query in result.queries if query not in groups]:
        raise ValueError(f"{len(without)} judged queries have no group, such as {without[0]!r}")
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(result.queries):
        rows.setdefault(groups[query], []).append(row)
    return {group: {name: values[rows[group]] for name, values in result.values.items()} for group in sorted(rows)}


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Documents by float32 score, the highest first, and equal ones by id in descending order.

        {"d1": 0.5, "d2": 0.5, "d3": 0.9} -> ["d3", "d2", "d1"]

    ValueError for a score that is NaN.
    """
    documents = sorted(scores, reverse=True)
    values = np.array([scores[doc] for doc in documents], np.float32)
    if np.isnan(values).any():
        raise ValueError(f"the score of document {documents[int(np.argmax(np.isnan(values)))]!r} is not a number")
    return [documents[i] for i in np.argsort(-values, kind="stable")]


def write_run(path: str | Path, run: Run, tag: str) -> None:
    """Writes `query Q0 document rank score tag` lines, whole or not at all.

    Scores are written as the float32 numbers that rank, in the fewest digits that give them back. ValueError for an
    empty id or tag, or one with a space, which this format cannot hold.
    """
    path = Path(path)
    documents = (doc for scores in run.values() for doc in scores)
    for kind, names in (("query", run), ("document", documents), ("tag", [tag])):
        check_trec_names(str(path), kind, names)
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        for query, scores in run.items():
            for rank, doc in enumerate(_ranked(scores, query), 1):
                file.write(f"{query} Q0 {doc} {rank} {np.float32(scores[doc])} {tag}\n")


def check_trec_names(where: str, kind: str, names: Iterable[str]) -> None:
    """ValueError for a name that is empty or has a space, which a TREC run file cannot hold."""
    for name in names:
        if name.split() != [name]:
            raise ValueError(f"{where}: the {kind} {name!r} is empty or has a space, which a TREC run file cannot hold")


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """The run of a TREC file; ranks and tags are not read, as trec_eval does not read them.

    ValueError names file and line: not six columns, a score that is no number, a document listed twice for a query.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, cells = f"{path}:{number}", line.split()
        if len(cells) != 6:
            raise ValueError(f"{where}: {len(cells)} columns; a run has 6: query, Q0, document, rank, score, tag")
        query, _, doc, _, score, _ = cells
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"{where}: the score {score!r} is not a number")
        if doc in run.setdefault(query, {}):
            raise ValueError(f"{where}: document {doc!r} is listed twice for query {query!r}")
        run[query][doc] = value
    return run


def _dcg(gains: np.ndarray) -> float:
    return float(np.sum(gains / np.log2(np.arange(2, len(gains) + 2))))


def _ranked(scores: Mapping[str, float], query: str) -> list[str]:
    try:
        return ranked(scores)
    except ValueError as error:
        raise ValueError(f"query {query!r}: {error}") from None


# gains of the ranked documents, gains of the relevant ones in the best order, cut-off -> value
MEASURES = {"ndcg": ndcg, "mrr": mrr, "map": average_precision, "recall": recall, "precision": precision,
            "success": success}
