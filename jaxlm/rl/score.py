"""Attempts to rewards: judged on the host, turned into arrays, and scored by one jitted function."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.reward.compose import Reward
from jaxlm.reward.math_answer import extract_boxed
from jaxlm.reward.tags import balanced
from jaxlm.reward.tool_match import similarity
from jaxlm.reward.trajectory import Trajectory, encode_calls, summary
from jaxlm.reward.verify import judge_rows
from jaxlm.rl.episode import Episode
from jaxlm.rl.task import Task

MAX_CALLS, MAX_PARAMS = 32, 8  # of an attempt that rewards compare; more of them count as invalid


class Scored(NamedTuple):
    """Attempts with what was said of them."""

    trajectory: Trajectory
    reward: Reward                      # of numpy arrays
    predictions: tuple[str | None, ...]
    errors: tuple[str | None, ...]      # of judges; such an attempt counts as wrong


def prediction(episode: Episode, task: Task) -> str | None:
    """What a judge reads: the last box of the last turn, or for tasks that ask for calls these; None: no answer."""
    if task.judge == "calls":
        calls = [{"name": name, "arguments": arguments} for name, arguments in episode.env.calls]
        # To call nothing is an answer where that is accepted.
        refrains = [] in task.answers and episode.ended and not episode.env.unparsable
        return json.dumps(calls) if calls or refrains else None
    return extract_boxed(episode.turns[-1]) if episode.turns else None


def trajectory_of(
    episodes: Sequence[Episode], tasks: Sequence[Task], tool_names: Sequence[str], correct: np.ndarray,
    answered: Sequence[bool], max_length: int,
) -> Trajectory:
    """Attempts as the arrays that rewards read; the width of tokens is a power of two."""
    width = 1 << (max(len(one.ids) for one in episodes) - 1).bit_length()
    tokens, sampled = np.zeros((len(episodes), width), np.int32), np.zeros((len(episodes), width), bool)
    for row, one in enumerate(episodes):
        tokens[row, :len(one.ids)], sampled[row, :len(one.ids)] = one.ids, one.sampled
    own = [tasks[one.task] for one in episodes]
    # A tool has one number everywhere; one that a task does not offer has a name there that no call can have.
    names = [[name if name in task.tools else f" {name}" for name in tool_names] for task in own]
    calls = encode_calls([one.env.calls for one in episodes], names, max_calls=MAX_CALLS, max_params=MAX_PARAMS)
    teacher = encode_calls([task.teacher_calls() for task in own], [tool_names] * len(own))
    count = lambda name: np.array([getattr(one.env, name) for one in episodes], np.int32)
    return Trajectory(
        tokens, sampled, np.array([one.group for one in episodes], np.int32),
        tool_ids=calls.tool_ids, call_keys=calls.call_keys, params=calls.params, values=calls.values,
        teacher_tool_ids=teacher.tool_ids, teacher_call_keys=teacher.call_keys, teacher_params=teacher.params,
        teacher_values=teacher.values, num_turns=count("turns"),
        num_calls=np.array([len(one.env.calls) + one.env.unparsable for one in episodes], np.int32),
        num_unparsable=count("unparsable"), num_failed=count("failed"),
        ended=np.array([one.ended or (task.judge == "calls" and one.env.reason == "turns")
                        for one, task in zip(episodes, own, strict=True)]),
        answered=np.array(answered), well_formed=np.array([all(map(balanced, one.turns)) for one in episodes]),
        correct=correct, max_length=np.full(len(episodes), max_length, np.int32))


def score(
    episodes: Sequence[Episode], tasks: Sequence[Task], tool_names: Sequence[str],
    reward: Callable[[Trajectory], Reward], max_length: int,
) -> Scored:
    """Judges every attempt and gives it its reward.

    Args:
      tool_names: all tools of the environment.
      reward: see `reward.compose`.
      max_length: the budget of sampled tokens, for terms on lengths.
    """
    own = [tasks[one.task] for one in episodes]
    predictions = [prediction(one, task) for one, task in zip(episodes, own, strict=True)]
    judged = judge_rows([task.judge for task in own], predictions, [task.answers for task in own])
    correct = judged.correct
    if jax.process_count() > 1:  # a judge has a time limit, which a busier process may miss: the first one decides
        correct = multihost_utils.broadcast_one_to_all(correct)
    trajectory = trajectory_of(episodes, tasks, tool_names, np.asarray(correct),
                               [one is not None for one in predictions], max_length)
    return Scored(trajectory, jax.device_get(reward(trajectory)), tuple(predictions), judged.errors)


def numbers(scored: Scored, num_tools: int) -> dict[str, float]:
    """What a log shows of attempts."""
    reward, trajectory = scored.reward, scored.trajectory
    values = {name: float(mean.value()) for name, mean in summary(trajectory).items()}
    finite = reward.reward[np.isfinite(reward.reward)]
    lengths = np.sum(trajectory.sampled, axis=1)
    ended = lengths[trajectory.ended]
    values |= {
        "correct": float(np.nan_to_num(trajectory.correct).mean()), "judge_errors": sum(map(bool, scored.errors)),
        "reward": _mean(finite), "reward_std": float(finite.std()) if len(finite) else 0.0,
        "reward_missing": len(reward.reward) - len(finite), "tokens/sampled": int(lengths.sum()),
        "length_min": int(lengths.min()), "length_max": int(lengths.max()), "length_ended": _mean(ended),
        "tool_similarity": tool_similarity(trajectory, num_tools)}
    for name, term in reward.terms.items():
        known = term[np.isfinite(term)]
        if len(known):
            values |= {f"terms/{name}": float(known.mean()), f"terms/{name}_std": float(known.std())}
        values[f"missing/{name}"] = int(reward.missing[name])
    for name, passed in reward.gates.items():
        values[f"gates/{name}"] = float(passed.mean())
    return values


def tool_similarity(trajectory: Trajectory, num_tools: int) -> float:
    """1 - JSD of the names of all tools called against those of the teacher, over all attempts together."""
    def histogram(ids: np.ndarray) -> np.ndarray:
        used = ids[ids != -1]
        return np.bincount(np.where(used < 0, num_tools, used), minlength=num_tools + 1).astype(np.float32)

    return float(similarity(histogram(trajectory.tool_ids), histogram(trajectory.teacher_tool_ids)))


def _mean(values: np.ndarray) -> float:
    """0 of nothing."""
    return float(values.mean()) if len(values) else 0.0
