"""Importance correction: the sampler and the trainer disagree, or the sampler is some updates behind.

Three policies: `sampler_logp` of the one that drew the tokens, `old_logp` of the trainer before the update, `logp` of
the trainer now. A policy loss compares the last two; the weights here are for old / sampler, so they do not depend on
the parameters being trained and are computed once for a batch of rollouts.
"""

from dataclasses import dataclass
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import aggregate, safe_divide
from jaxlm.objective.policy import MAX_LOG_RATIO, token_log_ratio
from jaxlm.objective.reduce import last_counted, sequence_mean, sequence_sum

# The ratio of a token, of its whole sequence (the product), or the geometric mean over its sequence.
Level = Literal["none", "token", "sequence", "sequence_mean"]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """A weight for every token, and a band outside which tokens are left out; the two may look at different ratios."""

    weight: Level = "none"
    cap: float | None = None     # largest weight (truncated importance sampling)
    reject: Level = "none"
    low: float | None = None     # tokens whose ratio at the level of `reject` is below get weight 0
    high: float | None = None    # ... or above

    def __post_init__(self) -> None:
        if self.weight == "none" and self.cap is not None:
            raise ValueError(f"correction.cap {self.cap} has no effect without correction.weight; set one of token, "
                             "sequence, sequence_mean, or drop the cap")
        if (self.reject == "none") != (self.low is None and self.high is None):
            raise ValueError("correction.reject needs correction.low or high, and they need it; got reject "
                             f"{self.reject}, low {self.low}, high {self.high}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"correction.cap must be above 0, got {self.cap}")
        if not (0 if self.low is None else self.low) < (float("inf") if self.high is None else self.high):
            raise ValueError(f"correction.low must be below correction.high, got {self.low} and {self.high}")


CORRECTIONS = {
    "none": CorrectionConfig(),
    "tis": CorrectionConfig(weight="token", cap=2.0),
    "icepop": CorrectionConfig(weight="token", reject="token", low=0.5, high=5.0),
    "sequence_tis": CorrectionConfig(weight="sequence", cap=2.0),
    "sequence_mask": CorrectionConfig(weight="sequence", reject="sequence", high=3.0),
    "sequence_mask_tis": CorrectionConfig(weight="token", cap=2.0, reject="sequence_mean", low=0.999, high=1.002),
}


def importance_weights(
    old_logp: jax.Array, sampler_logp: jax.Array, mask: jax.Array, segments: jax.Array, config: CorrectionConfig
) -> jax.Array:
    """What multiplies the policy loss of each token, [B, T] float32, detached; 0 where the mask is.

    A rejected token keeps its place in the divisor of the loss, so that rejecting does not raise the weight of others.
    All arguments [B, T]; log-probabilities under a zero mask may be infinite or NaN.
    """
    chex.assert_rank(old_logp, 2)
    chex.assert_equal_shape([old_logp, sampler_logp, mask, segments])
    ratio = lambda level: jnp.exp(_log_ratio(old_logp, sampler_logp, mask, segments, level))
    weight = jnp.ones(mask.shape, jnp.float32) if config.weight == "none" else ratio(config.weight)
    if config.cap is not None:
        weight = jnp.minimum(weight, config.cap)
    if config.reject != "none":
        judged = ratio(config.reject)
        inside = judged >= (0 if config.low is None else config.low)
        inside &= judged <= (jnp.inf if config.high is None else config.high)
        weight = jnp.where(inside, weight, 0)
    return jax.lax.stop_gradient(jnp.where(mask != 0, weight, 0))


def correction_metrics(
    old_logp: jax.Array, sampler_logp: jax.Array, weight: jax.Array, mask: jax.Array, segments: jax.Array
) -> dict[str, jax.Array]:
    """How far sampler and trainer are apart over a whole batch of rollouts, scalars.

    Args:
      weight: of `importance_weights`. The effective sample size is (sum w)^2 / sum w^2 as a share of the tokens.
    """
    mask, counted = mask.astype(jnp.float32), mask != 0
    d = token_log_ratio(old_logp, sampler_logp, mask)
    token, sequence = (_log_ratio(old_logp, sampler_logp, mask, segments, level) for level in ("token", "sequence"))
    mean = lambda x, mask=mask: aggregate(x, mask).value()
    total = mean(weight)
    return {
        "sampler_logp_difference": mean(jnp.abs(d)),
        "sampler_logp_difference_max": jnp.max(jnp.abs(d)),
        "sampler_k1": mean(-token),                       # of KL(sampler, old)
        "sampler_k3": mean(jnp.expm1(token) - token),
        "sampler_chi2_token": mean(jnp.exp(2 * token)) - 1,
        "sampler_chi2_sequence": mean(jnp.exp(2 * sequence), last_counted(mask, segments)) - 1,
        "sampler_perplexity": jnp.exp(-mean(sampler_logp)),
        "trainer_perplexity": jnp.exp(-mean(old_logp)),
        "is_weight": total,
        "is_weight_min": jnp.min(jnp.where(counted, weight, jnp.inf)),
        "is_weight_max": jnp.max(jnp.where(counted, weight, 0)),
        "is_rejected": mean(weight == 0),
        "is_effective_sample_size": safe_divide(total**2, mean(weight**2)),
    }


def truncated_logp(logp: jax.Array, kept: jax.Array, mask: jax.Array) -> jax.Array:
    """log(pi / kept): log-probabilities under the distribution that top-k, top-p or min-p left, renormalised.

    The sampler of jaxlm reports log-probabilities before truncation, and `kept`, the mass that truncation left. Those
    before truncation compare sampler and trainer: equal networks give a ratio of 1. Those of this function are what was
    sampled from: against them the expected ratio of an equal network is the kept mass, below 1, unless the trainer's
    log-probabilities are divided by its own mass of the same tokens. Shapes equal; 0 where the mask is.
    """
    chex.assert_equal_shape([logp, kept, mask])
    return jnp.where(mask != 0, logp - jnp.log(kept), 0)


def _log_ratio(
    old_logp: jax.Array, sampler_logp: jax.Array, mask: jax.Array, segments: jax.Array, level: Level
) -> jax.Array:
    d = token_log_ratio(old_logp, sampler_logp, mask)
    if level == "sequence":
        d = sequence_sum(d, mask != 0, segments)
    elif level == "sequence_mean":
        d = sequence_mean(d, mask, segments)
    return jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
