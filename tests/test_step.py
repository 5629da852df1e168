"""The step on a toy regression: accumulation, devices, skipped steps, donation, restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.masked import aggregate
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch
from jaxlm.core.rng import derive
from jaxlm.core.tree import count_parameters, named_leaves
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import check_batch, make_step, update_count

RULES = [("w$", P("fsdp", "tensor")), ("scale$", P())]
OPTIM = OptimConfig(lr=1e-2, schedule=ScheduleConfig(kind="constant", warmup=0.0))


def init(key):
    return {"w": jax.random.normal(key, (16, 8)), "scale": jnp.ones(8)}


def loss(params, batch, key):
    scale = params["scale"][None, :]
    error = jnp.sum((batch["x"] @ params["w"] * scale - batch["y"]) ** 2, axis=-1)
    mean = aggregate(error, batch["mask"])
    return mean.total, {"loss": mean}


def batch(seed: int, rows: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 16)).astype(np.float32),
        "y": rng.normal(size=(rows, 8)).astype(np.float32),
        "mask": (rng.random(rows) < 0.6).astype(np.float32),  # uneven weights: a mean of means would be wrong
    }


def train(mesh, accumulate=1, steps=3, change=lambda i, b: b, **more):
    tx = make_optimizer(OPTIM, steps)
    schedule = make_schedule(OPTIM.schedule, OPTIM.lr, steps)
    state = init_state(init, tx, derive(0, "init"), mesh, RULES)
    step = make_step(loss, tx, schedule, mesh=mesh, rules=RULES, accumulate=accumulate, **more)
    history = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, put_batch(change(i, batch(i)), mesh))
            history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def mesh_of(num_devices: int, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing(accumulate):
    one, metrics_one = train(mesh_of(1))
    many, metrics_many = train(mesh_of(1), accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics_one, metrics_many)


@pytest.mark.parametrize(
    "sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_change_nothing(sizes, accumulate):
    one, metrics_one = train(mesh_of(1))
    many, metrics_many = train(mesh_of(8, **sizes), accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics_one, metrics_many)


def test_a_step_that_is_not_finite_changes_only_the_counter():
    def poison(i, b):
        return b | {"x": b["x"] * np.nan} if i == 1 else b

    state, history = train(mesh_of(1), steps=2, change=poison)
    before, _ = train(mesh_of(1), steps=1)
    assert [h["skipped"] for h in history] == [0, 1]
    assert state.step == 2
    assert update_count(state.opt_state) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)


def test_an_empty_batch_gives_no_update_from_the_gradient():
    state, history = train(mesh_of(1), steps=1, change=lambda i, b: b | {"mask": np.zeros_like(b["mask"])})
    assert history[0]["loss"] == 0
    assert history[0]["grad_norm"] == 0
    assert np.isfinite(state.params["w"]).all()


def test_metrics_name_rate_and_tokens():
    _, history = train(mesh_of(1), steps=1)
    assert history[0]["lr"] == pytest.approx(1e-2)
    assert history[0]["tokens"] == batch(0)["mask"].sum()
    counted = lambda batch: batch["x"].shape[0] + batch["mask"].sum()
    _, history = train(mesh_of(1), accumulate=2, steps=1, tokens=counted)
    assert history[0]["tokens"] == 32 + batch(0)["mask"].sum()


def test_state_keeps_its_sharding_and_optimizer_follows_the_parameter():
    mesh = mesh_of(8, fsdp=4, tensor=2)
    tx = make_optimizer(OPTIM, 1)
    state = init_state(init, tx, derive(0, "init"), mesh, RULES)
    step = make_step(loss, tx, make_schedule(OPTIM.schedule, OPTIM.lr, 1), mesh=mesh, rules=RULES)
    with jax.set_mesh(mesh):
        after, _ = step(state, put_batch(batch(0), mesh))
    for tree in (abstract_state(init, tx, mesh, RULES), after):
        specs = {name: leaf.sharding.spec for name, leaf in named_leaves(tree).items()}
        assert {spec for name, spec in specs.items() if name.endswith("/w")} == {P("fsdp", "tensor")}
        assert sum(name.endswith("/w") for name in specs) == 3  # parameter and two moments


def test_batches_that_do_not_divide():
    mesh = mesh_of(8, fsdp=4, tensor=2)
    with pytest.raises(ValueError, match="use a multiple of 8"):
        check_batch(12, 2, mesh)
    check_batch(16, 2, mesh)


def test_counting_needs_no_arrays():
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert count_parameters(shapes) == 16 * 8 + 8


def test_keys_depend_on_seed_step_and_name():
    keys = {tuple(np.asarray(jax.random.key_data(derive(seed, name, step))).tolist())
            for seed in (0, 1) for name in ("a", "b") for step in (0, 1)}
    assert len(keys) == 8
