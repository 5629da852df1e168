"""What a teacher shows: trajectories made with real tools, and tasks as conversations to imitate."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.config import nearest
from jaxlm.core.files import replacing
from jaxlm.rl.task import Task
from jaxlm.rl.tool_worker import render
from jaxlm.rl.tools import Tool

Call = tuple[str, Mapping[str, Any]]


def assistant(content: str, calls: Sequence[Call] = ()) -> dict[str, Any]:
    """A message of the assistant, in the form of OpenAI and Hugging Face."""
    made = [{"type": "function", "function": {"name": name, "arguments": dict(arguments)}} for name, arguments in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": made} if made else {})


def call_turn(content: str, calls: Sequence[Call], tools: Mapping[str, Tool]) -> list[dict[str, Any]]:
    """A turn that calls trusted tools, and what they say, word for word as an environment brings it back."""
    assert all(tools[name].trusted for name, _ in calls)
    results = [{"role": "tool", "name": name, "content": render(tools[name].call(**arguments))}
               for name, arguments in calls]
    return [assistant(content, calls), *results]


def boxed(answer: Any) -> dict[str, Any]:
    r"""The last message: the answer is \boxed{...}."""
    return assistant(f"The answer is \\boxed{{{answer if isinstance(answer, str) else json.dumps(answer)}}}.")


def prompt_messages(task: Task, question: str = "{question}") -> list[dict[str, Any]]:
    """What stands before the first turn, as `jaxlm.rl.env.Dialogue` has it; `question` as in `EnvConfig`."""
    system = [] if task.system is None else [{"role": "system", "content": task.system}]
    return [*system, {"role": "user", "content": question.replace("{question}", task.question)}]


def conversation(task: Task, tools: Mapping[str, Tool], *, question: str = "{question}") -> dict[str, Any]:
    """A task and its teacher as a row for fine-tuning: `{"messages": [...], "tools": [...]}`.

    Its tokens are those of an episode in which the policy writes what the teacher wrote. ValueError for a task without
    teacher, or one that offers a tool that is not here.
    """
    if not task.teacher:
        raise ValueError(f"task {task.id!r} has no teacher, so there is nothing to imitate")
    for name in task.tools:
        if name not in tools:
            raise ValueError(f"task {task.id!r} offers the tool {name!r}, which is not here{nearest(name, tools)}")
    return {"messages": [*prompt_messages(task, question), *map(dict, task.teacher)],
            "tools": [tools[name].schema() for name in task.tools]}


def write_conversations(path: str | Path, tasks: Iterable[Task], tools: Mapping[str, Tool], *,
                        question: str = "{question}") -> int:
    """Writes `conversation` of each task as JSONL, and returns how many; the file appears whole or not at all."""
    path, count = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for task in tasks:
            file.write(json.dumps(conversation(task, tools, question=question), ensure_ascii=False) + "\n")
            count += 1
        if not count:
            raise ValueError(f"{path}: there is no task to write")
        file.flush()
        os.fsync(file.fileno())
    return count
