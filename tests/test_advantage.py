"""Advantages against loops in float64, and the rules for equal, single, missing and padded rewards."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.advantage import ADVANTAGES, AdvantageName, gdpo, group_stats, whiten
from jaxlm.objective.value import ValueConfig, gae, value_loss


@partial(jax.jit, static_argnums=2)
def every(rewards, groups, num_groups):
    """All estimators in one program; gdpo with one term."""
    results = {name: f(rewards, groups, num_groups) for name, f in ADVANTAGES.items()}
    return results | {"gdpo": gdpo(rewards[:, None], jnp.ones(1), groups, num_groups)}


NAMES = [*ADVANTAGES, "gdpo"]
GROUPED = [name for name in NAMES if name != "reinforce_plus_plus"]


def whitened(values):
    return (values - values.mean()) / values.std(ddof=1)


def reference(name, rewards, groups):
    """Formulas for groups of two and more finite, unequal rewards; any order."""
    rewards, groups = np.asarray(rewards, np.float64), np.asarray(groups)
    if name == "reinforce_plus_plus":
        return whitened(rewards)
    out = np.zeros(len(rewards))
    for i, reward in enumerate(rewards):
        own = rewards[groups == groups[i]]
        if name == "rloo":
            others = rewards[(groups == groups[i]) & (np.arange(len(rewards)) != i)]
            out[i] = reward - others.mean()
        else:
            out[i] = reward - own.mean()
        if name in ("grpo", "gdpo"):
            out[i] /= own.std(ddof=1) + 1e-6
    return whitened(out) if name in ("reinforce_plus_plus_baseline", "gdpo") else out


def test_the_names():
    assert tuple(ADVANTAGES) == get_args(AdvantageName)


@pytest.mark.parametrize("name", NAMES)
def test_ragged_groups_in_any_order(name):
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat([0, 1, 2, 4], [2, 5, 3, 7]))  # group 3 is empty
    rewards = rng.normal(size=len(groups)).astype(np.float32)
    got = every(jnp.asarray(rewards), jnp.asarray(groups), 5)[name]
    np.testing.assert_allclose(got.value, reference(name, rewards, groups), rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(got.stats.size.reshape(-1), [2, 5, 3, 0, 7])
    np.testing.assert_array_equal(got.stats.equal.reshape(-1), [0, 0, 0, 1, 0])
    own = rewards[groups == 4].astype(np.float64)
    np.testing.assert_allclose(got.stats.mean[4], own.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.stats.std[4], own.std(ddof=1), rtol=1e-5)


def test_values_by_hand():
    """Rewards of MENTOR: mean .775, deviation .471699, the others' mean of the first is 2/3."""
    rewards, groups = jnp.array([1.1, 1.1, 0.8, 0.1]), jnp.zeros(4, jnp.int32)
    got = every(rewards, groups, 1)
    value = lambda name: got[name].value
    np.testing.assert_allclose(value("grpo"), [0.688999, 0.688999, 0.053000, -1.430997], atol=3e-6)
    np.testing.assert_allclose(value("dr_grpo"), [0.325, 0.325, 0.025, -0.675], atol=1e-6)
    np.testing.assert_allclose(value("rloo"), [0.433333, 0.433333, 0.033333, -0.9], atol=1e-6)


EQUAL = {
    "noise": np.array([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]),
    "one unit in the last place": np.nextafter(np.float32([0.3, 0.3, 0.3, 0.3]), np.float32([1, 0, 0.3, 1])),
    "noise of large numbers": np.nextafter(np.float32([1e4, 1e4, 1e4, 1e4]), np.float32([0, 1e5, 1e4, 0])),
    "noise around nothing": np.array([5e-17, -2e-8, 0.0, 1e-9]),
    "zero": np.zeros(4),
}


@pytest.mark.parametrize("noisy", EQUAL.values(), ids=EQUAL)
@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_equal_rewards_has_no_advantage(name, noisy):
    """Also when a group of one moves the mean of a batch that is whitened afterwards."""
    rewards = jnp.concatenate((jnp.asarray(noisy, jnp.float32), jnp.array([0.0, 1, 1, 0, 0.7])))
    got = every(rewards, jnp.array([0, 0, 0, 0, 1, 1, 1, 1, 2]), 3)[name]
    np.testing.assert_array_equal(got.value[:4], np.zeros(4))
    np.testing.assert_array_equal(got.stats.equal.reshape(-1), [True, False, False])
    assert (got.value[4:] != 0).all()


def test_without_a_baseline_only_an_equal_batch_has_no_advantage():
    rewards, groups = jnp.array([0.3, 0.3, 1.0, 0.0]), jnp.array([0, 0, 1, 1])
    assert (every(rewards, groups, 2)["reinforce_plus_plus"].value != 0).all()
    noise = jnp.nextafter(jnp.full(4, 0.3), jnp.array([1.0, 0, 1, 0]))
    assert not every(noise, groups, 2)["reinforce_plus_plus"].value.any()


@pytest.mark.parametrize("rewards", [[0.0, 1e-3, 0.0, 0.0], [1e4, 1e4 + 1, 1e4, 1e4], [0.3, 0.3001, 0.3, 0.3]])
def test_a_small_difference_is_not_noise(rewards):
    got = every(jnp.array(rewards), jnp.zeros(4, jnp.int32), 1)["grpo"]
    np.testing.assert_allclose(got.value, [-0.5, 1.5, -0.5, -0.5], rtol=3e-2)


def test_the_tolerance_is_an_argument():
    rewards, groups = jnp.array([0.5, 0.51]), jnp.zeros(2, jnp.int32)
    assert not group_stats(rewards, groups, 1).equal[0]
    assert group_stats(rewards, groups, 1, tolerance=0.1).equal[0]


@pytest.mark.parametrize("name", GROUPED[:3])
def test_a_group_of_one_is_compared_with_nothing(name):
    got = every(jnp.array([0.7, 1.0, 0.0]), jnp.array([1, 0, 0]), 2)[name]
    np.testing.assert_allclose(got.value[0], 0.7, rtol=2e-6)
    assert not got.stats.equal[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_reward_that_is_not_finite_is_left_out(name, bad):
    rewards, groups = np.array([1.0, bad, 0.0, 0.5, 0.25, 2.0]), np.array([0, 0, 0, 0, 1, 1])
    kept = np.isfinite(rewards)
    got = every(jnp.asarray(rewards, jnp.float32), jnp.asarray(groups), 2)[name]
    np.testing.assert_array_equal(got.excluded, ~kept)
    assert got.value[1] == 0
    np.testing.assert_allclose(got.value[kept], reference(name, rewards[kept], groups[kept]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.stats.count.reshape(-1), [3, 2])


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_that_lost_its_others_has_no_advantage(name):
    got = every(jnp.array([0.7, jnp.nan, 1.0, 0.0]), jnp.array([0, 0, 1, 1]), 2)[name]
    np.testing.assert_array_equal(got.value[:2], [0, 0])
    np.testing.assert_array_equal(got.stats.equal.reshape(-1), [True, False])


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_change_nothing_and_wrong_groups_are_loud(name):
    rewards, groups = jnp.array([1.0, 0.0, 0.5, 0.1]), jnp.array([0, 0, 1, 1])
    plain = every(rewards, groups, 2)[name]
    padded = every(jnp.append(rewards, 9.0), jnp.append(groups, -1), 2)[name]
    np.testing.assert_array_equal(padded.value, np.append(plain.value, 0))
    assert not padded.excluded.any()
    assert jnp.isnan(every(rewards, groups.at[3].set(2), 2)[name].value[3])


def test_gdpo_normalises_each_term_before_the_sum():
    rng = np.random.default_rng(1)
    groups = np.repeat([0, 1], 4)
    rewards = rng.normal(size=(8, 3)) * [1, 100, 0.01]
    weights = np.array([1.0, 0.5, 2.0])
    total = sum(w * reference("grpo", rewards[:, r], groups) for r, w in enumerate(weights))
    got = gdpo(jnp.asarray(rewards, jnp.float32), jnp.asarray(weights), jnp.asarray(groups), 2)
    np.testing.assert_allclose(got.value, whitened(total), rtol=5e-4, atol=5e-5)
    assert got.stats.mean.shape == (2, 3)


def test_gdpo_leaves_out_a_missing_term_only():
    groups = jnp.zeros(3, jnp.int32)
    rewards = jnp.array([[1.0, jnp.nan], [0.0, 1.0], [0.5, 0.0]])
    got = gdpo(rewards, jnp.ones(2), groups, 1)
    half = 1 / np.sqrt(2)  # the second term compares two rewards, the first three: 1, -1, 0
    np.testing.assert_allclose(got.value, whitened(np.array([1, half - 1, -half])), rtol=1e-5, atol=1e-6)
    assert not got.excluded.any()
    gone = gdpo(rewards.at[0].set(jnp.nan), jnp.ones(2), groups, 1)
    np.testing.assert_array_equal(gone.excluded, [True, False, False])
    assert gone.value[0] == 0


def test_whitening_of_tokens():
    rng = np.random.default_rng(2)
    values, mask = rng.normal(size=(2, 5)), rng.integers(0, 2, size=(2, 5)).astype(bool)
    values[~mask] = np.nan
    got = whiten(jnp.asarray(values, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got[mask], whitened(values[mask]), rtol=1e-5)
    assert not got[~mask].any()
    assert not whiten(jnp.full((2, 2), 0.3), jnp.ones((2, 2))).any()
    assert not whiten(jnp.ones((2, 2)), jnp.zeros((2, 2))).any()


def gae_reference(rewards, values, mask, segments, gamma, lam):
    """By sequence, over its counted tokens alone."""
    out = np.zeros_like(values)
    for row in range(len(values)):
        for label in set(segments[row]) - {0}:
            steps = [t for t in range(values.shape[1]) if segments[row, t] == label and mask[row, t]]
            for i, t in enumerate(steps):
                for k, s in enumerate(steps[i:]):
                    following = values[row, steps[i + k + 1]] if i + k + 1 < len(steps) else 0
                    out[row, t] += (gamma * lam) ** k * (rewards[row, s] + gamma * following - values[row, s])
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_skips_tool_tokens_and_stays_in_its_sequence(gamma, lam):
    rng = np.random.default_rng(3)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    mask = np.array([[1, 0, 0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 1, 0]])
    rewards, values = rng.normal(size=(2, 2, 9))
    want = gae_reference(rewards, values, mask, segments, gamma, lam)
    rewards[mask == 0], values[mask == 0] = np.nan, np.inf
    got = jax.jit(gae, static_argnums=4)(
        jnp.asarray(rewards, jnp.float32), jnp.asarray(values, jnp.float32), jnp.asarray(mask),
        jnp.asarray(segments), ValueConfig(gamma=gamma, gae_lambda=lam))
    np.testing.assert_allclose(got.advantage, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.returns, np.where(mask, want + values, 0), rtol=1e-5, atol=1e-6)


def test_gae_of_the_docstring():
    array = lambda *x: jnp.array([x])
    got = gae(array(0, jnp.nan, 1, 3), array(0.2, jnp.nan, 0.5, 1), array(1, 0, 1, 1), array(1, 1, 1, 2),
              ValueConfig(gae_lambda=1.0))
    np.testing.assert_allclose(got.advantage, [[0.8, 0, 0.5, 2]], rtol=1e-6)


def test_value_loss_takes_the_worse_of_the_plain_and_the_limited_value():
    values = jnp.array([1.0, 1.0, 0.1, jnp.nan])
    old, returns, mask = jnp.zeros(4), jnp.array([2.0, 0.0, 1.0, jnp.nan]), jnp.array([1, 1, 1, 0])
    total = lambda v: jnp.sum(value_loss(v, old, returns, mask, 0.2).loss)
    got = value_loss(values, old, returns, mask, 0.2)
    np.testing.assert_allclose(got.loss, [1.62, 0.5, 0.405, 0], rtol=1e-6)
    np.testing.assert_array_equal(got.clipped, [1, 0, 0, 0])
    np.testing.assert_allclose(jax.grad(total)(values), [0, 1, -0.9, 0], rtol=1e-6)
    np.testing.assert_allclose(value_loss(values, old, returns, mask, None).loss, [0.5, 0.5, 0.405, 0], rtol=1e-6)


@pytest.mark.parametrize("values", [{"gamma": 1.1}, {"gae_lambda": -0.1}, {"clip": 0.0}, {"coefficient": 0.0}])
def test_value_settings_that_cannot_be(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ValueConfig(**values)
