"""Tools a model may call: what they are, how a Python function becomes one, and how they run under limits."""

import contextlib
import copy
import inspect
import itertools
import json
import multiprocessing
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import docstring_parser
import jsonschema

from jaxlm.core.config import nearest
from jaxlm.rl.tool_worker import ErrorKind, Outcome, failure, outcome

START_SECONDS = 60.0  # for the interpreter and the imports of the tools' modules
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_BASE = jsonschema.Draft202012Validator
# JSON Schema calls 2.0 an integer; range(2.0) does not.
_Validator = jsonschema.validators.extend(
    _BASE, type_checker=_BASE.TYPE_CHECKER.redefine("integer", lambda checker, value: type(value) is int))


@dataclass(frozen=True)
class Tool:
    """A tool. `trusted`: it is called in this process, where nothing ends it, so it must be pure, quick and bounded."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments, an object
    call: Callable[..., Any]       # takes the arguments by name
    trusted: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"a tool's name has letters, digits, '_', '.' and '-' only, at most 64, got {self.name!r}")
        try:
            _Validator.check_schema(self.parameters)
        except jsonschema.SchemaError as error:
            raise ValueError(f"tool {self.name}: the parameters are no JSON schema: {error.message}") from None
        if self.parameters.get("type") != "object":
            raise ValueError(f"tool {self.name}: the schema of the parameters must have the type object")
        if _refers(self.parameters):
            raise ValueError(f"tool {self.name}: $ref is not supported in the schema of the parameters")

    def schema(self) -> dict[str, Any]:
        """What a chat template shows to the model, in the common form."""
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": copy.deepcopy(dict(self.parameters))}}


def schema_only(**arguments: Any) -> str:
    """The `call` of a tool that is a schema and no more; `Dialogue` sees to it that nobody reads its result."""
    return "called"


class Result(NamedTuple):
    text: str  # for the model, bounded; of a failed call it starts with "error: "
    ok: bool
    error: ErrorKind | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ToolLimits:
    """Of one call."""

    max_chars: int = 4000
    seconds: float = 5.0
    memory: int = 512 * 2**20  # bytes beyond what the tools' modules take; in a worker process, on Linux

    def __post_init__(self) -> None:
        for name, least in (("max_chars", 100), ("seconds", 0.01), ("memory", 2**20)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def tool_of(function: Callable[..., Any], *, trusted: bool = False) -> Tool:
    """A tool out of a function with type hints and a docstring.

    Hints: str, int, float, bool, None, list, dict, Any, Literal, and unions of them. A parameter with a default is not
    required. Descriptions of parameters come from the docstring (Google, numpy or reST form). ValueError says what a
    model could not know about the function.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        signature, hints = inspect.signature(function), typing.get_type_hints(function)
    except (TypeError, ValueError, NameError) as error:
        raise ValueError(f"tool {name}: its signature cannot be read: {error}") from None
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    if not documented.description:
        raise ValueError(f"tool {name} has no docstring; the model reads there what the tool is for")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"tool {name} is a coroutine; a tool is an ordinary function")
    described = {one.arg_name: " ".join((one.description or "").split()) for one in documented.params}
    if unknown := [one for one in described if one not in signature.parameters]:
        raise ValueError(f"tool {name}: the docstring describes {unknown[0]!r}, which is no parameter"
                         f"{nearest(unknown[0], signature.parameters)}")
    properties, required = {}, []
    for key, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name}: the parameter {key!r} cannot be given by name")
        if key not in hints:
            raise ValueError(f"tool {name}: the parameter {key!r} has no type hint, so the model cannot know its type")
        try:
            properties[key] = _schema(hints[key])
        except TypeError as error:
            raise ValueError(f"tool {name}: the parameter {key!r} has the type {error}; use str, int, float, bool, "
                             "list, dict, Literal, or a union of them") from None
        if described.get(key):
            properties[key]["description"] = described[key]
        if parameter.default is parameter.empty:
            required.append(key)
        elif isinstance(parameter.default, str | int | float):
            properties[key]["default"] = parameter.default
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(name, documented.description.strip(), parameters, function, trusted)


class Runner:
    """Runs tools, each call under the limits, and never raises for what a model or a tool did. Threads may share it.

    Trusted tools run here, others in a worker process, which is killed at the time limit. Workers have the tools by
    pickle: functions at the top level of a module that can be imported. A worker serves one call at a time and is kept
    for the next; as many are started as calls run at once. Close it, or use it as a context manager.
    """

    def __init__(self, tools: Sequence[Tool], limits: ToolLimits | None = None) -> None:
        """Starts a first worker if there is work for it. ValueError names a tool that no worker could run."""
        self._limits = limits or ToolLimits()
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.name for tool in tools]
            raise ValueError(f"two tools are called {next(one for one in names if names.count(one) > 1)!r}")
        self._validators = {tool.name: _Validator(tool.parameters) for tool in tools}
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        isolated = [tool for tool in tools if not tool.trusted]
        self._setup = _pickled(isolated, self._limits)
        if isolated:
            self._idle.put(_Worker(self._setup))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def run(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """The result of a tool of this runner, by name."""
        start = time.monotonic()
        text, error = self._run(self._tools[name], arguments)
        return Result(text, error is None, error, time.monotonic() - start)

    def close(self) -> None:
        """Ends the worker processes."""
        while not self._idle.empty():
            self._idle.get().kill()

    def _run(self, tool: Tool, arguments: Mapping[str, Any]) -> Outcome:
        limits = self._limits
        if problems := [*itertools.islice(self._validators[tool.name].iter_errors(arguments), 3)]:
            told = "; ".join(map(_problem, problems))
            return failure(f"{told}. {_usage(tool)}", "arguments", limits.max_chars)
        if tool.trusted:
            return outcome(tool.call, copy.deepcopy(dict(arguments)), limits.max_chars)
        worker = self._worker()
        try:
            answer = worker.call(tool.name, arguments, limits.seconds)
        except TimeoutError:
            return failure(f"the tool did not finish within {limits.seconds:g} seconds", "timeout", limits.max_chars)
        except (EOFError, OSError):
            return failure("the tool's process ended", "crashed", limits.max_chars)
        finally:
            if worker.alive():
                self._idle.put(worker)
        return answer

    def _worker(self) -> "_Worker":
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return _Worker(self._setup)
            if worker.alive():
                return worker


class _Worker:
    """A process with `jaxlm.rl.tool_worker.main`, ready for calls."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = multiprocessing.Pipe()
        # A fresh interpreter knows nothing of this program's main module, threads and accelerators.
        program = (f"import sys; sys.path[:] = {sys.path!r}; "
                   f"from jaxlm.rl.tool_worker import main; main({theirs.fileno()})")
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "JAX_PLATFORMS": "cpu"})
        theirs.close()
        self._connection = ours
        try:
            ours.send_bytes(setup)
            problem = ours.recv_bytes().decode() if ours.poll(START_SECONDS) else "it took too long to start"
        except (EOFError, OSError):
            problem = "it ended while it started"
        if problem:
            self.kill()
            raise ValueError(f"a worker process cannot load the tools ({problem}); such tools are functions at the top "
                             "level of a module that can be imported, others must be trusted")

    def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> Outcome:
        """TimeoutError, EOFError or OSError if there is no answer; then the process is gone."""
        try:
            self._connection.send_bytes(json.dumps([name, arguments, seconds]).encode())
            if not self._connection.poll(seconds):
                raise TimeoutError
            return Outcome(*json.loads(self._connection.recv_bytes()))
        except BaseException:
            self.kill()
            raise

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and those it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


def _pickled(tools: Sequence[Tool], limits: ToolLimits) -> bytes:
    """What `tool_worker.main` reads first. ValueError names the tool that cannot be sent."""
    for tool in tools:
        try:
            pickle.dumps(tool.call)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"tool {tool.name} cannot be sent to a worker process ({error}): define it at the top "
                             "level of a module, or make it trusted, which runs it in this process") from None
    calls = pickle.dumps({tool.name: tool.call for tool in tools})
    return pickle.dumps((limits.max_chars, limits.memory, calls))


def _schema(hint: Any) -> dict[str, Any]:
    """JSON schema of a type hint. TypeError with the hint for one that JSON has nothing for."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg) for arg in args]}
    if origin is list:
        return {"type": "array"} | ({"items": _schema(args[0])} if args else {})
    if origin is dict and args[:1] in ((), (str,)):
        return {"type": "object"} | ({"additionalProperties": _schema(args[1])} if args else {})
    if origin in _SCALARS:
        return {"type": _SCALARS[origin]}
    raise TypeError(hint)


def _refers(schema: Any) -> bool:
    """Whether a schema names another one, which would have to be found, perhaps on the network."""
    if isinstance(schema, Mapping):
        return not schema.keys().isdisjoint(("$ref", "$dynamicRef")) or any(map(_refers, schema.values()))
    return isinstance(schema, list | tuple) and any(map(_refers, schema))


def _problem(error: jsonschema.ValidationError) -> str:
    """`numbers[1]: 'x' is not of type 'number'`."""
    where = error.json_path.removeprefix("$").removeprefix(".")
    return f"{where}: {error.message}" if where else error.message


def _usage(tool: Tool) -> str:
    """`power takes base, exponent`, where what is not required stands in brackets."""
    required = tool.parameters.get("required", ())
    names = [name if name in required else f"[{name}]" for name in tool.parameters.get("properties", ())]
    return f"{tool.name} takes {', '.join(names) or 'no arguments'}"
