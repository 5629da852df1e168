r"""Answers in mathematics: taking them out of `\boxed{}`, and asking math-verify whether two are equal.

Needs the extra `rl`, for the latter.
"""

import atexit
import contextlib
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_CHARS = 2000  # of an answer; longer ones equal nothing
SECONDS = 1.0     # for one comparison

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_boxed(text: str, *, fbox: bool = False) -> str | None:
    r"""The content of the last box of a text, or None if it is empty, not closed, or not there.

    `\boxed{3}` is 3, `\boxed{\frac{1}{2}}` is `\frac{1}{2}`, `\boxed {3}` is 3, `\boxed 3$` is 3 (all up to a dollar
    sign or the end), `\boxed{\{1\}}` is `\{1\}`, `\boxed{1} \boxed{2` is None.

    Args:
      text: only what a model sampled; the prompt may show an empty box.
      fbox: take `\fbox` where there is no `\boxed`. MENTOR does so in references, not in what the model wrote.
    """
    name = r"\boxed"
    start = text.rfind(name)
    if start < 0 and fbox:
        name = r"\fbox"
        start = text.rfind(name)
    if start < 0:
        return None
    rest = text[start + len(name):]
    content = rest.lstrip()
    if content.startswith("{"):
        content = _braced(content)
    else:
        content = content.partition("$")[0] if rest[:1].isspace() else None
    return content.strip() or None if content is not None else None


def _braced(text: str) -> str | None:
    """What stands between a brace at the start and the one that closes it."""
    depth = 0
    for match in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0 and match.group() == "}":
            return text[1:match.start()]
    return None


def check_math_verify() -> None:
    """ValueError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("judging mathematics needs the math-verify package: pip install jaxlm[rl]")


def symbolic_equal(prediction: str, answers: Sequence[str]) -> bool:
    """Whether math-verify finds a prediction equal to one of the answers. Threads may call it.

    It runs in a worker process, which is kept for the next call. math-verify's own limit is a signal, which only a
    main thread may set and which does not interrupt a long multiplication; this one ends the worker.

    Raises:
      ValueError: the prediction is longer than `MAX_CHARS`, or math-verify is not installed.
      TimeoutError: it took longer than `SECONDS`.
      RuntimeError: math-verify failed.
    """
    if len(prediction) > MAX_CHARS:
        raise ValueError(f"the answer has {len(prediction)} characters, more than {MAX_CHARS}")
    worker = _worker()
    reply = worker.ask({"prediction": prediction, "answers": list(answers), "seconds": SECONDS})
    _IDLE.put(worker)
    if reply["error"]:
        raise RuntimeError(f"math-verify: {reply['error']}")
    return reply["equal"]


class _Worker:
    """A process with `reward/math_worker.py`."""

    def __init__(self) -> None:
        check_math_verify()
        script = Path(__file__).with_name("math_worker.py")
        # -P: modules beside the script must not hide others.
        self.process = subprocess.Popen([sys.executable, "-P", str(script)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def ask(self, request: dict) -> dict:
        """TimeoutError or RuntimeError if there is no reply; then the process is gone."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:
            self.close()
            raise
        if line:
            return json.loads(line)
        self.close()
        if self.process.returncode == -signal.SIGALRM:
            raise TimeoutError(f"comparing the answers took longer than {SECONDS:g} seconds")
        raise RuntimeError(f"the process that compares answers ended with status {self.process.returncode}")

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Ends the process, unless it has ended itself."""
        try:
            self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):  # of a request that nobody reads any more
            self.process.stdin.close()
        self.process.stdout.close()


_IDLE: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


def _worker() -> _Worker:
    while True:
        try:
            worker = _IDLE.get_nowait()
        except queue.Empty:
            return _Worker()
        if worker.alive():
            return worker
        worker.close()


@atexit.register
def _close_idle() -> None:
    while not _IDLE.empty():
        worker = _IDLE.get()
        worker.process.kill()
        worker.close()
