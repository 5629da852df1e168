"""The difficulty of rows, a label or a number, and the buckets that it cuts them into. See `balance` for their use."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.core.config import nearest
from jaxlm.data.rows import BadRow, missing_field

EQUAL = "equal"
QUANTILES = ("easy", "medium", "hard")  # of numbers without names for the buckets


def parse_balance(balance: Sequence[str]) -> dict[str, float]:
    """`("easy=1", "hard=2")` as weights by bucket, empty for `("equal",)` and `()`; ValueError for anything else."""
    if tuple(balance) in ((), (EQUAL,)):
        return {}
    weights: dict[str, float] = {}
    for one in balance:
        name, equals, value = one.rpartition("=")
        try:
            weight = float(value) if name and equals else math.nan
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf or name in weights:
            raise ValueError(f"data.balance is {EQUAL}, or weights such as easy=1 medium=2 with each bucket once and a "
                             f"positive number, not {one!r}; rows are left out with exclude=FIELD:VALUE of a source")
        weights[name] = weight
    if len(weights) < 2:
        raise ValueError(f"data.balance {balance[0]} names one bucket; balance needs two or more")
    return weights


def read_difficulty(row: Mapping[str, Any], name: str) -> str | float:
    """The label or number in a field of a row; BadRow says what is wrong."""
    if name not in row:
        raise BadRow(missing_field(name, row))
    value = row[name]
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"field {name!r} is a label or a number, not {value!r:.40}")
    return value


def bucket_rows(values: Sequence[str | float], weights: Mapping[str, float]) -> tuple[list[str], dict[str, float]]:
    """The bucket of each row, and the weights of all buckets.

    Labels are buckets. Numbers (also as text, in TSV files) are cut into quantiles, equal ones never apart:

        values  3 1 2 9 5 4   weights easy=1 hard=3   ->   easy easy easy hard hard hard

    ValueError for a bucket without a weight, a weight without rows, a mixture of labels and numbers.
    """
    numbers = [_number(value) for value in values]
    labels = Counter(str(value) for value in values)
    if None not in numbers and not (weights and labels.keys() & weights.keys()):
        names = tuple(weights) or QUANTILES
        cuts = np.quantile(numbers, [i / len(names) for i in range(1, len(names))])
        buckets = [names[i] for i in np.searchsorted(cuts, numbers)]
        if empty := [name for name in names if name not in set(buckets)]:
            raise ValueError(f"data.balance: {len(labels)} distinct numbers in {len(values)} rows leave the "
                             f"{', '.join(empty)} of {len(names)} quantiles empty; name fewer buckets")
        return buckets, dict(weights) or dict.fromkeys(names, 1.0)
    if any(not isinstance(value, str) for value in values) and any(isinstance(value, str) for value in values):
        raise ValueError("data.balance: the difficulty is a number in some rows and a label in others: "
                         f"{', '.join(list(labels)[:10])}")
    said = ", ".join(f"{name} ({count} rows)" for name, count in labels.most_common(20))
    for name in weights:
        if name not in labels:
            raise ValueError(f"data.balance: no row is {name!r}{nearest(name, labels)}; buckets: {said}")
    if weights and (lacking := [name for name in labels if name not in weights]):
        raise ValueError(f"data.balance gives no weight to {', '.join(lacking)}; buckets: {said}")
    if len(labels) < 2:
        raise ValueError(f"data.balance: all rows are {said}; balance needs two buckets or more")
    return [str(value) for value in values], dict(weights) or dict.fromkeys(sorted(labels), 1.0)


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
