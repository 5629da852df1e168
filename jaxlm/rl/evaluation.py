"""What a policy can do: one attempt at each held-out task, by set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxlm.rl.episode import Episode
from jaxlm.rl.learner import PolicyLearner
from jaxlm.rl.rollout import Attempt, RolloutConfig, make_prompts
from jaxlm.rl.score import Scored, numbers, score
from jaxlm.rl.task import Task

SHOWN = ("correct", "invalid_calls", "tool_similarity", "length")


def make_evaluation(
    learner: PolicyLearner, sets: Mapping[str, Sequence[Task]], config: RolloutConfig, seed: int = 0,
) -> Callable[[Any, int], tuple[dict[str, float], str]]:
    """`params, iteration -> (numbers, text to show)`: accuracy, tools and lengths on each set and each domain in it.

    Args:
      config: `temperature=0` for greedy attempts. ValueError if a task's prompt is longer than its `max_prompt`: an
        evaluation leaves nothing out.
    """
    scene = learner.scene
    prompts = {}
    for name, tasks in sets.items():
        prompts[name] = make_prompts(scene.dialogue, tasks, config.max_prompt)
        if missing := [task.id for i, task in enumerate(tasks) if i not in prompts[name]]:
            raise ValueError(f"the prompts of {len(missing)} of {len(tasks)} evaluation tasks ({missing[0]}, ...) are "
                             f"longer than rollout.max_prompt {config.max_prompt}")

    def evaluate(params: Any, iteration: int) -> tuple[dict[str, float], str]:
        values, lines = {}, [f"held out at iteration {iteration}:"]
        for name, tasks in sets.items():
            attempts = [Attempt(i, i, 0, seed, prompts[name][i]) for i in range(len(tasks))]
            episodes = learner.run(params, attempts, config, tasks)
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
