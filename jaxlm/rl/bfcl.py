"""The Berkeley Function Calling Leaderboard, version 4: its single-turn rows as tasks whose answer is the call itself.

    BFCL_v4_NAME.json                   {"id": ..., "question": [[{"role": "user", "content": ...}]],
                                         "function": [{"name": ..., "description": ..., "parameters": {...}}]}
    possible_answer/BFCL_v4_NAME.json   {"id": ..., "ground_truth": [{name: {parameter: [accepted values]}}]}

The tools have schemas and no more: an episode must end after one turn (`EnvConfig(max_turns=1)`).
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core.config import nearest
from jaxlm.data import json_rows
from jaxlm.data.json_rows import read_rows
from jaxlm.data.sources import find_files
from jaxlm.reward.call_match import match_calls
from jaxlm.rl.demonstration import assistant
from jaxlm.rl.task import Task
from jaxlm.rl.tools import Tool, schema_only

ANSWERS = "possible_answer"
# Names of types in Python, Java and JavaScript for those of JSON schema; "" and any say nothing.
TYPES = {"dict": "object", "HashMap": "object", "float": "number", "double": "number", "long": "integer",
         "tuple": "array", "Array": "array", "ArrayList": "array", "String": "string", "char": "string",
         "Boolean": "boolean", "any": None, "": None}
JSON_TYPES = ("object", "number", "integer", "array", "string", "boolean", "null")
NOT_CONVERTED = ("memory", "web_search", "multi_turn")  # categories whose rows name classes with a state instead
RELEVANCE = "live_relevance"  # any call would do, which no judge can say

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BfclConfig:
    """A file of BFCL, or a glob; answers are found in the folder `possible_answer` beside it."""

    path: str
    count: int | None = None  # the first so many tasks

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


class Bfcl(NamedTuple):
    """Tasks, the tools of all of them, and how many rows did not convert, by reason."""

    tasks: list[Task]
    tools: tuple[Tool, ...]
    left_out: Counter[str]


@dataclass
class _Tools:
    """Tools by name. BFCL describes some names differently from row to row; a later one is called NAME_2, NAME_3."""

    known: dict[str, Tool] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # by name in the file: name here by description

    def add(self, name: str, description: str, parameters: Mapping[str, Any]) -> str:
        variants = self.names.setdefault(name, {})
        key = json.dumps([description, parameters], sort_keys=True)
        if key not in variants:
            own, number = name, 2
            while own in self.known:
                own, number = f"{name}_{number}", number + 1
            self.known[own] = Tool(own, description, parameters, schema_only, trusted=True)
            variants[key] = own
        return variants[key]


def bfcl(config: BfclConfig) -> Bfcl:
    """The rows of all files that the path names. ValueError names file, line and field; what is left out is logged."""
    found = _read(config)
    if not found.tasks:
        raise ValueError(f"{config.path}: holds no row of BFCL")
    for reason, rows in found.left_out.items():
        logger.warning("%s: left out %d rows: %s", config.path, rows, reason)
    return found


def _read(config: BfclConfig) -> Bfcl:
    tools, tasks, left_out = _Tools(), [], Counter()
    for path in find_files(config.path):
        category = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("BFCL_v4_")
        if category.startswith(NOT_CONVERTED) or category == RELEVANCE:
            raise ValueError(f"{path}: rows of the category {category} are no single turn with accepted calls")
        accepted = {} if "irrelevance" in category else _answers(path)
        for number, row in read_rows(path):
            where = f"{path}:{number}"
            messages = _messages(row, where)
            if [message["role"] for message in messages] not in (["user"], ["system", "user"]):
                left_out["a dialogue of several turns"] += 1
                continue
            tasks.append(_task(row, messages, category, accepted, tools, where))
            if len(tasks) == config.count:
                return Bfcl(tasks, tuple(tools.known.values()), left_out)
    return Bfcl(tasks, tuple(tools.known.values()), left_out)


def json_schema(parameters: Any) -> Any:
    """The schema of a BFCL row as JSON schema. ValueError for a type that has no name there."""
    if isinstance(parameters, list):
        return [json_schema(one) for one in parameters]
    if not isinstance(parameters, Mapping):
        return parameters
    schema = {}
    for key, value in parameters.items():
        if key == "properties" and isinstance(value, Mapping):
            schema[key] = {name: json_schema(one) for name, one in value.items()}
        elif key == "type":
            if not isinstance(value, str) or value not in {*TYPES, *JSON_TYPES}:
                raise ValueError(f"{value!r:.40} is no type{nearest(str(value), (*TYPES, *JSON_TYPES))}")
            if (name := TYPES.get(value, value)) is not None:
                schema[key] = name
        elif key in ("items", "additionalProperties"):
            schema[key] = json_schema(value)
        elif key != "optional":  # said by `required`
            schema[key] = value
    return schema


def first_accepted(accepted: Mapping[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of the first accepted values; those that may be left out are, unless they are required."""
    made = {}
    for name, choices in accepted.items():
        values = choices if isinstance(choices, list) else [choices]
        given = [one for one in values if one != ""]
        if given and ("" not in values or name in required):
            made[name] = _example(given[0])
        elif values and name in required:
            made[name] = ""
    return made


def _example(value: Any) -> Any:
    if isinstance(value, Mapping):
        return first_accepted(value)
    return [_example(one) for one in value] if isinstance(value, list) else value


def _task(row: Mapping[str, Any], messages: list[dict[str, str]], category: str, accepted: Mapping[str, Any],
          tools: _Tools, where: str) -> Task:
    name = json_rows.field(row, "id", str, where)
    renamed, required = {}, {}
    for function in json_rows.field(row, "function", list, where):
        if not isinstance(function, Mapping):
            raise ValueError(f"{where}: field 'function' must hold objects, got {function!r:.80}")
        own = json_rows.field(function, "name", str, f"{where}: field 'function'")
        try:
            schema = json_schema(json_rows.field(function, "parameters", dict, where))
            renamed[own] = tools.add(own, function.get("description", ""), schema)
        except ValueError as error:
            raise ValueError(f"{where}: field 'function': {own}: {error}") from None
        required[own] = tuple(schema.get("required", ()))
    wanted = [] if "irrelevance" in category else accepted.get(name)
    if wanted is None:
        raise ValueError(f"{where}: {name!r} has no answer in {ANSWERS}")
    for call in wanted:
        if not isinstance(call, Mapping) or len(call) != 1 or next(iter(call)) not in renamed:
            raise ValueError(f"{where}: the accepted call {call!r:.120} names no function of the row")
    answer = [{renamed[own]: parameters} for call in wanted for own, parameters in call.items()]
    calls = [(renamed[own], first_accepted(parameters, required[own]))
             for call in wanted for own, parameters in call.items()]
    try:
        taught = bool(calls) and match_calls(calls, answer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    system = messages[0]["content"] if len(messages) == 2 else None
    return Task(id=name, question=messages[-1]["content"], tools=tuple(renamed.values()), answers=(answer,),
                judge="calls", domain=category, teacher=(assistant("", calls),) if taught else (), system=system)


def _messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    turns = json_rows.field(row, "question", list, where)
    if len(turns) != 1 or not isinstance(turns[0], list) or not turns[0]:
        raise ValueError(f"{where}: field 'question' must hold one list of messages, got {turns!r:.80}")
    for message in turns[0]:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str)
                                                       for key in ("role", "content")):
            raise ValueError(f"{where}: field 'question' must hold messages with role and content, got {message!r:.80}")
    return turns[0]


def _answers(path: Path) -> dict[str, Any]:
    """Accepted calls by the id of their row."""
    plain = path.parent / ANSWERS / path.name.removesuffix(".gz")
    found = [one for one in (plain, plain.with_name(plain.name + ".gz")) if one.is_file()]
    if not found:
        raise ValueError(f"{path}: needs the accepted calls in {plain} (or .gz)")
    return {json_rows.field(row, "id", str, f"{found[0]}:{number}"):
            json_rows.field(row, "ground_truth", list, f"{found[0]}:{number}") for number, row in read_rows(found[0])}
