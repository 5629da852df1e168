"""The loop: order of events, signals, bad steps, exact continuation."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.log import MetricLog, read_metrics
from jaxlm.core.masked import aggregate
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer
from jaxlm.train.loop import LoopConfig, NonFiniteError, fit
from jaxlm.train.measure import Ledger
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import make_step

MESH = make_mesh(MeshConfig())
RULES = [("w$", P())]


class Numbers:
    """Batches whose content is their position; `at` runs a function when a position is drawn."""

    def __init__(self, at=None):
        self.position, self.at = 0, at or {}

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        value = self.at.get(self.position, lambda: None)()
        return np.full((8,), self.position if value is None else value, np.float32)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def stats(self):
        return {"position": float(self.position)}


def loss(params, batch, key):
    noise = jax.random.normal(key, ())
    out = aggregate(jnp.square(params["w"] * batch - 3 - noise), jnp.ones_like(batch))
    return out.total, {"loss": out}


def run(folder, steps=12, batches=None, evaluate=None, resume=False, every=4, **config):
    tx = optax.sgd(optax.constant_schedule(1e-3), momentum=0.9)
    init = lambda key: {"w": jnp.ones(())}
    step = make_step(loss, tx, optax.constant_schedule(1e-3), mesh=MESH, rules=RULES)
    batches = batches or Numbers()
    checkpointer = Checkpointer(folder, CheckpointConfig(every=every, keep_last=9), {}, {})
    if resume:
        state = checkpointer.restore(abstract_state(init, tx, MESH, RULES), batches)
    else:
        state = init_state(init, tx, jax.random.key(0), MESH, RULES)
    metric_log, ledger = MetricLog(folder), Ledger()
    try:
        return fit(state, step, batches, mesh=MESH, config=LoopConfig(steps=steps, log_every=1, **config),
                   checkpointer=checkpointer, metric_log=metric_log, ledger=ledger, flops_ratio=1e-3, evaluate=evaluate)
    finally:
        checkpointer.close()
        metric_log.close()
        ledger.close()


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_runs_to_the_end_and_reports(tmp_path, capfd):
    seen = []
    state, finished = run(tmp_path, evaluate=lambda params, step: (seen.append(step) or {"eval/x": 1.0}, "looks good"),
                          eval_every=5)
    assert finished and int(state.step) == 12
    assert seen == [5, 10, 12]
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    record = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if r["step"] == 7)
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gb", "skipped", "position"} <= set(record)
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 1e-3, rel=1e-6)
    printed = capfd.readouterr().out
    assert "step 12/12  loss" in printed and "left 00:00" in printed and printed.count("looks good") == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["12", "4", "8"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_sigterm_saves_and_resume_is_bit_identical(tmp_path):
    whole, _ = run(tmp_path / "whole")
    stop = Numbers({6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    state, finished = run(tmp_path / "cut", batches=stop)
    assert not finished and int(state.step) == 6
    assert (tmp_path / "cut/checkpoints/6").is_dir()
    resumed, finished = run(tmp_path / "cut", resume=True)
    assert finished
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])


@pytest.mark.parametrize(("compute", "load", "waits"), [(0.3, 0.05, False), (0.0, 0.3, True)])
def test_only_loading_that_the_devices_wait_for_counts(tmp_path, capfd, compute, load, waits):
    """A step that takes longer than loading hides it; one that is done before does not."""
    def slow(x):
        return jax.pure_callback(lambda x: (time.sleep(compute), x)[1], x, x)

    tx, init = optax.sgd(optax.constant_schedule(1e-3)), lambda key: {"w": jnp.ones(())}
    def slow_loss(params, batch, key):
        total, metrics = loss(params, batch, key)
        seen = jax.lax.stop_gradient(slow(jnp.zeros(())))
        return total + seen, {"loss": metrics["loss"]._replace(total=metrics["loss"].total + seen)}

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_step(slow_loss, tx, optax.constant_schedule(1e-3), mesh=mesh, rules=RULES)
    batches = Numbers(dict.fromkeys(range(1, 13), lambda: time.sleep(load)))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every=100), {}, {})
    metric_log, ledger = MetricLog(tmp_path), Ledger()
    fit(init_state(init, tx, jax.random.key(0), mesh, RULES), step, batches, mesh=mesh, flops_ratio=1e-3,
        config=LoopConfig(steps=12, log_every=4), checkpointer=checkpointer, metric_log=metric_log, ledger=ledger)
    for part in (checkpointer, metric_log, ledger):
        part.close()
    waited = [r["data_wait"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["step"] in (8, 12) and "loss" in r]
    assert all(share > 0.5 if waits else share < 0.3 for share in waited), waited
    shares = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if "goodput/step" in r)
    assert sum(shares[f"goodput/{name}"] for name in ledger.seconds) == pytest.approx(1)
    assert f"data {waited[-1]:.0%}" in capfd.readouterr().out


def test_non_finite_steps_are_skipped_counted_and_then_stop_the_run(tmp_path, caplog):
    bad = dict.fromkeys((3, 6, 7, 8), lambda: np.nan)
    state, finished = run(tmp_path / "a", batches=Numbers(bad), max_skipped=4)
    assert finished and np.isfinite(state.params["w"])
    records = {r["step"]: r for r in read_metrics(tmp_path / "a/metrics.jsonl") if "loss" in r}
    assert records[3]["loss"] is None and [records[s]["skipped"] for s in (2, 3, 5, 8, 12)] == [0, 1, 1, 4, 4]
    with pytest.raises(NonFiniteError, match="3 steps in a row, the last one step 8"):
        run(tmp_path / "b", batches=Numbers(bad), max_skipped=3)


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    run(tmp_path)
    before = losses(tmp_path)
    state, finished = run(tmp_path, resume=True)
    assert finished and int(state.step) == 12 and losses(tmp_path) == before


def test_a_checkpoint_beyond_the_end_is_an_error(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"at step 12, beyond loop\.steps 5"):
        run(tmp_path, resume=True, steps=5)


def test_config_errors():
    with pytest.raises(ValueError, match=r"loop\.log_every must be at least 1"):
        LoopConfig(log_every=0)
