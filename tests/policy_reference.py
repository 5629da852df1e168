"""Policy objectives as loops over sequences and tokens in float64 numpy, written from the formulas.

`frozen` is `logp` at the point where the gradient is taken; what an algorithm detaches is computed from it. Central
differences of the loss in `logp` with `frozen` fixed are then the gradient that the algorithm uses.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.objective.algorithm import PolicyTokens

# Packed rows: three, one, two and one sequences, pads on either side, tool output inside; one never sampled a token.
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
MASK = np.array(
    [[0, 1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1]], np.int32)
SHAPE = MASK.shape


def draw(seed=0, spread=0.6):
    """log-probabilities in float64 whose ratios pass every limit, and everything else that an update takes."""
    rng = np.random.default_rng(seed)
    old = -rng.gamma(2.0, size=SHAPE)
    logp = old + spread * rng.normal(size=SHAPE)
    logp[0, 1], logp[3, 1] = old[0, 1] + 1.5, old[3, 1] + 1.4  # beyond the dual limit
    advantage = np.zeros(SHAPE)
    for (row, label, _), value in zip(sequences(SEGMENTS > 0, SEGMENTS), rng.normal(size=20), strict=False):
        advantage[row, SEGMENTS[row] == label] = value
    advantage[0, :4], advantage[3] = -0.7, -1.1
    near = lambda: old + 0.3 * rng.normal(size=SHAPE)
    tokens = PolicyTokens(old, advantage, MASK, SEGMENTS, rng.uniform(0, 2, size=SHAPE), near(), near())
    return logp, rng.uniform(0.1, 2, size=SHAPE), tokens


def device(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), tree)


def sequences(mask, segments):
    """(row, label, positions of the counted tokens) of every sequence that has one."""
    for row, labels in enumerate(segments):
        for label in sorted(set(labels.tolist()) - {0}):
            counted = [t for t in range(len(labels)) if labels[t] == label and mask[row, t]]
            if counted:
                yield row, label, counted


def bounds(clip):
    if clip.convention == "absolute":
        return clip.low or 0.0, math.inf if clip.high is None else clip.high
    return 0.0 if clip.low is None else 1 - clip.low, math.inf if clip.high is None else 1 + clip.high


def token_loss(name, ratio, frozen_ratio, logp, advantage, clip):
    """One token, with the ratio that its loss compares."""
    low, high = bounds(clip)
    if name == "reinforce":
        return -advantage * logp
    if name == "cispo":
        return -min(max(frozen_ratio, low), high) * advantage * logp
    loss = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
    if clip.dual is not None and advantage < 0:
        loss = min(loss, clip.dual * abs(advantage))
    return loss


def policy_losses(name, logp, frozen, old_logp, advantage, mask, segments, clip):
    """{(row, t): loss} of the counted tokens."""
    losses = {}
    for row, _, counted in sequences(mask, segments):
        gap = {t: logp[row, t] - old_logp[row, t] for t in counted}
        frozen_gap = {t: frozen[row, t] - old_logp[row, t] for t in counted}
        if name == "gspo":
            gap = dict.fromkeys(counted, sum(gap.values()) / len(counted))
        if name == "gspo_token":
            mean = sum(frozen_gap.values()) / len(counted)
            gap = {t: mean + logp[row, t] - frozen[row, t] for t in counted}
        for t in counted:
            losses[row, t] = token_loss(
                name, math.exp(gap[t]), math.exp(frozen_gap[t]), logp[row, t], advantage[row, t], clip)
    return losses


def kl_term(kl, logp, frozen, ref):
    """One token's penalty in the loss."""
    def estimate(logp):
        d = logp - ref
        value = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kl.estimator]
        return value if kl.clip_value is None else min(max(value, -kl.clip_value), kl.clip_value)

    if kl.gradient == "naive":
        return estimate(logp)
    if kl.gradient == "straight_through":
        return estimate(frozen) + ((logp - ref) ** 2 - (frozen - ref) ** 2) / 2
    return estimate(logp) + estimate(frozen) * (logp - frozen)


def aggregate(losses, mask, segments, aggregation, constant_length):
    """The mean of {(row, t): loss} over a whole batch."""
    parts = [[losses[row, t] for t in counted] for row, _, counted in sequences(mask, segments)]
    if aggregation == "token_mean":
        return sum(map(sum, parts)) / sum(map(len, parts))
    if aggregation == "sequence_mean_token_mean":
        return sum(sum(part) / len(part) for part in parts) / len(parts)
    return sum(sum(part) / (constant_length or 1) for part in parts) / len(parts)


def objective(config, logp, frozen, entropy, tokens):
    """The value of the whole objective."""
    losses = policy_losses(config.loss, logp, frozen, tokens.old_logp, tokens.advantage, tokens.mask, tokens.segments,
                           config.clip)
    for at in losses:
        if tokens.weight is not None:
            losses[at] *= tokens.weight[at]
        for kl, other in ((config.kl, tokens.ref_logp), (config.teacher, tokens.teacher_logp)):
            if kl.coefficient and kl.place == "loss":
                losses[at] += kl.coefficient * kl_term(kl, logp[at], frozen[at], other[at])
        losses[at] -= config.entropy * entropy[at]
    return aggregate(losses, tokens.mask, tokens.segments, config.aggregation, config.constant_length)


def gradient(f, x, mask, eps=1e-6):
    """Central differences of the scalar f at x [B, T], 0 where the mask is."""
    slopes = np.zeros_like(x)
    for at in zip(*np.nonzero(mask), strict=True):
        up, down = x.copy(), x.copy()
        up[at] += eps
        down[at] -= eps
        slopes[at] = (f(up) - f(down)) / (2 * eps)
    return slopes
