"""The training loop, straight down: evaluate, save, dispatch a step, then read the metrics of the step before."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from jaxlm.core.distributed import is_primary
from jaxlm.core.log import MetricLog, ProgressLine, human_count, human_seconds
from jaxlm.core.mesh import put_batch
from jaxlm.core.signals import stop_on_signal
from jaxlm.data.pipeline import EndOfData
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.measure import Ledger, memory_bytes
from jaxlm.train.state import TrainState
from jaxlm.train.step import Metrics, Step

log = logging.getLogger(__name__)

STOPPED = 75  # exit status of a run that a signal ended: EX_TEMPFAIL of sysexits.h, for schedulers to start it again


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to look."""

    steps: int = 1000           # batches in the whole run
    log_every: int = 10         # steps between records
    eval_every: int = 500       # steps between evaluations; the last step is always evaluated
    max_skipped: int = 10       # stop after this many steps in a row with a non-finite loss or gradient

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {getattr(self, name)}")


class Batches(Protocol):
    """A stream of host batches whose position can be saved."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def stats(self) -> Mapping[str, float]: ...


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite for too many steps in a row."""


def fit(
    state: TrainState,
    step: Step,
    batches: Batches,
    *,
    mesh: Mesh,
    config: LoopConfig,
    checkpointer: Checkpointer,
    metric_log: MetricLog,
    ledger: Ledger,
    flops_ratio: float,
    evaluate: Callable[[Any, int], tuple[Mapping[str, float], str]] | None = None,
) -> tuple[TrainState, bool]:
    """Trains from `state.step` to `config.steps`; returns the state and whether the run got to its end.

    SIGTERM or SIGINT ends the run after the step in flight, with a checkpoint; several processes end after the same
    step. Checkpoints hold the state before a step and the data position before its batch, so a resumed run repeats
    nothing and skips nothing. Where the time went is logged at the end, however the run ends. Data that end before
    the run does are an EndOfData, raised after a checkpoint and an evaluation.

    Args:
      ledger: books the time of the whole process, from its start.
      evaluate: `params, step -> (numbers to log, text to show)`, called outside the timed part.
      flops_ratio: model FLOPs per token / peak FLOP/s of all devices; times tokens/s it is the MFU. Tokens are
        targets that count in the loss, so padding lowers both.
    """
    start = int(state.step)
    if start > config.steps:
        raise ValueError(f"the checkpoint is at step {start}, beyond loop.steps {config.steps}")
    progress = ProgressLine(config.steps, start, visible=is_primary())
    ledger.book("start")
    reporter = _Reporter(config, metric_log, progress, batches, ledger, flops_ratio, start)
    pending: tuple[int, Metrics] | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(reporter.goodput)
        stack.callback(progress.close)
        stack.enter_context(jax.set_mesh(mesh))
        stopping = stack.enter_context(stop_on_signal(mesh))
        number, ended, saved, evaluated = start, False, None, None
        while True:
            last, stop = ended or number == config.steps, stopping()
            evaluating = evaluate and (last or (number % config.eval_every == 0 and number > start))
            saving = last or stop or (number % checkpointer.every == 0 and number > start)
            if pending and (evaluating or saving):  # both wait for the step; its time must not count as theirs
                reporter.step(*pending, last=ended)
                pending = None
            if saving and saved != number:  # first: who sent a signal may not wait for an evaluation
                with ledger.spend("checkpoint"):
                    checkpointer.save(state, batches)
                saved = number
            if evaluating and (last or not stop) and evaluated != number:
                with ledger.spend("evaluation"):
                    reporter.evaluation(number, *evaluate(state.params, number))
                evaluated = number
            if last or stop:
                break
            ledger.book()
            try:
                batch = put_batch(next(batches), mesh)
            except EndOfData:
                ended = True
                continue
            # What is loaded while the step before still computes costs nothing.
            ledger.book("data" if pending is None or pending[1]["loss"].is_ready() else "step")
            state, metrics = step(state, batch)
            if pending:
                reporter.step(*pending)
            number += 1
            pending = number, metrics
        with ledger.spend("checkpoint"):
            checkpointer.wait()
    if ended:
        ending = f", or end this one with --resume --loop.steps {number}" if number else ""
        raise EndOfData(f"every source is used up after {number} of {config.steps} steps, and the checkpoint of that "
                        f"step is saved; raise epochs= or cap= of a source in a new run{ending}")
    if not last:
        log.warning("stopped by a signal at step %d; continue with --resume", number)
    return state, last


class _Reporter:
    """Turns the metrics of finished steps into records, a progress line and the stop after bad steps."""

    def __init__(self, config: LoopConfig, metric_log: MetricLog, progress: ProgressLine, batches: Batches,
                 ledger: Ledger, flops_ratio: float, start: int):
        self.config, self.metric_log, self.progress, self.batches = config, metric_log, progress, batches
        self.ledger, self.flops_ratio = ledger, flops_ratio
        self.read = ledger.training, ledger.seconds["data"]  # at the last report
        self.last = start                                    # the newest step seen
        self.tokens = self.steps = self.skipped = self.skipped_in_row = 0
        self.first = True  # the first step is reported at once: it holds the compilation, which later rates leave out

    def step(self, number: int, metrics: Metrics, last: bool = False) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.tokens += values.pop("tokens")
        self.steps += 1
        self.last = number
        self._count_skipped(number, values)
        if number % self.config.log_every and not (last or number == self.config.steps or self.first):
            return
        self.ledger.book()
        now = self.ledger.training, self.ledger.seconds["data"]
        seconds, waited = (new - old for new, old in zip(now, self.read, strict=True))
        self.read = now
        rate = self.tokens / seconds
        left = (f"first step {seconds:.1f} s with compilation" if self.first else
                f"left {human_seconds((self.config.steps - number) * seconds / self.steps)}")
        values |= {
            "skipped": self.skipped, "tokens_per_second": rate, "mfu": rate * self.flops_ratio,
            "memory_gb": memory_bytes() / 2**30, "data_wait": waited / seconds, **self.batches.stats(),
        }
        self.metric_log.write(number, values)
        self.progress.report(number, "  ".join((
            f"loss {values['loss']:.4f}", f"{human_count(rate)} tok/s", f"MFU {values['mfu']:.1%}",
            f"{values['memory_gb']:.2f} GB", f"data {values['data_wait']:.0%}", left, f"lr {values['lr']:.2e}",
            f"grad {values['grad_norm']:.2f}",
        )))
        self.tokens = self.steps = 0
        self.first = False

    def evaluation(self, number: int, values: Mapping[str, float], text: str) -> None:
        self.metric_log.write(number, values)
        self.progress.say(text)

    def goodput(self) -> None:
        """The shares of the process's time, as one record and one line."""
        self.ledger.book()
        shares = self.ledger.shares()
        self.metric_log.write(self.last, {f"goodput/{name}": share for name, share in shares.items()})
        log.info("time %s: %s", human_seconds(sum(self.ledger.seconds.values())),
                 ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

    def _count_skipped(self, number: int, values: Mapping[str, float]) -> None:
        if not values["skipped"]:
            self.skipped_in_row = 0
            return
        self.skipped += 1
        self.skipped_in_row += 1
        log.warning("step %d skipped: loss %s, gradient norm %s", number, values["loss"], values["grad_norm"])
        if self.skipped_in_row >= self.config.max_skipped:
            raise NonFiniteError(
                f"loss or gradient not finite in {self.skipped_in_row} steps in a row, the last one step {number}; "
                "lower optim.lr, or look at the data of these steps"
            )
