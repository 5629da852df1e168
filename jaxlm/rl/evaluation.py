"""What a policy can do: one attempt at each held-out task, by set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxlm.rl.env import Dialogue
from jaxlm.rl.episode import Episode
from jaxlm.rl.learner import PolicyLearner
from jaxlm.rl.rollout import Attempt, RolloutConfig, make_prompts
from jaxlm.rl.score import Scored, numbers, score
from jaxlm.rl.task import Task

SHOWN = ("correct", "invalid_calls", "tool_similarity", "length")


class EvalSet(NamedTuple):
    """Tasks that are only measured on."""

    tasks: list[Task]
    prompts: dict[int, tuple[int, ...]]


def make_eval_set(dialogue: Dialogue, tasks: Sequence[Task], max_prompt: int) -> EvalSet:
    """ValueError if a prompt is longer than `max_prompt`: an evaluation leaves nothing out."""
    prompts = make_prompts(dialogue, tasks, max_prompt)
    if missing := [task.id for i, task in enumerate(tasks) if i not in prompts]:
        raise ValueError(f"the prompts of {len(missing)} of {len(tasks)} evaluation tasks ({missing[0]}, ...) are "
                         f"longer than rollout.max_prompt {max_prompt}")
    return EvalSet(list(tasks), prompts)


def make_evaluation(
    learner: PolicyLearner, sets: Mapping[str, EvalSet], config: RolloutConfig, seed: int = 0,
) -> Callable[[Any, int], tuple[dict[str, float], str]]:
    """`params, iteration -> (numbers, text to show)`: accuracy, tools and lengths on each set and each domain in it.

    `config`: how attempts are made, greedy with `temperature=0`.
    """
    scene = learner.scene

    def evaluate(params: Any, iteration: int) -> tuple[dict[str, float], str]:
        values, lines = {}, [f"held out at iteration {iteration}:"]
        sampler = learner.sampler(params)
        for name, (tasks, prompts) in sets.items():
            attempts = [Attempt(i, i, 0, seed, prompts[i]) for i in range(len(tasks))]
            episodes = learner.run(sampler, attempts, config, tasks)
            scored = score(episodes, tasks, list(scene.env.tools), scene.reward, config.max_response)
            found = numbers(scored, len(scene.env.tools)) | by_domain(episodes, tasks, scored)
            values |= {f"eval/{name}/{key}": value for key, value in found.items()}
            lines.append(f"  {name}: " + "  ".join(f"{key} {found[key]:.3f}" for key in SHOWN if key in found))
            lines.append(f"    {tasks[0].question} | {' | '.join(episodes[0].turns)}".replace("\n", " ⏎ "))
        return values, "\n".join(lines)

    return evaluate


def by_domain(episodes: Sequence[Episode], tasks: Sequence[Task], scored: Scored) -> dict[str, float]:
    """Accuracy in each domain, if there are several."""
    domains = [tasks[one.task].domain for one in episodes]
    correct = np.nan_to_num(scored.trajectory.correct)
    if len(set(domains)) < 2:
        return {}
    return {f"correct/{name}": float(np.mean(correct[np.array(domains) == name])) for name in sorted(set(domains))}


def greedy(config: RolloutConfig) -> RolloutConfig:
    """The same budgets without sampling."""
    return replace(config, temperature=0.0, top_k=None, top_p=None)
