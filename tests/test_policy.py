"""Policy objectives against the loops of `policy_reference`, and what must not change them: the split of a batch, the
layout of its rows, devices, and everything under the mask."""

from dataclasses import replace
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.config import from_json, parse, to_json
from jaxlm.core.mesh import MeshConfig, make_mesh, put_whole
from jaxlm.objective.advantage import ADVANTAGES
from jaxlm.objective.algorithm import (
    ALGORITHMS,
    NO_CLIP,
    PolicyConfig,
    PolicyTokens,
    policy_objective,
    token_advantage,
)
from jaxlm.objective.correction import CORRECTIONS
from jaxlm.objective.kl import KLConfig
from jaxlm.objective.policy import POLICY_LOSSES, ClipConfig, PolicyLossName, policy_metrics, ratio_range
from jaxlm.objective.reduce import Aggregation, last_counted, sequence_mean, sequence_sum, token_weights
from jaxlm.objective.value import ValueConfig
from tests import policy_reference as reference
from tests.policy_reference import MASK, SEGMENTS, SHAPE, device, draw

CLIP = ClipConfig(low=0.2, high=0.28, dual=3.0)
# Every algorithm, and the parts that no preset has.
CONFIGS = ALGORITHMS | {
    "gspo_token": PolicyConfig(loss="gspo_token", aggregation="sequence_mean_token_mean", clip=CLIP),
    "one-sided": PolicyConfig(clip=ClipConfig(low=None, high=0.2)),
    "cispo around one": PolicyConfig(loss="cispo", clip=ClipConfig(low=0.4, high=0.5)),
    "kl k3 score": PolicyConfig(kl=KLConfig(coefficient=0.3, gradient="score")),
    "kl k1 straight": PolicyConfig(kl=KLConfig(coefficient=0.3, estimator="k1", gradient="straight_through")),
    "kdrl": PolicyConfig(teacher=KLConfig(coefficient=0.7, estimator="k2")),
    "all": replace(_all := ALGORITHMS["mentor"], teacher=KLConfig(coefficient=0.5, gradient="score"), entropy=0.2,
                   kl=replace(_all.kl, coefficient=0.4), aggregation="sequence_mean_token_sum", constant_length=16),
}
# One of each loss and aggregation, with every term.
KINDS = {name: replace(CONFIGS[name], **(
    {} if name == "all" else {"kl": KLConfig(coefficient=0.1), "entropy": 0.1})) for name in (
    "grpo", "gspo", "gspo_token", "cispo", "rloo", "all")}


def value(logp, entropy, tokens, config):
    total, metrics = policy_objective(logp, entropy, tokens, config)
    return total / metrics["loss"].weight, metrics


@jax.jit
def all_gradients(logp, entropy, tokens):
    """((value, metrics), gradients) of every configuration, in one program."""
    f = jax.value_and_grad(value, (0, 1), has_aux=True)
    return {name: f(logp, entropy, tokens, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def results():
    return all_gradients(*device(draw()))


def test_names():
    assert tuple(POLICY_LOSSES) == get_args(PolicyLossName)
    assert set(get_args(get_type_hints(PolicyConfig)["advantage"])) == {*ADVANTAGES, "gdpo", "gae"}
    for configs in (CONFIGS, KINDS):
        assert {config.loss for config in configs.values()} == set(POLICY_LOSSES)
        assert {config.aggregation for config in configs.values()} == set(get_args(Aggregation))


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradient_equal_the_loops(name, results):
    config = CONFIGS[name]
    logp, entropy, tokens = draw()
    want = reference.objective(config, logp, logp, entropy, tokens)
    slopes = reference.gradient(lambda x: reference.objective(config, x, logp, entropy, tokens), logp, MASK)
    entropy_slopes = reference.gradient(lambda x: reference.objective(config, logp, logp, x, tokens), entropy, MASK)
    (got, metrics), grads = results[name]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"].value(), want, rtol=1e-5, atol=1e-6)
    largest = np.abs(slopes).max()
    np.testing.assert_allclose(grads[0], slopes, rtol=1e-4, atol=1e-5 * largest)
    np.testing.assert_allclose(grads[1], entropy_slopes, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_per_token_losses_equal_the_loops(name):
    logp, _, tokens = draw(1)
    clip = {"cispo": ClipConfig(low=0.3, high=2.0, convention="absolute"), "reinforce": NO_CLIP}.get(name, CLIP)
    want = np.zeros(SHAPE)
    for at, loss in reference.policy_losses(name, logp, logp, *tokens[:4], clip).items():
        want[at] = loss
    got = POLICY_LOSSES[name](*device((logp, *tokens[:4])), clip)
    np.testing.assert_allclose(got.loss, want, rtol=1e-5, atol=1e-6)
    for aux in got[1:]:
        assert not aux[MASK == 0].any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_the_first_step_the_ratio_is_exactly_one(name):
    logp, _, tokens = device(draw())
    out = POLICY_LOSSES[name](logp, logp, tokens.advantage, MASK, SEGMENTS, NO_CLIP if name == "reinforce" else CLIP)
    metrics = {name: mean.value() for name, mean in policy_metrics(out, MASK).items()}
    assert metrics.pop("ratio") == 1
    assert set(map(float, metrics.values())) == {0.0}
    assert ratio_range(out, MASK) == (1, 1)


def test_without_old_log_probabilities_this_is_the_first_step():
    logp, entropy, tokens = device(draw())
    config = CONFIGS["all"]
    want = jax.grad(policy_objective, has_aux=True)(logp, entropy, tokens._replace(old_logp=logp), config)
    got = jax.grad(policy_objective, has_aux=True)(logp, entropy, tokens._replace(old_logp=None), config)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_at_the_first_step_all_ratio_losses_have_the_gradient_of_reinforce():
    logp, _, tokens = device(draw())
    weights = token_weights(MASK, SEGMENTS, "sequence_mean_token_mean").weight

    def grad(name):
        clip = NO_CLIP if name == "reinforce" else CLIP
        total = lambda x: jnp.sum(weights * POLICY_LOSSES[name](
            x, logp, tokens.advantage, MASK, SEGMENTS, clip).loss)
        return jax.grad(total)(logp)

    for name in POLICY_LOSSES:
        np.testing.assert_allclose(grad(name), grad("reinforce"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_masked_is_not_seen(bad, results):
    """Tool text may have any log-probability, advantage or entropy: value, metrics and gradient stay what they are."""
    spoil = lambda x: np.where(MASK == 0, bad, x) if x.dtype == np.float64 else x
    got = all_gradients(*device(jax.tree.map(spoil, draw())))
    jax.tree.map(np.testing.assert_array_equal, got, results)


def shared(seed=0):
    """A policy of three parameters shared by all tokens: theta, and features, entropy, tokens."""
    _, entropy, tokens = draw(seed)
    features = np.random.default_rng(5).normal(size=(*SHAPE, 3))
    return device((np.array([0.3, -0.2, 0.4]), features, entropy, tokens))


@jax.jit
def shared_gradients(theta, features, entropy, tokens):
    """(gradient, metrics) of the summed loss of each kind."""
    def loss(theta, config):
        return policy_objective(tokens.old_logp + features @ theta, entropy, tokens, config)

    return {name: jax.grad(loss, has_aux=True)(theta, config) for name, config in KINDS.items()}


def divided(results):
    return {name: (grads / metrics["loss"].weight, {name: mean.value() for name, mean in metrics.items()})
            for name, (grads, metrics) in results.items()}


def assert_same(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), divided(got), divided(want))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_change_nothing(parts):
    theta, *rest = shared()
    step = len(MASK) // parts
    micro = [shared_gradients(theta, *jax.tree.map(lambda x, i=i: x[i * step:(i + 1) * step], rest))
             for i in range(parts)]
    assert_same(jax.tree.map(lambda *x: sum(x), *micro), shared_gradients(theta, *rest))


def test_eight_devices_change_nothing():
    theta, *rest = shared()
    want = jax.tree.map(np.asarray, shared_gradients(theta, *rest))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    with jax.set_mesh(mesh):
        got = shared_gradients(theta, *put_whole(jax.tree.map(np.asarray, rest), mesh))
        got = jax.tree.map(np.asarray, got)
    assert_same(got, want)


def unpacked(tree, side, width=10):
    """One sequence a row, padded on one side; pads are NaN where they can be."""
    place = [(row, np.nonzero(SEGMENTS[row] == label)[0]) for row, label, _ in reference.sequences(
        SEGMENTS > 0, SEGMENTS)]

    def leaf(x):
        out = np.full((len(place), width, *x.shape[2:]), np.nan if x.dtype == np.float32 else 0, x.dtype)
        for i, (row, at) in enumerate(place):
            out[i, slice(None, len(at)) if side == "right" else slice(width - len(at), None)] = x[row, at]
        return out

    tree = jax.tree.map(lambda x: leaf(np.asarray(x)), tree)
    features, entropy, tokens = tree
    return np.nan_to_num(features), entropy, tokens._replace(segments=np.minimum(tokens.segments, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_and_padded_rows_agree(side):
    theta, *rest = shared()
    got = shared_gradients(theta, *jax.tree.map(jnp.asarray, unpacked(rest, side)))
    assert_same(got, shared_gradients(theta, *rest))


def test_sums_and_weights_of_the_docstrings():
    segments, mask = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[1, 0, 1, 0, 1, 0]])
    values = jnp.array([[5.0, jnp.nan, 2, jnp.inf, 4, jnp.nan]])
    np.testing.assert_array_equal(sequence_sum(values, mask, segments), [[7, 7, 7, 4, 4, 0]])
    np.testing.assert_array_equal(sequence_mean(values, mask, segments), [[3.5, 3.5, 3.5, 4, 4, 0]])
    last = last_counted(jnp.array([[1, 1, 0, 0, 1, 0]]), segments)
    np.testing.assert_array_equal(last, [[0, 1, 0, 0, 1, 0]])
    for aggregation, length, want, divisor in (
        ("token_mean", None, [1, 0, 1, 0, 1, 0], 3),
        ("sequence_mean_token_mean", None, [0.5, 0, 0.5, 0, 1, 0], 2),
        ("sequence_mean_token_sum", 4, [0.25, 0, 0.25, 0, 0.25, 0], 2),
        ("sequence_mean_token_sum", None, [1, 0, 1, 0, 1, 0], 2),
    ):
        got = token_weights(mask, segments, aggregation, length)
        np.testing.assert_array_equal(got.weight, [want])
        assert got.divisor == divisor
    assert jnp.isnan(sequence_sum(values, mask, jnp.full((1, 6), 7))).all(), "a segment beyond T"


def test_weight_of_a_token_in_a_short_and_in_a_long_answer():
    """10 and 100 tokens: GRPO .05 and .005, token mean .0091 both, Dr.GRPO with 512 .00098 both."""
    segments = jnp.array([[1] * 10 + [2] * 100])
    for aggregation, length, short, long in (
        ("sequence_mean_token_mean", None, 1 / 20, 1 / 200), ("token_mean", None, 1 / 110, 1 / 110),
        ("sequence_mean_token_sum", 512, 1 / 1024, 1 / 1024),
    ):
        got = token_weights(jnp.ones_like(segments), segments, aggregation, length)
        np.testing.assert_allclose((got.weight / got.divisor)[0, [0, 10]], [short, long], rtol=1e-6)


def test_a_batch_without_a_counted_token_is_zero():
    logp, entropy, tokens = device(draw())
    tokens = tokens._replace(mask=jnp.zeros_like(tokens.mask))
    for config in (CONFIGS["all"], CONFIGS["gspo"]):
        grads, metrics = jax.grad(policy_objective, has_aux=True)(logp, entropy, tokens, config)
        assert not grads.any()
        assert {float(mean.value()) for mean in metrics.values()} == {0.0}


def single(log_ratio, advantage, config, **more):
    """Loss and slope of one token."""
    one = jnp.ones((1, 1))
    tokens = PolicyTokens(-one, advantage * one, one, jnp.ones((1, 1), jnp.int32), **more)
    total, slope = jax.value_and_grad(lambda x: policy_objective(x, one, tokens, config)[0])(log_ratio - one)
    return float(total), float(slope[0, 0])


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),    # clipped high
    (0.5, 2.0, -1.0, -1.0),   # a likely good token that became unlikely still counts
    (0.5, -2.0, 1.6, 0.0),    # clipped low
    (1.5, -2.0, 3.0, 3.0),
    (5.0, -2.0, 6.0, 0.0),    # dual clip: 3 * 2, not 5 * 2
])
def test_the_policy_term_of_mentor_by_hand(ratio, advantage, loss, slope):
    config = replace(ALGORITHMS["mentor"], kl=KLConfig(), entropy=0.0)
    assert single(np.log(ratio), advantage, config) == pytest.approx((loss, slope), rel=1e-5)


def test_entropy_and_kl_of_mentor_by_hand():
    """One token with advantage 0, entropy 1 and ref / pi = e^2, then e^5, whose estimate is clamped."""
    config = ALGORITHMS["mentor"]
    ref = lambda d: {"ref_logp": jnp.full((1, 1), d - 1.0)}
    k3 = np.exp(2) - 2 - 1
    assert single(0.0, 0.0, config, **ref(2.0))[0] == pytest.approx(1e-3 * k3 - 1e-3, rel=1e-5)
    assert single(0.0, 0.0, config, **ref(5.0)) == (pytest.approx(1e-3 * 10 - 1e-3, rel=1e-5), 0)


def test_the_importance_weight_is_for_the_policy_term_only():
    config = PolicyConfig(kl=KLConfig(coefficient=0.1, estimator="k2"))
    ref = jnp.full((1, 1), -3.0)
    full, none = (single(0.0, 1.0, config, ref_logp=ref, weight=jnp.full((1, 1), w))[0] for w in (1.0, 0.0))
    assert (full, none) == pytest.approx((-1 + 0.1 * 2, 0.1 * 2))


def test_both_estimates_of_each_kl_are_reported():
    """Of two tokens e^-2 and e^30 as likely as by the teacher, the second beyond the clamp of k3's exponential."""
    logp, mask = jnp.array([[-3.0, -1.0, jnp.nan]]), jnp.array([[1, 1, 0]])
    tokens = PolicyTokens(None, logp, mask, mask, teacher_logp=logp + jnp.array([[2.0, -30.0, 0.0]]))
    metrics = policy_objective(logp, None, tokens, PolicyConfig())[1]
    assert "kl_k1" not in metrics
    assert float(metrics["teacher_k1"].value()) == pytest.approx((-2 + 30) / 2)
    assert float(metrics["teacher_k3"].value()) == pytest.approx((np.e**2 - 3 + 19) / 2, rel=1e-5)


def test_clip_fractions():
    config = PolicyConfig(clip=CLIP)
    one = jnp.ones((1, 6))
    ratio = jnp.array([[0.5, 0.5, 1.5, 1.5, 4.0, 1.0]])
    advantage = jnp.array([[1.0, -1, 1, -1, -1, 1]])
    tokens = PolicyTokens(-one, advantage, one, jnp.ones((1, 6), jnp.int32))
    metrics = policy_objective(jnp.log(ratio) - 1, None, tokens, config)[1]
    want = {"low": 1, "high": 1, "dual": 1}
    assert {name: round(6 * float(metrics[f"clip_fraction_{name}"].value())) for name in want} == want
    assert float(metrics["clip_fraction"].value()) == pytest.approx(2 / 6)
    assert float(metrics["ratio"].value()) == pytest.approx(9 / 6)
    assert float(metrics["approx_kl"].value()) == pytest.approx(float(jnp.mean(ratio - 1 - jnp.log(ratio))), rel=1e-5)
    out = POLICY_LOSSES["ppo"](jnp.log(ratio) - 1, -one, advantage, one.at[0, 4].set(0), tokens.segments, CLIP)
    np.testing.assert_allclose(ratio_range(out, one.at[0, 4].set(0)), (0.5, 1.5), rtol=1e-6)


def test_extreme_ratios_stay_finite():
    for config in CONFIGS.values():
        if config.kl.place == "loss" and config.kl.coefficient:
            continue
        for gap in (-500.0, 500.0):
            total, slope = single(gap, -1.0, replace(config, teacher=KLConfig(), entropy=0.0))
            assert np.isfinite([total, slope]).all()


def test_the_advantage_of_on_policy_distillation_is_the_log_ratio_to_the_teacher():
    logp, _, tokens = draw()
    kl = KLConfig(coefficient=0.5, estimator="k1", place="advantage")
    args = device((tokens.advantage, np.where(MASK, logp, np.nan), np.where(MASK, tokens.teacher_logp, -np.inf)))
    got = token_advantage(*args, MASK, kl)
    np.testing.assert_allclose(
        got, tokens.advantage + 0.5 * np.where(MASK, tokens.teacher_logp - logp, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("values", "match"), [
    ({"loss": "gspo"}, "set aggregation to sequence_mean_token_mean"),
    ({"loss": "gspo_token", "aggregation": "sequence_mean_token_sum"}, "one ratio a sequence"),
    ({"constant_length": 512}, "constant_length has no effect with aggregation token_mean"),
    ({"aggregation": "sequence_mean_token_sum", "constant_length": 0}, "at least 1"),
    ({"loss": "reinforce"}, "no ratio to clip"),
    ({"loss": "cispo", "clip": ClipConfig(dual=3.0)}, "clip.dual has no effect on loss cispo"),
    ({"clip": ClipConfig(low=0.8, high=1.2, convention="absolute")}, "distances from 1"),
    ({"value": ValueConfig(gamma=0.9)}, "no effect with advantage grpo"),
    ({"entropy": -0.1}, "at least 0"),
    ({"teacher": KLConfig(coefficient=1.0, estimator="k1", place="reward")}, "use advantage"),
])
def test_settings_that_do_not_fit_together(values, match):
    with pytest.raises(ValueError, match=match):
        PolicyConfig(**values)


@pytest.mark.parametrize(("values", "match"), [
    ({"dual": 0.5}, "must be above 1"),
    ({"low": 1.2}, r"\[-0.2, 1.2\]"),
    ({"low": -0.2}, "must contain 1"),
    ({"high": 0.2, "low": None, "convention": "absolute"}, r"\[0, 0.2\]"),
])
def test_limits_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        ClipConfig(**values)


@pytest.mark.parametrize(("config", "gone"), [
    (PolicyConfig(kl=KLConfig(coefficient=0.1)), "ref_logp"),
    (PolicyConfig(teacher=KLConfig(coefficient=0.1)), "teacher_logp"),
    (PolicyConfig(correction=CORRECTIONS["tis"]), "weight"),
    (PolicyConfig(entropy=0.1), "entropy"),
])
def test_a_missing_array_is_named(config, gone):
    logp, entropy, tokens = device(draw())
    entropy, tokens = (None, tokens) if gone == "entropy" else (entropy, tokens._replace(**{gone: None}))
    with pytest.raises(ValueError, match=f"needs `{gone}`"):
        policy_objective(logp, entropy, tokens, config)


def test_shapes_are_checked():
    logp, entropy, tokens = device(draw())
    with pytest.raises(AssertionError):
        policy_objective(logp[:, 1:], entropy, tokens, ALGORITHMS["dapo"])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_survive_json(name):
    assert from_json(PolicyConfig, to_json(ALGORITHMS[name])) == ALGORITHMS[name]


def test_algorithms_take_flags():
    got = parse(ALGORITHMS, ["--preset", "dapo", "--clip.high", "0.3", "--kl.coefficient", "0.01"], prog="x",
                description="x")
    assert got == replace(ALGORITHMS["dapo"], clip=ClipConfig(low=0.2, high=0.3), kl=KLConfig(coefficient=0.01))
