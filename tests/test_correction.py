"""Importance correction against loops, its metrics by hand, and log-probabilities after truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.correction import (
    CORRECTIONS,
    CorrectionConfig,
    correction_metrics,
    importance_weights,
    truncated_logp,
)
from tests.policy_reference import MASK, SEGMENTS, SHAPE, device, draw, sequences

jitted_weights = jax.jit(importance_weights, static_argnums=4)


def corrected(old, sampler, config):
    """Weights of `importance_weights` by loops."""
    weights = np.zeros(SHAPE)
    for row, _, counted in sequences(MASK, SEGMENTS):
        gap = {t: old[row, t] - sampler[row, t] for t in counted}
        total = sum(gap.values())
        for t in counted:
            ratio = {"none": 1, "token": np.exp(gap[t]), "sequence": np.exp(total),
                     "sequence_mean": np.exp(total / len(counted))}
            inside = config.reject == "none" or (
                (config.low or 0) <= ratio[config.reject] <= (config.high or np.inf))
            weights[row, t] = inside * min(ratio[config.weight], config.cap or np.inf)
    return weights


@pytest.mark.parametrize("config", [*CORRECTIONS.values(), CorrectionConfig(
    weight="sequence_mean", cap=1.1, reject="token", low=0.9)], ids=[*CORRECTIONS, "mixed"])
def test_importance_weights_equal_the_loops(config):
    old, _, tokens = draw(2)
    sampler = tokens.old_logp
    if config.reject == "sequence_mean":  # its band is narrow
        sampler = old - 2e-2 * (old - sampler)
    want = corrected(old, sampler, config)
    spoil = lambda x: np.where(MASK, x, -np.inf)
    got = jitted_weights(*device((spoil(old), spoil(sampler))), jnp.asarray(MASK), jnp.asarray(SEGMENTS), config)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert config == CORRECTIONS["none"] or len(np.unique(want[MASK > 0].round(4))) > 1
    assert config.reject == "none" or 0 < np.mean(want[MASK > 0] == 0) < 1


def test_metrics_of_the_correction():
    old, sampler = jnp.log(jnp.array([[0.5, 0.4, 0.1, 1]])), jnp.log(jnp.array([[0.25, 0.5, 0.1, 0]]))
    mask, segments = jnp.array([[1, 1, 1, 0]]), jnp.array([[1, 1, 2, 2]])
    weight = jitted_weights(old, sampler, mask, segments, CorrectionConfig(
        weight="token", reject="token", high=1.5))
    got = jax.jit(correction_metrics)(old, sampler, weight, mask, segments)
    ratio = np.array([2, 0.8, 1.0])
    want = {
        "sampler_logp_difference": np.abs(np.log(ratio)).mean(), "sampler_logp_difference_max": np.log(2),
        "sampler_k1": -np.log(ratio).mean(), "sampler_k3": (ratio - 1 - np.log(ratio)).mean(),
        "sampler_chi2_token": (ratio**2).mean() - 1, "sampler_chi2_sequence": (1.6**2 + 1) / 2 - 1,
        "sampler_perplexity": (0.25 * 0.5 * 0.1) ** (-1 / 3), "trainer_perplexity": (0.5 * 0.4 * 0.1) ** (-1 / 3),
        "is_weight": 0.6, "is_weight_min": 0, "is_weight_max": 1, "is_rejected": 1 / 3,
        "is_effective_sample_size": 1.8**2 / (0.8**2 + 1) / 3,
    }
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_log_probabilities_after_truncation():
    """top-p keeps .8 of the mass: what was sampled from sums to 1, and the expected ratio against it is the mass."""
    p = jnp.array([[0.5, 0.3, 0.2]])
    keeps = jnp.array([[1, 1, 0]])
    got = truncated_logp(jnp.log(p), jnp.array([[0.8, 0.8, 0]]), keeps)
    sampled_from = jnp.exp(got) * keeps
    np.testing.assert_allclose(sampled_from, [[0.625, 0.375, 0]], rtol=1e-6)
    assert float(jnp.sum(sampled_from * jnp.exp(jnp.log(p) - got))) == pytest.approx(0.8)
    grad = jax.grad(lambda x: jnp.sum(truncated_logp(x, jnp.array([[0.8, 0.8, 0]]), keeps)))(jnp.log(p))
    np.testing.assert_array_equal(grad, keeps)


@pytest.mark.parametrize(("values", "match"), [
    ({"cap": 2.0}, "no effect without correction.weight"),
    ({"reject": "token"}, "needs correction.low or high"),
    ({"high": 2.0}, "needs correction.low or high"),
    ({"reject": "token", "low": 2.0, "high": 0.5}, "must be below"),
    ({"weight": "token", "cap": 0.0}, "above 0"),
])
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        CorrectionConfig(**values)
