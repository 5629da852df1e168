"""Judges mathematics with math-verify, in a process of its own that `reward.math_answer` starts.

It runs as a script and imports nothing of jaxlm. What a model wrote may take hours or all memory to evaluate, in one
call that no exception interrupts; here the kernel ends it.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

START_SECONDS = 60.0


def expressions(text: str) -> list[Any]:
    """What math-verify reads in an answer: as LaTeX, or, if that gives nothing, as anything in the text."""
    boxed = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
    return [one for one in boxed if not isinstance(one, str)] or parse(text, parsing_timeout=None)


def judge(prediction: str, answers: list[str]) -> dict[str, Any]:
    """`equal`, and `error` if a comparison failed and no other one succeeded."""
    ours, error = expressions(prediction), None
    for answer in answers:
        try:
            if verify(expressions(answer), ours, timeout_seconds=None, raise_on_error=True):
                return {"equal": True, "error": None}
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"[:200]
    return {"equal": False, "error": error}


def limit_memory(memory: int) -> None:
    """At most `memory` bytes beyond what is in use; Linux only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            limit = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> None:
    """One JSON request a line, one JSON reply a line, until the input is closed."""
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    limit_memory(2**30)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        request = json.loads(line)
        # Nothing handles this signal, so that it ends the process.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            reply = judge(request["prediction"], request["answers"])
        except Exception as error:
            reply = {"equal": False, "error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


signal.setitimer(signal.ITIMER_REAL, START_SECONDS)  # of which the import takes most
from math_verify import LatexExtractionConfig, parse, verify  # noqa: E402

if __name__ == "__main__":
    main()
