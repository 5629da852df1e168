"""KL estimators by enumeration: expected value and expected gradient of every combination on a vocabulary of five."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.kl import ESTIMATORS, Estimator, Gradient, KLConfig, kl_penalty, token_rewards
from jaxlm.objective.reduce import sequence_sum

THETA = jnp.array([0.3, -1.1, 0.8, 0.1, -0.4])
REF = jax.nn.log_softmax(jnp.array([-0.5, 0.9, 0.2, -1.3, 0.6]))
ONES = jnp.ones(5)


def kl(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(logp) * (logp - REF))


def forward_kl(theta):
    return jnp.sum(jnp.exp(REF) * (REF - jax.nn.log_softmax(theta)))


def second(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(logp) * (logp - REF) ** 2 / 2)


def unchecked(**values):
    """A config that may combine what a user may not."""
    config = KLConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config


def expected_gradient(config):
    """sum_v pi_v grad loss_v: in the loss the penalty itself, elsewhere it is the cost of REINFORCE."""
    def loss(theta):
        logp = jax.nn.log_softmax(theta)
        penalty = kl_penalty(logp, REF, ONES, config)
        per_token = penalty if config.place == "loss" else penalty * logp
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * per_token)

    return jax.grad(loss)(THETA)


REVERSE, FORWARD, SECOND, ZERO = jax.grad(kl)(THETA), jax.grad(forward_kl)(THETA), jax.grad(second)(THETA), jnp.zeros(5)
IN_LOSS = {
    ("k1", "naive"): ZERO, ("k1", "straight_through"): REVERSE, ("k1", "score"): REVERSE,
    ("k2", "naive"): REVERSE, ("k2", "straight_through"): REVERSE, ("k2", "score"): SECOND,
    ("k3", "naive"): FORWARD, ("k3", "straight_through"): REVERSE, ("k3", "score"): REVERSE,
}
ELSEWHERE = {"k1": REVERSE, "k2": SECOND - REVERSE, "k3": REVERSE - FORWARD}


def test_the_tables_are_complete():
    assert set(IN_LOSS) == {(e, g) for e in get_args(Estimator) for g in get_args(Gradient)}
    assert set(ELSEWHERE) == set(ESTIMATORS) == set(get_args(Estimator))
    pairs = [REVERSE, FORWARD, SECOND, ZERO, SECOND - REVERSE, REVERSE - FORWARD]
    gaps = [jnp.abs(a - b).max() for i, a in enumerate(pairs) for b in pairs[:i]]
    assert min(gaps) > 0.02, "the expectations can be told apart"


@pytest.mark.parametrize(("estimator", "gradient"), IN_LOSS)
def test_expected_gradient_in_the_loss(estimator, gradient):
    got = expected_gradient(unchecked(estimator=estimator, gradient=gradient))
    np.testing.assert_allclose(got, IN_LOSS[estimator, gradient], atol=2e-7)


@pytest.mark.parametrize("estimator", ELSEWHERE)
@pytest.mark.parametrize("place", ["reward", "advantage"])
def test_expected_gradient_in_reward_and_advantage(estimator, place):
    config = KLConfig(estimator=estimator, place=place)
    np.testing.assert_allclose(expected_gradient(config), ELSEWHERE[estimator], atol=2e-7)
    assert not jax.grad(lambda logp: jnp.sum(kl_penalty(logp, REF, ONES, config)))(REF + 1).any(), "a number"


@pytest.mark.parametrize("gradient", get_args(Gradient))
def test_expected_values_do_not_depend_on_the_gradient(gradient):
    logp = jax.nn.log_softmax(THETA)
    value = lambda name: jnp.sum(
        jnp.exp(logp) * kl_penalty(logp, REF, ONES, unchecked(estimator=name, gradient=gradient)))
    for name, want in {"k1": kl, "k2": second, "k3": kl}.items():
        np.testing.assert_allclose(value(name), want(THETA), rtol=1e-6)


def test_no_gradient_reaches_the_reference():
    config = KLConfig(gradient="score")
    assert not jax.grad(lambda ref: jnp.sum(kl_penalty(THETA, ref, ONES, config)))(REF).any()


def test_clamps():
    logp, ref = jnp.array([-1.0, -30.0, -3.0]), jnp.array([-1.0, -1.0, -1.0])
    mask = jnp.ones(3)
    k3 = lambda **values: kl_penalty(logp, ref, mask, KLConfig(**values))
    np.testing.assert_allclose(k3(), [0, np.expm1(20) - 20, np.expm1(2) - 2], rtol=1e-6)
    np.testing.assert_allclose(k3(clip_argument=1.0), [0, np.e - 2, np.e - 2], rtol=1e-6)
    np.testing.assert_allclose(k3(clip_value=3.0), [0, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(kl_penalty(logp, ref, mask, KLConfig(estimator="k2")), [0, 29**2 / 2, 2], rtol=1e-6)
    slope = lambda config: jax.grad(lambda x: jnp.sum(kl_penalty(x, ref, mask, config)))(logp)
    np.testing.assert_allclose(slope(KLConfig(clip_value=3.0)), [0, 0, 0], atol=1e-7)
    straight = KLConfig(clip_value=3.0, gradient="straight_through")
    np.testing.assert_allclose(slope(straight), [0, -29, -2], rtol=1e-6, err_msg="of k2, which nothing clamps")


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("config", [KLConfig(), KLConfig(gradient="score", clip_value=1.0),
                                    KLConfig(estimator="k1", gradient="straight_through")])
def test_what_is_masked_is_not_seen(bad, config):
    mask = jnp.array([1.0, 0.0, 1.0])
    logp, ref = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-1.5, -1.0, -2.0])
    f = jax.value_and_grad(lambda logp, ref: jnp.sum(kl_penalty(logp, ref, mask, config)))
    want, got = f(logp, ref), f(logp.at[1].set(bad), ref.at[1].set(bad))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got[1][1] == 0


def test_token_rewards_of_the_docstring():
    segments, mask = jnp.array([[1, 1, 1, 2, 0]]), jnp.array([[1, 0, 1, 1, 0]])
    rewards, penalty = jnp.array([[5.0, 5, 5, 7, 9]]), jnp.array([[0.1, jnp.nan, 0.2, 0.3, jnp.nan]])
    got = token_rewards(rewards, penalty, mask, segments)
    np.testing.assert_allclose(got, [[-0.1, 0, 4.8, 6.7, 0]], rtol=1e-6)
    np.testing.assert_allclose(sequence_sum(got, mask, segments), [[4.7, 4.7, 4.7, 6.7, 0]], rtol=1e-6)


@pytest.mark.parametrize(("values", "match"), [
    ({"estimator": "k1"}, "expected gradient of 0"),
    ({"place": "reward", "gradient": "score"}, "no effect on a penalty in the reward"),
    ({"coefficient": -0.1}, "coefficient must be at least 0"),
    ({"coefficient": float("nan")}, "coefficient must be at least 0"),
    ({"clip_argument": 100.0}, "at most 80"),
    ({"clip_value": 0.0}, "above 0 or None"),
])
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        KLConfig(**values)
