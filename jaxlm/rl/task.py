"""A task for a model with tools: the question, the tools it may call, accepted answers, and how a teacher solved it.

A file of tasks is JSONL, one object a line with the fields of `Task`:

    {"id": "shop-1", "question": "2 + 3?", "tools": ["add"], "answers": [5], "judge": "numeric", "domain": "shop",
     "teacher": [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]},
                 {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5"}]}
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxlm.core.config import nearest
from jaxlm.data.rows import decode_json
from jaxlm.rl.calls import read_call

Judge = Literal["math", "numeric", "exact", "set", "calls"]  # how an answer is compared with the accepted ones
_LISTS = ("tools", "answers", "teacher")


@dataclass(frozen=True)
class Task:
    """One question. ValueError names the field that is wrong."""

    id: str
    question: str
    tools: tuple[str, ...]                       # names of the tools on offer
    answers: tuple[Any, ...]                     # JSON values; one of them suffices
    judge: Judge
    domain: str
    teacher: tuple[Mapping[str, Any], ...] = ()  # messages of assistant and tool in the form of OpenAI, Hugging Face
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question", "judge", "domain"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"field {name!r} must be a text that is not empty, got {getattr(self, name)!r:.80}")
        for name in _LISTS:
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"field {name!r} must be a list, got {getattr(self, name)!r:.80}")
        if self.judge not in get_args(Judge):
            raise ValueError(f"field 'judge' must be one of {', '.join(get_args(Judge))}, got {self.judge!r:.80}"
                             f"{nearest(self.judge, get_args(Judge))}")
        if not all(isinstance(name, str) for name in self.tools) or len(set(self.tools)) < len(self.tools):
            raise ValueError(f"field 'tools' must name each tool once, got {list(self.tools)!r:.80}")
        if not self.answers:
            raise ValueError("field 'answers' must hold at least one accepted answer")
        if not isinstance(self.system, str | None):
            raise ValueError(f"field 'system' must be a text or null, got {self.system!r:.80}")
        for i, message in enumerate(self.teacher):
            try:
                _calls(message)
            except ValueError as error:
                raise ValueError(f"field 'teacher[{i}]': {error}") from None

    def teacher_calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and arguments of the teacher's calls, in order."""
        return [call for message in self.teacher for call in _calls(message)]

    def to_json(self) -> dict[str, Any]:
        """The task as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def task_from_json(values: Any) -> Task:
    """The inverse of `Task.to_json`. ValueError names a field that is unknown, missing or wrong."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a task must be an object, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(Task)}
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown field {name!r}{nearest(name, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"field {name!r} is missing")
    return Task(**{name: tuple(value) if name in _LISTS and isinstance(value, list) else value
                   for name, value in values.items()})


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a JSONL file. ValueError names the line that holds no task, or an id that was seen before."""
    path, tasks, lines = Path(path), [], {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            task = task_from_json(decode_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if task.id in lines:
            raise ValueError(f"{path}:{number}: the id {task.id!r} is that of line {lines[task.id]}")
        lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path}: holds no task")
    return tasks


def _calls(message: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(message, Mapping) or message.get("role") not in ("assistant", "tool"):
        raise ValueError(f"must be a message of the role assistant or tool, got {message!r:.80}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple) or (calls and message["role"] == "tool"):
        raise ValueError(f"'tool_calls' must be a list of an assistant's calls, got {calls!r:.80}")
    return [read_call(call.get("function", call) if isinstance(call, Mapping) else call) for call in calls]
