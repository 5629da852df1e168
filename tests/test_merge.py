"""Every merging method: the same conformance checks, parity with plain numpy, and what is special to some."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.merge.methods import METHODS, MethodName
from jaxlm.merge.spec import NUMBERS, SWITCHES, MergeConfig
from jaxlm.merge.tensors import merge_tensor, merge_trees
from jaxlm.merge.vectors import loss_weights
from tests.merge_reference import REFERENCES

WEIGHTED = [name for name, method in METHODS.items() if method.weighted]


def num_models(name: str) -> int:
    return METHODS[name].models[1] or 3


def case(name: str, shape=(6, 9), seed=0, near=0.3):
    """Base (or None), models around it, weights (or () where there are none)."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    models = [base + near * rng.standard_normal(shape).astype(np.float32) for _ in range(num_models(name))]
    weights = (0.2, 0.5, 0.3)[: len(models)] if METHODS[name].weighted else ()
    return (None if METHODS[name].base == "none" else base), models, weights


def merge(name, base, models, weights=(), **settings) -> np.ndarray:
    return np.asarray(merge_tensor("w", base, models, MergeConfig(method=name, weights=tuple(weights), **settings)))


def test_the_dict_the_literal_and_the_signatures_agree():
    assert set(METHODS) == set(MethodName.__args__) == set(REFERENCES)
    for name, method in METHODS.items():
        keywords = {p.name for p in inspect.signature(method.function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == set(method.settings) | ({"key"} if method.random else set()), name
        assert set(method.settings) <= {*NUMBERS, *SWITCHES}


SETTINGS = {
    "linear": [{}, {"normalize": False}],
    "task_arithmetic": [{"scale": 0.7}, {"normalize": True}],
    "ties": [{"density": 0.4}, {"density": 0.4, "scale": 1.3, "normalize": False}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}, {"density": 0.95, "gamma": 0.2}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1}],
    "model_stock": [{}, {"row_wise": True}],
    "sce": [{}, {"density": 0.3}],
    "ram": [{"threshold": 0.2}], "ram_plus": [{"threshold": 0.2}, {"threshold": 0.4, "bonus": 0.5, "bonus_limit": 2.0}],
    "slerp": [{"t": 0.3}], "nuslerp": [{}, {"row_wise": True}], "nearswap": [{"t": 0.1}],
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_plain_numpy(name):
    for settings in SETTINGS.get(name, [{}]):
        base, models, weights = case(name)
        bases = [base] if METHODS[name].base != "optional" else [base, None]
        for origin in bases:
            expected = REFERENCES[name](
                None if origin is None else origin.astype(np.float64), [x.astype(np.float64) for x in models],
                weights, **settings)
            got = merge(name, origin, models, weights, **settings)
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6, err_msg=f"{settings}")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_models_and_untrained_models_come_back_bit_for_bit(name, dtype):
    base, models, weights = case(name)
    cast = partial(jnp.asarray, dtype=dtype)
    if base is not None:  # no model has moved
        untrained = merge(name, cast(base), [cast(base)] * len(models), weights)
        assert untrained.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(untrained, cast(base))
    # What all models agree on; weights that are no binary fractions, and sum to 1 only up to rounding.
    weights = tuple([1 / len(models)] * len(models)) if weights else ()
    settings = {"density": 1.0} if "density" in METHODS[name].settings else {}
    if name == "ram_plus":
        settings = {"threshold": 0.0}
    if name == "ram":
        settings = {"threshold": 0.0}
    if name.startswith(("breadcrumbs", "dare", "della")):
        settings["density"] = 1.0
    same = merge(name, None if base is None else cast(base), [cast(models[0])] * len(models), weights, **settings)
    np.testing.assert_array_equal(same, cast(models[0]))


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("chosen", [0, 1])
def test_weight_one_on_one_model_is_that_model_bit_for_bit(name, chosen):
    base, models, _ = case(name, near=5.0)  # far from the base: base + (x - base) would round
    weights = [float(i == chosen) for i in range(len(models))]
    np.testing.assert_array_equal(merge(name, base, models, weights), models[chosen])


def test_slerp_and_nearswap_reach_both_ends_bit_for_bit():
    _, (a, b), _ = case("slerp")
    for name, start, end in (("slerp", 0.0, 1.0), ("nearswap", 0.0, 100.0)):
        np.testing.assert_array_equal(merge(name, None, [a, b], t=start), a)
        np.testing.assert_array_equal(merge(name, None, [a, b], t=end), b)


@pytest.mark.parametrize("name", [name for name in METHODS if num_models(name) == 3 and not METHODS[name].random])
def test_order_of_models_does_not_matter(name):
    # Not so for slerp and nearswap, whose order has a meaning, nor for masks, which are drawn for the model's place.
    base, models, weights = case(name)
    order = [2, 0, 1]
    settings = {"density": 0.5} if "density" in METHODS[name].settings else {}
    np.testing.assert_allclose(
        merge(name, base, [models[i] for i in order], [weights[i] for i in order] if weights else (), **settings),
        merge(name, base, models, weights, **settings), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_tensors_of_any_size_with_zero_and_opposite_task_vectors_stay_finite(name):
    config = MergeConfig(method=name, **({"density": 0.3} if "density" in METHODS[name].settings else {}))
    run = jax.jit(lambda base, models: merge_tensor("w", base, models, config))
    rare = [(), (0, 4), (2, 1)] if name in ("linear", "della", "ties") else []
    for shape in [(1,), (99,), *rare]:
        base, models, _ = case(name, shape)
        origin = np.zeros(shape, np.float32) if base is None else base
        opposite = [origin + (-1) ** i * np.ones(shape, np.float32) for i in range(len(models))]
        still = [origin, *models[1:]]
        for group in (models, opposite, still, [origin] * len(models)):
            merged = run(base, group)
            assert merged.shape == shape and np.isfinite(merged).all(), (shape, group)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_small_tensors_keep_at_least_one_and_do_not_lose_their_task_vector(name, size):
    base, (x, *_), _ = case(name, (size,))
    merged = merge(name, base, [x], (1.0,), density=0.1)
    assert 1 <= np.sum(merged != base) <= max(1, size // 10 + 1)
    assert np.sum(merge(name, base, [x], (1.0,), density=0.9) != base) >= max(1, int(0.9 * size))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_computed_in_float32(name):
    base, models, weights = case(name)
    cast = [jnp.asarray(x, jnp.bfloat16) for x in models]
    low = None if base is None else jnp.asarray(base, jnp.bfloat16)
    got = merge(name, low, cast, weights)
    exact = merge(name, None if low is None else np.asarray(low, np.float32), [np.asarray(x, np.float32) for x in cast],
                  weights)
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.bfloat16))
    wide = merge(name, low, cast, weights, dtype="float32")
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, exact)


def test_model_stock_is_clamped():
    base = np.zeros(2, np.float32)
    away = [np.array([1, 0], np.float32), np.array([-0.5, 3**0.5 / 2], np.float32)]  # cosine -0.5: t would be -2
    np.testing.assert_array_equal(merge("model_stock", base, away), base)


def test_ties_by_hand():
    base = np.zeros(3, np.float32)
    models = [np.array(x, np.float32) for x in ([4, -1, 2], [2, 3, -2], [-1, -1, 0])]
    # Signs: 5 > 0, 1 > 0, 0 counts as positive. Means of those that agree: (4 + 2)/2, 3, 2.
    np.testing.assert_allclose(merge("ties", base, models), [3, 3, 2], rtol=1e-6)
    # Weights of both signs whose agreeing sum is 0: w d = (2, 2) agree, divided by |1| + |-1|.
    pair = [np.array([2], np.float32), np.array([-2], np.float32)]
    np.testing.assert_allclose(merge("ties", base[:1], pair, (1.0, -1.0)), [2])


def test_mean_of_task_vectors_is_the_mean_of_models():
    base, models, _ = case("ties")
    expected = base + np.mean([x - base for x in models], axis=0)
    np.testing.assert_allclose(merge("linear", None, models), expected, atol=1e-6)
    np.testing.assert_allclose(merge("task_arithmetic", base, models), expected, atol=1e-6)


def test_karcher_of_two_is_slerp_and_stays_on_the_sphere():
    _, (a, b), _ = case("slerp", near=2.0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    slerp = merge("slerp", None, [a, b], t=0.3)
    np.testing.assert_allclose(merge("karcher", None, [a, b], (0.7, 0.3)), slerp, atol=1e-6)
    third = 3 * b - a
    length = np.linalg.norm(merge("karcher", None, [a, b, third]))
    np.testing.assert_allclose(length, (2 + np.linalg.norm(third)) / 3, rtol=1e-5)


def test_loss_weights():
    weights = loss_weights(jnp.array([1.0, 3.0]), temperature=2.0)
    np.testing.assert_allclose(weights, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-6)


SMOOTH = ["linear", "task_arithmetic", "ties", "dare_linear", "nuslerp", "multislerp", "karcher"]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_to_the_weights_equals_finite_differences(name):
    base, models, weights = case(name)
    target = np.random.default_rng(9).standard_normal(models[0].shape).astype(np.float32)
    settings = {"density": 0.6} if "density" in METHODS[name].settings else {}
    config = MergeConfig(method=name, **settings)

    @jax.jit
    def loss(weights):
        return jnp.mean((merge_trees(base, models, config, weights=weights) - target) ** 2)

    weights = jnp.array(weights)
    gradient = jax.jit(jax.grad(loss))(weights)
    steps = 1e-2 * np.eye(len(weights), dtype=np.float32)
    differences = [(loss(weights + step) - loss(weights - step)) / 2e-2 for step in steps]
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, differences, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "slerp"])
def test_gradient_to_scale_and_t(name):
    base, models, weights = case(name)
    own = {"slerp": {"t": 0.3}, "ties": {"density": 1.0, "scale": 1.0}, "task_arithmetic": {"scale": 1.0}}[name]
    fixed = {"slerp": {}, "ties": {"normalize": True}, "task_arithmetic": {"normalize": False}}[name]
    variable = "t" if name == "slerp" else "scale"

    @jax.jit
    def loss(value):
        numbers = {**own, variable: value}
        weight = jnp.array(weights or (0.5, 0.5))
        return jnp.mean(METHODS[name].function(base, jnp.stack(models), weight, **numbers, **fixed) ** 2)

    at = own[variable]
    numeric = (loss(at + 1e-2) - loss(at - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(at), numeric, rtol=1e-2)


@pytest.mark.parametrize("name", ["linear", "ties", "karcher"])
def test_32_sets_of_weights_in_one_call(name):
    base, models, _ = case(name)
    tree = {"a": models[0], "layers": {"b": np.stack(models)}}
    trees = [jax.tree.map(lambda x, i=i: x + i, tree) for i in range(3)]
    base = None if base is None else jax.tree.map(np.zeros_like, tree)
    settings = {"density": 0.5} if "density" in METHODS[name].settings else {}
    run = partial(merge_trees, base, trees, MergeConfig(method=name, **settings))
    weights = jax.random.uniform(jax.random.key(0), (32, 3), minval=0.1)
    together = jax.jit(jax.vmap(lambda w: run(weights=w)))(weights)
    single = jax.jit(lambda w: run(weights=w))
    for i, one in enumerate(weights):
        jax.tree.map(lambda all_, x, i=i: np.testing.assert_allclose(all_[i], x, rtol=1e-5, atol=1e-6), together,
                     single(one))


def test_nuslerp_follows_the_arc_where_slerp_takes_the_chord():
    angle = 0.025  # its cosine is above 0.9995
    a, b = (np.array([np.cos(x), np.sin(x)], np.float32) for x in (0, angle))
    np.testing.assert_allclose(np.linalg.norm(merge("nuslerp", None, [a, b])), 1, atol=3e-7)
    np.testing.assert_allclose(np.linalg.norm(merge("slerp", None, [a, b])), np.cos(angle / 2), atol=3e-7)
