"""Which coordinates of a task vector stay, and what they are multiplied with.

A sparsifier takes a task vector d (float32) and settings, and returns factors of its shape: 0 where d is dropped. They
are constants to a gradient: which coordinates stay does not change for small changes of a weight.
"""

import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from jaxlm.core.masked import safe_divide

Rescale = Literal["inverse", "l1", "none"]

BLOCK = 4096  # coordinates that are counted together; its counters fit the first-level cache
STEPS = (28, 25, 22, 19, 16, 13, 10, 7, 4, 1, 0)  # bits of a non-negative float32, three at a time


def kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of non-negative values of any shape, exactly and without sorting; k from 1 to their number.

    Non-negative floats are ordered as their bits are. Eleven passes over the values count how many reach each of seven
    bounds, and each fixes three bits. 16 million values: 0.2 s on one core, where a sort takes 2 to 4.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values).astype(jnp.float32), jnp.int32).reshape(-1)
    rows = _blocks(bits, -1)  # which lies below every bound: what is missing to whole blocks never counts

    def narrow(i: jax.Array, low: jax.Array) -> jax.Array:
        bounds = low + (jnp.arange(1, 8) << jnp.asarray(STEPS)[i])
        # Past 2^31 a bound turns negative; nothing reaches it.
        counts = jnp.where(bounds > 0, jax.lax.platform_dependent(rows, bounds, cpu=_count_rows, default=_count), 0)
        return low + (jnp.sum(counts >= k, dtype=jnp.int32) << jnp.asarray(STEPS)[i])

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, len(STEPS), narrow, jnp.int32(0)), jnp.float32)


def _blocks(x: jax.Array, fill: int) -> jax.Array:
    """Rows of `BLOCK` numbers, or of all where there are fewer; the last one is filled up."""
    width = min(BLOCK, len(x))
    return jnp.pad(x, (0, -len(x) % width), constant_values=fill).reshape(-1, width)


def _count_rows(rows: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many values reach each bound. XLA's CPU sum of comparisons is scalar; adding rows is 5 to 10 times faster."""
    def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return total + (row[None] >= bounds[:, None]).astype(jnp.int32), None

    return jnp.sum(jax.lax.scan(add, jnp.zeros((len(bounds), rows.shape[1]), jnp.int32), rows)[0], axis=1)


def _count(rows: jax.Array, bounds: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(rows >= bound, dtype=jnp.int32) for bound in bounds])


def largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """True at exactly k of non-negative values, the largest; of equal ones at those that come first. k from 0.

    Differences of bfloat16 weights are few different numbers: of a fine-tuned model a third may be as large as the
    k-th of the fifth that is wanted.
    """
    flat = jax.lax.stop_gradient(values).astype(jnp.float32).reshape(-1)
    bound = kth_largest(flat, jnp.maximum(k, 1))
    # Sums of rows of float32 are exact and what XLA has a fast loop for on CPU.
    rows = lambda mask: _blocks(mask.astype(jnp.float32), 0)
    equal = rows(flat == bound)
    missing = k - jnp.sum(jnp.sum(rows(flat > bound), axis=1).astype(jnp.int32))
    until = jnp.cumsum(jnp.sum(equal, axis=1).astype(jnp.int32))
    row = jnp.minimum(jnp.sum(until < missing), len(equal) - 1)  # that of the last equal one which stays
    inside = jnp.cumsum(equal[row]).astype(jnp.int32) + jnp.where(row > 0, until[row - 1], 0)
    last = row * equal.shape[1] + jnp.sum(inside < missing)
    keep = (flat > bound) | ((flat == bound) & (jnp.arange(len(flat)) <= last))
    return (keep & (k > 0)).reshape(values.shape)


def share(size: int | jax.Array, fraction: jax.Array) -> jax.Array:
    """floor(fraction * size) as an integer; 0.29 of 100 is 29, though 0.29 * 100 = 28.999998 in float32."""
    return jnp.floor(fraction * size + 1e-3).astype(jnp.int32)


def magnitude(delta: jax.Array, density: jax.Array) -> jax.Array:
    """1 for the share `density` of largest magnitude, at least one coordinate; of equal ones for those that come first.

    Density 0.4 of [3, -1, 2, 0.5, -4]: [1, 0, 0, 0, 1]. The trimming of TIES, Yadav et al. 2023, arXiv:2306.01708.
    """
    return largest(jnp.abs(delta), jnp.clip(share(delta.size, density), 1, delta.size)).astype(jnp.float32)


def breadcrumbs(delta: jax.Array, density: jax.Array, *, gamma: jax.Array) -> jax.Array:
    """1 for the share `density` that follows the share `gamma` of largest magnitude, which are outliers.

    Density 0.4, gamma 0.2 of [3, -1, 2, 0.5, -4]: [1, 0, 1, 0, 0]. Fewer outliers are dropped where the rest would
    not make up the density. Davari and Belilovsky 2023, arXiv:2312.06795.
    """
    size = jnp.abs(delta)
    wanted = jnp.clip(share(delta.size, density), 1, delta.size)
    dropped = jnp.minimum(share(delta.size, gamma), delta.size - wanted)
    return (largest(size, dropped + wanted) & ~largest(size, dropped)).astype(jnp.float32)


def dare(delta: jax.Array, density: jax.Array, *, rescale: Rescale, key: jax.Array) -> jax.Array:
    """Keeps each coordinate with probability `density`, independently (Yu et al. 2023, arXiv:2311.03099).

    See `rescaled` for the factors; "inverse" is the paper's.
    """
    return rescaled(delta, jnp.full_like(delta, density), rescale, key)


def della(
    delta: jax.Array, density: jax.Array, *, epsilon: jax.Array, rescale: Rescale, key: jax.Array
) -> jax.Array:
    """Keeps the coordinate of rank r (0: smallest) in its row of n with probability density + epsilon (2 r/(n-1) - 1).

    Rows lie along the last axis; in a row of one the probability is the density. Density 1 keeps everything. Deep et
    al. 2024, arXiv:2406.11617.
    """
    rows = jnp.abs(jnp.atleast_1d(jax.lax.stop_gradient(delta)))
    rank = jnp.argsort(jnp.argsort(rows, axis=-1), axis=-1)
    place = rank / (rows.shape[-1] - 1) if rows.shape[-1] > 1 else jnp.full(rows.shape, 0.5)
    probability = jnp.where(density >= 1, 1, density + epsilon * (2 * place - 1))
    return rescaled(delta, probability.reshape(delta.shape).astype(jnp.float32), rescale, key)


def rescaled(delta: jax.Array, probability: jax.Array, rescale: Rescale, key: jax.Array) -> jax.Array:
    """Factors of a random choice of coordinates with the given probabilities.

    "inverse": 1 / probability where kept, so that the expected task vector is the whole one; "l1": one factor that
    gives the kept part the L1 norm of the whole (as mergekit does); "none": 1. A probability is rounded to a multiple
    of 2^-16, and the inverse is that of the rounded one, so that the expectation stays exact.
    """
    chex.assert_equal_shape([delta, probability])
    level = jnp.clip(jnp.round(probability * 2**16), 1, 2**16).astype(jnp.uint32)
    kept = uniform16(key, delta.shape) < level
    if rescale == "inverse":
        return jnp.where(kept, 2**16 / level.astype(jnp.float32), 0)
    if rescale == "none":
        return kept.astype(jnp.float32)
    size = jnp.abs(jax.lax.stop_gradient(delta))
    return jnp.where(kept, safe_divide(jnp.sum(size), jnp.sum(jnp.where(kept, size, 0))), 0)


def uniform16(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent uniform integers below 2^16, as uint32: a function of key and shape, whatever the sharding.

    One Threefry call makes four of them, `jax.random.bits` one; for a mask that is all the time there is.
    """
    assert jax.random.key_impl(key) == "threefry2x32"  # the only one whose numbers no device or partition changes
    *rows, last = shape if shape else (1,)
    words = (*rows, (last + 1) // 2)
    count = jax.lax.iota(jnp.uint32, math.prod(words))
    numbers = threefry_2x32(jax.random.key_data(key), count).reshape(words)
    pairs = jnp.stack([numbers & 0xFFFF, numbers >> 16], axis=-1)
    return pairs.reshape(*rows, -1)[..., :last].reshape(shape)


SPARSIFIERS: dict[str, Callable[..., jax.Array]] = {
    "magnitude": magnitude,
    "breadcrumbs": breadcrumbs,
    "dare": dare,
    "della": della,
}
