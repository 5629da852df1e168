"""A JSONL file of results that a killed run continues: one record a line, the settings of the run in a file beside it.

    texts.jsonl                  written line by line; half a line at its end, as a kill leaves it, is dropped
    texts.jsonl.settings.json    what decides the records; continuing with other settings is an error
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.log import ProgressLine, human_count, human_seconds
from jaxlm.core.tree import digest

ENDING = ".settings.json"


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """ValueError if `path` holds results of other settings, of those that are given here, or no results of ours."""
    if not path.exists():
        return
    beside = path.with_name(path.name + ENDING)
    try:
        saved = json.loads(beside.read_bytes())["settings"]
    except OSError:
        raise ValueError(f"{path} exists, and {beside.name} is not beside it, so it cannot be continued; --overwrite "
                         "replaces it") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{beside} is damaged, so {path} cannot be continued; --overwrite replaces it") from None
    for name, value in _plain(settings).items():
        if name not in saved or saved[name] != value:
            raise ValueError(f"{path} was written with other settings: {name} was {_short(saved.get(name))}, now "
                             f"{_short(value)}; another file keeps both, --overwrite replaces it")


class Results:
    """The file, open for more records; `records` are those that were there.

    With `overwrite` records of other settings are dropped; without, `check_settings` says what differs.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        try:
            check_settings(path, settings)
        except ValueError:
            if not overwrite:
                raise
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ENDING)
        scratch = beside.with_name(f".{beside.name}.tmp-{os.getpid()}")
        try:
            scratch.write_text(json.dumps({"settings": _plain(settings)}, ensure_ascii=False, indent=2) + "\n",
                               encoding="utf-8")
            scratch.replace(beside)
        finally:
            scratch.unlink(missing_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self.records = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path}:{number} is damaged; delete this line or use --overwrite") from None
        self._file = path.open("ab")
        if whole < len(content):
            self._file.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """One more line, in the file when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Pace:
    """The progress of a long run: how many of `total` are done, tokens/s, and the time that is left."""

    def __init__(self, total: int, start: int = 0, visible: bool = True) -> None:
        self._line = ProgressLine(total, start, visible, "text")
        self._total, self._start, self._done, self._tokens, self._steps = total, start, start, 0, 0
        self._began = self._shown = time.perf_counter()

    def done(self, tokens: int, steps: int = 0) -> None:
        """One more is done; of `steps` forward passes, if they matter."""
        self._done, self._tokens, self._steps = self._done + 1, self._tokens + tokens, self._steps + steps
        now = time.perf_counter()
        if now - self._shown < (0.1 if sys.stdout.isatty() else 10) and self._done < self._total:
            return
        self._shown, seconds = now, now - self._began
        left = seconds / (self._done - self._start) * (self._total - self._done)
        passes = f", {self._tokens / self._steps:.2f} a forward pass" if self._steps else ""
        self._line.report(self._done, f"{human_count(self._tokens)} tokens, {self._tokens / seconds:.1f}/s{passes}, "
                                      f"{human_seconds(left)} left")

    def close(self) -> None:
        """Ends the line."""
        self._line.close()


def weights_mark(params: Any) -> str:
    """A checksum of the weights as eight letters."""
    return f"{zlib.crc32(json.dumps(digest(params), sort_keys=True).encode()):08x}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=os.fspath))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
