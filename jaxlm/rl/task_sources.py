"""Tasks by a line of text, such as `words:train?count=2000&digits=1`, together with the tools that they offer.

    words:train|held_out|unseen   `WordProblemConfig`        bfcl:PATH    `BfclConfig`
    strings:train|held_out        `StringFunctionConfig`     gym:NAME     `GymConfig`
    gsm8k:PATH                    `Gsm8kConfig`              PATH.jsonl   a file of tasks, `FileConfig`

Behind `?` stand fields of the configuration, `key=value`, joined by `&`; lists have commas.
"""

import types
import typing
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from jaxlm.core.config import nearest
from jaxlm.rl.arithmetic import ARITHMETIC, CALCULATOR
from jaxlm.rl.bfcl import BfclConfig, bfcl
from jaxlm.rl.gsm8k import Gsm8kConfig, gsm8k_tasks
from jaxlm.rl.gym_tasks import GymConfig, gym_tasks
from jaxlm.rl.string_functions import STRING_TOOLS, StringFunctionConfig, string_functions
from jaxlm.rl.task import Task, read_tasks
from jaxlm.rl.tools import Tool
from jaxlm.rl.word_problems import WordProblemConfig, word_problems

SourceKind = Literal["words", "strings", "gsm8k", "bfcl", "gym", "file"]
KNOWN_TOOLS = {tool.name: tool for tool in (*ARITHMETIC, CALCULATOR, *STRING_TOOLS)}


class TaskSource(NamedTuple):
    """Tasks, and those of their tools that are known here: all, except where a file of tasks names others."""

    tasks: list[Task]
    tools: tuple[Tool, ...]


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """A JSONL file of tasks, see `jaxlm.rl.task`."""

    path: str
    count: int | None = None  # the first so many
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


class TaskStatistics(NamedTuple):
    """What tasks and their teachers are like; lengths in words are (least, mean, most)."""

    count: int
    domains: dict[str, int]               # tasks
    calls: dict[int, int]                 # tasks by how many calls the teacher makes
    tools: dict[str, int]                 # the teacher's calls by name
    question_words: tuple[int, float, int]
    said_words: tuple[int, float, int]    # of all that the teacher says, without calls
    vocabulary: int                       # different words of questions and teachers, numbers not counted


def open_tasks(spec: str) -> list[Task]:
    """The tasks that a line names. ValueError names the source, the option, or the file with line and field."""
    return open_task_source(spec).tasks


def open_task_source(spec: str) -> TaskSource:
    """The tasks that a line names, and their tools. ValueError as for `open_tasks`."""
    kind, config = parse_task_source(spec)
    return SOURCES[kind][1](config)


def parse_task_source(spec: str) -> tuple[SourceKind, Any]:
    """The kind of a source and its configuration. ValueError for an unknown source or option, or a wrong value.

    Values are percent-decoded. The first `?` ends the path, so a glob uses `*` and `[...]`.
    """
    address, _, query = spec.partition("?")
    kind, colon, target = address.partition(":")
    if not colon or kind not in SOURCES:
        if not address.endswith(".jsonl"):
            raise ValueError(f"tasks {spec!r}: neither a source of tasks{nearest(kind, SOURCES)} nor a file of the "
                             f"ending .jsonl; sources: {', '.join(f'{name}:' for name in SOURCES)}")
        kind, target = "file", address
    config = SOURCES[kind][0]
    hints = get_type_hints(config)
    first = next(iter(hints))  # what stands behind the colon
    try:
        if not target:
            raise ValueError(f"says no {first}")
        values = {first: target}
        for item in query.split("&") if query else []:
            key, equals, value = item.partition("=")
            options = [name for name in hints if name != first]
            if key not in options:
                raise ValueError(f"unknown option {key!r}{nearest(key, options)}; options: {', '.join(options)}")
            if key in values:
                raise ValueError(f"option {key!r} is given twice")
            if not equals:
                raise ValueError(f"option {key!r} needs a value")
            values[key] = _value(hints[key], key, urllib.parse.unquote(value, errors="strict"))
        return kind, config(**values)
    except ValueError as error:
        raise ValueError(f"tasks {spec!r}: {error}") from None


def statistics(tasks: Iterable[Task]) -> TaskStatistics:
    """See `TaskStatistics`. ValueError without tasks."""
    tasks = list(tasks)
    if not tasks:
        raise ValueError("there are no tasks to describe")
    calls = [task.teacher_calls() for task in tasks]
    said = [[message.get("content") or "" for message in task.teacher if message["role"] == "assistant"]
            for task in tasks]
    words = {word.strip(".,?!\"'():;") for task, texts in zip(tasks, said, strict=True)
             for word in " ".join([task.question, *texts]).split()}
    return TaskStatistics(
        len(tasks), dict(Counter(task.domain for task in tasks)), dict(sorted(Counter(map(len, calls)).items())),
        dict(Counter(name for one in calls for name, _ in one).most_common()),
        _spread([len(task.question.split()) for task in tasks]),
        _spread([sum(len(text.split()) for text in texts) for texts in said]),
        len({word for word in words if word and not any(letter.isdigit() for letter in word)}))


def _spread(values: Sequence[int]) -> tuple[int, float, int]:
    return min(values), sum(values) / len(values), max(values)


def _value(hint: Any, key: str, text: str) -> Any:
    """The value of an option: a number, a switch, a text, or a list of texts with commas."""
    choices = [one for one in get_args(hint) if one is not types.NoneType] if _is_union(hint) else [hint]
    (kind,) = choices
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"option {key!r} must be true or false, got {text!r}")
        return text == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"option {key!r} must be {'an integer' if kind is int else 'a number'}, "
                             f"got {text!r}") from None
    return tuple(text.split(",")) if typing.get_origin(kind) is tuple else text


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _words(config: WordProblemConfig) -> TaskSource:
    return TaskSource(word_problems(config), ARITHMETIC)


def _strings(config: StringFunctionConfig) -> TaskSource:
    return TaskSource(string_functions(config), STRING_TOOLS)


def _gsm8k(config: Gsm8kConfig) -> TaskSource:
    return TaskSource(gsm8k_tasks(config), (*ARITHMETIC, CALCULATOR) if config.arithmetic else (CALCULATOR,))


def _bfcl(config: BfclConfig) -> TaskSource:
    found = bfcl(config)
    return TaskSource(found.tasks, found.tools)


def _gym(config: GymConfig) -> TaskSource:
    return TaskSource(gym_tasks(config), (CALCULATOR,) if config.calculator else ())


def _file(config: FileConfig) -> TaskSource:
    tasks = read_tasks(Path(config.path).expanduser())
    domains = list(dict.fromkeys(task.domain for task in tasks))
    for name in config.domains:
        if name not in domains:
            raise ValueError(f"{config.path}: has no task of the domain {name!r}{nearest(name, domains)}; its domains: "
                             f"{', '.join(domains)}")
    chosen = [task for task in tasks if not config.domains or task.domain in config.domains][:config.count]
    offered = {name for task in chosen for name in task.tools}
    return TaskSource(chosen, tuple(tool for name, tool in KNOWN_TOOLS.items() if name in offered))


# The first field of a configuration is what stands behind the colon.
SOURCES: dict[SourceKind, tuple[type, Callable[[Any], TaskSource]]] = {
    "words": (WordProblemConfig, _words), "strings": (StringFunctionConfig, _strings), "gsm8k": (Gsm8kConfig, _gsm8k),
    "bfcl": (BfclConfig, _bfcl), "gym": (GymConfig, _gym), "file": (FileConfig, _file),
}
