"""Trains the same small run twice, once with kills at random moments, and compares every bit.

Run: python -m tools.soak --minutes 30 --processes 2 --devices 4
     python -m tools.soak --steps 40 --kills 3 --processes 1 --devices 8          a short one

Both runs are the real recipe on CPU devices. The disturbed one meets SIGKILL and SIGTERM, to one process or to all,
while it starts and compiles, while it trains and while it writes a checkpoint, in random order; then it is started
again with `--resume` (`--overwrite` as long as no checkpoint is complete). When one process is gone the others must
end by themselves; those that have not after twice the heartbeat are killed, as a scheduler would. Compared at the end:
parameters, optimizer moments and data positions of the last checkpoint, and every record of `metrics.jsonl`, those of
repeated steps too. Exit status 1 when anything differs, or when an attempt failed that nobody disturbed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from jaxlm.core.config import load_config
from jaxlm.core.log import human_seconds
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.core.tree import path_name
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.optim.optimizer import make_optimizer
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, saved_steps
from jaxlm.train.loop import STOPPED
from jaxlm.train.state import TrainState, abstract_state
from recipes.pretrain import Config as RecipeConfig

MODEL = ["--model.vocab-size", "300", "--model.d-model", "64", "--model.num-layers", "2", "--model.num-heads", "4",
         "--model.num-kv-heads", "2", "--model.head-dim", "16", "--model.d-ff", "128", "--tokenizer.path", "bytes",
         "--pipeline.batch-size", "16", "--pipeline.seq-len", "64", "--accumulate", "2", "--samples.tokens", "3",
         "--data.path", "sample:ko?documents=300&weight=2", "sample:en?documents=300",
         "--data.held-out", "sample:ko?documents=10&split=held_out", "--loop.log-every", "1"]
MOMENTS = ("start", "training", "checkpoint")
KINDS = ("SIGKILL one", "SIGKILL all", "SIGTERM one", "SIGTERM all")
EXACT = ("loss", "accuracy", "grad_norm", "lr", "eval/")  # what a record holds beside times


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long and how hard."""

    minutes: float = 30           # of the disturbed run; after them nothing is killed any more
    processes: int = 2
    devices: int = 4              # CPU devices of each process
    steps: int = 0                # 0: as many as fit, by a calibration
    kills: int = 0                # at most so many; 0: as many as come
    heartbeat: int = 10           # seconds, --distributed.heartbeat
    workers: int = 0              # loader processes of each process
    seed: int = 0                 # of the kills
    folder: Path = Path("runs/soak")

    def __post_init__(self):
        if self.processes < 1 or self.devices < 1 or self.minutes <= 0 or min(self.steps, self.kills) < 0:
            raise ValueError("processes, devices and minutes must be positive, steps and kills not negative")


@dataclass
class Tally:
    """What happened to the disturbed run."""

    kills: Counter = field(default_factory=Counter)     # by (moment, kind)
    attempts: int = 0
    resumes: int = 0
    restarts: int = 0             # before a first checkpoint
    ended: int = 0                # processes that ended by themselves after another had died
    killed: int = 0               # processes that did not
    stopped: int = 0              # attempts that a SIGTERM ended in order, with a checkpoint
    partial: int = 0              # checkpoints found half written
    lost: int = 0                 # reported steps that no checkpoint held
    failures: list[str] = field(default_factory=list)


class Group:
    """The processes of one attempt; their output goes to files."""

    def __init__(self, config: Config, run: Path, arguments: Sequence[str], name: str):
        self.config, self.records = config, run / "metrics.jsonl"
        self.seen = _size(self.records) if "--resume" in arguments else 0
        logs = config.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{name}_process_{i}.txt" for i in range(config.processes)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for i, path in enumerate(self.logs):
            together = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes",
                        str(config.processes), "--distributed.process-id", str(i), "--distributed.heartbeat",
                        str(config.heartbeat)] if config.processes > 1 else []
            with path.open("wb") as output:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-m", "recipes.pretrain", *arguments, *together], stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(config.devices)}))

    def codes(self) -> list[int | None]:
        """Exit statuses, None while a process runs; 0 also for one that stopped in order."""
        return [0 if (code := process.poll()) == STOPPED else code for process in self.processes]

    def running(self) -> bool:
        return None in self.codes()

    def reported(self) -> int:
        """Records that this attempt has written."""
        if _size(self.records) <= self.seen:
            return 0
        with self.records.open("rb") as file:
            file.seek(self.seen)
            return file.read().count(b"\n")

    def wait(self, seconds: float) -> bool:
        """Whether all ended within so many seconds."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.running()

    def kill(self) -> int:
        """Ends what still runs, also loaders that outlived their process; returns how many processes had not ended."""
        left = self.codes().count(None)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group is named after the process
            process.wait()
        return left

    def tail(self) -> str:
        return "\n".join(f"--- {path}\n" + path.read_text(errors="replace")[-1500:] for path in self.logs)


def soak(config: Config) -> list[str]:
    """Runs both, prints the table and returns what differs."""
    if config.folder.exists() and not (config.folder / "logs").is_dir() and any(config.folder.iterdir()):
        raise ValueError(f"--folder {config.folder} holds something else; this tool deletes what it finds")
    shutil.rmtree(config.folder, ignore_errors=True)
    steps, every = (config.steps, max(2, config.steps // 8)) if config.steps else _fitting(config)
    whole, cut = config.folder / "whole", config.folder / "cut"
    start, step = _whole(config, whole, _flags(config, whole, steps, every))
    print(f"undisturbed: {steps} steps, a checkpoint every {every}, {start:.1f} s to the first step, "
          f"{step:.3f} s a step", flush=True)
    began = time.monotonic()
    tally = _disturbed(config, cut, _flags(config, cut, steps, every), steps, start, every)
    different = tally.failures or _differences(whole, cut, steps)
    _print_table(tally, cut, time.monotonic() - began, different)
    return different


def _flags(config: Config, run: Path, steps: int, every: int) -> list[str]:
    return [*MODEL, "--folder", str(run), "--loop.steps", str(steps), "--loop.eval-every", str(4 * every),
            "--checkpoint.every", str(every), "--pipeline.workers", str(config.workers)]


def _fitting(config: Config) -> tuple[int, int]:
    """Steps, and steps between checkpoints, for a disturbed run of `minutes`.

    With a checkpoint about every start's time, an attempt gets 0.8 of such an interval further on average and takes one
    start more: the run takes 1 + 1 / 0.8 times its training, and some waiting.
    """
    run = config.folder / "calibration"
    start, step = _whole(config, run, _flags(config, run, 60, 30))
    return max(60, round(config.minutes * 60 / 2.4 / step)), max(2, round(start / step))


def _whole(config: Config, run: Path, arguments: list[str]) -> tuple[float, float]:
    """An undisturbed run: seconds to its first step, and of a later one."""
    group, clock = Group(config, run, arguments, run.name), time.time()
    while group.running():
        time.sleep(0.1)
    if any(group.codes()):
        raise ValueError(f"the undisturbed run failed with {group.codes()}\n{group.tail()}")
    times = [record["time"] for record in _records(run) if "loss" in record]
    return times[0] - clock, (times[-1] - times[len(times) // 4]) / (len(times) - 1 - len(times) // 4)


def _disturbed(config: Config, run: Path, arguments: list[str], steps: int, start: float, every: int) -> Tally:
    """Starts, kills and starts again until the run is done; `start`: about the seconds to the first step."""
    tally, rng, began = Tally(), random.Random(config.seed), time.monotonic()
    plan = _plan(rng)
    while not tally.failures:
        saved = _latest(run)
        tally.resumes += saved > 0
        tally.restarts += saved == 0 and tally.attempts > 0
        group = Group(config, run, [*arguments, "--resume" if saved else "--overwrite"],
                      f"{run.name}_{tally.attempts}")
        tally.attempts += 1
        quiet = time.monotonic() - began > 60 * config.minutes or 0 < config.kills <= tally.kills.total()
        try:
            struck = "" if quiet else _strike(group, run, *next(plan), rng, start, every, tally)
            _settle(group, struck, 60 + 3 * start, tally)
        finally:
            group.kill()
        reached, kept = _last_step(run) if group.reported() else saved, _latest(run)
        if not any(group.codes()):
            if kept == steps:
                return tally
            tally.stopped += 1
            if not struck or reached > kept:
                tally.failures.append(f"attempt {tally.attempts} ended in order at step {reached}, but the last "
                                      f"checkpoint is step {kept}\n{group.tail()}")
        tally.lost += max(0, reached - kept)
        tally.partial += len(list((run / "checkpoints").glob("*-tmp*")))
    return tally


def _plan(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Every kind at every moment, again and again, each time in another order."""
    while True:
        yield from rng.sample(list(product(MOMENTS, KINDS)), len(MOMENTS) * len(KINDS))


def _strike(group: Group, run: Path, moment: str, kind: str, rng: random.Random, start: float, every: int,
            tally: Tally) -> str:
    """Waits for a moment and sends the signal; returns `kind`, or nothing when the attempt ended before."""
    known = set((run / "checkpoints").glob("*-tmp*"))
    end, records = time.monotonic() + rng.uniform(0, start), rng.randint(1, 3 * every)
    begun = {"start": lambda: time.monotonic() > end or group.reported() > 0,
             "training": lambda: group.reported() >= records,
             "checkpoint": lambda: bool(set((run / "checkpoints").glob("*-tmp*")) - known)}[moment]
    while group.running() and not begun():
        time.sleep(0.005)
    group.wait(rng.uniform(0, 0.2))  # anywhere in a step, anywhere in the writing
    if None not in group.codes():
        return ""
    victims = group.processes if kind.endswith("all") else [rng.choice(group.processes)]
    signum = signal.SIGKILL if "SIGKILL" in kind else signal.SIGTERM
    for process in victims:
        if kind.endswith("all"):  # as a scheduler or a terminal does: to the loaders too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
    tally.kills[moment, kind] += 1
    return kind


def _settle(group: Group, struck: str, limit: float, tally: Tally) -> None:
    """Lets the attempt end: all of it, or what a death leaves within twice the heartbeat."""
    deaths = (-signal.SIGKILL, -signal.SIGTERM)
    end = time.monotonic() + limit
    while group.running() and not any(group.codes()) and (not struck or time.monotonic() < end):
        time.sleep(0.02)
    codes = group.codes()
    if any(codes) and struck and set(codes) & set(deaths):
        survivors = sum(code not in deaths for code in codes)
        group.wait(2 * group.config.heartbeat)
        killed = group.kill()
        tally.ended, tally.killed = tally.ended + survivors - killed, tally.killed + killed
    elif any(codes) or group.running():
        group.wait(2 * group.config.heartbeat)
        tally.failures.append(f"attempt {tally.attempts} {'after ' + struck if struck else 'undisturbed'}: exit "
                              f"status {group.codes()}\n{group.tail()}")


def _differences(whole: Path, cut: Path, steps: int) -> list[str]:
    """What is not the same in the last checkpoints and in the records of two runs."""
    found = []
    left, right = (_last_state(run, steps) for run in (whole, cut))
    for name, value in left[0].items():
        other = right[0][name]
        if value.dtype != other.dtype or value.tobytes() != other.tobytes():
            found.append(f"{name}: {int((value != other).sum())} of {value.size} numbers differ")
    if left[0].keys() != right[0].keys() or left[1] != right[1]:
        found.append("the positions in the data differ")
    expected = {}
    for record in _records(whole):
        expected |= {(record["step"], name): value for name, value in _exact(record).items()}
    seen = {}
    for record in _records(cut):
        for name, value in _exact(record).items():
            seen[record["step"], name] = value
            if expected.get((record["step"], name)) != value:
                found.append(f"step {record['step']}: {name} {value} instead of {expected.get((record['step'], name))}")
    if seen.keys() != expected.keys():
        found.append(f"{len(expected.keys() - seen.keys())} records are missing")
    return found


def _last_state(run: Path, steps: int) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays by name and the data positions of the last checkpoint, read on one device."""
    class Position:
        def set_state(self, state: Any) -> None:
            self.state = state

    config, position = load_config(RecipeConfig, run / "config.json"), Position()
    abstract = abstract_state(build(config.model, config.compute).init, make_optimizer(config.optim, steps),
                              make_mesh(MeshConfig(), jax.devices()[:1]), PARAM_RULES)
    checkpointer = Checkpointer(run, CheckpointConfig(), {}, {})
    state: TrainState = checkpointer.restore(abstract, position)
    checkpointer.close()
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}, position.state


def _exact(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name.startswith(EXACT)}


def _records(run: Path) -> list[dict[str, Any]]:
    """Every record in the order of writing; a line that a kill tore is left out."""
    records, path = [], run / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def _last_step(run: Path) -> int:
    """The step reported last; an attempt before may have reported later ones, which no checkpoint held."""
    return next((record["step"] for record in reversed(_records(run)) if "loss" in record), 0)


def _latest(run: Path) -> int:
    """Step of the newest complete checkpoint, or 0."""
    try:
        return saved_steps(run.absolute() / "checkpoints")[0]
    except CheckpointError:
        return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _print_table(tally: Tally, cut: Path, seconds: float, different: Sequence[str]) -> None:
    steps = [record["step"] for record in _records(cut) if "loss" in record]
    print(f"\n| kills | {' | '.join(KINDS)} |\n| --- |{' --- |' * len(KINDS)}")
    for moment in MOMENTS:
        print(f"| {moment} | {' | '.join(str(tally.kills[moment, kind]) for kind in KINDS)} |")
    rows = {
        "disturbed run": human_seconds(seconds), "kills": tally.kills.total(), "attempts": tally.attempts,
        "resumes": tally.resumes, "starts from step 0 again": tally.restarts,
        "ended in order by SIGTERM": tally.stopped,
        "survivors of a death that ended by themselves": tally.ended, "survivors killed": tally.killed,
        "checkpoints found half written": tally.partial,
        "checkpoints set aside as damaged": len(list((cut / "checkpoints").glob("*.unusable"))),
        "steps lost": tally.lost, "steps repeated": len(steps) - len(set(steps)),
        "verdict": "bit for bit the same" if not different else f"{len(different)} DIFFERENCES",
    }
    print("\n| what | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for line in different[:20]:
        print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=argv, prog="python -m tools.soak", description=__doc__)
    try:
        different = soak(config)
    except ValueError as error:
        print(f"tools.soak: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
