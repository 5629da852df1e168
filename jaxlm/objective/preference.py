"""Preference objectives: log-probabilities of whole completions in, one loss per row out.

A row is a pair (chosen, rejected), or for KTO one completion that was judged. What a method needs besides the policy
stands beside it in `METHODS`. All arrays are global, and a row's loss depends on no other row; the one number that is
of the batch, KTO's reference point, is an argument (`anchor`), so that micro-batches can share it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.config import nearest
from jaxlm.core.masked import Mean, aggregate, safe_divide

PreferenceMethod = Literal["dpo", "robust", "hinge", "ipo", "rpo", "kto", "orpo", "simpo"]

# ORPO's odds p / (1 - p) of a completion that is certain: log p at most this keeps them and their gradient finite.
MAX_MEAN_LOGP = -1e-6


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is minimised. None: the default of the method (`METHODS`); a setting that it does not read is an error."""

    method: PreferenceMethod = "dpo"
    beta: float | None = None                # factor of the rewards; tau of IPO, lambda of ORPO
    label_smoothing: float | None = None     # share of the pairs whose labels are taken to be the wrong way round
    nll_weight: float | None = None          # rpo: of the chosen completion's mean negative log-likelihood
    gamma: float | None = None               # simpo: by how much the rewards should differ
    desirable_weight: float | None = None    # kto: of the loss of desirable rows
    undesirable_weight: float | None = None  # kto

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"loss.method {self.method!r} is unknown{nearest(self.method, METHODS)}; one of "
                             f"{', '.join(METHODS)}")
        read = METHODS[self.method].settings
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "method"}
        for name, value in given.items():
            if value is None:
                continue
            if name not in read:
                raise ValueError(f"loss.{name} has no effect with {self.method}, which reads {', '.join(read)}")
            limit = 0.5 if name == "label_smoothing" else float("inf")
            if not 0 <= value < limit:
                raise ValueError(f"loss.{name} must be a number from 0 to below {limit}, got {value}")
        if self.beta == 0:
            raise ValueError("loss.beta must be above 0, got 0")
        if self.desirable_weight == 0 and self.undesirable_weight == 0:
            raise ValueError("loss.desirable_weight and undesirable_weight are both 0, so nothing is learnt")

    def filled(self) -> "PreferenceConfig":
        """With the defaults of its method."""
        return replace(self, **{name: default for name, default in METHODS[self.method].settings.items()
                                if getattr(self, name) is None})


class Rows(NamedTuple):
    """B rows of C completions, float32: C is 2 (chosen, rejected), or 1 where each row is judged alone."""

    logp: jax.Array                     # [B, C] sum over the tokens of a completion, nats
    length: jax.Array                   # [B, C] tokens of it
    ref_logp: jax.Array | None = None   # [B, C] as logp, of the reference model
    desirable: jax.Array | None = None  # [B] 1 where the completion was judged good; C is 1
    anchor: jax.Array | None = None     # [B] KTO's reference point, see `kto_anchor`


class RowLoss(NamedTuple):
    """What a method says of the rows."""

    loss: jax.Array    # [B] float32
    reward: jax.Array  # [B, C] float32, in the unit of the method


class PreferenceLoss(NamedTuple):
    """Per-row results, float32; all but the loss detached."""

    loss: jax.Array     # [B], 0 where `counted` is
    reward: jax.Array   # [B, C], 0 where `counted` is
    # [B] 1 where the chosen has the greater reward, or where a row judged alone is on its side of the anchor; ties: 0
    correct: jax.Array
    counted: jax.Array  # [B] 1 where every completion has a token: the mask for `core.masked.aggregate`


def preference_loss(rows: Rows, config: PreferenceConfig) -> PreferenceLoss:
    """The loss of each row by `config.method`.

    Rows with a completion of no token count nowhere, whatever else stands in them, NaN too. Everything else that is not
    finite reaches the loss: the training step then changes nothing and says so.

    Raises ValueError for rows that lack what the method needs, or that have what it does not read.
    """
    _check(rows, config)
    counted = jnp.all(rows.length > 0, axis=1)
    keep = lambda x, other: None if x is None else jnp.where(
        counted.reshape(-1, *(1,) * (x.ndim - 1)), x.astype(jnp.float32), other)
    # Selected before any function: a NaN times 0 would be NaN, in the gradient too. -1 is a log-probability.
    clean = Rows(keep(rows.logp, -1), keep(rows.length, 1), keep(rows.ref_logp, -1), keep(rows.desirable, 0),
                 keep(rows.anchor, 0))
    if clean.ref_logp is not None:
        clean = clean._replace(ref_logp=jax.lax.stop_gradient(clean.ref_logp))
    config = config.filled()
    out = METHODS[config.method].loss(clean, config)
    reward = jax.lax.stop_gradient(out.reward)
    if METHODS[config.method].paired:
        correct = reward[:, 0] > reward[:, 1]
    else:
        point = config.beta * clean.anchor
        correct = jnp.where(clean.desirable > 0, reward[:, 0] > point, reward[:, 0] < point)
    zeroed = lambda x: jnp.where(counted, x, 0).astype(jnp.float32)
    return PreferenceLoss(zeroed(out.loss), jnp.where(counted[:, None], reward, 0), zeroed(correct),
                          counted.astype(jnp.float32))


def preference_metrics(rows: Rows, out: PreferenceLoss) -> dict[str, Mean]:
    """Means over the rows that count, which add over micro-batches; `loss` is what is minimised.

    Of rows judged alone, chosen means desirable and rejected undesirable, and there is no margin.
    """
    mean = lambda values, mask=out.counted: aggregate(jax.lax.stop_gradient(values), mask)
    found = {"loss": aggregate(out.loss, out.counted), "accuracy": mean(out.correct)}
    if rows.desirable is None:
        found["margin"] = mean(out.reward[:, 0] - out.reward[:, 1])
        sides = {"chosen": (0, out.counted), "rejected": (1, out.counted)}
    else:
        good = out.counted * rows.desirable.astype(jnp.float32)
        sides = {"chosen": (0, good), "rejected": (0, out.counted - good)}
        found["kl"] = mean(rows.anchor)
    for name, (column, mask) in sides.items():
        found[f"reward_{name}"] = mean(out.reward[:, column], mask)
        found[f"logp_{name}"] = mean(rows.logp[:, column], mask)
    return found


def dpo(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """-(1 - e) log s(d) - e log s(-d), d = b (log pi/ref of the chosen - that of the rejected), e the label smoothing.

    Rafailov et al. 2023, arXiv:2305.18290; with e above 0 it is cDPO (Mitchell 2023).
    """
    return _smoothed(_rewards(rows, config), config.label_smoothing)


def robust(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """(-(1 - e) log s(d) + e log s(-d)) / (1 - 2 e), d as in `dpo`: unbiased if a share e of the labels is flipped.

    Chowdhury et al. 2024, arXiv:2403.00409.
    """
    reward, e = _rewards(rows, config), config.label_smoothing
    difference = reward[:, 0] - reward[:, 1]
    loss = ((1 - e) * jax.nn.softplus(-difference) - e * jax.nn.softplus(difference)) / (1 - 2 * e)
    return RowLoss(loss, reward)


def hinge(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """max(0, 1 - d), d as in `dpo`: SLiC (Zhao et al. 2023, arXiv:2305.10425) on rewards (RSO, arXiv:2309.06657)."""
    reward = _rewards(rows, config)
    return RowLoss(jax.nn.relu(1 - (reward[:, 0] - reward[:, 1])), reward)


def ipo(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """(h - 1 / (2 b))^2, h the difference of log pi/ref, each divided by the tokens of its completion.

    Azar et al. 2023, arXiv:2310.12036, equation 17, b its tau. The division is not in the paper; TRL has it, after
    asking the authors: without it the target of a difference would be the same for one word and for a page.
    """
    per_token = (rows.logp - rows.ref_logp) / rows.length
    return RowLoss(jnp.square(per_token[:, 0] - per_token[:, 1] - 1 / (2 * config.beta)), config.beta * per_token)


def rpo(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """`dpo` - w log pi(chosen) / its tokens, w the weight of the likelihood (Pang et al. 2024, arXiv:2404.19733).

    The mean is that of each completion, as in the paper; TRL once divided by the tokens of the batch.
    """
    out = _smoothed(_rewards(rows, config), config.label_smoothing)
    return out._replace(loss=out.loss - config.nll_weight * rows.logp[:, 0] / rows.length[:, 0])


def kto(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """w (1 - s(b (r - z))) for desirable rows, w' (1 - s(b (z - r))) for others; r = log pi/ref, z the anchor.

    Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
    """
    reward = _rewards(rows, config)
    above = reward[:, 0] - config.beta * jax.lax.stop_gradient(rows.anchor)
    loss = jnp.where(rows.desirable > 0, config.desirable_weight * jax.nn.sigmoid(-above),
                     config.undesirable_weight * jax.nn.sigmoid(above))
    return RowLoss(loss, reward)


def orpo(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """-m - b log s(odds(m) - odds(m')), m and m' the mean log-probability of chosen and rejected tokens,
    odds(m) = m - log(1 - exp(m)).

    Hong et al. 2024, arXiv:2403.07691, equations 4 to 7, b its lambda. The likelihood is that of the completion alone;
    TRL's is of the prompt too.
    """
    mean = rows.logp / rows.length
    bounded = jnp.minimum(mean, MAX_MEAN_LOGP)
    odds = bounded - jnp.log(-jnp.expm1(bounded))
    return RowLoss(-mean[:, 0] + config.beta * jax.nn.softplus(odds[:, 1] - odds[:, 0]), config.beta * mean)


def simpo(rows: Rows, config: PreferenceConfig) -> RowLoss:
    """-log s(b m - b m' - g), m and m' the mean log-probability of chosen and rejected tokens.

    Meng et al. 2024, arXiv:2405.14734, equation 6; there, and in TRL, g is also given as g / b.
    """
    reward = config.beta * rows.logp / rows.length
    return RowLoss(jax.nn.softplus(config.gamma - (reward[:, 0] - reward[:, 1])), reward)


def kto_anchor(logp: jax.Array, ref_logp: jax.Array, counted: jax.Array) -> jax.Array:
    """max(0, mean(log pi/ref)) of completions that answer another prompt of the batch, [B] each; scalar, detached.

    KTO's estimate of KL(pi, ref), section 4; 0 where nothing counts.
    """
    chex.assert_rank([logp, ref_logp, counted], 1)
    chex.assert_equal_shape([logp, ref_logp, counted])
    mean = aggregate(logp.astype(jnp.float32) - ref_logp.astype(jnp.float32), counted)
    return jax.lax.stop_gradient(jnp.maximum(safe_divide(mean.total, mean.weight), 0))


def _rewards(rows: Rows, config: PreferenceConfig) -> jax.Array:
    """b log pi/ref, [B, C]."""
    return config.beta * (rows.logp - rows.ref_logp)


def _smoothed(reward: jax.Array, smoothing: float) -> RowLoss:
    difference = reward[:, 0] - reward[:, 1]
    loss = (1 - smoothing) * jax.nn.softplus(-difference) + smoothing * jax.nn.softplus(difference)
    return RowLoss(loss, reward)


def _check(rows: Rows, config: PreferenceConfig) -> None:
    method = METHODS[config.method]
    chex.assert_shape([rows.logp, rows.length], (None, 2 if method.paired else 1))
    for name, there, needed in (("ref_logp", rows.ref_logp, method.reference),
                                ("desirable", rows.desirable, not method.paired),
                                ("anchor", rows.anchor, not method.paired)):
        if (there is not None) != needed:
            raise ValueError(f"{config.method} {'needs' if needed else 'does not read'} {name}")
    chex.assert_equal_shape([x for x in (rows.logp, rows.length, rows.ref_logp) if x is not None])
    chex.assert_shape([x for x in (rows.desirable, rows.anchor) if x is not None], rows.logp.shape[:1])


class Method(NamedTuple):
    """A loss, what it needs, and its settings with their defaults."""

    loss: Callable[[Rows, PreferenceConfig], RowLoss]
    settings: Mapping[str, float]
    reference: bool = True  # it compares with a reference model
    paired: bool = True     # its rows are pairs; else completions, each judged alone


METHODS = {
    "dpo": Method(dpo, {"beta": 0.1, "label_smoothing": 0.0}),
    "robust": Method(robust, {"beta": 0.1, "label_smoothing": 0.1}),
    "hinge": Method(hinge, {"beta": 0.1}),
    "ipo": Method(ipo, {"beta": 0.1}),
    "rpo": Method(rpo, {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 1.0}),
    "kto": Method(kto, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, paired=False),
    "orpo": Method(orpo, {"beta": 0.1}, reference=False),
    "simpo": Method(simpo, {"beta": 2.0, "gamma": 1.0}, reference=False),
}
