"""Attempts at tasks: the engine writes, the environment answers, and every token keeps who wrote it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.generate.engine import Engine, EngineConfig, serve
from jaxlm.generate.requests import Completion, Report, Turn
from jaxlm.generate.settings import SamplingConfig
from jaxlm.rl.env import Dialogue, EnvState, ToolEnv, cut_off
from jaxlm.rl.episode import Episode, episode_from_json, episode_to_json
from jaxlm.rl.task import Task


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How attempts are made."""

    temperature: float = 1.0      # of sampling, and of the log-probabilities that are trained
    top_k: int | None = None
    top_p: float | None = None
    max_prompt: int = 512         # tokens; tasks with a longer prompt are left out, and counted
    max_response: int = 512       # tokens of all turns and observations of an attempt
    max_turn: int | None = None   # tokens of one turn; None: what is left
    engine: EngineConfig = field(default_factory=EngineConfig)  # how attempts share the device

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_response", "max_turn"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        self.sampling(1, 0)

    def sampling(self, max_new_tokens: int, seed: int) -> SamplingConfig:
        """The request for one attempt."""
        if self.temperature == 0:
            return SamplingConfig(max_new_tokens=max_new_tokens)
        return SamplingConfig(max_new_tokens=max_new_tokens, temperature=self.temperature, top_k=self.top_k,
                              top_p=self.top_p, seed=seed)


@dataclass(frozen=True)
class Attempt:
    """What is to be attempted: which task, and the numbers by which its attempt is known."""

    task: int
    group: int
    sample: int
    seed: int
    prompt: tuple[int, ...]


@dataclass
class _Running:
    """An attempt while it is made."""

    attempt: Attempt
    env: EnvState
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    kept: list[float]
    turns: list[str] = field(default_factory=list)
    observations: list[tuple[str, ...]] = field(default_factory=list)
    ended: bool = False


def rollout(
    engine: Engine, env: ToolEnv, dialogue: Dialogue, tasks: Sequence[Task], attempts: Sequence[Attempt],
    config: RolloutConfig, *, report: Report | None = None,
) -> list[Episode]:
    """All attempts to their ends, in the order given.

    A turn that ended is read by the environment at once, and what the tools say is fed to the same row: ids are never
    made of text again, and nothing that was computed is computed twice. An observation that leaves no token for another
    turn within `max_response` ends the attempt.
    """
    running = [_Running(one, env.reset(tasks[one.task]), list(one.prompt), [False] * len(one.prompt),
                        [0.0] * len(one.prompt), [1.0] * len(one.prompt)) for one in attempts]
    first = min(config.max_turn or config.max_response, config.max_response)

    def respond(done: Completion) -> Turn | None:
        return _turn(running[done.prompt], done, env, dialogue, config)

    settings = [replace(config.sampling(first, one.seed), stop_ids=dialogue.stop_ids) for one in attempts]
    for _ in serve(engine, [one.prompt for one in attempts], settings, respond=respond, budget=config.max_response,
                   report=report):
        pass
    return [_finished(one) for one in running]


def _turn(one: _Running, done: Completion, env: ToolEnv, dialogue: Dialogue, config: RolloutConfig) -> Turn | None:
    one.ids += done.tokens
    one.sampled += [True] * len(done.tokens)
    one.logprobs += done.logprobs
    one.kept += done.kept
    text = dialogue.turn_text(done.tokens)
    one.turns.append(text)
    if done.reason == "length":
        one.env = cut_off(one.env)
        return None
    one.env, observations, over = env.step(one.env, text)
    if observations:
        one.observations.append(tuple(observation.text for observation in observations))
    if over:
        one.ended = one.env.reason in ("answered", "unbalanced")
        return None
    ids = dialogue.observation_ids(observations)
    left = config.max_response - (len(one.ids) - len(one.attempt.prompt)) - len(ids)
    if left < 1:
        one.env = one.env._replace(reason="length")
        return None
    one.ids += ids
    one.sampled += [False] * len(ids)
    one.logprobs += [0.0] * len(ids)
    one.kept += [1.0] * len(ids)
    return Turn(ids, min(config.max_turn or left, left))


def _finished(one: _Running) -> Episode:
    attempt = one.attempt
    return Episode(
        group=attempt.group, sample=attempt.sample, task=attempt.task, ids=tuple(one.ids), sampled=tuple(one.sampled),
        logprobs=tuple(one.logprobs), kept=tuple(one.kept), turns=tuple(one.turns),
        observations=tuple(one.observations), ended=one.ended, env=one.env)


def make_prompts(dialogue: Dialogue, tasks: Sequence[Task], max_prompt: int) -> dict[int, tuple[int, ...]]:
    """The prompts of the tasks by their numbers; those that are longer than `max_prompt` are left out."""
    prompts = {number: tuple(dialogue.prompt_ids(task)) for number, task in enumerate(tasks)}
    return {number: ids for number, ids in prompts.items() if len(ids) <= max_prompt}


def sampler_params(params: Any, mesh: Mesh) -> Any:
    """The parameters as the engine of this process takes them.

    One process decodes on its whole mesh. Of several each decodes its own attempts on its first device, with a copy of
    all parameters there.
    """
    if jax.process_count() == 1:
        return params
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(params)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def share_of_process(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts that this process makes: every n-th."""
    return list(attempts[jax.process_index()::jax.process_count()])


def gather(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes of all processes, the same list in each, in the order of the attempts before they were shared."""
    if jax.process_count() == 1:
        return list(episodes)
    mine = np.frombuffer(json.dumps([episode_to_json(one) for one in episodes]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(mine)]))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[:len(mine)] = mine
    everything = multihost_utils.process_allgather(padded)
    parts = [[episode_from_json(one) for one in json.loads(row[:size].tobytes())]
             for row, size in zip(everything, sizes, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
