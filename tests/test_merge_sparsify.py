"""What stays of a task vector: thresholds without a sort, random masks and their rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.merge import sparsify
from jaxlm.merge.spec import MergeConfig
from jaxlm.merge.tensors import Layout, merge_tensor, merge_trees


def test_kth_largest_equals_a_sort():
    rng = np.random.default_rng(0)
    find = jax.jit(sparsify.kth_largest)
    for values in (rng.standard_normal(9000), np.zeros(50), np.arange(4099.0) * 1e-42, [0.5], [np.inf, 1, 1, 1e38, 0]):
        values = np.abs(np.asarray(values, np.float32))
        ordered = np.sort(values)[::-1]
        for k in {1, min(3, len(values)), (len(values) + 1) // 2, len(values)}:
            assert find(values, k) == ordered[k - 1], (len(values), k)


def test_worked_examples_of_the_docstrings():
    d = jnp.array([3, -1, 2, 0.5, -4])
    np.testing.assert_array_equal(sparsify.magnitude(d, 0.4), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(sparsify.breadcrumbs(d, 0.4, gamma=0.2), [1, 0, 1, 0, 0])
    assert sparsify.share(100, 0.29) == 29


def test_exactly_the_share_stays_and_of_equal_ones_the_first():
    """bfloat16 weights that a small update moved: few different magnitudes, many equal to the last that stays."""
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal(9001)).astype(jnp.bfloat16)
    tuned = (base.astype(np.float32) + 1e-4 * rng.standard_normal(9001)).astype(jnp.bfloat16)
    find = jax.jit(sparsify.largest)
    for values in (np.abs(tuned.astype(np.float32) - base.astype(np.float32)), np.ones(7, np.float32), np.zeros(1)):
        order = np.argsort(-values, kind="stable")
        for k in {0, 1, len(values) // 5, len(values)}:
            np.testing.assert_array_equal(np.flatnonzero(find(values, k)), np.sort(order[:k]))
    base, tuned = base[:9000].reshape(90, 100), tuned[:9000].reshape(90, 100)
    for method in ("ties", "breadcrumbs"):
        merged = merge_tensor("x", base, [tuned], MergeConfig(method=method, density=0.05))
        assert np.sum(np.asarray(merged) != base) == 450, method
    # In memory, where a leaf may lie otherwise, and as stored.
    leaf, layout = {"k": tuned.T[None]}, Layout(("x",), True, lambda x: x.T, lambda x: x.T)
    tree = merge_trees({"k": base.T[None]}, [leaf], MergeConfig(method="ties", density=0.05), layouts={"k": layout})
    stored = merge_tensor("x", base, [tuned], MergeConfig(method="ties", density=0.05))
    np.testing.assert_array_equal(tree["k"][0].T, stored)


def test_both_counts_of_kth_largest_agree():
    rows = jax.random.randint(jax.random.key(0), (5, 16), -1, 100)
    bounds = jnp.arange(7) * 15
    np.testing.assert_array_equal(sparsify._count_rows(rows, bounds), sparsify._count(rows, bounds))


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_keeps_the_share_and_rescales_as_named(rescale):
    d = np.random.default_rng(0).standard_normal((64, 65)).astype(np.float32)
    base = np.zeros_like(d)
    config = MergeConfig(method="dare_linear", density=0.3, rescale=rescale)
    merged = np.asarray(merge_tensor("w", base, [d], config))
    kept = merged != 0
    assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.21 / d.size)
    factor = {"inverse": 1 / 0.3, "none": 1, "l1": np.abs(d).sum() / np.abs(d[kept]).sum()}[rescale]
    np.testing.assert_allclose(merged[kept] / d[kept], factor, rtol=3e-5)


def test_inverse_rescaling_is_unbiased_also_for_della():
    d = jax.random.normal(jax.random.key(1), (4, 8))
    draw = {
        "dare": lambda key: sparsify.dare(d, 0.2, rescale="inverse", key=key),
        "della": lambda key: sparsify.della(d, 0.4, epsilon=0.3, rescale="inverse", key=key)}
    for name, one in draw.items():
        factors = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 20000))
        spread = np.asarray(factors).std(axis=0) / np.sqrt(len(factors))
        assert np.all(np.abs(factors.mean(axis=0) - 1) < 5 * spread), name


def test_della_keeps_large_coordinates_more_often():
    d = jnp.array([[0.1, -5.0, 2.0], [7.0, 1.0, 3.0]])
    keys = jax.random.split(jax.random.key(0), 20000)
    kept = jax.jit(jax.vmap(lambda key: sparsify.della(d, 0.5, epsilon=0.3, rescale="none", key=key)))(keys)
    np.testing.assert_allclose(kept.mean(axis=0), [[0.2, 0.8, 0.5], [0.8, 0.2, 0.5]], atol=0.02)


def test_uniform16_is_uniform_in_every_bit():
    numbers = np.asarray(sparsify.uniform16(jax.random.key(7), (3, 333, 101)))
    assert numbers.dtype == np.uint32 and numbers.max() < 2**16
    bits = (numbers[..., None] >> np.arange(16)) & 1
    sigma = 0.5 / np.sqrt(numbers.size)
    assert np.all(np.abs(bits.mean(axis=(0, 1, 2)) - 0.5) < 5 * sigma)
    correlation = np.corrcoef(numbers[..., :-1].ravel(), numbers[..., 1:].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(numbers.size)
