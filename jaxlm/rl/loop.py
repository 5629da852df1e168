"""The RL loop, straight down: save, evaluate, roll out, judge, score and pack, update."""

import contextlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from jaxlm.core.distributed import is_primary, together
from jaxlm.core.log import MetricLog, ProgressLine, human_count, human_seconds
from jaxlm.core.signals import stop_on_signal
from jaxlm.core.tree import digest
from jaxlm.generate.requests import Report
from jaxlm.rl.episode import Episode, load_episodes, save_episodes
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import NonFiniteError
from jaxlm.train.measure import Ledger, memory_bytes
from jaxlm.train.state import TrainState
from jaxlm.train.step import Metrics

log = logging.getLogger(__name__)

PHASES = ("rollout", "score", "step")  # of an iteration, as the ledger books them
EXTREMES = {"ratio_min": min, "ratio_max": max}  # of several updates; other metrics are averaged


@dataclass(frozen=True, kw_only=True)
class RLLoopConfig:
    """How long to train and how often to look."""

    iterations: int = 100       # rollouts, each followed by its updates
    eval_every: int = 10        # iterations between evaluations; the first and the last are always evaluated
    pages_every: int = 10       # iterations between pages of attempts to read
    max_skipped: int = 10       # stop after this many updates in a row with a non-finite loss or gradient

    def __post_init__(self) -> None:
        for name in ("iterations", "eval_every", "pages_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {getattr(self, name)}")


class Progress:
    """Where a run is: what a checkpoint holds besides the state of training."""

    def __init__(self) -> None:
        self.iteration, self.drawn = 0, 0  # iterations done, prompts drawn for them

    def get_state(self) -> dict[str, Any]:
        return {"rl": {"iteration": self.iteration, "drawn": self.drawn}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.drawn = int(state["rl"]["iteration"]), int(state["rl"]["drawn"])


class Learner(Protocol):
    """The parts that a recipe chooses. All processes call them alike and get equal results."""

    report: Report  # of all rollouts of this process so far

    def rollout(self, params: Any, iteration: int, drawn: int) -> tuple[list[Episode], int]:
        """Attempts of one iteration, and how many prompts have been drawn with them."""

    def score(self, params: Any, episodes: Sequence[Episode]) -> tuple[Any, dict[str, float]]:
        """What updates need of the attempts, and numbers to log."""

    def updates(self, scored: Any, iteration: int) -> Sequence[Callable[[TrainState], tuple[TrainState, Metrics]]]:
        """The updates of an iteration, in order; none if there is nothing to learn."""

    def page(self, path: Path, scored: Any, episodes: Sequence[Episode]) -> None:
        """Writes attempts for people."""


def fit_rl(
    state: TrainState, learner: Learner, progress: Progress, *, mesh: Mesh, config: RLLoopConfig, folder: Path,
    checkpointer: Checkpointer, metric_log: MetricLog, ledger: Ledger,
    evaluate: Callable[[Any, int], tuple[Mapping[str, float], str]] | None = None,
) -> tuple[TrainState, bool]:
    """Trains from `progress.iteration` to `config.iterations`; returns the state and whether the run got to its end.

    A checkpoint holds the state before an iteration and has its number. The attempts of an iteration are on disk before
    they are used (`rollouts/NUMBER.jsonl`). A run that was killed goes on from its last checkpoint: attempts that it
    finds are used again if the same parameters wrote them, and give the same updates.
    """
    start = progress.iteration
    if start > config.iterations:
        raise ValueError(f"the checkpoint is at iteration {start}, beyond loop.iterations {config.iterations}")
    line = ProgressLine(config.iterations, start, visible=is_primary())
    ledger.book("start")
    skipped, saved = 0, start
    with contextlib.ExitStack() as stack:
        stack.callback(_goodput, ledger, metric_log, progress)
        stack.callback(line.close)
        stack.enter_context(jax.set_mesh(mesh))
        stopping = stack.enter_context(stop_on_signal(mesh))
        for number in range(start, config.iterations + 1):
            last, stop = number == config.iterations, stopping()
            if last or stop or (number % checkpointer.every == 0 and number > start):
                with ledger.spend("checkpoint"):
                    checkpointer.save(state, progress, number)
                    _forget(folder, saved)
                    saved = number
            if evaluate and (last or (number % config.eval_every == 0 and not stop)):
                with ledger.spend("evaluation"):
                    values, text = evaluate(state.params, number)
                    metric_log.write(number, values)
                    line.say(text)
            if last or stop:
                break
            before, written = dict(ledger.seconds), learner.report.tokens
            with ledger.spend("rollout"):
                episodes, progress.drawn = _attempts(state, learner, progress, folder)
            with ledger.spend("score"):
                scored, values = learner.score(state.params, episodes)
                if is_primary() and number % config.pages_every == 0:
                    learner.page(folder / "pages" / f"{number:06d}.html", scored, episodes)
            with ledger.spend("step"):
                state, trained, skipped = _update(state, learner, scored, number, skipped, config.max_skipped)
            progress.iteration = number + 1
            seconds = {name: ledger.seconds[name] - before[name] for name in (*PHASES, "compile")}
            values |= trained | {f"seconds/{name}": value for name, value in seconds.items()}
            written = (learner.report.tokens - written) * jax.process_count()  # 0: the attempts were on disk
            values |= {"memory_gb": memory_bytes() / 2**30, "prompts": progress.drawn,
                       "tokens_per_second": written / max(seconds["rollout"], 1e-9)}
            metric_log.write(number + 1, values)
            line.report(number + 1, _line(values, sum(seconds.values()), config.iterations - number - 1))
        with ledger.spend("checkpoint"):
            checkpointer.wait()
    if not last:
        log.warning("stopped by a signal at iteration %d; continue with --resume", number)
    return state, last


def _attempts(state: TrainState, learner: Learner, progress: Progress, folder: Path) -> tuple[list[Episode], int]:
    """The attempts of the iteration: those on disk if these parameters wrote them, else new ones."""
    number, path = progress.iteration, folder / "rollouts" / f"{progress.iteration:06d}.jsonl"
    head = {"iteration": number, "drawn": progress.drawn, "parameters": digest(state.params)}
    found = together(lambda: _saved(path, head), lambda found: {"rollouts on disk": str(found is not None)})
    if found:
        log.info("iteration %d: %d attempts taken from %s", number, len(found[1]), path)
        return found[1], found[0]["drawn_after"]
    episodes, drawn = learner.rollout(state.params, number, progress.drawn)
    together(lambda: save_episodes(path, episodes, {**head, "drawn_after": drawn}) if is_primary() else None)
    return episodes, drawn


def _saved(path: Path, head: Mapping[str, Any]) -> tuple[dict[str, Any], list[Episode]] | None:
    if not path.exists():
        return None
    try:
        found, episodes = load_episodes(path)
    except ValueError as error:
        log.warning("%s; the attempts are made again", error)
        return None
    if any(found.get(name) != value for name, value in head.items()):
        log.warning("%s is of other parameters; the attempts are made again", path)
        return None
    return found, episodes


def _update(
    state: TrainState, learner: Learner, scored: Any, number: int, skipped: int, max_skipped: int,
) -> tuple[TrainState, dict[str, float], int]:
    """All updates of an iteration, and the means of their metrics; extremes stay extremes."""
    updates = learner.updates(scored, number)
    if not updates:
        log.warning("iteration %d: no group of attempts has anything to learn from; nothing is updated", number)
        return state, {"updates": 0.0}, skipped
    found: list[dict[str, float]] = []
    for update in updates:
        state, metrics = update(state)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            log.warning("iteration %d: an update was skipped: loss %s, gradient norm %s", number, values["loss"],
                        values["grad_norm"])
        if skipped >= max_skipped:
            raise NonFiniteError(f"loss or gradient not finite in {skipped} updates in a row, the last one of "
                                 f"iteration {number}; lower optim.lr, or look at its attempts")
        found.append(values)
    over = {name: EXTREMES.get(name, statistics.fmean)(values[name] for values in found) for name in found[0]}
    return state, over | {"updates": len(updates)}, skipped


def _line(values: Mapping[str, float], seconds: float, left: int) -> str:
    shares = ", ".join(f"{name} {values[f'seconds/{name}'] / max(seconds, 1e-9):.0%}" for name in PHASES)
    return "  ".join((
        f"reward {values['reward']:.3f}", f"correct {values['correct']:.1%}",
        f"equal groups {values['groups/equal']:.0%}", f"length {values['length']:.0f}",
        f"{human_count(values['tokens_per_second'])} tok/s", f"{seconds:.1f} s ({shares})",
        f"left {human_seconds(left * seconds)}"))


def _forget(folder: Path, before: int) -> None:
    """Deletes attempts that no checkpoint needs any more: those before the checkpoint before the last."""
    if is_primary() and (folder / "rollouts").is_dir():
        for path in (folder / "rollouts").glob("*.jsonl"):
            if path.stem.isdecimal() and int(path.stem) < before:
                path.unlink()


def _goodput(ledger: Ledger, metric_log: MetricLog, progress: Progress) -> None:
    ledger.book()
    shares = ledger.shares()
    metric_log.write(progress.iteration, {f"goodput/{name}": share for name, share in shares.items()})
    log.info("time %s: %s", human_seconds(sum(ledger.seconds.values())),
             ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
