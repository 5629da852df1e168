"""A model as the teacher: attempts that were right become the trajectories that tasks carry."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxlm.rl.calls import OPEN, Call, parse_calls
from jaxlm.rl.episode import Episode
from jaxlm.rl.score import Scored
from jaxlm.rl.task import Task


def messages_of(episode: Episode) -> list[dict[str, Any]]:
    """The turns of an attempt as messages of assistant and tool; calls that did not parse are not among them."""
    messages = []
    for i, turn in enumerate(episode.turns):
        calls = [one for one in parse_calls(turn).calls if isinstance(one, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": turn.partition(OPEN)[0].strip() if calls else turn}
        if calls:
            message["tool_calls"] = [{"type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                                     for one in calls]
        messages.append(message)
        if calls and i < len(episode.observations):
            messages += [{"role": "tool", "content": text} for text in episode.observations[i]]
    return messages


def taught(tasks: Sequence[Task], episodes: Sequence[Episode], scored: Scored) -> list[Task]:
    """The tasks that were solved, each with the shortest attempt that is fit to teach.

    Fit is an attempt that is right, came to its end, and called at least one tool, only those on offer and all without
    a failure (MENTOR, specification 1.3).
    """
    best: dict[int, Episode] = {}
    for number, one in enumerate(episodes):
        state = one.env
        clean = state.calls and not (state.invalid or state.failed or state.refused or state.unparsable)
        right = np.nan_to_num(scored.trajectory.correct[number]) == 1
        if right and clean and scored.trajectory.ended[number]:
            old = best.get(one.task)
            if old is None or one.num_sampled() < old.num_sampled():
                best[one.task] = one
    return [replace(tasks[i], teacher=tuple(messages_of(best[i]))) for i in sorted(best)]
