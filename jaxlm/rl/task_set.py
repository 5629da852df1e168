"""Several sources of tasks as one, and a corpus to search in."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from jaxlm.rl.search_tools import DENSE_SEARCH, KEYWORD_SEARCH, SearchConfig, search_tools
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


def open_task_set(specs: Sequence[str], search: SearchConfig | None = None) -> TaskSet:
    """The tasks of all lines; see `open_task_source`. With a corpus every task also offers to search it.

    ValueError for an id that two sources have, for two tools of one name, and for tasks with a search in no corpus.
    """
    if twice := {spec for spec in specs if specs.count(spec) > 1}:
        raise ValueError(f"tasks {min(twice)} are named twice")
    sources = [open_task_source(spec) for spec in specs]
    found = [(spec, source.tools) for spec, source in zip(specs, sources, strict=True)]
    if searches := search_tools(search or SearchConfig()):
        sources = [source._replace(tasks=[_searching(task, searches) for task in source.tasks]) for source in sources]
        found.append((search.corpus, searches))
    seen: dict[str, str] = {}
    for spec, source in zip(specs, sources, strict=True):
        for task in source.tasks:
            if seen.setdefault(task.id, spec) != spec:
                raise ValueError(f"task {task.id!r} is in {seen[task.id]} and in {spec}; ids must be distinct")
    offered = {name for source in sources for task in source.tasks for name in task.tools}
    tools: dict[str, Tool] = {}
    for spec, some in found:
        for tool in some:
            if tool.name in offered and tools.setdefault(tool.name, tool).schema() != tool.schema():
                raise ValueError(f"{spec} has a tool {tool.name!r} that is not the one of another source")
    for name, flag, missing in ((KEYWORD_SEARCH, "corpus", "corpus is named to search in"),
                                (DENSE_SEARCH, "model", "model is named to search with")):
        if name in offered - set(tools):
            raise ValueError(f"a task offers the tool {name!r}, but no {missing} (--tasks.search.{flag} of "
                             "recipes.rl_distill)")
    return TaskSet(tuple(source.tasks for source in sources), tuple(tools.values()))


def _searching(task: Task, searches: Sequence[Tool]) -> Task:
    return replace(task, tools=tuple(dict.fromkeys((*task.tools, *(tool.name for tool in searches)))))
