"""SPLADE: a text as weights of the vocabulary, and what keeps most of them zero."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def splade(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """w_v = max over tokens t of log(1 + relu(logit_tv)): [B, T, V] to [B, V] float32, 0 or more.

    Args:
      mask: [B, T], nonzero at the tokens of the text.

    SPLADE-max, Formal et al. 2021, arXiv:2109.10086.
    """
    chex.assert_rank([logits, mask], [3, 2])
    chex.assert_equal_shape_prefix([logits, mask], 2)
    # The activation grows, so it may follow the maximum: V logarithms a text, not T V.
    largest = jnp.max(jnp.where(mask[:, :, None] != 0, logits, -jnp.inf), axis=1)
    return jnp.log1p(jax.nn.relu(largest.astype(jnp.float32)))


def flops(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """sum_v (mean over texts of |w_v|)^2, a scalar: the expected products of two random texts.

    A statistic of the whole batch, not a sum over examples: micro-batches change it. To add it to a summed loss,
    multiply it by the weight that divides the sum. Paria et al. 2020, arXiv:2004.05665.

    Args:
      weights: [B, V].
      mask: [B], 0 for texts that do not count.
    """
    chex.assert_rank([weights, mask], [2, 1])
    mask = mask.astype(jnp.float32)
    held = jnp.where(mask[:, None] != 0, jnp.abs(weights.astype(jnp.float32)), 0) * mask[:, None]
    return jnp.sum(jnp.square(jnp.sum(held, axis=0) / jnp.maximum(jnp.sum(mask), 1)))


def l1(weights: jax.Array) -> jax.Array:
    """sum_v |w_v|: [B, V] to [B] float32."""
    chex.assert_rank(weights, 2)
    return jnp.sum(jnp.abs(weights.astype(jnp.float32)), axis=1)


def quadratic_warmup(peak: float, num_steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """The regulariser's weight at a step: peak min(1, (step / num_steps)^2), so that terms are learnt before they die.

    Formal et al. 2021. ValueError: a negative peak, `num_steps` below 1.
    """
    if peak < 0 or num_steps < 1:
        raise ValueError(f"a warm-up needs a weight of 0 or more and at least 1 step, got {peak} and {num_steps}")
    return lambda step: peak * jnp.square(jnp.minimum(1.0, step / num_steps))
