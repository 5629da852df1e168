"""Calls a tool and writes down what came of it; `main` does so in a process of its own.

`jaxlm.rl.tools.Runner` starts that process and kills it when a call takes too long. It imports the tools' modules and
nothing else, has no standard output, and ends with the process that started it.
"""

import json
import math
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

ErrorKind = Literal["arguments", "raised", "result", "timeout", "crashed"]
GRACE = 1.0  # seconds that the starting process gets to end this one


class Outcome(NamedTuple):
    text: str
    error: ErrorKind | None = None


def outcome(call: Callable[..., Any], arguments: Mapping[str, Any], max_chars: int) -> Outcome:
    """What a call returned, or why it did not, in at most `max_chars` characters."""
    try:
        value = call(**arguments)
    except (Exception, SystemExit) as error:
        # A ValueError speaks for itself; of others the name may be all there is.
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return failure(f"{kind}{error}", "raised", max_chars)
    try:
        return Outcome(bounded(render(value), max_chars))
    except RecursionError:
        return failure("the tool returned a value that is nested too deeply", "result", max_chars)
    except (TypeError, ValueError) as error:
        return failure(f"the tool returned {error}", "result", max_chars)


def failure(message: str, kind: ErrorKind, max_chars: int) -> Outcome:
    return Outcome(bounded(f"error: {message}", max_chars), kind)


def bounded(text: str, max_chars: int) -> str:
    """The text, of a longer one the start and a mark; without halves of surrogate pairs, which no encoding has."""
    if len(text) > max_chars:
        mark = f"\n[cut: {len(text)} characters]"
        text = text[:max_chars - len(mark)] + mark
    return text.encode("utf-8", "replace").decode("utf-8")


def render(value: Any) -> str:
    """A value as JSON; a text stands for itself, unless it is empty, and so do numbers that JSON does not have.

    5.0 is `5.0`, 0 is `0`, False is `false`, None is `null`, "" is `""`, inf is `inf`, [nan] is `["nan"]`.
    TypeError or ValueError, to be read after "the tool returned", for what JSON cannot hold.
    """
    plain = _plain(value)
    if isinstance(plain, str) and plain:
        return plain
    try:
        return json.dumps(plain, ensure_ascii=False)
    except ValueError:
        raise ValueError("an integer of more than 4300 digits") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError("an object whose keys are no texts")
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return [_plain(one) for one in sorted(value, key=repr)]  # the order of a set changes from process to process
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{len(value)} bytes, which are no text")
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    raise TypeError(f"a {type(value).__name__}, which is no JSON value")


def main(descriptor: int) -> None:
    """Serves calls until the other end of the connection is closed. What it unpickles is its parent's."""
    connection = Connection(descriptor)
    max_chars, memory, pickled = pickle.loads(connection.recv_bytes())
    try:
        calls = pickle.loads(pickled)
    except Exception as error:
        connection.send_bytes(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        return
    _limit_memory(memory)
    connection.send_bytes(b"")
    while True:
        try:
            name, arguments, seconds = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Without a parent to end it, an endless call ends itself: nothing handles this signal.
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
        answer = outcome(calls[name], arguments, max_chars)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(answer).encode())


def _limit_memory(memory: int) -> None:
    """At most `memory` bytes beyond what the interpreter and the tools' modules take; Linux only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            limit = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
