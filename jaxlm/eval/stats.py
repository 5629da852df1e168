"""How sure a mean over queries is, and whether two systems differ on the same queries."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CHUNK = 1 << 22  # numbers of resampled values held at a time


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """Two systems on the same queries."""

    difference: float   # mean of first minus second
    p_permutation: float
    p_t: float


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """`bootstrap_intervals` of one measure, values [Q]."""
    return bootstrap_intervals([values], level=level, resamples=resamples, seed=seed)[0]


def bootstrap_intervals(measures: Sequence[np.ndarray], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
                        ) -> list[Interval]:
    """The mean of values [Q] of each measure with its percentile bootstrap interval (Efron 1979), the same for a seed.

    The queries are drawn once for all measures. A single query gives an interval of no width, which says nothing.
    ValueError for no values, values that are not finite, a level outside (0, 1).
    """
    values = np.stack([_finite(one) for one in measures])
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    queries = values.shape[1]
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // queries)
    drawn = [_times_drawn(rng, min(rows, resamples - start), queries) @ values.T / queries
             for start in range(0, resamples, rows)]
    bounds = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(one.mean()), float(low), float(high))
            for one, low, high in zip(values, *bounds, strict=True)]


def paired_test(first: np.ndarray, second: np.ndarray, *, permutations: int = 10_000, seed: int = 0) -> Paired:
    """Two-sided tests that the mean difference of values [Q] of the same queries is 0.

    The permutation test exchanges the systems per query: all 2^Q ways where these are at most `permutations`, else
    so many drawn ones, with p = (1 + as extreme) / (1 + drawn), never 0. Student's paired t beside it. Systems that are
    equal on every query have p = 1.

    ValueError: arrays of different lengths, fewer than 2 queries, values that are not finite.
    """
    first, second = _finite(first), _finite(second)
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"a paired test needs two values for each of at least 2 queries, got {len(first)} and "
                         f"{len(second)}")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    if np.array_equal(first, second):
        return Paired(0.0, 1.0, 1.0)
    # Exchanging the two systems of a query turns the sign of its difference.
    drawn = stats.permutation_test((first - second,), np.mean, permutation_type="samples", n_resamples=permutations,
                                   batch=max(1, CHUNK // len(first)), vectorized=True, rng=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a constant difference: no variance, and p = 0 is meant
        t = stats.ttest_rel(first, second)
    return Paired(float(np.mean(first - second)), float(drawn.pvalue), float(t.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): p_(i) becomes max_{j<=i} min(1, (m - j + 1) p_(j)).

        {"a": 0.01, "b": 0.04, "c": 0.03} -> {"a": 0.03, "b": 0.06, "c": 0.06}

    ValueError for a p-value that is none.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"{name}: a p-value lies between 0 and 1, got {p}")
    names = sorted(p_values, key=p_values.__getitem__)
    scaled = [min(1.0, (len(names) - i) * p_values[name]) for i, name in enumerate(names)]
    corrected = dict(zip(names, np.maximum.accumulate(scaled).tolist(), strict=True))
    return {name: corrected[name] for name in p_values}


def _times_drawn(rng: np.random.Generator, rows: int, queries: int) -> np.ndarray:
    """How often each query is in each of `rows` samples of as many queries, [rows, Q]."""
    places = rng.integers(queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
    return np.bincount(places.ravel(), minlength=rows * queries).reshape(rows, queries).astype(np.float64)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite, one a query, and at least one, got shape {values.shape}")
    return values
