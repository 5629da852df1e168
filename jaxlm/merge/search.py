"""Coefficients to try: points of a grid over the weights of models and the scale of what they add."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig

MAX_CANDIDATES = 512


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which coefficients are tried, and on what."""

    steps: int = 0                  # weights are multiples of 1 / steps that sum to 1; 0: no search
    scales: tuple[float, ...] = ()  # each is tried with all weights, for methods with a scale
    held_out: tuple[str, ...] = ()  # sources of text, `path?option=value`, on which the loss is measured
    batch_size: int = 4             # rows of a batch
    seq_len: int = 512              # tokens of a row

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.seq_len < 2:
            raise ValueError("search.steps must not be negative, search.batch_size at least 1 and search.seq_len at "
                             "least 2")
        if bool(self.steps) != bool(self.held_out) or (self.scales and not self.steps):
            raise ValueError("a search needs search.steps and search.held_out; search.scales alone has no effect")


def candidates(config: MergeConfig, search: SearchConfig, num_models: int) -> list[MergeConfig]:
    """The configuration with every weight vector of the simplex grid, at every scale.

    Three models and two steps: (1, 0, 0), (0, 1, 0), (0, 0, 1) and the three with two halves. ValueError for a method
    that reads no weights, and for a grid of more than `MAX_CANDIDATES` points.
    """
    method = METHODS[config.method]
    if not method.weighted:
        raise ValueError(f"method {config.method} reads no weights, so there is nothing to search for")
    if config.weights or any(rule.setting == "weights" for rule in config.rules):
        raise ValueError("a search finds the weights; drop those of the merge")
    if search.scales and "scale" not in method.settings:
        raise ValueError(f"search.scales has no effect with method {config.method}, which has no scale")
    count = math.comb(search.steps + num_models - 1, num_models - 1) * max(len(search.scales), 1)
    if count > MAX_CANDIDATES:
        raise ValueError(f"a grid of {search.steps} steps over {num_models} models has {count} points, more than "
                         f"{MAX_CANDIDATES}; take fewer steps")
    return [replace(config, weights=tuple(part / search.steps for part in parts), scale=scale)
            for scale in search.scales or (config.scale,) for parts in _compositions(search.steps, num_models)]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of `parts` whole numbers that are not negative and sum to `total`, largest first ones first."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
