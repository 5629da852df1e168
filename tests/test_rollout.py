"""Attempts: who wrote each token, what the model saw, and that sampler and trainer agree on every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.chat_template import hermes
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.model.decoder import build
from jaxlm.rl.arithmetic import ARITHMETIC
from jaxlm.rl.calls import Observation
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv
from jaxlm.rl.episode import load_episodes, save_episodes
from jaxlm.rl.pack import pack_rows, pad_rows, spread
from jaxlm.rl.rollout import Attempt, RolloutConfig, make_prompts, rollout
from jaxlm.rl.task import Task
from jaxlm.rl.update import Policy, policy_logprobs, score_rows
from tests.tiny_chat import MODEL, json_tokenizer

TOKENIZER = json_tokenizer()
CONFIG = dataclasses.replace(MODEL, max_positions=1024)
TASKS = [Task(id=f"t{i}", question=f"{i} + 3?", tools=(), answers=(i + 3,), judge="numeric", domain="sums")
         for i in range(3)]


class Talkative(ToolEnv):
    """Answers the first turns of an attempt, whatever they say: a random model never calls a tool."""

    def step(self, state, text):
        if state.turns < int(state.task[1:]):
            observation = Observation("add", text[:5], f"heard <|im_end|> {len(text)} characters")
            return state._replace(turns=state.turns + 1, seconds=0.0), (observation,), False
        return super().step(state, text)


@functools.cache
def written(temperature=1.0, **fields):
    """Episodes of a random model that often ends its turns."""
    model = build(CONFIG)
    params = jax.jit(model.init)(jax.random.key(1))
    end = TOKENIZER.token_id("<|im_end|>")
    params["embed"]["embedding"] = params["embed"]["embedding"] * 0.5
    params["head"]["kernel"] = params["head"]["kernel"] * 0.3
    engine = Engine(model=model, params=params, eos_id=end, tokenizer=TOKENIZER, config=EngineConfig(batch_size=4))
    config = RolloutConfig(temperature=temperature, max_prompt=200, **{"max_response": 260, "max_turn": 90, **fields})
    env = Talkative(ARITHMETIC, EnvConfig(max_turns=4))
    dialogue = Dialogue(ARITHMETIC, hermes(TOKENIZER), TOKENIZER, EnvConfig(max_turns=4))
    prompts = make_prompts(dialogue, TASKS, config.max_prompt)
    attempts = [Attempt(task, task, sample, 7 * task + sample, prompts[task])
                for task in prompts for sample in range(2)]
    with env:
        return model, params, dialogue, attempts, rollout(engine, env, dialogue, TASKS, attempts, config)


def test_every_token_keeps_who_wrote_it():
    _, _, dialogue, attempts, episodes = written()
    assert {len(one.observations) for one in episodes} > {0}  # some were answered, some not
    for attempt, one in zip(attempts, episodes, strict=True):
        assert one.ids[:len(attempt.prompt)] == attempt.prompt and not any(one.sampled[:len(attempt.prompt)])
        assert len(one.ids) == len(one.sampled) == len(one.logprobs) == len(one.kept)
        assert len(one.ids) - len(attempt.prompt) <= 260
        runs, start = [], len(attempt.prompt)
        while start < len(one.ids):
            stop = next((i for i in range(start, len(one.ids)) if one.sampled[i] != one.sampled[start]), len(one.ids))
            runs.append((one.sampled[start], list(one.ids[start:stop])))
            start = stop
        assert [kind for kind, _ in runs] == [i % 2 == 0 for i in range(len(runs))]
        spoken = [ids for sampled, ids in runs if sampled]
        assert [dialogue.turn_text(ids) for ids in spoken] == list(one.turns)
        for (_, ids), text in zip(runs[1::2], one.observations, strict=False):
            assert text[0] in TOKENIZER.decode(ids) and "heard" in text[0]
            assert ids.count(dialogue.end_of_turn) == 1  # what the tool said is no special token
        assert one.ended == (one.env.reason in ("answered", "unbalanced"))
        assert one.ended == (one.ids[-1] == dialogue.end_of_turn) or one.env.reason == "length"
        assert all(logprob == 0 for logprob, own in zip(one.logprobs, one.sampled, strict=True) if not own)


@pytest.mark.parametrize(("temperature", "fields"), [(1.0, ()), (0.7, (("top_p", 0.8),))])
def test_the_trainer_gives_sampled_tokens_the_sampler_s_probabilities(temperature, fields):
    """In packed rows, at the temperature of sampling, before truncation."""
    model, params, *_, episodes = written(temperature, **dict(fields))
    rows = pack_rows(episodes, 700)
    assert np.max(rows.segments) > 1
    policy = Policy(model, temperature, num_tokens=TOKENIZER.vocab_size)
    logp = jax.jit(policy_logprobs, static_argnums=0)(policy, params, rows)[0].logp
    np.testing.assert_allclose(np.where(rows.mask, logp, 0), rows.sampler_logp, atol=5e-5)
    assert rows.mask.sum() == sum(one.num_sampled() for one in episodes)
    parts, values = jax.jit(score_rows, static_argnums=(0, 3))(
        policy._replace(num_chunks=2), params, pad_rows(rows, 4), 2)
    np.testing.assert_allclose(parts[:len(logp)], logp, atol=1e-5)
    assert values is None


def test_a_budget_ends_an_attempt():
    *_, attempts, episodes = written(max_response=60, max_turn=20)
    cut = [one for one in episodes if one.env.reason == "length"]
    assert cut and not any(one.ended for one in cut)
    assert all(len(one.ids) - len(attempt.prompt) <= 60 for attempt, one in zip(attempts, episodes, strict=True))


def test_episodes_on_disk_are_the_same_and_damage_is_noticed(tmp_path):
    *_, episodes = written()
    path = tmp_path / "rollouts" / "1.jsonl"
    episodes = [dataclasses.replace(episodes[0], turns=("a\u2028b\x85c",)), *episodes[1:]]
    save_episodes(path, episodes, {"iteration": 1})
    head, again = load_episodes(path)
    assert again == episodes and head == {"iteration": 1, "episodes": len(episodes)}
    whole = path.read_text()
    for damaged in (whole[:len(whole) // 2], whole.rsplit("\n", 2)[0] + "\n", "", whole.replace('"ids"', '"idz"')):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_episodes(path)


def test_prompts_that_are_too_long_are_left_out():
    dialogue = Dialogue(ARITHMETIC, hermes(TOKENIZER), TOKENIZER)
    long = dataclasses.replace(TASKS[0], id="long", question="x" * 300)
    assert list(make_prompts(dialogue, [long, *TASKS], 200)) == [1, 2, 3]


def test_packing_by_hand():
    """The example of `Rows`."""
    *_, episodes = written()
    one = dataclasses.replace(episodes[0], ids=(5, 6, 7, 8), sampled=(False, False, True, True),
                              logprobs=(0, 0, -1.0, -2.0), kept=(1, 1, 0.5, 0.25))
    two = dataclasses.replace(one, ids=(5, 7, 8), sampled=(False, True, True), logprobs=(0, -3.0, -4.0), kept=(1, 1, 1))
    rows = pack_rows([one, two], 6)
    expected = {
        "tokens": [5, 6, 7, 5, 7, 0], "targets": [6, 7, 8, 7, 8, 0], "mask": [0, 1, 1, 1, 1, 0],
        "segments": [1, 1, 1, 2, 2, 0], "positions": [0, 1, 2, 0, 1, 0], "sampler_logp": [0, -1, -2, -3, -4, 0],
        "kept": [1, 0.5, 0.25, 1, 1, 1], "episode": [0, 0, 0, 1, 1, -1]}
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(rows, name), [values], err_msg=name)
    np.testing.assert_array_equal(spread(jnp.array([10.0, 20.0]), rows.episode), [[10, 10, 10, 20, 20, 0]])
    assert [len(pack_rows([one] * n, 3).tokens) for n in (1, 3, 5, 7, 9, 13)] == [1, 3, 6, 8, 12, 16]
    with pytest.raises(ValueError, match="has 4 tokens, which a row of 2 cannot hold"):
        pack_rows([one], 2)
