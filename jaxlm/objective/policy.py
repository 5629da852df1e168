"""Policy losses per token. Group advantage, loss and aggregation make an algorithm (`objective.algorithm`).

Every loss takes log-probabilities of sampled tokens [B, T] now (`logp`) and before the update (`old_logp`), advantages
[B, T], the mask of tokens that the policy sampled, and the sequences of packed rows (`objective.reduce`). Under a zero
mask everything may be infinite or NaN; the loss and its gradient are 0 there. Only `logp` is differentiated.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import Mean, aggregate
from jaxlm.objective.reduce import sequence_mean

PolicyLossName = Literal["ppo", "gspo", "gspo_token", "cispo", "reinforce"]

MAX_LOG_RATIO = 20.0  # of any ratio of two policies, so that exp and its square stay finite


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Where the ratio r of a loss stops to count. None: no such limit."""

    low: float | None = 0.2
    high: float | None = 0.2      # above `low`: clip-higher of DAPO
    dual: float | None = None     # r at most this where the advantage is negative (dual clip, arXiv:1912.09729)
    # Papers mean either [1 - low, 1 + high] or [low, high] by the two numbers; CISPO is written both ways.
    convention: Literal["around_one", "absolute"] = "around_one"

    def __post_init__(self) -> None:
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"clip.dual bounds the ratio and must be above 1, got {self.dual}")
        lower, upper = self.bounds()
        if not 0 <= lower <= 1 <= upper:
            raise ValueError(f"clip.low {self.low} and clip.high {self.high} ({self.convention}) bound the ratio by "
                             f"[{lower:g}, {upper:g}], which must contain 1 and nothing negative")

    def bounds(self) -> tuple[float, float]:
        """The interval outside which a ratio is clipped."""
        shift, sign = (1.0, -1.0) if self.convention == "around_one" else (0.0, 1.0)
        return (0.0 if self.low is None else shift + sign * self.low,
                float("inf") if self.high is None else shift + self.high)


class PolicyLoss(NamedTuple):
    """Per-token results, [B, T] float32 each, 0 where the mask is; all but the loss detached."""

    loss: jax.Array
    log_ratio: jax.Array     # of the ratio that the loss uses: of the token, or of its sequence
    clipped_low: jax.Array   # 1 where the lower limit takes the gradient
    clipped_high: jax.Array
    clipped_dual: jax.Array


def token_log_ratio(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """log pi - log pi_old, 0 where the mask is and exactly 0 where both are equal; not clamped."""
    # Selected before any exp: 0 * inf in a masked product would be NaN, in the gradient too.
    return jnp.where(mask != 0, logp.astype(jnp.float32) - jax.lax.stop_gradient(old_logp).astype(jnp.float32), 0)


def ppo(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array, clip: ClipConfig
) -> PolicyLoss:
    """-min(r A, clip(r) A) with the ratio r of the token, and at most -dual * A where A < 0.

    Schulman et al. 2017, arXiv:1707.06347; the loss of GRPO, Dr.GRPO, DAPO and MENTOR.
    """
    advantage = _checked(logp, old_logp, advantage, mask, segments)
    return _clipped(token_log_ratio(logp, old_logp, mask), advantage, mask, clip)


def gspo(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array, clip: ClipConfig
) -> PolicyLoss:
    """`ppo` with one ratio a sequence, exp(mean of its tokens' log-ratios) (GSPO, arXiv:2507.18071)."""
    advantage = _checked(logp, old_logp, advantage, mask, segments)
    log_ratio = sequence_mean(token_log_ratio(logp, old_logp, mask), mask, segments)
    return _clipped(log_ratio, advantage, mask, clip)


def gspo_token(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array, clip: ClipConfig
) -> PolicyLoss:
    """`gspo` for tokens with advantages of their own: the value of the sequence's ratio, the gradient of log pi_t.

    Equal to `gspo` in value and summed gradient where all tokens of a sequence share their advantage.
    """
    advantage = _checked(logp, old_logp, advantage, mask, segments)
    own = token_log_ratio(logp, old_logp, mask)
    mean = sequence_mean(jax.lax.stop_gradient(own), mask, segments)
    return _clipped(mean + own - jax.lax.stop_gradient(own), advantage, mask, clip)


def cispo(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array, clip: ClipConfig
) -> PolicyLoss:
    """-sg(clip(r)) A log pi: a clipped ratio still weighs its gradient (CISPO, MiniMax-M1, arXiv:2506.13585)."""
    advantage = _checked(logp, old_logp, advantage, mask, segments)
    log_ratio = jax.lax.stop_gradient(_clamped(token_log_ratio(logp, old_logp, mask)))
    lower, upper = clip.bounds()
    ratio = jnp.exp(log_ratio)
    loss = -jnp.clip(ratio, lower, upper) * advantage * _selected(logp, mask)
    return _result(loss, log_ratio, mask, ratio < lower, ratio > upper, jnp.zeros_like(mask))


def reinforce(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array, clip: ClipConfig
) -> PolicyLoss:
    """-A log pi (Williams 1992): right only while pi is the policy that sampled. No ratio, hence nothing to clip."""
    advantage = _checked(logp, old_logp, advantage, mask, segments)
    log_ratio = jax.lax.stop_gradient(_clamped(token_log_ratio(logp, old_logp, mask)))
    none = jnp.zeros_like(mask)
    return _result(-advantage * _selected(logp, mask), log_ratio, mask, none, none, none)


def policy_metrics(out: PolicyLoss, mask: jax.Array) -> dict[str, Mean]:
    """Token means of one update, which add over micro-batches. For the extremes of a ratio see `ratio_range`."""
    ratio = jnp.exp(out.log_ratio)
    return {
        "ratio": aggregate(ratio, mask),
        "abs_log_ratio": aggregate(jnp.abs(out.log_ratio), mask),
        "approx_kl": aggregate(jnp.expm1(out.log_ratio) - out.log_ratio, mask),  # k3 of KL(old, new)
        "clip_fraction": aggregate(jnp.maximum(out.clipped_low, out.clipped_high), mask),
        "clip_fraction_low": aggregate(out.clipped_low, mask),
        "clip_fraction_high": aggregate(out.clipped_high, mask),
        "clip_fraction_dual": aggregate(out.clipped_dual, mask),
    }


def ratio_range(out: PolicyLoss, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest ratio of the counted tokens; infinity and 0 if there are none.

    Extremes do not add: over micro-batches take the minimum and the maximum.
    """
    ratio = jnp.exp(out.log_ratio)
    return jnp.min(jnp.where(mask != 0, ratio, jnp.inf)), jnp.max(jnp.where(mask != 0, ratio, 0))


def _checked(
    logp: jax.Array, old_logp: jax.Array, advantage: jax.Array, mask: jax.Array, segments: jax.Array
) -> jax.Array:
    """The shapes; the advantage as the losses use it."""
    chex.assert_rank(logp, 2)
    chex.assert_equal_shape([logp, old_logp, advantage, mask, segments])
    return _selected(jax.lax.stop_gradient(advantage), mask)


def _selected(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask != 0, x.astype(jnp.float32), 0)


def _clamped(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped(log_ratio: jax.Array, advantage: jax.Array, mask: jax.Array, clip: ClipConfig) -> PolicyLoss:
    """The pessimistic of the plain and the clipped objective."""
    log_ratio = _clamped(log_ratio)
    ratio = jnp.exp(log_ratio)
    lower, upper = clip.bounds()
    loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, lower, upper) * advantage)
    dual = jnp.zeros_like(mask, bool)
    if clip.dual is not None:
        dual = (advantage < 0) & (ratio > clip.dual)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -clip.dual * advantage), loss)
    low, high = (ratio < lower) & (advantage < 0), (ratio > upper) & (advantage > 0)
    return _result(loss, log_ratio, mask, low, high, dual)


def _result(
    loss: jax.Array, log_ratio: jax.Array, mask: jax.Array, low: jax.Array, high: jax.Array, dual: jax.Array
) -> PolicyLoss:
    loss, *aux = (_selected(x, mask) for x in (loss, log_ratio, low, high, dual))
    return PolicyLoss(loss, *map(jax.lax.stop_gradient, aux))


POLICY_LOSSES = {
    "ppo": ppo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "reinforce": reinforce,
}
