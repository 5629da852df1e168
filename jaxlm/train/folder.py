"""The run folder: who may write into it, and what a resumed run must share with the one before.

    runs/demo/config.json      resolved configuration; `--config` starts the same run from it
    runs/demo/checkpoints/     see train.checkpoint
    runs/demo/metrics.jsonl    one record per report, and tensorboard/ with the same numbers
    runs/demo/curves.png       written at the end
    runs/rl/rollouts, pages    of rl.loop: the attempts that updates need, and attempts to read
"""

import dataclasses
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxlm.core.config import differences

log = logging.getLogger(__name__)

OURS = ("config.json", "checkpoints", "metrics.jsonl", "tensorboard", "curves.png", "tokenizer", "rollouts", "pages",
        "exported")


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """ValueError when `folder` does not fit what was asked for; changes nothing.

    A folder that holds a run is never written over without `overwrite`.
    """
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--folder {folder} is a file")
    if resume and not (folder / "checkpoints").is_dir():
        raise ValueError(f"--resume: {folder} holds no run (no checkpoints folder); check --folder")
    taken = [name for name in OURS if (folder / name).exists()]
    if taken and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run already ({', '.join(taken)}); --resume continues it, --overwrite "
                         "deletes it, another --folder keeps both")


def clear_folder(folder: Path) -> None:
    """Makes an empty run folder: deletes what a run left there, and only this project's own files."""
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder {folder} cannot be created: {error.strerror}") from None


def check_shared(folder: Path) -> None:
    """ValueError unless this process sees the run folder that the first one has made."""
    if not (folder / "config.json").exists():
        raise ValueError(f"--folder {folder} is not a folder that all processes see: config.json of process 0 is not "
                         "there")


def check_resumable(saved: Any, asked: Any, *, fixed: Collection[str], ignored: Collection[str]) -> None:
    """Compares the configuration in a checkpoint with the one asked for.

    Top-level fields in `fixed` decide the shapes or the data order: a difference there is a ValueError that lists
    them. Fields in `ignored` do not matter; any other difference is reported and taken.
    """
    changed = differences(saved, asked)
    top = {line: line.split(":")[0].split(".")[0] for line in changed}
    broken = [line for line in changed if top[line] in fixed]
    if broken:
        raise ValueError("the checkpoint belongs to another run; these settings differ (checkpoint -> asked for): "
                         + "; ".join(broken))
    for line in changed:
        if top[line] not in ignored:
            log.warning("resuming with a changed setting: %s", line)
    assert {field.name for field in dataclasses.fields(asked)} >= {*fixed, *ignored}
