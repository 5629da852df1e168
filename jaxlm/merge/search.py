"""Coefficients to try: points of a grid over the weights of models and the scale of what they add; or from losses."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig
from jaxlm.merge.vectors import loss_weights

MAX_CANDIDATES = 512


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which coefficients are tried, and on what."""

    kind: Literal["grid", "losses"] = "grid"  # try weights; or softmax(-loss / temperature) of each model (LM-Cocktail)
    steps: int = 0                  # grid: weights are multiples of 1 / steps that sum to 1; 0: no search
    scales: tuple[float, ...] = ()  # grid: each is tried with all weights, for methods with a scale
    held_out: tuple[str, ...] = ()  # sources of text, `path?option=value`, on which decoders are measured
    data: tuple[str, ...] = ()      # BEIR folders, `folder?split=dev`, on which retrievers are
    measure: str = "ndcg@10"        # of retrievers
    temperature: float = 5.0        # losses: of the softmax, in nats a token
    batch_size: int = 4             # rows of a batch of text
    seq_len: int = 512              # tokens of a row

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.seq_len < 2 or not 0 < self.temperature < math.inf:
            raise ValueError("search.steps must not be negative, search.batch_size at least 1, search.seq_len at "
                             "least 2 and search.temperature a number above 0")
        if self.kind == "losses" and (self.steps or self.scales or self.data or not self.held_out):
            raise ValueError("search.kind losses takes the losses of search.held_out; search.steps, search.scales and "
                             "search.data belong to a grid")
        if self.kind == "grid" and (bool(self.steps) != bool(self.held_out or self.data) or
                                    (self.scales and not self.steps)):
            raise ValueError("a search needs search.steps and search.held_out or search.data; search.scales alone has "
                             "no effect")
        if self.held_out and self.data:
            raise ValueError("a search goes by search.held_out (decoders) or search.data (retrievers), not by both")
        if not self.held_out and (self.batch_size, self.seq_len) != (4, 512):
            raise ValueError("search.batch_size and search.seq_len have an effect with search.held_out only")
        if (self.measure != "ndcg@10" and not self.data) or (self.temperature != 5.0 and self.kind != "losses"):
            raise ValueError("search.measure has an effect with search.data only, search.temperature with search.kind "
                             "losses")

    @property
    def asked(self) -> bool:
        """Whether there is anything to search for."""
        return bool(self.held_out or self.data)


def candidates(config: MergeConfig, search: SearchConfig, num_models: int) -> list[MergeConfig]:
    """The configuration with every weight vector of the simplex grid, at every scale.

    Three models and two steps: (1, 0, 0), (0, 1, 0), (0, 0, 1) and the three with two halves. ValueError for a method
    that reads no weights, and for a grid of more than `MAX_CANDIDATES` points.
    """
    check_search(config)
    if search.scales and "scale" not in METHODS[config.method].settings:
        raise ValueError(f"search.scales has no effect with method {config.method}, which has no scale")
    count = math.comb(search.steps + num_models - 1, num_models - 1) * max(len(search.scales), 1)
    if count > MAX_CANDIDATES:
        raise ValueError(f"a grid of {search.steps} steps over {num_models} models has {count} points, more than "
                         f"{MAX_CANDIDATES}; take fewer steps")
    return [replace(config, weights=tuple(part / search.steps for part in parts), scale=scale)
            for scale in search.scales or (config.scale,) for parts in _compositions(search.steps, num_models)]


def from_losses(config: MergeConfig, losses: Sequence[float], temperature: float) -> MergeConfig:
    """The configuration with `loss_weights` of the models; ValueError for a method that reads no weights."""
    check_search(config)
    weights = jax.device_get(loss_weights(jnp.asarray(losses), temperature))
    return replace(config, weights=tuple(map(float, weights)))


def check_search(config: MergeConfig) -> None:
    """ValueError for a merge whose weights cannot be found, or are given."""
    if not METHODS[config.method].weighted:
        raise ValueError(f"method {config.method} reads no weights, so there is nothing to search for")
    if config.weights or any(rule.setting == "weights" for rule in config.rules):
        raise ValueError("a search finds the weights; drop those of the merge")


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of `parts` whole numbers that are not negative and sum to `total`, largest first ones first."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
