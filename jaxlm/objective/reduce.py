"""Sums over the sequences of packed rows, and the per-token weights by which losses are aggregated.

`segments` [B, T] numbers the sequences of a row from 1 to at most T, 0 is padding, as in `core.batch.LMBatch`; a
sequence lies in one row without gaps. `mask` [B, T] weighs the tokens that count: those the policy sampled.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import Mean, safe_divide

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]


class TokenWeights(NamedTuple):
    """A loss over a batch is `sum(weight * loss) / divisor`; both add over micro-batches."""

    weight: jax.Array   # [B, T] float32
    divisor: jax.Array  # scalar float32


def sequence_sum(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
    """sum_s mask_s x_s over the sequence of each token, [B, T] float32; values under a zero mask may be NaN.

        segments   1  1  1  2  2  0
        mask       1  0  1  0  1  0
        values     5  ?  2  ?  4  ?
        result     7  7  7  4  4  0

    A segment above T gives NaN.
    """
    chex.assert_rank([values, mask, segments], 2)
    chex.assert_equal_shape([values, mask, segments])
    values = jnp.where(mask != 0, values.astype(jnp.float32), 0) * mask.astype(jnp.float32)

    def row(values: jax.Array, segments: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(values, segments, num_segments=len(segments) + 1)
        return sums.at[segments].get(mode="fill", fill_value=jnp.nan)

    return jax.vmap(row)(values, segments)


def sequence_mean(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
    """`sequence_sum` divided by the sum of the mask over the sequence; 0 where nothing counts."""
    return safe_divide(sequence_sum(values, mask, segments), sequence_sum(jnp.ones_like(mask), mask, segments))


def last_counted(mask: jax.Array, segments: jax.Array) -> jax.Array:
    """True at the last counted token of each sequence that has one, [B, T].

        segments   1  1  1  2  2  0
        mask       1  1  0  0  1  0
        result     .  x  .  .  x  .
    """
    chex.assert_rank([mask, segments], 2)
    chex.assert_equal_shape([mask, segments])
    counted, time = mask != 0, mask.shape[1]
    at = jnp.where(counted, jnp.arange(time, dtype=jnp.int32)[None], time)
    following = jax.lax.cummin(at, axis=1, reverse=True)[:, 1:]  # the next counted token, T if there is none
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=time)
    label = jnp.take_along_axis(jnp.pad(segments, ((0, 0), (0, 1))), following, axis=1)
    return counted & (label != segments)


def token_weights(
    mask: jax.Array, segments: jax.Array, aggregation: Aggregation, constant_length: int | None = None
) -> TokenWeights:
    """How much each token counts, and what divides the sum.

    The mean over all tokens (DAPO), the mean over sequences of their token means (GRPO), or the mean over sequences of
    their token sums divided by a constant (Dr.GRPO). A sequence without a counted token is no sequence.

        segments                            1  1  1  2  2  0
        mask                                1  0  1  0  1  0     divisor
        token_mean                          1  0  1  0  1  0        3
        sequence_mean_token_mean            ½  0  ½  0  1  0        2
        sequence_mean_token_sum, length 4   ¼  0  ¼  0  ¼  0        2
    """
    mask = jnp.where(segments != 0, mask.astype(jnp.float32), 0)
    if aggregation == "token_mean":
        return TokenWeights(mask, jnp.sum(mask))
    num_sequences = jnp.sum(last_counted(mask, segments), dtype=jnp.float32)
    if aggregation == "sequence_mean_token_mean":
        return TokenWeights(safe_divide(mask, sequence_sum(mask != 0, mask, segments)), num_sequences)
    assert aggregation == "sequence_mean_token_sum", aggregation
    return TokenWeights(mask / (constant_length or 1), num_sequences)


def weighted(values: jax.Array, weights: TokenWeights) -> Mean:
    """`sum(weight * values)` over `divisor`, not divided yet; values under a zero weight may be NaN."""
    counted = jnp.where(weights.weight != 0, values.astype(jnp.float32), 0)
    return Mean(jnp.sum(counted * weights.weight), weights.divisor)
