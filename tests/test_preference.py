"""Preference objectives against plain numpy in float64, and what rows, masks and order must not change."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.preference import (
    METHODS,
    PreferenceConfig,
    PreferenceMethod,
    Rows,
    kto_anchor,
    preference_loss,
    preference_metrics,
)

RNG = np.random.default_rng(0)
B = 6
LENGTH = RNG.integers(1, 9, (B, 2)).astype(np.float64)
LOGP = -LENGTH * RNG.uniform(0.1, 2.0, (B, 2))
REF = LOGP + RNG.normal(0, 2, (B, 2))
DESIRABLE = np.array([1, 0, 1, 1, 0, 0], np.float64)
ANCHOR = 0.7
# Other numbers than the defaults, so that a setting that is not read would show.
SETTINGS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.2}, "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.4}, "ipo": {"beta": 0.3}, "rpo": {"beta": 0.3, "label_smoothing": 0.1, "nll_weight": 0.7},
    "kto": {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}, "orpo": {"beta": 0.2},
    "simpo": {"beta": 2.5, "gamma": 0.8},
}


def reference(method, logp, ref, length, desirable, anchor, beta, **extra):
    """Losses [B] of the published formulas, in the order of `Rows`."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    ratio, mean = beta * (logp - ref), logp / length
    if method == "kto":
        value = np.where(desirable > 0, sigmoid(ratio[:, 0] - beta * anchor), sigmoid(beta * anchor - ratio[:, 0]))
        return np.where(desirable > 0, extra["desirable_weight"], extra["undesirable_weight"]) * (1 - value)
    difference = ratio[:, 0] - ratio[:, 1]
    smoothing = extra.get("label_smoothing", 0)
    right, wrong = -np.log(sigmoid(difference)), -np.log(sigmoid(-difference))
    smooth = (1 - smoothing) * right + smoothing * wrong
    match method:
        case "dpo":
            return smooth
        case "robust":
            return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        case "hinge":
            return np.maximum(0, 1 - difference)
        case "ipo":
            tokens = (logp - ref) / length
            return (tokens[:, 0] - tokens[:, 1] - 1 / (2 * beta)) ** 2
        case "rpo":
            return smooth - extra["nll_weight"] * mean[:, 0]
        case "orpo":
            odds = np.log(np.exp(mean) / (1 - np.exp(mean)))
            return -mean[:, 0] - beta * np.log(sigmoid(odds[:, 0] - odds[:, 1]))
        case "simpo":
            return -np.log(sigmoid(beta * (mean[:, 0] - mean[:, 1]) - extra["gamma"]))


def rows_of(method, logp=LOGP, ref=REF, length=LENGTH, anchor=ANCHOR):
    """What the method takes, float32."""
    kind, count = METHODS[method], np.s_[:, :1 if method == "kto" else 2]
    array = lambda x: jnp.asarray(x, jnp.float32)
    return Rows(array(logp[count]), array(length[count]), array(ref[count]) if kind.reference else None,
                None if kind.paired else array(DESIRABLE), None if kind.paired else array(np.full(B, anchor)))


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def run(method):
    """Results and the gradient of the summed loss by all log-probabilities, compiled once."""
    config = PreferenceConfig(method=method, **SETTINGS[method])

    def total(logp, ref, rows):
        rows = rows._replace(logp=logp, ref_logp=ref)
        out = preference_loss(rows, config)
        return jnp.sum(out.loss), (out, preference_metrics(rows, out))

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1) if METHODS[method].reference else 0, has_aux=True))

    def call(rows):
        (_, (out, metrics)), gradient = compiled(rows.logp, rows.ref_logp, rows)
        gradient, by_ref = gradient if METHODS[method].reference else (gradient, jnp.zeros(()))
        assert not np.any(by_ref)  # nothing is learnt by the reference
        return jax.device_get(out), np.asarray(gradient), {name: float(one.value()) for name, one in metrics.items()}

    return call


def test_the_family_is_complete():
    assert set(get_args(PreferenceMethod)) == set(METHODS) == set(SETTINGS)
    for name, one in METHODS.items():
        assert set(SETTINGS[name]) == set(one.settings), name
        assert PreferenceConfig(method=name).filled() == PreferenceConfig(method=name, **one.settings), name


def test_value_and_gradient_equal_numpy(run, method):
    out, gradient, _ = run(rows_of(method))
    exact = lambda logp: reference(method, logp, REF, LENGTH, DESIRABLE, ANCHOR, **SETTINGS[method])
    np.testing.assert_allclose(out.loss, exact(LOGP), rtol=2e-5)
    for row, column in np.ndindex(gradient.shape):
        step = np.zeros_like(LOGP)
        step[row, column] = 1e-6
        slope = (exact(LOGP + step) - exact(LOGP - step)).sum() / 2e-6
        np.testing.assert_allclose(gradient[row, column], slope, rtol=1e-4, atol=1e-6)
    assert out.counted.all()


def test_rewards_and_metrics(run, method):
    out, _, metrics = run(rows_of(method))
    beta = SETTINGS[method]["beta"]
    per = 1 if method in ("dpo", "robust", "hinge", "rpo", "kto") else LENGTH
    reward = beta * (LOGP - (REF if METHODS[method].reference else 0)) / per
    if method == "kto":
        good = DESIRABLE > 0
        np.testing.assert_allclose(out.reward[:, 0], reward[:, 0], rtol=1e-5)
        np.testing.assert_array_equal(out.correct, (reward[:, 0] > beta * ANCHOR) == good)
        expected = {"reward_chosen": reward[good, 0].mean(), "reward_rejected": reward[~good, 0].mean(),
                    "logp_chosen": LOGP[good, 0].mean(), "logp_rejected": LOGP[~good, 0].mean(), "kl": ANCHOR}
    else:
        np.testing.assert_allclose(out.reward, reward, rtol=1e-5)
        np.testing.assert_array_equal(out.correct, reward[:, 0] > reward[:, 1])
        expected = {"reward_chosen": reward[:, 0].mean(), "reward_rejected": reward[:, 1].mean(),
                    "logp_chosen": LOGP[:, 0].mean(), "logp_rejected": LOGP[:, 1].mean(),
                    "margin": (reward[:, 0] - reward[:, 1]).mean()}
    expected |= {"loss": out.loss.mean(), "accuracy": out.correct.mean()}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_rows_without_tokens_count_nowhere(run, method):
    """Whatever stands in them; the other rows stay as they are."""
    whole, slopes, _ = run(rows_of(method))
    dirty, length, ref = LOGP.copy(), LENGTH.copy(), REF.copy()
    dirty[2], dirty[4], ref[2], length[2], length[4, 0] = np.nan, np.inf, np.nan, 0, 0
    out, gradient, metrics = run(rows_of(method, dirty, ref, length))
    kept = [0, 1, 3, 5]
    np.testing.assert_array_equal(out.counted, [1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(out.loss[kept], whole.loss[kept])
    np.testing.assert_array_equal(gradient[kept], slopes[kept])
    assert not out.loss[[2, 4]].any() and not gradient[[2, 4]].any() and not out.reward[[2, 4]].any()
    np.testing.assert_allclose(metrics["loss"], whole.loss[kept].mean(), rtol=1e-6)
    assert np.isfinite(list(metrics.values())).all()


def test_what_is_not_finite_in_a_row_that_counts_reaches_the_loss(run, method):
    dirty = LOGP.copy()
    dirty[1] = np.nan
    assert np.isnan(run(rows_of(method, dirty))[0].loss[1])


def test_far_apart_and_certain_completions_stay_finite(run, method):
    for logp in (LOGP * 1e4, LOGP * 0):
        out, gradient, _ = run(rows_of(method, logp, REF * 0))
        assert np.isfinite(out.loss).all() and np.isfinite(gradient).all()


def test_equal_completions_are_not_correct():
    for method in METHODS:
        same = np.repeat(LOGP[:, :1], 2, axis=1)
        rows = rows_of(method, same, same, np.ones_like(LENGTH), anchor=0.0)
        assert not preference_loss(rows, PreferenceConfig(method=method)).correct.any()


def test_the_anchor_is_a_mean_that_is_not_negative():
    logp, ref = jnp.asarray([1.0, 5.0, np.nan, 3.0]), jnp.asarray([0.0, 1.0, 2.0, np.inf])
    assert kto_anchor(logp, ref, jnp.asarray([1, 1, 0, 0])) == 2.5
    assert kto_anchor(-logp, ref, jnp.asarray([1, 1, 0, 0])) == 0
    assert kto_anchor(logp, ref, jnp.zeros(4)) == 0


def test_wrong_settings_and_rows():
    for message, settings in {
        "did you mean 'simpo'": {"method": "simp"},
        "label_smoothing has no effect with ipo, which reads beta": {"method": "ipo", "label_smoothing": 0.1},
        "gamma has no effect with dpo": {"gamma": 1.0},
        "beta must be above 0": {"beta": 0.0},
        "beta must be a number from 0": {"beta": float("nan")},
        "from 0 to below 0.5": {"method": "robust", "label_smoothing": 0.5},
        "both 0": {"method": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            PreferenceConfig(**settings)
    pairs, judged = rows_of("dpo"), rows_of("kto")
    for message, method, rows in (
        ("dpo needs ref_logp", "dpo", rows_of("orpo")),
        ("simpo does not read ref_logp", "simpo", pairs),
        ("kto needs anchor", "kto", judged._replace(anchor=None)),
        ("dpo does not read desirable", "dpo", pairs._replace(desirable=judged.desirable)),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(rows, PreferenceConfig(method=method))
    with pytest.raises(AssertionError):
        preference_loss(judged, PreferenceConfig(method="dpo"))
