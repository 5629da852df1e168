"""Metrics of an update: extremes are those of all its tokens, whatever the micro-batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.masked import Largest, Mean, Smallest
from jaxlm.core.mesh import MeshConfig, make_mesh, put_whole
from jaxlm.model.decoder import build
from jaxlm.objective.algorithm import ALGORITHMS, PolicyTokens
from jaxlm.rl.pack import Rows
from jaxlm.rl.policy_params import RULES
from jaxlm.rl.update import LearnBatch, Policy, make_policy_loss, score_rows
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step
from tests.tiny_chat import MODEL

POLICY = Policy(build(MODEL), 1.0)


def test_extremes_by_hand():
    stacked = lambda kind, values: kind(jnp.array(values)).over_parts().value()
    assert stacked(Smallest, [0.9, jnp.inf, 0.4]) == jnp.float32(0.4)
    assert stacked(Largest, [-3.0, -jnp.inf, -2.0]) == -2
    assert stacked(Smallest, [jnp.inf] * 2) == stacked(Largest, [-jnp.inf] * 2) == 0  # nothing was counted
    assert np.isnan(stacked(Largest, [1.0, jnp.nan])) and stacked(Largest, [1.0, jnp.inf]) == jnp.inf
    assert Mean(jnp.array([6.0, 0.0]), jnp.array([2.0, 1.0])).over_parts().value() == 2


def batch():
    """Four rows of ten tokens, the third without any that counts; the old policy was another."""
    rng = np.random.default_rng(0)
    ids, shape = lambda high: jnp.asarray(rng.integers(0, high, shape), jnp.int32), (4, 10)
    mask = jnp.asarray(rng.random(shape) < 0.6, jnp.float32).at[2].set(0)
    segments, zeros = jnp.ones(shape, jnp.int32), jnp.zeros(shape)
    positions = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), shape)
    rows = Rows(ids(264), ids(264), mask, segments, positions, zeros, zeros + 1, segments)
    params = jax.jit(POLICY.model.init)(jax.random.key(0))
    logp = jax.jit(score_rows, static_argnums=(0, 3))(POLICY, params, rows, 4)[0]
    old_logp = logp + jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)
    ratios = np.exp(np.asarray(logp - old_logp))[np.asarray(mask) != 0]
    advantage = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return LearnBatch(rows, PolicyTokens(old_logp, advantage, mask, segments)), ratios


@pytest.mark.parametrize(("accumulate", "devices"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_extremes_of_ratios_do_not_depend_on_micro_batches(accumulate, devices):
    mesh, tx = make_mesh(MeshConfig(data=devices), jax.devices()[:devices]), optax.scale_by_schedule(lambda count: 0.0)
    given, ratios = batch()
    step = make_step(make_policy_loss(POLICY, ALGORITHMS["dapo"]), tx, lambda count: 0.0, mesh=mesh, rules=RULES,
                     accumulate=accumulate)
    state = init_state(POLICY.model.init, tx, jax.random.key(0), mesh, RULES)
    with jax.set_mesh(mesh):
        metrics = jax.device_get(step(state, put_whole(given, mesh))[1])
    np.testing.assert_allclose(metrics["ratio_min"], ratios.min(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], ratios.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], ratios.mean(), rtol=1e-5)
