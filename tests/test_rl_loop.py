"""The RL loop on a tiny model: it learns what is rewarded, and a run that is killed anywhere goes on bit for bit."""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.log import MetricLog
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.core.rng import derive
from jaxlm.data.chat_template import hermes
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.model.decoder import build
from jaxlm.objective.algorithm import ALGORITHMS
from jaxlm.objective.kl import KLConfig
from jaxlm.objective.value import ValueConfig
from jaxlm.reward.compose import RewardConfig, TermConfig, compose
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl import loop
from jaxlm.rl.arithmetic import ARITHMETIC
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv
from jaxlm.rl.learner import BatchConfig, PolicyLearner, Scene
from jaxlm.rl.loop import Progress, RLLoopConfig, fit_rl
from jaxlm.rl.pack import Rows
from jaxlm.rl.policy_params import RULES
from jaxlm.rl.rollout import RolloutConfig, make_prompts
from jaxlm.rl.task import Task
from jaxlm.rl.update import VALUE, Policy, learn_batch, penalised_rewards
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer
from jaxlm.train.measure import Ledger
from jaxlm.train.state import abstract_state, init_state
from tests.tiny_chat import MODEL, json_tokenizer

TOKENIZER = json_tokenizer()
END = TOKENIZER.token_id("<|im_end|>")
TASKS = [Task(id=f"t{i}", question=f"{i}?", tools=(), answers=(i,), judge="numeric", domain="sums") for i in range(5)]
SHORT = RewardConfig(terms=(TermConfig(name="overlong", buffer=24),))  # the shorter the better
MESH = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def learner(objective=ALGORITHMS["dapo"], reward=SHORT, mesh=MESH, **batch):
    """Its parts for a model of one layer; attempts of 24 tokens at most."""
    model = build(MODEL)
    env_config = EnvConfig(max_turns=2)
    dialogue = Dialogue(ARITHMETIC, hermes(TOKENIZER), TOKENIZER, env_config)
    rollouts = RolloutConfig(max_prompt=40, max_response=24)
    tx = optax.adamw(3e-3)
    return PolicyLearner(
        Policy(model, 1.0, 1, TOKENIZER.vocab_size),
        Engine(model=model, params=None, eos_id=END, tokenizer=TOKENIZER, config=EngineConfig(batch_size=8)),
        Scene(TASKS, make_prompts(dialogue, TASKS, 40), ToolEnv(ARITHMETIC, env_config), dialogue,
              compose(reward, Trajectory._fields), tuple(term.weight for term in reward.terms)),
        objective, rollouts=rollouts, tx=tx, schedule=optax.constant_schedule(3e-3), mesh=mesh, rules=RULES, seed=3,
        reference=jax.jit(init)(derive(0, "init")) if objective.kl.coefficient else None,
        batch=BatchConfig(**{"prompts": 2, "samples": 4, "minibatches": 2, "micro_rows": 2, **batch})), tx


@functools.cache
def parts():
    return learner()


def init(key, value=False):
    """Random, but about one token in ten ends the turn: a feature that all tokens share is its logit."""
    params = build(MODEL).init(key)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, 0].set(3.0)
    params["head"]["kernel"] = params["head"]["kernel"].at[0, END].set(1.2)
    return params | ({VALUE: {"kernel": jnp.zeros((MODEL.d_model, 1))}} if value else {})


def run(folder: Path, iterations: int, *, resume=False, made=None, evaluate=None, value=False, **config):
    """A run of `fit_rl` in a folder; its state, what was logged, and whether it got to its end."""
    it, tx = made or parts()
    make = functools.partial(init, value=value)
    ledger, progress = Ledger(*loop.PHASES), Progress()
    checkpointer = Checkpointer(folder, CheckpointConfig(every=2), {}, {"tokenizer.json": b"{}"})
    metric_log = MetricLog(folder)
    try:
        state = (checkpointer.restore(abstract_state(make, tx, it.mesh, RULES), progress) if resume
                 else init_state(make, tx, derive(0, "init"), it.mesh, RULES))
        state, done = fit_rl(
            state, it, progress, mesh=it.mesh, config=RLLoopConfig(iterations=iterations, pages_every=2, **config),
            folder=folder, checkpointer=checkpointer, metric_log=metric_log, ledger=ledger, evaluate=evaluate)
    finally:
        checkpointer.close()
        metric_log.close()
        ledger.close()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return jax.device_get(state), [one for one in records if "reward" in one], done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder, 5)


def test_every_phase_is_logged_and_pages_are_written(whole):
    folder, state, records, done = whole
    assert done and len(records) == 5 and int(state.step) == 2 * sum(one["updates"] > 0 for one in records)
    wanted = {"reward", "reward_std", "correct", "groups/equal", "length", "length_min", "length_max", "ended", "turns",
              "calls", "entropy", "ratio", "ratio_min", "ratio_max", "approx_kl", "clip_fraction", "clip_fraction_low",
              "clip_fraction_high", "clip_fraction_dual", "sampler_logp_difference", "is_weight", "grad_norm", "lr",
              "is_effective_sample_size", "seconds/rollout", "seconds/score", "seconds/step", "tokens_per_second",
              "tool_similarity", "terms/overlong", "missing/overlong", "rows/filled", "prompts", "memory_gb"}
    assert not wanted - set(records[0])
    assert records[0]["sampler_logp_difference"] < 1e-4
    assert abs(records[0]["ratio"] - 1) < 0.05 and records[-1]["prompts"] == 10
    page = (folder / "pages" / "000002.html").read_text()
    assert "<h1>Iteration 2</h1>" in page and "t" in page and "reward" in page


def test_the_first_update_of_an_iteration_sees_the_policy_that_sampled(tmp_path):
    """Ratio 1 in every token, nothing clipped, no distance to the old policy: with one update an iteration."""
    _, records, _ = run(tmp_path, 2, made=learner(minibatches=1))
    for one in records:
        assert one["ratio_min"] == one["ratio_max"] == 1.0
        assert one["approx_kl"] == one["clip_fraction"] == 0


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, caplog):
    """In every phase of an iteration after a checkpoint; what the rollout left is used again."""
    _, state, records, _ = whole
    it, _ = parts()
    for name in ("rollout", "score", "updates"):
        folder = tmp_path / name

        def die(*_, **__):
            raise KeyboardInterrupt

        real, calls = getattr(it, name), []

        def counted(*arguments, real=real, calls=calls, **keywords):
            calls.append(1)
            return die() if len(calls) == 3 else real(*arguments, **keywords)

        monkeypatch.setattr(it, name, counted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, 5)
        monkeypatch.undo()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again, more, done = run(folder, 5, resume=True)
        assert done
        jax.tree.map(np.testing.assert_array_equal, again, state)
        assert more[-1]["reward"] == records[-1]["reward"]
        assert ("attempts taken from" in caplog.text) == (name != "rollout")


def test_attempts_of_other_parameters_are_made_again(whole, tmp_path, caplog):
    folder = whole[0]
    path = tmp_path / "rollouts" / "000000.jsonl"
    path.parent.mkdir()
    lines = (folder / "rollouts" / "000004.jsonl").read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"iteration": 0, "drawn": 0}), *lines[1:]]) + "\n")
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 1)
    assert "is of other parameters" in caplog.text


def test_it_learns_what_is_rewarded(tmp_path):
    _, records, _ = run(tmp_path, 12, made=learner(prompts=4, minibatches=1, seq_len=256))
    first, last = (np.mean([one["reward"] for one in part]) for part in (records[:4], records[-4:]))
    assert last > first + 0.1, (first, last)


@pytest.mark.parametrize("name", ["mentor", "ppo"])
def test_algorithms_run(name, tmp_path):
    """With a reference where there is a KL, with a value head for PPO; nothing is skipped."""
    objective = ALGORITHMS[name]
    if objective.advantage == "gae":
        objective = dataclasses.replace(objective, kl=KLConfig(coefficient=0.02, estimator="k1", place="reward"))
    _, records, done = run(tmp_path, 2, made=learner(objective, minibatches=1), value=objective.advantage == "gae")
    assert done and all(one["skipped"] == 0 and np.isfinite(one["loss"]) for one in records)
    assert ("value_loss" in records[0]) == (name == "ppo")
    assert name not in ("mentor",) or abs(records[0]["kl_k1"]) < 1e-6


def test_a_kl_in_the_reward_counts_once():
    """One attempt of 4 sampled tokens, reward 1, each token 1 nat from the reference at coefficient 0.02."""
    rows = Rows(*(np.zeros((1, 6), dtype) for dtype in (int, int, float, int, int, float, float, int)))._replace(
        mask=np.array([[0, 1, 1, 1, 1, 0.0]]), segments=np.array([[1, 1, 1, 1, 1, 0]]),
        positions=np.arange(6)[None], episode=np.array([[0, 0, 0, 0, 0, -1]]), kept=np.ones((1, 6)))
    near, far = jnp.zeros((1, 6)), jnp.full((1, 6), -1.0)
    kl = KLConfig(coefficient=0.02, estimator="k1", place="reward")
    for name, returns in (("ppo", [0.92, 0.94, 0.96, 0.98]), ("rloo", None)):
        objective = dataclasses.replace(ALGORITHMS[name], kl=kl)
        if returns:
            objective = dataclasses.replace(objective, value=ValueConfig(gae_lambda=1.0))
        rewards = penalised_rewards(objective, rows, jnp.ones(1), near, far)
        advantage = None if returns else rewards
        batch = learn_batch(objective, rows, rewards, advantage, near, far, None, near)
        assert rewards == pytest.approx([1.0 if returns else 0.92])
        if returns:
            np.testing.assert_allclose(batch.returns[0, 1:5], returns, atol=1e-6)


def test_nothing_to_learn_is_no_update(tmp_path, caplog):
    """All attempts have the same reward."""
    flat = RewardConfig(terms=(TermConfig(name="correctness"),))
    with caplog.at_level(logging.WARNING):
        state, records, _ = run(tmp_path, 2, made=learner(reward=flat))
    assert int(state.step) == 0 and records[-1]["groups/equal"] == 1 and "nothing is updated" in caplog.text


def test_dynamic_sampling_draws_until_groups_differ(tmp_path, monkeypatch):
    it, _ = learner(dynamic=True, max_draws=3)
    asked = []
    monkeypatch.setattr(it, "_equal", lambda group: asked.append(group) or len(asked) in (1, 2, 4))
    episodes, drawn = it.rollout(jax.jit(init)(jax.random.key(0)), 0, 0)
    assert drawn == 5 and [one.group for one in episodes] == [0] * 4 + [1] * 4 and len(asked) == 5


def test_extremes_of_several_updates_stay_extremes():
    numbers = [{"skipped": 0.0, "loss": 1.0, "grad_norm": 1.0, "ratio_min": low, "ratio_max": high}
               for low, high in ((0.5, 1.1), (0.9, 1.7))]
    learner = SimpleNamespace(updates=lambda *_: [lambda state, one=one: (state, one) for one in numbers])
    _, found, _ = loop._update(None, learner, None, 1, skipped=0, max_skipped=2)
    assert (found["ratio_min"], found["ratio_max"], found["loss"], found["updates"]) == (0.5, 1.7, 1.0, 2)
