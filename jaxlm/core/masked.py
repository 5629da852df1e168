"""Masked reductions. A loss is summed everywhere and divided once, by the global weight; extremes stay extremes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A weighted mean that is not divided yet, so that parts of a batch can be added exactly.

    `Mean(6., 2.) + Mean(0., 1.)` taken leaf by leaf is `Mean(6., 3.)`, whose value is 2, while the mean of the
    two means (3 and 0) is 1.5. Micro-batches, devices and packing therefore do not change a metric.
    """

    total: jax.Array   # scalar float32
    weight: jax.Array  # scalar float32

    def value(self) -> jax.Array:
        """`total / weight`; 0 where nothing was counted."""
        return safe_divide(self.total, self.weight)

    def over_parts(self) -> "Mean":
        """One of many, stacked along the first axis."""
        return Mean(jnp.sum(self.total, axis=0), jnp.sum(self.weight, axis=0))


class Smallest(NamedTuple):
    """The least of some values; infinity while there are none. Of `[Smallest(0.9), Smallest(0.4)]` it is 0.4."""

    least: jax.Array  # scalar float32

    def value(self) -> jax.Array:
        """The least; 0 where nothing was counted."""
        return jnp.where(self.least == jnp.inf, 0, self.least)

    def over_parts(self) -> "Smallest":
        """One of many, stacked along the first axis."""
        return Smallest(jnp.min(self.least, axis=0))


class Largest(NamedTuple):
    """The greatest of some values; minus infinity while there are none."""

    most: jax.Array  # scalar float32

    def value(self) -> jax.Array:
        """The greatest; 0 where nothing was counted."""
        return jnp.where(self.most == -jnp.inf, 0, self.most)

    def over_parts(self) -> "Largest":
        """One of many, stacked along the first axis."""
        return Largest(jnp.max(self.most, axis=0))


Metric = Mean | Smallest | Largest  # of a batch, so that the metric of its parts is exactly that of the whole


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """`numerator / denominator`, and 0 where the denominator is 0, with a zero gradient there."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def aggregate(values: jax.Array, mask: jax.Array) -> Mean:
    """Sum of `values * mask` and sum of `mask`, both float32; any equal shape.

    Values under a zero mask may be NaN or infinite: they are replaced before the product, so neither the sum
    nor its gradient sees them.
    """
    mask = mask.astype(jnp.float32)
    values = jnp.where(mask != 0, values.astype(jnp.float32), 0)
    return Mean(jnp.sum(values * mask), jnp.sum(mask))
