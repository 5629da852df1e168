"""Algorithms of policy optimisation as combinations: advantage, loss, aggregation, clipping and KL."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import chex
import jax

from jaxlm.core.masked import Mean, aggregate
from jaxlm.objective.advantage import AdvantageName
from jaxlm.objective.correction import CorrectionConfig
from jaxlm.objective.kl import KLConfig, kl_penalty
from jaxlm.objective.policy import POLICY_LOSSES, ClipConfig, PolicyLossName, policy_metrics
from jaxlm.objective.reduce import Aggregation, token_weights, weighted
from jaxlm.objective.value import ValueConfig

NO_CLIP = ClipConfig(low=None, high=None)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What one update minimises."""

    advantage: Literal[AdvantageName, "gdpo", "gae"] = "grpo"  # gdpo: several reward terms; gae: a value head
    loss: PolicyLossName = "ppo"
    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None  # divides the token sum of a sequence: the budget of tokens (Dr.GRPO)
    clip: ClipConfig = field(default_factory=ClipConfig)
    kl: KLConfig = field(default_factory=KLConfig)        # from the reference policy
    teacher: KLConfig = field(default_factory=KLConfig)   # from a teacher: on-policy distillation, KDRL
    entropy: float = 0.0                                  # weight of the entropy bonus
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        if self.constant_length is not None and self.aggregation != "sequence_mean_token_sum":
            raise ValueError(f"constant_length has no effect with aggregation {self.aggregation}; drop it, or set "
                             "aggregation to sequence_mean_token_sum")
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"constant_length must be at least 1, got {self.constant_length}")
        if self.loss in ("gspo", "gspo_token") and self.aggregation != "sequence_mean_token_mean":
            raise ValueError(f"loss {self.loss} has one ratio a sequence, which aggregation {self.aggregation} would "
                             "count once for every token of it; set aggregation to sequence_mean_token_mean")
        if self.loss == "reinforce" and self.clip != NO_CLIP:
            raise ValueError("loss reinforce has no ratio to clip; set clip.low, clip.high and clip.dual to None")
        if self.loss == "cispo" and self.clip.dual is not None:
            raise ValueError("clip.dual has no effect on loss cispo, whose weight is clipped for either sign; drop it")
        if self.loss != "cispo" and self.clip.convention == "absolute":
            raise ValueError(f"clip.convention absolute is that of cispo; write the limits of loss {self.loss} as "
                             "distances from 1")
        if not self.entropy >= 0:
            raise ValueError(f"entropy is the weight of a bonus and must be at least 0, got {self.entropy}")
        if self.advantage != "gae" and self.value != ValueConfig():
            raise ValueError(f"value settings have no effect with advantage {self.advantage}; drop them, or set "
                             "advantage to gae")
        if self.kl.place == "advantage":
            raise ValueError("kl.place advantage is for a teacher; a reference holds the policy by kl.place reward or "
                             "loss")
        if self.teacher.place == "reward" and self.teacher.coefficient:
            raise ValueError("teacher.place reward would judge sequences by their total distance from the teacher; use "
                             "advantage (each token by its own) or loss")


class PolicyTokens(NamedTuple):
    """What an update learns from, [B, T] each: everything but the policy itself."""

    # log p of the sampled tokens by the trainer before the update. None: this is the first update since, so it is
    # `logp` itself; the ratio is then exactly 1, which two compiled programs promise only up to rounding.
    old_logp: jax.Array | None
    advantage: jax.Array                   # of the token, with everything that `token_advantage` adds
    mask: jax.Array                        # 1 where the policy sampled, 0 on prompts, tool output and padding
    segments: jax.Array                    # int32, sequence within the row from 1; 0 is padding
    weight: jax.Array | None = None        # `correction.importance_weights`
    ref_logp: jax.Array | None = None      # needed by a KL in the loss; its distance is reported
    teacher_logp: jax.Array | None = None


def token_advantage(
    advantage: jax.Array, old_logp: jax.Array, other_logp: jax.Array, mask: jax.Array, kl: KLConfig
) -> jax.Array:
    """Advantages [B, T] minus `kl.coefficient` times the estimate at each token, for `kl.place` advantage.

    On-policy distillation (Agarwal et al. 2024, arXiv:2306.13649; sampled reverse KL): with k1 the advantage of a token
    is log teacher - log student, and its own only: later tokens are not its merit.
    """
    assert kl.place == "advantage", kl
    return advantage - kl.coefficient * kl_penalty(old_logp, other_logp, mask, kl)


def policy_objective(
    logp: jax.Array, entropy: jax.Array | None, tokens: PolicyTokens, config: PolicyConfig
) -> tuple[jax.Array, dict[str, Mean]]:
    """The summed loss of a micro-batch and its metrics; `metrics["loss"].weight` is what divides the sum.

    loss_t = weight_t * policy_t + kl_t + teacher_t - entropy_t, aggregated as one. The importance weight is for the
    policy term only. KDRL (arXiv:2506.02208) is a teacher with k2 in the loss.

    Args:
      logp: [B, T], log p of the sampled tokens at the sampling temperature; differentiated.
      entropy: [B, T] or None; differentiated if it has a weight.
    """
    _check_given(entropy, tokens, config)
    mask, segments = tokens.mask, tokens.segments
    old_logp = jax.lax.stop_gradient(logp) if tokens.old_logp is None else tokens.old_logp
    out = POLICY_LOSSES[config.loss](logp, old_logp, tokens.advantage, mask, segments, config.clip)
    weights = token_weights(mask, segments, config.aggregation, config.constant_length)
    parts = {"policy_loss": out.loss if tokens.weight is None else out.loss * tokens.weight}
    for name, kl, other in (("kl", config.kl, tokens.ref_logp), ("teacher", config.teacher, tokens.teacher_logp)):
        if kl.coefficient and kl.place == "loss":
            parts[f"{name}_loss"] = kl.coefficient * kl_penalty(logp, other, mask, kl)
    if config.entropy:
        parts["entropy_loss"] = -config.entropy * entropy
    parts = {name: weighted(part, weights) for name, part in parts.items()}
    loss = sum(part.total for part in parts.values())
    metrics = {"loss": Mean(loss, weights.divisor), **parts, **policy_metrics(out, mask)}
    return loss, jax.lax.stop_gradient(metrics | _distances(logp, entropy, tokens))


def _distances(logp: jax.Array, entropy: jax.Array | None, tokens: PolicyTokens) -> dict[str, Mean]:
    """Token means of what is known: entropy, and both unbiased estimates of each KL."""
    metrics = {} if entropy is None else {"entropy": aggregate(entropy, tokens.mask)}
    for name, other in (("kl", tokens.ref_logp), ("teacher", tokens.teacher_logp)):
        if other is not None:
            for estimator in ("k1", "k3"):
                measure = KLConfig(estimator=estimator, place="reward")
                metrics[f"{name}_{estimator}"] = aggregate(kl_penalty(logp, other, tokens.mask, measure), tokens.mask)
    return metrics


def _check_given(entropy: jax.Array | None, tokens: PolicyTokens, config: PolicyConfig) -> None:
    for name, needed, value in (
        ("ref_logp", config.kl.coefficient and config.kl.place == "loss", tokens.ref_logp),
        ("teacher_logp", config.teacher.coefficient and config.teacher.place == "loss", tokens.teacher_logp),
        ("weight", config.correction != CorrectionConfig(), tokens.weight),
        ("entropy", config.entropy, entropy),
    ):
        if needed and value is None:
            raise ValueError(f"the configured objective needs `{name}`, which was not given")
    chex.assert_equal_shape([x for x in tokens if x is not None])


_GRPO = PolicyConfig(
    aggregation="sequence_mean_token_mean", kl=KLConfig(coefficient=0.04))  # DeepSeekMath, section 4.1.3
ALGORITHMS = {
    "grpo": _GRPO,
    # Its constant is the budget of generated tokens: set constant_length to that of the run.
    "dr_grpo": PolicyConfig(
        advantage="dr_grpo", aggregation="sequence_mean_token_sum", constant_length=1024),  # arXiv:2503.20783
    "dapo": PolicyConfig(clip=ClipConfig(low=0.2, high=0.28)),                              # arXiv:2503.14476
    "gspo": PolicyConfig(                                                                   # arXiv:2507.18071
        loss="gspo", aggregation="sequence_mean_token_mean", clip=ClipConfig(low=3e-4, high=4e-4)),
    "cispo": PolicyConfig(loss="cispo", clip=ClipConfig(low=None, high=5.0, convention="absolute")),
    # One sampled sequence is one action, on policy (arXiv:2402.14740), with the KL of TRL.
    "rloo": PolicyConfig(
        advantage="rloo", loss="reinforce", aggregation="sequence_mean_token_sum", clip=NO_CLIP,
        kl=KLConfig(coefficient=0.05, estimator="k1", place="reward")),
    "reinforce_plus_plus": PolicyConfig(                                                    # arXiv:2501.03262
        advantage="reinforce_plus_plus", kl=KLConfig(coefficient=0.01, estimator="k1", place="reward")),
    "reinforce_plus_plus_baseline": PolicyConfig(
        advantage="reinforce_plus_plus_baseline", kl=KLConfig(coefficient=0.01, estimator="k2")),
    "ppo": PolicyConfig(                                                                    # arXiv:2203.02155
        advantage="gae", kl=KLConfig(coefficient=0.02, estimator="k1", place="reward")),
    # arXiv:2510.18383 and its released code, whose token mean is of micro-batches; this one is of the whole batch.
    "mentor": PolicyConfig(
        clip=ClipConfig(dual=3.0), kl=KLConfig(coefficient=1e-3, clip_value=10.0), entropy=1e-3),
}
