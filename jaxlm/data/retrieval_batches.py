"""Batches to train a retriever on: of one data set each, in an order that a seed and a counter give."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.retrieval_rows import Passage, RetrievalRow

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetrievalBatchConfig:
    """Shape and order of the batches."""

    batch_size: int = 32         # queries of a batch
    num_negatives: int = 1       # of each query
    drop_last: bool = True       # the batch of a data set that is not full; False keeps it, smaller
    unique_positives: bool = False  # no two queries of a batch have a positive in common: no false negatives
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_negatives < 0:
            raise ValueError("batch_size must be at least 1 and num_negatives not negative, got "
                             f"{self.batch_size} and {self.num_negatives}")


class RetrievalBatch(NamedTuple):
    """B queries with one positive and n negatives each, for whoever tokenizes them."""

    dataset: int                    # which data set all rows are of
    rows: list[int]                 # which of its rows, [B]
    queries: list[str]              # [B]
    positives: list[Passage]        # [B]
    negatives: list[list[Passage]]  # [B][n]
    # Of each query, the ids of all its positives: a key among them is no negative of this query.
    positive_ids: list[frozenset[str]]
    scores: np.ndarray | None       # [B, 1 + n] float32 of the teacher: the positive, then the negatives


class EpochPlan(NamedTuple):
    batches: list[tuple[int, list[int]]]  # data set and rows, in order
    num_dropped: int                      # rows in no batch
    num_moved: int                        # rows that went to a later batch for the sake of unique positives


def plan_epoch(datasets: Sequence[Sequence[RetrievalRow]], config: RetrievalBatchConfig, epoch: int) -> EpochPlan:
    """Every row of every data set once, in batches of one data set, the batches of all sets in random order."""
    batches, num_moved = [], 0
    for dataset, rows in enumerate(datasets):
        order = np.random.default_rng((config.seed, epoch, dataset, 0)).permutation(len(rows)).tolist()
        if config.unique_positives:
            own, moved = _unique_batches(rows, order, config.batch_size)
            num_moved += moved
        else:
            own = [order[i:i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        batches += [(dataset, one) for one in own if len(one) == config.batch_size or not config.drop_last]
    order = np.random.default_rng((config.seed, epoch)).permutation(len(batches))
    kept = sum(len(one) for _, one in batches)
    return EpochPlan([batches[i] for i in order], sum(map(len, datasets)) - kept, num_moved)


class RetrievalBatches:
    """An endless iterator of `RetrievalBatch`; its state is the number of batches drawn.

    The positive and the negatives of a row are drawn anew each epoch, from (seed, epoch, data set, row) alone.
    Raises ValueError at once for data sets that cannot give these batches.
    """

    def __init__(self, datasets: Sequence[Sequence[RetrievalRow]], config: RetrievalBatchConfig):
        self._datasets, self._config, self._drawn = datasets, config, 0
        self._check()
        self._epoch, self._first, self._plan = 0, 0, plan_epoch(datasets, config, 0)
        if not self._plan.batches:
            raise ValueError(f"no data set has {config.batch_size} rows for a full batch (sizes: "
                             f"{', '.join(str(len(rows)) for rows in datasets)}); take a smaller batch_size or "
                             "drop_last=False")
        for dataset, rows in enumerate(datasets):
            if not any(own == dataset for own, _ in self._plan.batches):
                raise ValueError(f"data set {dataset} with {len(rows)} rows gives no full batch of "
                                 f"{config.batch_size}; take a smaller batch_size, drop_last=False, or leave it out")
        # With `unique_positives` other epochs may have some more or less.
        self.batches_per_epoch = len(self._plan.batches)
        self._warn()

    def __iter__(self) -> Iterator[RetrievalBatch]:
        return self

    def __next__(self) -> RetrievalBatch:
        while self._drawn - self._first >= len(self._plan.batches):
            self._first, self._epoch = self._first + len(self._plan.batches), self._epoch + 1
            self._plan = plan_epoch(self._datasets, self._config, self._epoch)
        dataset, rows = self._plan.batches[self._drawn - self._first]
        self._drawn += 1
        return self._batch(dataset, rows)

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another iterator over the same data and configuration was."""
        self._epoch, self._first, self._drawn = 0, 0, int(state["drawn"])
        self._plan = plan_epoch(self._datasets, self._config, 0)

    def _batch(self, dataset: int, rows: list[int]) -> RetrievalBatch:
        data, n = self._datasets[dataset], self._config.num_negatives
        positives, negatives, scores = [], [], []
        for index in rows:
            row = data[index]
            rng = np.random.default_rng((self._config.seed, self._epoch, dataset, 1, index))
            positive = int(rng.integers(len(row.positives)))
            chosen = rng.choice(len(row.negatives), n, replace=False).tolist() if n else []
            positives.append(row.positives[positive])
            negatives.append([row.negatives[i] for i in chosen])
            if row.positive_scores is not None:
                scores.append([row.positive_scores[positive], *((row.negative_scores or ())[i] for i in chosen)])
        return RetrievalBatch(dataset, rows, [data[i].query for i in rows], positives, negatives,
                              [frozenset(one.id for one in data[i].positives) for i in rows],
                              np.array(scores, np.float32) if scores else None)

    def _check(self) -> None:
        if not self._datasets:
            raise ValueError("there is no data set")
        for dataset, rows in enumerate(self._datasets):
            short = [i for i, row in enumerate(rows) if len(row.negatives) < self._config.num_negatives]
            if short:
                raise ValueError(f"data set {dataset}: {len(short)} of {len(rows)} rows have fewer than num_negatives="
                                 f"{self._config.num_negatives} negatives, row {short[0]} first "
                                 f"({len(rows[short[0]].negatives)}); mine more, ask for fewer, or leave them out")
            scored = sum(row.positive_scores is not None for row in rows)
            if scored not in (0, len(rows)):
                raise ValueError(f"data set {dataset}: {scored} of {len(rows)} rows have teacher scores; all or none "
                                 "must have them")

    def _warn(self) -> None:
        if self._plan.num_dropped:
            log.warning("the batches of the first epoch leave out %d of %d rows (drop_last: %s)",
                        self._plan.num_dropped, sum(map(len, self._datasets)), self._config.drop_last)
        if self._plan.num_moved:
            log.info("unique_positives moves %d rows of the first epoch to a later batch", self._plan.num_moved)


def _unique_batches(rows: Sequence[RetrievalRow], order: list[int], size: int) -> tuple[list[list[int]], int]:
    """Rows in their order, each in the first batch with room that has none of its positives; and how many waited.

    Size 2, positives a, a, b, c: the batches are (0, 2) and (1, 3), and row 1 waited.
    """
    fresh, waiting, batches, num_moved = deque(order), deque(), [], 0
    while fresh or waiting:
        batch, taken, still = [], set(), deque()
        for queue in (waiting, fresh):
            while queue and len(batch) < size:
                index = queue.popleft()
                ids = {one.id for one in rows[index].positives}
                if taken & ids:
                    still.append(index)
                    num_moved += queue is fresh
                else:
                    batch.append(index)
                    taken |= ids
        waiting = still + waiting
        batches.append(batch)
    return batches, num_moved
