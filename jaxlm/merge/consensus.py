"""Sums of sparse task vectors, with and without an election of signs; SCE; RAM.

All are base + sum_i u_i d_i, d_i = x_i - base, with coefficients u that differ from coordinate to coordinate.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide
from jaxlm.merge.sparsify import SPARSIFIERS, Rescale, largest, share
from jaxlm.merge.vectors import affine, check, remainder


def ties(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    density: jax.Array, scale: jax.Array, normalize: bool,
) -> jax.Array:
    """Trim by magnitude, elect signs, average what agrees (Yadav et al. 2023, arXiv:2306.01708)."""
    factors = _sparsify("magnitude", base, stacked, weights, density)
    return _elect(base, stacked, weights, factors, scale, normalize)


def dare_linear(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    density: jax.Array, scale: jax.Array, rescale: Rescale, normalize: bool, key: jax.Array,
) -> jax.Array:
    """base + scale * sum w m d / density, m random (Yu et al. 2023, arXiv:2311.03099)."""
    factors = _sparsify("dare", base, stacked, weights, density, rescale=rescale, key=key)
    return _add(base, stacked, weights, factors, scale, normalize)


def dare_ties(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    density: jax.Array, scale: jax.Array, rescale: Rescale, normalize: bool, key: jax.Array,
) -> jax.Array:
    """`dare_linear` with the election of signs of `ties`."""
    factors = _sparsify("dare", base, stacked, weights, density, rescale=rescale, key=key)
    return _elect(base, stacked, weights, factors, scale, normalize)


def della_linear(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *, density: jax.Array, epsilon: jax.Array,
    scale: jax.Array, rescale: Rescale, normalize: bool, key: jax.Array,
) -> jax.Array:
    """`dare_linear` whose probabilities grow with the magnitude (Deep et al. 2024, arXiv:2406.11617)."""
    factors = _sparsify("della", base, stacked, weights, density, epsilon=epsilon, rescale=rescale, key=key)
    return _add(base, stacked, weights, factors, scale, normalize)


def della(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *, density: jax.Array, epsilon: jax.Array,
    scale: jax.Array, rescale: Rescale, normalize: bool, key: jax.Array,
) -> jax.Array:
    """`della_linear` with the election of signs of `ties`."""
    factors = _sparsify("della", base, stacked, weights, density, epsilon=epsilon, rescale=rescale, key=key)
    return _elect(base, stacked, weights, factors, scale, normalize)


def breadcrumbs(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    density: jax.Array, gamma: jax.Array, scale: jax.Array, normalize: bool,
) -> jax.Array:
    """Task vectors without their largest and smallest coordinates (Davari and Belilovsky 2023, arXiv:2312.06795)."""
    factors = _sparsify("breadcrumbs", base, stacked, weights, density, gamma=gamma)
    return _add(base, stacked, weights, factors, scale, normalize)


def breadcrumbs_ties(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    density: jax.Array, gamma: jax.Array, scale: jax.Array, normalize: bool,
) -> jax.Array:
    """`breadcrumbs` with the election of signs of `ties`."""
    factors = _sparsify("breadcrumbs", base, stacked, weights, density, gamma=gamma)
    return _elect(base, stacked, weights, factors, scale, normalize)


def sce(base: jax.Array, stacked: jax.Array, weights: jax.Array, *, density: jax.Array) -> jax.Array:
    """Select the coordinates that vary most, calculate weights mean(d^2), erase the minority's signs.

    `density` is a share of the coordinates whose variance over the models is not 0. The weights of a tensor follow from
    its task vectors, so none are given. Wan et al. 2024, arXiv:2408.07990.
    """
    check(base, stacked, weights, needs_base=True)
    deltas = _deltas(base, stacked)
    mean = sum(deltas) / len(deltas)
    variance = sum((d - mean) ** 2 for d in deltas) / len(deltas)
    k = share(jnp.sum(variance > 0, dtype=jnp.int32), density)
    selected = (density >= 1) | largest(variance, k)
    deltas = [jnp.where(selected, d, 0) for d in deltas]
    own = [jnp.mean(d * d) for d in deltas]
    agree = [jnp.sign(d) == _majority(deltas) for d in deltas]
    divisor = sum(m * w for m, w in zip(agree, own, strict=True))
    coefficients = [safe_divide(m * w, divisor) for m, w in zip(agree, own, strict=True)]
    return affine([base, *stacked], [(divisor == 0).astype(jnp.float32), *coefficients])


def ram(base: jax.Array, stacked: jax.Array, weights: jax.Array, *, threshold: jax.Array) -> jax.Array:
    """What one model alone changed (by more than `threshold`) is kept whole, what several changed is averaged.

    Models count alike. Reinforced Agent Merging, arXiv:2601.13572.
    """
    check(base, stacked, weights, needs_base=True)
    changed, count = _changes(base, stacked, threshold)
    return affine([base, *stacked], [(count == 0).astype(jnp.float32), *(safe_divide(c, count) for c in changed)])


def ram_plus(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *,
    threshold: jax.Array, bonus: jax.Array, bonus_limit: jax.Array,
) -> jax.Array:
    """`ram` that enlarges what a model alone changed by 1 + bonus * min(rho, bonus_limit).

    rho is how many coordinates of this tensor the model shares with others, divided by how many it has alone: it makes
    up for what averaging takes away.
    """
    check(base, stacked, weights, needs_base=True)
    changed, count = _changes(base, stacked, threshold)
    rest, coefficients = (count == 0).astype(jnp.float32), []
    for c in changed:
        shared, alone = jnp.sum(c * (count > 1)), c * (count == 1)
        rho = jnp.minimum(shared / jnp.maximum(jnp.sum(alone), 1), bonus_limit)
        coefficients.append(safe_divide(c, count) + alone * bonus * rho)
        rest = rest - alone * bonus * rho
    return affine([base, *stacked], [rest, *coefficients])


def _deltas(base: jax.Array, stacked: jax.Array) -> list[jax.Array]:
    base = base.astype(jnp.float32)
    return [x.astype(jnp.float32) - base for x in stacked]


def _sparsify(
    name: str, base: jax.Array, stacked: jax.Array, weights: jax.Array, density: jax.Array, *,
    key: jax.Array | None = None, **settings: Any,
) -> list[jax.Array]:
    """The factors of every task vector; each model draws from a key of its own."""
    check(base, stacked, weights, needs_base=True)
    keys = [{} if key is None else {"key": jax.random.fold_in(key, i)} for i in range(len(stacked))]
    return [SPARSIFIERS[name](d, density, **settings, **own)
            for d, own in zip(_deltas(base, stacked), keys, strict=True)]


def _add(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, factors: list[jax.Array], scale: jax.Array, normalize: bool
) -> jax.Array:
    """base + scale * sum w f d, with `normalize` / sum w."""
    if normalize:
        weights = weights / jnp.sum(weights)
    coefficients = [scale * w * f for w, f in zip(weights, factors, strict=True)]
    return affine([base, *stacked], [remainder(coefficients), *coefficients])


def _elect(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, factors: list[jax.Array], scale: jax.Array, normalize: bool
) -> jax.Array:
    """`_add` over those w f d only whose sign is that of their sum; a sum of 0 counts as positive.

    `normalize` divides each coordinate by the sum of |w| over those that agree. (The sum of w, as others divide, is the
    same for positive weights, and comes near 0 where weights of both signs agree.)
    """
    parts = [w * f * d for w, f, d in zip(weights, factors, _deltas(base, stacked), strict=True)]
    majority = _majority(parts)
    agree = [jnp.sign(part) == majority for part in parts]
    coefficients = [scale * w * f * m for w, f, m in zip(weights, factors, agree, strict=True)]
    if normalize:
        divisor = sum(m * jnp.abs(w) for m, w in zip(agree, weights, strict=True))
        coefficients = [safe_divide(c, divisor) for c in coefficients]
    return affine([base, *stacked], [remainder(coefficients), *coefficients])


def _majority(parts: list[jax.Array]) -> jax.Array:
    return jnp.where(sum(parts) >= 0, 1.0, -1.0)


def _changes(base: jax.Array, stacked: jax.Array, threshold: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """1 where a model differs from the base, and by how many models a coordinate is changed; float32."""
    changed = [(jnp.abs(d) > threshold).astype(jnp.float32) for d in _deltas(base, stacked)]
    return changed, sum(changed)
