"""Trains the same small run twice, once with kills at random moments, and compares every bit.

Run: python -m tools.soak --minutes 30 --processes 2 --devices 4
     python -m tools.soak --steps 40 --kills 3 --processes 1 --devices 8          a short one
     python -m tools.soak --recipe rl_distill --processes 1 --devices 2           of an RL run

Both runs are the real recipe on CPU devices. The disturbed one meets SIGKILL and SIGTERM, to one process or to all,
while it starts and compiles, while it trains and while it writes a checkpoint, in random order; then it is started
again with `--resume` (`--overwrite` as long as no checkpoint is complete). Training of an RL run is its rollouts,
scores, updates (step) and evaluations: its processes are stopped, and killed only when the files that they have left
say that they are where they were meant to be. When one process is gone the others must end by themselves; those that
have not after twice the heartbeat are killed, as a scheduler would. Compared at the end: parameters, optimizer moments
and data positions of the last checkpoint, and every record of `metrics.jsonl`, those of repeated steps too. Exit
status 1 when anything differs, or when an attempt failed that nobody disturbed.
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
from typing import Any, Literal, get_args

import tyro

from jaxlm.core.log import human_seconds
from jaxlm.train.loop import STOPPED
from tools.soak_runs import RECIPES, differences, flags, latest, partial, records_of

Kind = Literal["SIGKILL one", "SIGKILL all", "SIGTERM one", "SIGTERM all"]
KINDS = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long and how hard."""

    recipe: Literal["pretrain", "rl_distill"] = "pretrain"
    minutes: float = 30           # of the disturbed run; after them nothing is killed any more
    processes: int = 2
    devices: int = 4              # CPU devices of each process
    steps: int = 0                # 0: as many as fit, by a calibration
    kills: int = 0                # at most so many; 0: as many as come
    kinds: tuple[Kind, ...] = KINDS
    moments: tuple[str, ...] = ()  # those of the recipe to strike at; none: all
    heartbeat: int = 10           # seconds, --distributed.heartbeat
    workers: int = 0              # loader processes of each process
    seed: int = 0                 # of the kills
    folder: Path = Path("runs/soak")

    def __post_init__(self):
        if self.processes < 1 or self.devices < 1 or self.minutes <= 0 or min(self.steps, self.kills) < 0:
            raise ValueError("processes, devices and minutes must be positive, steps and kills not negative")
        if unknown := [name for name in self.moments if name not in RECIPES[self.recipe].moments]:
            raise ValueError(f"recipe {self.recipe} has no moment {unknown[0]}, only "
                             f"{', '.join(RECIPES[self.recipe].moments)}")
        if not self.kinds:
            raise ValueError(f"kinds must name some of {', '.join(KINDS)}")


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

    def __init__(self, config: Config, run: Path, arguments: Sequence[str], name: str, first: int = 0):
        """`first`: the step that it goes on from."""
        self.config, self.run, self.first, self.began = config, run, first, time.time()
        self.seen = _size(run / "metrics.jsonl") if "--resume" in arguments else 0
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
                    [sys.executable, "-m", f"recipes.{config.recipe}", *arguments, *together], stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(config.devices)}))

    def codes(self) -> list[int | None]:
        """Exit statuses, None while a process runs; 0 also for one that stopped in order."""
        return [0 if (code := process.poll()) == STOPPED else code for process in self.processes]

    def running(self) -> bool:
        return None in self.codes()

    def written(self) -> list[dict[str, Any]]:
        """Records of this attempt; a run that starts over leaves those of the one before for a while."""
        return [record for record in records_of(self.run, self.seen) if record["time"] >= self.began]

    def send(self, signum: int) -> None:
        """To all processes and their loaders, as a scheduler or a terminal does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)  # the group is named after the process

    def wait(self, seconds: float) -> bool:
        """Whether all ended within so many seconds."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.running()

    def kill(self) -> int:
        """Ends what still runs, also loaders that outlived their process; returns how many processes had not ended."""
        left = self.codes().count(None)
        self.send(signal.SIGKILL)
        for process in self.processes:
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
    start, step = _whole(config, whole, flags(config.recipe, whole, steps, every, config.workers))
    print(f"undisturbed: {steps} steps, a checkpoint every {every}, {start:.1f} s to the first step, "
          f"{step:.3f} s a step", flush=True)
    began = time.monotonic()
    tally = _disturbed(config, cut, flags(config.recipe, cut, steps, every, config.workers), steps, start, every)
    different = tally.failures or differences(whole, cut, RECIPES[config.recipe].exact)
    _print_table(config, tally, cut, time.monotonic() - began, different)
    return different


def _fitting(config: Config) -> tuple[int, int]:
    """Steps, and steps between checkpoints, for a disturbed run of `minutes`.

    With a checkpoint about every start's time, an attempt gets 0.8 of such an interval further on average and takes one
    start more: the run takes 1 + 1 / 0.8 times its training, and some waiting.
    """
    run = config.folder / "calibration"
    start, step = _whole(config, run, flags(config.recipe, run, 60, 30, config.workers))
    return max(60, round(config.minutes * 60 / 2.4 / step)), max(2, round(start / step))


def _whole(config: Config, run: Path, arguments: list[str]) -> tuple[float, float]:
    """An undisturbed run: seconds to its first step, and of a later one."""
    group, clock = Group(config, run, arguments, run.name), time.time()
    while group.running():
        time.sleep(0.1)
    if any(group.codes()):
        raise ValueError(f"the undisturbed run failed with {group.codes()}\n{group.tail()}")
    times = [record["time"] for record in records_of(run) if RECIPES[config.recipe].finished in record]
    return times[0] - clock, (times[-1] - times[len(times) // 4]) / (len(times) - 1 - len(times) // 4)


def _disturbed(config: Config, run: Path, arguments: list[str], steps: int, start: float, every: int) -> Tally:
    """Starts, kills and starts again until the run is done; `start`: about the seconds to the first step."""
    tally, rng, began = Tally(), random.Random(config.seed), time.monotonic()
    plan = _plan(rng, config.moments or RECIPES[config.recipe].moments, config.kinds)
    while not tally.failures:
        saved = latest(run)
        tally.resumes += saved > 0
        tally.restarts += saved == 0 and tally.attempts > 0
        group = Group(config, run, [*arguments, "--resume" if saved else "--overwrite"],
                      f"{run.name}_{tally.attempts}", saved)
        tally.attempts += 1
        quiet = time.monotonic() - began > 60 * config.minutes or 0 < config.kills <= tally.kills.total()
        try:
            struck = "" if quiet else _strike(group, *next(plan), rng, start, every, tally)
            _settle(group, struck, 60 + 3 * start, tally)
        finally:
            group.kill()
        reached, kept = _last_step(group), latest(run)
        if not any(group.codes()):
            if kept == steps:
                return tally
            tally.stopped += 1
            if not struck or reached > kept:
                tally.failures.append(f"attempt {tally.attempts} ended in order at step {reached}, but the last "
                                      f"checkpoint is step {kept}\n{group.tail()}")
        tally.lost += max(0, reached - kept)
        tally.partial += len(partial(run))
    return tally


def _plan(rng: random.Random, moments: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every kind at every moment, again and again, each time in another order."""
    every = list(product(moments, kinds))
    while True:
        yield from rng.sample(every, len(every))


def _strike(group: Group, moment: str, kind: str, rng: random.Random, start: float, every: int, tally: Tally) -> str:
    """Waits for a moment and sends the signal; returns `kind`, or nothing when the attempt ended before."""
    if not _wait_for(group, moment, rng, start, every):
        return ""
    signum = signal.SIGKILL if "SIGKILL" in kind else signal.SIGTERM
    if kind.endswith("all"):
        group.send(signum)
    else:
        rng.choice(group.processes).send_signal(signum)
    group.send(signal.SIGCONT)  # those that `_wait_for` has stopped
    tally.kills[moment, kind] += 1
    return kind


def _wait_for(group: Group, moment: str, rng: random.Random, start: float, every: int) -> bool:
    """Whether the moment came before the attempt ended."""
    known = partial(group.run)
    end, records = time.monotonic() + rng.uniform(0, start), rng.randint(1, 3 * every)
    begun = {"start": lambda: time.monotonic() > end or bool(group.written()),
             "training": lambda: len(group.written()) >= records,
             "checkpoint": lambda: bool(partial(group.run) - known)}.get(moment)
    iteration = group.first + rng.randint(0, 2 * every)
    there = lambda: (seen := _phase(group))[1] == moment and seen[0] >= iteration
    while begun is None and group.running():  # a phase of milliseconds: stopped, and only then sure
        if there():
            time.sleep(rng.uniform(0, 0.02))
            group.send(signal.SIGSTOP)
            time.sleep(0.01)
            if there():
                return None in group.codes()
            group.send(signal.SIGCONT)
        time.sleep(0.002)
    while begun is not None and group.running() and not begun():
        time.sleep(0.005)
    group.wait(rng.uniform(0, 0.2))  # anywhere in a step, anywhere in the writing
    return None in group.codes()


def _phase(group: Group) -> tuple[int, str]:
    """Iteration and phase of an RL run, by what this attempt has written; "" when that does not tell.

    An iteration leaves its attempts behind the rollout, a page of them behind the score, a record behind the updates.
    """
    records = group.written()
    done = max((record["step"] for record in records if RECIPES["rl_distill"].finished in record), default=group.first)
    if _fresh(group, f"pages/{done:06d}.html"):
        return done, "step"
    if _fresh(group, f"rollouts/{done:06d}.jsonl"):
        return done, "score"
    if not records:
        return done, ""
    loop = json.loads((group.run / "config.json").read_text())["loop"]
    evaluated = any(record["step"] == done and any(name.startswith("eval/") for name in record) for record in records)
    if not evaluated and (done == loop["iterations"] or done % loop["eval_every"] == 0):
        return done, "evaluation"
    if done == loop["iterations"]:
        return done, ""
    # Attempts that an attempt before has left are only read.
    return done, "score" if (group.run / f"rollouts/{done:06d}.jsonl").exists() else "rollout"


def _fresh(group: Group, name: str) -> bool:
    """Whether this attempt has written a file."""
    path = group.run / name
    return path.exists() and path.stat().st_mtime >= group.began


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


def _last_step(group: Group) -> int:
    """The step that this attempt reported last, or the one that it began with."""
    finished = RECIPES[group.config.recipe].finished
    return next((record["step"] for record in reversed(group.written()) if finished in record), group.first)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _print_table(config: Config, tally: Tally, cut: Path, seconds: float, different: Sequence[str]) -> None:
    recipe = RECIPES[config.recipe]
    steps = [record["step"] for record in records_of(cut) if recipe.finished in record]
    print(f"\n| kills | {' | '.join(KINDS)} |\n| --- |{' --- |' * len(KINDS)}")
    for moment in recipe.moments:
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
