"""Weighted sums of models: means, task vectors, Model Stock. Every merging method ends in `affine`.

A merging method takes a base leaf (None where it has none), the leaves of the models [N, ...], their weights [N] and
its own settings by keyword, and returns a leaf in float32: one tensor of one layer at a time, of any architecture.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide


def affine(tensors: Sequence[jax.Array], coefficients: Sequence[jax.Array]) -> jax.Array:
    """sum_i c_i x_i in float32, for coefficients that sum to 1, as p + sum_i c_i (x_i - p).

    p is, coordinate by coordinate, the tensor with the largest coefficient. So equal tensors and a coefficient of 1
    give back their tensor bit for bit, where the plain sum rounds: 7 times x / 7 is not x in float32.

    Args:
      tensors: of one shape. coefficients: scalars, or arrays that broadcast to it. Their sum is not checked; what is
        missing to 1 is the share of a tensor of zeros (or of the base), and the caller passes that too.
    """
    chex.assert_equal_shape(tensors)
    assert len(tensors) == len(coefficients)
    tensors = [x.astype(jnp.float32) for x in tensors]
    pivot, largest = tensors[0], jnp.abs(coefficients[0])
    for x, c in zip(tensors[1:], coefficients[1:], strict=True):
        pivot = jnp.where(jnp.abs(c) > largest, x, pivot)
        largest = jnp.maximum(jnp.abs(c), largest)
    total = pivot
    for x, c in zip(tensors, coefficients, strict=True):
        total = total + c * (x - pivot)
    return total


def remainder(coefficients: Sequence[jax.Array]) -> jax.Array:
    """1 - their sum: the share of the base. What is but rounding becomes 0, without a change to the gradient."""
    rest = 1 - sum(coefficients)
    return rest - jax.lax.stop_gradient(jnp.where(jnp.abs(rest) < 1e-6, rest, 0))


def linear(base: None, stacked: jax.Array, weights: jax.Array, *, normalize: bool) -> jax.Array:
    """sum w x / sum w, or without `normalize` sum w x ("model soups", Wortsman et al. 2022, arXiv:2203.05482)."""
    check(base, stacked, weights, needs_base=False)
    if normalize:
        return affine(list(stacked), list(weights / jnp.sum(weights)))
    return affine([jnp.zeros_like(stacked[0]), *stacked], [remainder(list(weights)), *weights])


def task_arithmetic(
    base: jax.Array, stacked: jax.Array, weights: jax.Array, *, scale: jax.Array, normalize: bool
) -> jax.Array:
    """base + scale * sum w (x - base), with `normalize` / sum w (Ilharco et al. 2023, arXiv:2212.04089)."""
    check(base, stacked, weights, needs_base=True)
    if normalize:
        weights = weights / jnp.sum(weights)
    coefficients = list(scale * weights)
    return affine([base, *stacked], [remainder(coefficients), *coefficients])


def model_stock(base: jax.Array, stacked: jax.Array, weights: jax.Array, *, row_wise: bool) -> jax.Array:
    """t mean(x) + (1 - t) base, t = N c / (1 + (N - 1) c), c the mean cosine of two task vectors.

    t is clamped to [0, 1]: a negative c says that the models disagree, and the formula would then step away from them
    (N = 2, c = -0.5: t = -2). The models count alike, so there are no weights. Jang et al. 2024, arXiv:2403.19522.
    """
    check(base, stacked, weights, needs_base=True)
    num = len(stacked)
    cosines = cosine_matrix(gram(stacked, base, row_wise))
    mean = sum(cosines[i, j] for i in range(num) for j in range(i)) / (num * (num - 1) / 2)
    mean = jnp.maximum(mean, 0)
    t = num * mean / (1 + (num - 1) * mean)
    return affine([base, *stacked], [1 - t, *[t / num] * num])


def loss_weights(losses: jax.Array, temperature: float) -> jax.Array:
    """softmax(-loss / T), [N]: weights of models from their losses on examples of a task.

    LM-Cocktail (Xiao et al. 2023, arXiv:2311.13534), whose T is 5.
    """
    chex.assert_rank(losses, 1)
    return jax.nn.softmax(-losses.astype(jnp.float32) / temperature)


def gram(stacked: jax.Array, base: jax.Array | None = None, row_wise: bool = False) -> jax.Array:
    """Inner products of tensors (with a base, of their differences from it) in float32, [N, N].

    With `row_wise` of each row (the last axis), [N, N, ..., 1].
    """
    def inner(i: int, j: int) -> jax.Array:
        # Behind a barrier every product reads the tensors as they are stored. Else XLA (CPU, jax 0.10.2) casts each
        # once for all products, into new memory: 71 ms instead of 8 for two of 11.5 million bfloat16.
        parts = jax.lax.optimization_barrier((stacked[i], stacked[j], *([] if base is None else [base])))
        a, b, *origin = (part.astype(jnp.float32) for part in parts)
        product = (a - origin[0]) * (b - origin[0]) if origin else a * b
        return jnp.sum(product, axis=-1, keepdims=True) if row_wise and product.ndim else jnp.sum(product)

    # All entries come from one kind of sum, so that those of equal tensors are equal bit for bit.
    num = len(stacked)
    entries = {(i, j): inner(i, j) for i in range(num) for j in range(i + 1)}
    return jnp.stack([jnp.stack([entries[max(i, j), min(i, j)] for j in range(num)]) for i in range(num)])


def cosine_matrix(products: jax.Array) -> jax.Array:
    """Cosines from a Gram matrix [N, N, ...]: exactly 1 for equal tensors, 0 beside a tensor of zeros."""
    squares = jnp.stack([products[i, i] for i in range(len(products))])
    ratio = safe_divide(squares[:, None], squares[None])
    # a.b / |a|^2 * (|a| / |b|): neither |a|^2 |b|^2, which may overflow, nor sqrt(x)^2, which need not be x.
    return jnp.clip(safe_divide(products, squares[:, None]) * safe_sqrt(ratio), -1, 1)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The root, and 0 with gradient 0 where x is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def check(base: jax.Array | None, stacked: jax.Array, weights: jax.Array, *, needs_base: bool | None) -> None:
    """The shapes every method asks for; `needs_base` None: with or without."""
    chex.assert_shape(weights, (len(stacked),))
    assert needs_base is None or (base is not None) == needs_base
    if base is not None:
        chex.assert_shape(stacked, (None, *base.shape))
