"""Metrics to JSONL and TensorBoard, and one progress line to the console."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from tensorboard.summary import Writer

log = logging.getLogger(__name__)


def setup_logging(process: int = 0) -> None:
    """Sends the log of this package to standard error: coloured on a terminal, plain lines in a file.

    Of several processes only the first one says what all of them do; the others name themselves when they warn.
    """
    who = f"[process {process}] " if process else ""
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{who}%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s", "%H:%M:%S"))
    for name in ("jaxlm", "recipes"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if process else logging.INFO)
    # Orbax logs pages of tracebacks for an error that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


class MetricLog:
    """Appends each record to `metrics.jsonl` (flushed line by line) and to TensorBoard event files.

    A run that was killed and resumed writes some steps twice; readers take the last line of a step. Of several
    processes one writes: `active` is False in the others.
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._file = path.open("a+b")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a killed run or a full disk left half a line
                self._file.write(b"\n")
        self._board = Writer(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record. Values that are not finite are written as null: JSON has no name for them."""
        if not self._active:
            return
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both outputs."""
        if not self._active:
            return
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a `metrics.jsonl` in step order, the last line winning within (step, set of names).

    A torn line, as a kill in mid-write leaves it, is skipped.
    """
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records[record["step"], frozenset(record)] = record
        except (ValueError, KeyError, TypeError):
            log.warning("%s: skipped a torn line of %d characters", path, len(line))
    return [record for _, record in sorted(records.items(), key=lambda item: item[0][0])]


class ProgressLine:
    """A live bar on a terminal; elsewhere one plain line per report; nothing at all unless `visible`."""

    def __init__(self, total: int, start: int = 0, visible: bool = True, unit: str = "step") -> None:
        self._total, self._visible, self._unit = total, visible, unit
        self._bar = None
        if visible and sys.stdout.isatty():
            # On a narrow terminal the numbers are cut at their end; step and bar keep their width.
            fixed = Column(min_width=len(f"{unit} {total}/{total}"), no_wrap=True)
            columns = (TextColumn(f"{unit} {{task.completed}}/{{task.total}}", table_column=fixed),
                       BarColumn(bar_width=8, table_column=Column(min_width=8)),
                       TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")))
            self._bar = Progress(*columns, console=Console(), refresh_per_second=4)
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def report(self, step: int, text: str) -> None:
        """Shows `text` as the state of the run at `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self._visible:
            print(f"{self._unit} {step}/{self._total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays: an evaluation, a sample, a checkpoint."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._visible:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the live display."""
        if self._bar:
            self._bar.stop()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def human_count(value: float) -> str:
    """Three significant digits with a decimal suffix: 1234 -> '1.23k'."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def human_seconds(seconds: float) -> str:
    """`h:mm:ss`, or `mm:ss` under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
