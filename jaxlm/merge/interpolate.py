"""Interpolation on spheres, and NearSwap.

Every mean on a sphere lies in the span of its tensors: the tensors enter through their inner products [N, N] alone, all
angles and iterations happen among N numbers, and one weighted sum makes the result. Tensors that are parallel but for
rounding are averaged along the chord, which is the arc then.
"""

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide
from jaxlm.merge.vectors import affine, check, cosine_matrix, gram, safe_sqrt

CHORD = 0.9995    # SLERP's customary cosine, beyond which the line is taken for the arc
PARALLEL = 1e-6   # 1 - cosine below this is rounding of float32


def slerp(base: None, stacked: jax.Array, weights: jax.Array, *, t: jax.Array) -> jax.Array:
    """(sin((1-t) a) x_0 + sin(t a) x_1) / sin a, a the angle between two tensors; their line where |cos a| > 0.9995.

    Shoemake 1985. It needs no weights, `t` is the share of the second model.
    """
    check(base, stacked, weights, needs_base=False)
    chex.assert_shape(stacked, (2, ...))
    cosine = cosine_matrix(gram(stacked))[0, 1]
    coefficients = _arc(cosine, t, jnp.abs(cosine) > CHORD)
    return affine([jnp.zeros_like(stacked[0]), *stacked], coefficients)


def nuslerp(base: jax.Array | None, stacked: jax.Array, weights: jax.Array, *, row_wise: bool) -> jax.Array:
    """`slerp` with t = w_1 / (w_0 + w_1) and the line for parallel tensors only; with a base, of the task vectors.

    `row_wise`: each row (last axis) has an angle of its own.
    """
    check(base, stacked, weights, needs_base=None)
    chex.assert_shape(stacked, (2, ...))
    cosine = cosine_matrix(gram(stacked, base, row_wise))[0, 1]
    coefficients = _arc(cosine, weights[1] / jnp.sum(weights), 1 - jnp.abs(cosine) < PARALLEL)
    return affine([jnp.zeros_like(stacked[0]) if base is None else base, *stacked], coefficients)


def multislerp(base: jax.Array | None, stacked: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of directions, made as long as the weighted mean of lengths; with a base, of the task vectors.

    sum w |x| * s / |s|, s = sum w x / |x|. The original then averages once more in the tangent space at s, where the
    weighted sum is 0 by the choice of s; `karcher` does not stop there. The linear mean where s vanishes.
    """
    check(base, stacked, weights, needs_base=None)
    weights = weights / jnp.sum(weights)
    products = gram(stacked, base)
    cosines = cosine_matrix(products)
    square = weights @ cosines @ weights
    share = safe_divide(weights, safe_sqrt(square))
    return _spherical(base, stacked, weights, products, share, square < PARALLEL)


def karcher(base: jax.Array | None, stacked: jax.Array, weights: jax.Array, *, iterations: int) -> jax.Array:
    """The point of the sphere with the least weighted squared angles, as long as the weighted mean of lengths.

    From the direction of `multislerp`: v = sum w (a_i / sin a_i) (u_i - cos a_i m), m <- cos|v| m + sin|v| v / |v|,
    with u_i the directions and a_i their angles to m. Grove and Karcher 1973; Karcher 1977.
    """
    check(base, stacked, weights, needs_base=None)
    weights = weights / jnp.sum(weights)
    products = gram(stacked, base)
    cosines = cosine_matrix(products)
    square = weights @ cosines @ weights

    def improve(_: jax.Array, share: jax.Array) -> jax.Array:  # m = sum_i share_i u_i
        cos = cosines @ share
        # Near 1 a / sin a is 1 + (1 - cos a) / 3, exact to float32; near -1 the direction is not defined.
        near = 1 - cos < 1e-4
        inner = jnp.where(near, 0, jnp.clip(cos, -1 + PARALLEL, 1))
        ratio = weights * jnp.where(near, 1 + (1 - cos) / 3, jnp.arccos(inner) / jnp.sqrt(1 - inner**2))
        step = ratio - jnp.sum(ratio * cos) * share
        length = safe_sqrt(step @ cosines @ step)
        share = jnp.cos(length) * share + jnp.sinc(length / jnp.pi) * step
        return safe_divide(share, safe_sqrt(share @ cosines @ share))

    share = jax.lax.fori_loop(0, iterations, improve, safe_divide(weights, safe_sqrt(square)))
    return _spherical(base, stacked, weights, products, share, square < PARALLEL)


def nearswap(base: None, stacked: jax.Array, weights: jax.Array, *, t: jax.Array) -> jax.Array:
    """x_0 moved towards x_1 by at most `t` in every coordinate; x_1 itself where it is that near. No weights."""
    check(base, stacked, weights, needs_base=False)
    chex.assert_shape(stacked, (2, ...))
    first, second = stacked.astype(jnp.float32)
    return jnp.where(jnp.abs(second - first) <= t, second, first + jnp.clip(second - first, -t, t))


def _arc(cosine: jax.Array, t: jax.Array, line: jax.Array) -> list[jax.Array]:
    """Coefficients of the origin and of two tensors; of the line where `line`."""
    angle = jnp.arccos(jnp.where(line, 0, cosine))
    first = jnp.where(line, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    second = jnp.where(line, t, jnp.sin(t * angle) / jnp.sin(angle))
    return [jnp.where(line, 0, 1 - first - second), first, second]


def _spherical(
    base: jax.Array | None, stacked: jax.Array, weights: jax.Array, products: jax.Array, share: jax.Array,
    undefined: jax.Array,
) -> jax.Array:
    """sum w |x| * sum_i share_i x_i / |x_i| around the base; the linear mean for parallel tensors or no direction."""
    norms = safe_sqrt(jnp.diagonal(products))
    line = undefined | (1 - jnp.min(cosine_matrix(products)) < PARALLEL)
    coefficients = jnp.where(line, weights, share * safe_divide(jnp.sum(weights * norms), norms))
    rest = jnp.where(line, 0, 1 - jnp.sum(coefficients))
    return affine([jnp.zeros_like(stacked[0]) if base is None else base, *stacked], [rest, *coefficients])
