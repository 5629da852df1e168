"""Advantages of whole sequences from their rewards, by comparison inside a group or a batch.

Rewards are [B] and `groups` [B] tells which of `num_groups` prompts a sequence answers, in any order and with any
number of sequences each; a negative group is a padded row. Rules that hold for every estimator:

- A reward that is not finite stays out of all statistics, and its sequence gets 0 (`Advantage.excluded`).
- Rewards of a group count as equal when their deviation is rounding: std <= tolerance * max(1, largest |reward|).
  Differences of use must therefore exceed 1e-5; `GroupStats.equal` is what dynamic sampling (DAPO) refills.
- A group of one sequence is compared with mean 0 and deviation 1, so that its advantage is its reward. A group that
  lost all but one to the first rule has nothing to compare with and counts as equal.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]

TOLERANCE = 1e-5


class GroupStats(NamedTuple):
    """Statistics of the finite rewards of each group, [num_groups] each."""

    mean: jax.Array
    std: jax.Array    # with Bessel's correction; 0 for fewer than two rewards
    size: jax.Array   # int32, sequences
    count: jax.Array  # int32, finite rewards
    equal: jax.Array  # bool: nothing to learn from; true for an empty group, false for a group of one


class Advantage(NamedTuple):
    """One advantage per sequence."""

    value: jax.Array     # [B] float32; NaN where `groups` is not below num_groups
    excluded: jax.Array  # [B] bool: the reward was not finite
    stats: GroupStats


def group_stats(
    rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE
) -> GroupStats:
    """Mean, deviation and equality of rewards [B] by group [B]; the rules of this module."""
    chex.assert_rank([rewards, groups], 1)
    chex.assert_equal_shape([rewards, groups])
    valid = _valid(rewards, groups)
    rewards = jnp.where(valid, rewards.astype(jnp.float32), 0)
    total = lambda x: jax.ops.segment_sum(x, groups, num_segments=num_groups)
    size, count = total(jnp.ones_like(groups)), total(valid.astype(jnp.int32))
    mean = safe_divide(total(rewards), count)
    gap = jnp.where(valid, rewards - mean[groups], 0)
    std = jnp.sqrt(safe_divide(total(gap**2), jnp.maximum(count - 1, 0)))
    largest = jax.ops.segment_max(jnp.abs(rewards), groups, num_segments=num_groups)
    same = std <= tolerance * jnp.maximum(largest, 1)  # also with fewer than two rewards
    return GroupStats(mean, std, size, count, same & (size != 1))


def grpo(rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE) -> Advantage:
    """A_i = (r_i - mean) / (std + 1e-6) over the group (DeepSeekMath, arXiv:2402.03300, section 4.1)."""
    stats = group_stats(rewards, groups, num_groups, tolerance)
    return _advantage(_centred(rewards, groups, stats) / (_spread(stats)[groups] + 1e-6), rewards, groups, stats)


def dr_grpo(rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE) -> Advantage:
    """A_i = r_i - mean over the group (Dr.GRPO, arXiv:2503.20783, section 3.2)."""
    stats = group_stats(rewards, groups, num_groups, tolerance)
    return _advantage(_centred(rewards, groups, stats), rewards, groups, stats)


def rloo(rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE) -> Advantage:
    """A_i = r_i - mean of the other rewards of the group (RLOO, arXiv:2402.14740, equation 5)."""
    stats = group_stats(rewards, groups, num_groups, tolerance)
    # r_i - (n mean - r_i) / (n - 1)
    factor = jnp.where(stats.count > 1, stats.count / jnp.maximum(stats.count - 1, 1), 1)
    return _advantage(_centred(rewards, groups, stats) * factor[groups], rewards, groups, stats)


def reinforce_plus_plus(
    rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE
) -> Advantage:
    """A_i = (r_i - mean) / std over the batch, one number a sequence (REINFORCE++, arXiv:2501.03262, equation 3).

    Equal rewards in one group do not make its advantages 0, only equal rewards in the whole batch.
    """
    stats = group_stats(rewards, groups, num_groups, tolerance)
    value = whiten(rewards, _valid(rewards, groups), tolerance)
    return _advantage(value, rewards, groups, stats, keep_equal=True)


def reinforce_plus_plus_baseline(
    rewards: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE
) -> Advantage:
    """r_i - mean over the group, then whitened over the batch (REINFORCE++-baseline, arXiv:2501.03262)."""
    stats = group_stats(rewards, groups, num_groups, tolerance)
    centred = _advantage(_centred(rewards, groups, stats), rewards, groups, stats).value
    return _advantage(whiten(centred, _valid(rewards, groups), tolerance), rewards, groups, stats)


def gdpo(
    rewards: jax.Array, weights: jax.Array, groups: jax.Array, num_groups: int, tolerance: float = TOLERANCE
) -> Advantage:
    """`grpo` of every reward term by itself, their weighted sum, whitened over the batch (GDPO, arXiv:2601.05242).

    Terms of different scale and variance keep their weight, which one z-score of the summed reward gives away.

    Args:
      rewards: [B, R]; a term that is not finite adds 0 to the sum of its sequence.
      weights: [R].

    Returns:
      `excluded` where no term is finite; the leaves of `stats` are [num_groups, R].
    """
    chex.assert_rank([rewards, weights, groups], [2, 1, 1])
    terms = jax.vmap(lambda term: grpo(term, groups, num_groups, tolerance), in_axes=1, out_axes=-1)(rewards)
    excluded = jnp.all(terms.excluded, axis=1)
    value = whiten(terms.value @ weights.astype(jnp.float32), ~excluded & (groups >= 0), tolerance)
    return terms._replace(value=jnp.where(jnp.all(terms.stats.equal, axis=1)[groups], 0, value), excluded=excluded)


def whiten(values: jax.Array, mask: jax.Array, tolerance: float = TOLERANCE) -> jax.Array:
    """(x - mean) / std over all values where the mask is not 0, any equal shape; 0 elsewhere.

    With Bessel's correction; all 0 when the deviation is rounding. Over a whole batch, before it is split.
    """
    chex.assert_equal_shape([values, mask])
    mask = mask != 0
    values = jnp.where(mask, values.astype(jnp.float32), 0)
    count = jnp.sum(mask)
    gap = jnp.where(mask, values - safe_divide(jnp.sum(values), count), 0)
    std = jnp.sqrt(safe_divide(jnp.sum(gap**2), jnp.maximum(count - 1, 0)))
    equal = std <= tolerance * jnp.maximum(jnp.max(jnp.abs(values)), 1)  # not so if NaN, which must be seen
    return jnp.where(equal, 0, gap / jnp.where(equal, 1, std))


def _valid(rewards: jax.Array, groups: jax.Array) -> jax.Array:
    return jnp.isfinite(rewards) & (groups >= 0)


def _spread(stats: GroupStats) -> jax.Array:
    return jnp.where(stats.size == 1, 1, stats.std)


def _centred(rewards: jax.Array, groups: jax.Array, stats: GroupStats) -> jax.Array:
    return rewards.astype(jnp.float32) - jnp.where(stats.size == 1, 0, stats.mean)[groups]


def _advantage(
    value: jax.Array, rewards: jax.Array, groups: jax.Array, stats: GroupStats, keep_equal: bool = False
) -> Advantage:
    """Applies the rules of the module to the formula of an estimator."""
    counted = _valid(rewards, groups) & (keep_equal | ~stats.equal[groups])
    value = jnp.where(counted, value, 0)
    beyond = groups >= len(stats.mean)
    return Advantage(jnp.where(beyond, jnp.nan, value), (groups >= 0) & ~jnp.isfinite(rewards), stats)


ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
