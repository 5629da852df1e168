"""A recipe as a program, with its logging, flags and errors; and recipes that run others, each in its own process."""

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jaxlm.core import config as flags
from jaxlm.core.files import replacing
from jaxlm.core.log import setup_logging

T = TypeVar("T")

log = logging.getLogger(__name__)


def run_command(
    work: Callable[[T], None], presets: Mapping[str, T], argv: Sequence[str] | None, *, prog: str, description: str
) -> None:
    """`work` with the configuration that a command line asks for (`config.parse`).

    ValueError and OSError end the process as `config.fail` says, with status 2; an interrupt with 130 and SIGTERM with
    143, as shells do, after every `with` block was left.
    """
    setup_logging()
    config = flags.parse(presets, argv, prog=prog, description=description)
    try:
        with _unwinding():
            work(config)
    except (ValueError, OSError) as error:
        flags.fail(error, prog)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM leaves every `with` block in order, instead of ending the process where it stands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_recipe(recipe: str, result: Path | None, *arguments: object) -> None:
    """Runs `python -m recipes.RECIPE ARGUMENTS` in a process of its own, unless its result is there.

    Args:
      result: appears whole, at the end; None for a recipe that itself finds what is there and goes on.

    ValueError if it fails; what it says itself has been printed.
    """
    if result is not None and result.exists():
        log.info("%s is there", result)
        return
    line = [sys.executable, "-m", f"recipes.{recipe}", *map(str, arguments)]
    log.info("$ %s", " ".join(["python", *line[1:]]))
    if run_process(line):
        raise ValueError(f"recipes.{recipe} failed, see above; the same command goes on from here")


def run_process(line: Sequence[str]) -> int:
    """Runs a command with this process's modules and returns its status; what ends this process asks the other one to
    end too, and waits for what it still saves."""
    process = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def run_training_recipe(recipe: str, folder: Path, *arguments: object) -> None:
    """`run_recipe` of a training run in `folder`: one that was interrupted goes on from its last checkpoint.

    The command is kept in `folder` from the start, and again when the run has ended; ValueError if the run that is
    there was made with another.
    """
    done, kept = folder / "command.json", folder / "command_begun.json"
    made = {"recipe": recipe, "flags": [str(one) for one in arguments]}
    # Only whole checkpoints have a number alone for a name; of others no run can go on.
    started = (folder / "checkpoints").is_dir() and any(
        one.name.isdigit() for one in (folder / "checkpoints").iterdir())
    kept = done if done.exists() else kept
    if (started or done.exists()) and kept.exists() and (then := json.loads(kept.read_bytes())) != made:
        raise ValueError(f"{folder} was made by recipes.{then['recipe']} {shlex.join(then['flags'])}, not by "
                         f"recipes.{recipe} {shlex.join(made['flags'])}; delete it or name another --folder")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _keep(folder / "command_begun.json", made)
    run_recipe(recipe, done, *arguments, "--folder", folder, "--resume" if started else "--overwrite")
    _keep(done, made)


def _keep(path: Path, made: Mapping[str, object]) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(made), encoding="utf-8")
