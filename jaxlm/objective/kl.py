"""KL of the policy from a reference at sampled tokens: three choices that are independent of each other.

With d = log pi - log ref of the sampled token, `estimator` is what is measured, `place` where it enters, and
`gradient` what a place in the loss differentiates. In expectation over tokens from pi the loss then has the gradient

    estimator                       naive          straight_through     score
    k1 = d                          0              grad KL(pi, ref)     grad KL(pi, ref)
    k2 = d^2 / 2                    grad KL(pi, ref)   the same         grad E[k2]
    k3 = exp(-d) - 1 + d            grad KL(ref, pi)   grad KL(pi, ref) grad KL(pi, ref)

E[k1] = E[k3] = KL(pi, ref); k2 is biased. In the reward or the advantage, k1 gives grad KL(pi, ref), k2
grad E[k2] - grad KL(pi, ref), and k3 grad KL(pi, ref) - grad KL(ref, pi): k1 belongs there. (Schulman 2020,
"Approximating KL divergence"; arXiv:2506.09477.)
"""

from dataclasses import dataclass
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxlm.objective.reduce import last_counted

Estimator = Literal["k1", "k2", "k3"]
Place = Literal["loss", "reward", "advantage"]
Gradient = Literal["naive", "straight_through", "score"]


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty on the distance from a reference or a teacher."""

    coefficient: float = 0.0          # 0: no penalty
    estimator: Estimator = "k3"
    place: Place = "loss"             # reward: of the sequence, before advantages; advantage: of each token, after them
    gradient: Gradient = "naive"      # straight_through: value of the estimator, gradient of k2
    clip_argument: float = 20.0       # of |d| in the exponential of k3; beyond it k3 has no gradient
    clip_value: float | None = None   # of |estimate|, which has no naive gradient beyond

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ValueError(f"kl.coefficient must be at least 0, got {self.coefficient}")
        if not 0 < self.clip_argument <= 80 or not (self.clip_value is None or self.clip_value > 0):
            raise ValueError("kl.clip_argument must be above 0 and at most 80 (exp of more is infinite), kl.clip_value "
                             f"above 0 or None; got {self.clip_argument} and {self.clip_value}")
        if self.place != "loss" and self.gradient != "naive":
            raise ValueError(f"kl.gradient {self.gradient} has no effect on a penalty in the {self.place}, which is a "
                             "number; leave it naive, or set kl.place to loss")
        if self.place == "loss" and self.estimator == "k1" and self.gradient == "naive":
            raise ValueError("kl.estimator k1 in the loss has an expected gradient of 0 and holds nothing back; "
                             "set kl.gradient to straight_through or score, or kl.place to reward, or kl.estimator to "
                             "k2 or k3")


def k1(d: jax.Array) -> jax.Array:
    """d: unbiased, of either sign."""
    return d


def k2(d: jax.Array) -> jax.Array:
    """d^2 / 2: biased, never negative."""
    return 0.5 * d**2


def k3(d: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d: unbiased, never negative, of less variance than k1."""
    return jnp.expm1(-d) + d


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(logp: jax.Array, ref_logp: jax.Array, mask: jax.Array, config: KLConfig) -> jax.Array:
    """The estimate at each token, not yet times the coefficient: float32 of any equal shape, 0 where the mask is.

    Log-probabilities under a zero mask may be infinite or NaN. No gradient flows to `ref_logp`, nor to `logp` unless
    the penalty is a term of the loss.
    """
    chex.assert_equal_shape([logp, ref_logp, mask])
    logp, ref_logp = (jnp.where(mask != 0, x.astype(jnp.float32), 0) for x in (logp, ref_logp))
    if config.place != "loss":
        logp = jax.lax.stop_gradient(logp)
    d = logp - jax.lax.stop_gradient(ref_logp)
    used = jnp.clip(d, -config.clip_argument, config.clip_argument) if config.estimator == "k3" else d
    estimate = ESTIMATORS[config.estimator](used)
    if config.clip_value is not None:
        estimate = jnp.clip(estimate, -config.clip_value, config.clip_value)
    if config.gradient == "straight_through":
        return jax.lax.stop_gradient(estimate) + _only_gradient(k2(d))
    if config.gradient == "score":
        return estimate + jax.lax.stop_gradient(estimate) * _only_gradient(logp)
    return estimate


def token_rewards(
    rewards: jax.Array, penalty: jax.Array, mask: jax.Array, segments: jax.Array
) -> jax.Array:
    """Rewards of tokens: minus the penalty at each, and the sequence's reward at its last counted token.

        segments   1   1   1   2        mask       1   0   1   1
        rewards    5   5   5   7        penalty   .1   ?  .2  .3        result   -.1   0  4.8  6.7

    Args:
      rewards: [B, T], the reward of a sequence at each of its tokens.
      penalty: [B, T], `coefficient * kl_penalty`. `reduce.sequence_sum` of the result is the penalised reward of the
        whole sequence, which group estimators compare.
    """
    final = jnp.where(last_counted(mask, segments), rewards.astype(jnp.float32), 0)
    return final - jnp.where(mask != 0, penalty.astype(jnp.float32), 0)


def _only_gradient(x: jax.Array) -> jax.Array:
    """0, with the gradient of x."""
    return x - jax.lax.stop_gradient(x)
