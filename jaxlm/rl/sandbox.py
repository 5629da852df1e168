"""Python for a model, run by the interpreter `pydantic-monty`: no files, no network, no processes, bounded in time.

Monty (github.com/pydantic/monty) is an interpreter of a part of Python, written in Rust; nothing of CPython can be
reached from its code. It runs in a process of its own, below the worker process of `jaxlm.rl.tools`. Needs the extra
`rl`.
"""

import functools
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jaxlm.core.extras import extra
from jaxlm.rl.tools import Tool

DESCRIPTION = """Runs Python code and returns what it prints and the value of its last line.

Each run starts afresh. A part of the standard library is there (math, re, json, datetime and others); files, network
and other processes are not."""
GRACE = 0.5   # seconds beyond the limit until the interpreter's process is killed
# Equal code gives equal output: a run that is resumed repeats what it did.
POLICY = {"datetime": datetime(2026, 1, 1), "sleep": "zero", "random_start": {"seed": 0}}


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Limits of one run of code."""

    seconds: float = 2.0
    memory: int = 64 * 2**20   # bytes
    recursion: int = 200       # nested calls
    max_output: int = 20_000   # bytes that may be printed

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "recursion", "max_output"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def python_tool(config: SandboxConfig | None = None) -> Tool:
    """The tool `python(code)`. State does not survive a call. ValueError without pydantic-monty."""
    extra("pydantic_monty", "rl")
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"],
                  "additionalProperties": False}
    return Tool("python", DESCRIPTION, parameters, functools.partial(run_python, config or SandboxConfig()))


def run_python(config: SandboxConfig, code: str) -> str:
    """Printed text, then the value of the last expression as Python shows it. ValueError with the error's line."""
    monty = extra("pydantic_monty", "rl")
    output = monty.CollectString(max_bytes=config.max_output)
    limits = {"max_feed_duration_secs": config.seconds, "max_memory": config.memory,
              "max_recursion_depth": config.recursion}
    try:
        with _pool(config).checkout(limits=limits, os_policy=POLICY) as session:
            value = session.feed_run(code, print_callback=output)
    except monty.MontyError as error:
        printed = f"\nIt had printed:\n{output.output}" if output.output else ""
        raise ValueError(_told(error, config) + printed) from None
    parts = [output.output.removesuffix("\n")] if output.output else []
    parts += [] if value is None else [repr(value)]
    return "\n".join(parts) or "(no output)"


def _told(error: Any, config: SandboxConfig) -> str:
    """An error in one line. Of limits it names no measured value, which would change from run to run."""
    if isinstance(error, extra("pydantic_monty", "rl").MontyCrashedError):
        return f"the code was stopped: it ran longer than {config.seconds:g} seconds, or crashed the interpreter"
    kind, frames = error.display("type-msg"), error.traceback()
    if kind.startswith("TimeoutError: feed time limit"):
        return f"TimeoutError: the code ran longer than {config.seconds:g} seconds"
    if kind.startswith("MemoryError"):
        return (f"MemoryError: the code used more than {config.memory} bytes of memory, "
                f"or printed more than {config.max_output}")
    return f"line {frames[-1].line}: {kind}" if frames else kind


@functools.cache
def _pool(config: SandboxConfig) -> Any:
    """One interpreter process, started at the first call; it ends with this one."""
    return extra("pydantic_monty", "rl").Monty(max_processes=1, request_timeout=config.seconds + 2 * GRACE,
                          feed_duration_limit_grace=GRACE).__enter__()
