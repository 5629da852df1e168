"""Several sources of tasks as one."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from jaxlm.rl.task import Task
from jaxlm.rl.task_sources import open_task_source
from jaxlm.rl.tools import Tool


class TaskSet(NamedTuple):
    """Tasks by the line that named them, and the tools that some task offers."""

    parts: tuple[list[Task], ...]
    tools: tuple[Tool, ...]

    def tasks(self) -> list[Task]:
        """All of them, in order."""
        return list(chain.from_iterable(self.parts))


def open_task_set(specs: Sequence[str]) -> TaskSet:
    """The tasks of all lines; see `open_task_source`.

    ValueError for an id that two sources have, and for two tools of one name.
    """
    if twice := {spec for spec in specs if specs.count(spec) > 1}:
        raise ValueError(f"tasks {min(twice)} are named twice")
    sources = [open_task_source(spec) for spec in specs]
    seen: dict[str, str] = {}
    for spec, source in zip(specs, sources, strict=True):
        for task in source.tasks:
            if seen.setdefault(task.id, spec) != spec:
                raise ValueError(f"task {task.id!r} is in {seen[task.id]} and in {spec}; ids must be distinct")
    offered = {name for source in sources for task in source.tasks for name in task.tools}
    tools: dict[str, Tool] = {}
    for spec, source in zip(specs, sources, strict=True):
        for tool in source.tools:
            if tool.name in offered and tools.setdefault(tool.name, tool).schema() != tool.schema():
                raise ValueError(f"{spec} has a tool {tool.name!r} that is not the one of another source")
    return TaskSet(tuple(source.tasks for source in sources), tuple(tools.values()))
