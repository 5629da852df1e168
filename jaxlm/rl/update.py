"""Packed attempts and their rewards to what an update learns from, and the loss of a micro-batch; pure functions.

The learner shares parameters, kernels and numerics with the sampler: one program, no copy of weights that is behind.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.masked import Largest, Metric, Smallest, aggregate
from jaxlm.model.decoder import Model
from jaxlm.objective.advantage import ADVANTAGES, Advantage, gdpo
from jaxlm.objective.algorithm import PolicyConfig, PolicyTokens, policy_objective, token_advantage
from jaxlm.objective.correction import CorrectionConfig, correction_metrics, importance_weights, truncated_logp
from jaxlm.objective.kl import kl_penalty, token_rewards
from jaxlm.objective.logprobs import TokenLogprob, chunked_token_logprobs
from jaxlm.objective.policy import POLICY_LOSSES, ratio_range
from jaxlm.objective.reduce import sequence_sum, token_weights, weighted
from jaxlm.objective.value import gae, value_loss
from jaxlm.rl.pack import Rows, spread
from jaxlm.train.step import Loss

VALUE = "value_head"  # its place in the parameter tree: {"kernel": [D, 1]}
VALUE_RULE = (r"value_head/kernel$", P("fsdp", None))


class Policy(NamedTuple):
    """How tokens get log-probabilities; static under jit."""

    model: Model
    temperature: float
    num_chunks: int = 1            # parts of a row whose logits exist at once
    num_tokens: int | None = None  # ids from here on belong to no token, as for the sampler


class LearnBatch(NamedTuple):
    """Rows of one update. Without `tokens.old_logp` the policy is the one that sampled, and every ratio exactly 1."""

    rows: Rows
    tokens: PolicyTokens
    old_values: jax.Array | None = None  # [R, T], with a value head
    returns: jax.Array | None = None


def policy_logprobs(policy: Policy, params: Any, rows: Rows) -> tuple[TokenLogprob, jax.Array]:
    """Log-probabilities of the targets and entropies [R, T], and the hidden states [R, T, D]."""
    hidden = policy.model.apply(
        model_part(params), rows.tokens, positions=rows.positions, segments=rows.segments, logits=False).hidden
    head = policy.model.head(params)[:, :policy.num_tokens]
    return chunked_token_logprobs(hidden, head, rows.targets, policy.num_chunks, policy.temperature), hidden


def model_part(params: Any) -> Any:
    """The parameters without a value head."""
    return {name: part for name, part in params.items() if name != VALUE}


def values_of(params: Any, hidden: jax.Array) -> jax.Array:
    """The value of every token, [R, T] float32."""
    return jnp.einsum("RTD,Do->RTo", hidden.astype(jnp.float32), params[VALUE]["kernel"])[..., 0]


def score_rows(policy: Policy, params: Any, rows: Rows, micro_rows: int) -> tuple[jax.Array, jax.Array | None]:
    """`policy_logprobs(...).logp` and values (None without a head), `micro_rows` rows at a time."""
    def one(rows: Rows) -> tuple[jax.Array, jax.Array | None]:
        out, hidden = policy_logprobs(policy, params, rows)
        return out.logp, values_of(params, hidden) if VALUE in params else None

    num_micro = rows.tokens.shape[0] // micro_rows
    # As `train.step` splits: each device cuts the rows that it holds already.
    split = lambda x: jnp.swapaxes(x.reshape(micro_rows, num_micro, *x.shape[1:]), 0, 1)
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(split, rows)))


def group_advantages(config: PolicyConfig, rewards: jax.Array, weights: jax.Array, terms: jax.Array,
                     groups: jax.Array, num_groups: int) -> Advantage | None:
    """One advantage per attempt by comparison in its group; None for `gae`, which compares with values.

    Args:
      rewards: [E]; not finite where a judge failed: the attempt is left out.
      weights, terms: [N] and [E, N], for `gdpo` only.
      groups: [E], negative for padding.
    """
    if config.advantage == "gae":
        return None
    if config.advantage == "gdpo":
        return gdpo(terms, weights, groups, num_groups)
    return ADVANTAGES[config.advantage](rewards, groups, num_groups)


def learn_batch(
    config: PolicyConfig, rows: Rows, rewards: jax.Array, advantage: jax.Array | None, old_logp: jax.Array,
    ref_logp: jax.Array | None, teacher_logp: jax.Array | None, values: jax.Array | None,
) -> LearnBatch:
    """What an update learns from.

    Args:
      rewards, advantage: [E] of attempts; an attempt with a reward that is not finite does not count.
      old_logp, ref_logp, teacher_logp, values: [R, T].
    """
    valid = jnp.isfinite(rewards)
    mask = rows.mask * spread(valid.astype(jnp.float32), rows.episode)
    returns = None
    if advantage is None:
        penalty = _reward_penalty(config, rows, mask, old_logp, ref_logp)
        given = token_rewards(spread(jnp.where(valid, rewards, 0), rows.episode), penalty, mask, rows.segments)
        advantages, returns = gae(given, values, mask, rows.segments, config.value)
    else:
        advantages = spread(advantage, rows.episode)
    if teacher_logp is not None and config.teacher.place == "advantage":
        advantages = token_advantage(advantages, old_logp, teacher_logp, mask, config.teacher)
    weight = None
    if config.correction != CorrectionConfig():
        sampled_from = truncated_logp(rows.sampler_logp, rows.kept, mask)
        weight = importance_weights(old_logp, sampled_from, mask, rows.segments, config.correction)
    tokens = PolicyTokens(old_logp, advantages, mask, rows.segments, weight, ref_logp, teacher_logp)
    return LearnBatch(rows, tokens, values, returns)


def penalised_rewards(config: PolicyConfig, rows: Rows, rewards: jax.Array, old_logp: jax.Array,
                      ref_logp: jax.Array | None) -> jax.Array:
    """Rewards [E] minus the KL of their attempts, for a KL in the reward of group estimators.

    `gae` takes it from tokens instead, see `learn_batch`.
    """
    if not config.kl.coefficient or config.kl.place != "reward" or config.advantage == "gae":
        return rewards
    total = sequence_sum(_reward_penalty(config, rows, rows.mask, old_logp, ref_logp), rows.mask, rows.segments)
    first = rows.positions == 0
    at = jnp.where(first & (rows.episode >= 0), rows.episode, len(rewards))
    return rewards - jnp.zeros(len(rewards)).at[at.ravel()].set(total.ravel(), mode="drop")


def _reward_penalty(config, rows, mask, old_logp, ref_logp) -> jax.Array:
    if not config.kl.coefficient or config.kl.place != "reward":
        return jnp.zeros_like(mask)
    return config.kl.coefficient * kl_penalty(old_logp, ref_logp, mask, config.kl)


def sampler_metrics(rows: Rows, batch: LearnBatch) -> dict[str, jax.Array]:
    """How far the sampler was from the trainer; see `objective.correction.correction_metrics`."""
    weight = jnp.ones_like(batch.tokens.mask) if batch.tokens.weight is None else batch.tokens.weight
    return correction_metrics(batch.tokens.old_logp, rows.sampler_logp, weight, batch.tokens.mask, rows.segments)


def make_policy_loss(policy: Policy, config: PolicyConfig) -> Loss:
    """The loss of `train.step.make_step` over a `LearnBatch`."""
    def loss(params: Any, batch: LearnBatch, key: jax.Array) -> tuple[jax.Array, dict[str, Metric]]:
        out, hidden = policy_logprobs(policy, params, batch.rows)
        tokens = batch.tokens
        if tokens.old_logp is None:
            tokens = tokens._replace(old_logp=jax.lax.stop_gradient(out.logp))
        total, metrics = policy_objective(out.logp, out.entropy, tokens, config)
        mask = tokens.mask
        ratios = POLICY_LOSSES[config.loss](
            jax.lax.stop_gradient(out.logp), tokens.old_logp, tokens.advantage, mask, tokens.segments, config.clip)
        low, high = ratio_range(ratios, mask)
        metrics |= {"ratio_min": Smallest(low), "ratio_max": Largest(high)}
        if batch.returns is not None:
            value = value_loss(values_of(params, hidden), batch.old_values, batch.returns, mask, config.value.clip)
            # By the weights of the policy's loss, so that one division serves the sum.
            part = weighted(value.loss, token_weights(mask, tokens.segments, config.aggregation,
                                                      config.constant_length))
            total = total + config.value.coefficient * part.total
            metrics |= {"value_loss": part, "value_clipped": aggregate(value.clipped, mask)}
        return total, jax.tree.map(jax.lax.stop_gradient, metrics)

    return loss

