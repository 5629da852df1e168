"""Checkpoints: state, data position, configuration and tokenizer in one folder per step, written by orbax.

    checkpoints/1200/state/      the TrainState, tensorstore, any mesh can read it
    checkpoints/1200/data/       position of each shard of the data stream, JSON, written by the processes that load it
    checkpoints/1200/digest/     a checksum of every array of the state
    checkpoints/1200/config/     the run's configuration
    checkpoints/1200/tokenizer/  the tokenizer's own files

A folder gets its final name only when all of it is written, so a killed run leaves the last complete step. What was
damaged afterwards is noticed when it is read: the checkpoint before it serves, with a warning.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlm.core.distributed import barrier, is_primary, together
from jaxlm.core.log import first_line
from jaxlm.core.tree import digest, named_leaves
from jaxlm.train.checkpoint_files import CheckpointError, FolderSave, json_file, read_folder, read_json
from jaxlm.train.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500       # steps between checkpoints; the last step is always saved
    keep_last: int = 2     # newest checkpoints kept
    keep_every: int = 0    # also keep each multiple of this many steps; 0 keeps none

    def __post_init__(self):
        if self.every < 1 or self.keep_last < 1 or self.keep_every < 0:
            raise ValueError("checkpoint.every and keep_last must be at least 1, keep_every at least 0")
        if self.keep_every % self.every:
            raise ValueError(f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.every "
                             f"{self.every}, so it would keep nothing")


class Resumable(Protocol):
    """A stream whose position is some named JSON values: those of this process, or those of all of them to restore."""

    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


# A full disk is an OSError in the small files and a ValueError of tensorstore's in the arrays.
WRITE_ERRORS = (OSError, ValueError)
READ_ERRORS = (OSError, ValueError, KeyError, TypeError)  # damaged metadata may be valid JSON of another shape


class Checkpointer:
    """Saves in the background and restores the newest usable checkpoint of one run folder.

    `config` and `files` (the tokenizer's) are written into every checkpoint, so each is usable alone. With several
    processes all of them make every call, and the folder is one that all of them see.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, run_config: dict[str, Any], files: dict[str, bytes]):
        self.folder = folder.absolute() / "checkpoints"
        self.every = config.every
        self._config, self._files = run_config, files
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last, keep_period=config.keep_every or None, create=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, data: Resumable, number: int | None = None) -> None:
        """Starts writing; returns when the arrays are copied. An error of the previous write is raised here.

        `number`: what the checkpoint is called; None: the step of the state.
        """
        step = int(state.step) if number is None else number
        if step in self._manager.all_steps():
            return
        position = {}
        for name, value in data.get_state().items():
            position |= json_file(name, value)
        try:
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=FolderSave(position, by_all=True),  # processes that load the same rows write the same bytes
                digest=FolderSave(json_file("digest", digest(state))),
                config=FolderSave(json_file("config", self._config)),
                tokenizer=FolderSave(self._files),
            ))
        except WRITE_ERRORS as error:
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Blocks until everything is on disk. CheckpointError if a write failed."""
        try:
            self._manager.wait_until_finished()
        except WRITE_ERRORS as error:
            raise self._write_error(None, error) from error

    def restore(self, abstract: TrainState, data: Resumable) -> TrainState:
        """The newest state that can be read, in the shardings of `abstract`; moves `data` to its position.

        Newer checkpoints that cannot be read are reported and renamed `STEP.unusable`. CheckpointError when none can.
        """
        failed = {}
        for step in together(lambda: saved_steps(self.folder), lambda steps: {"list of checkpoints": str(steps)}):
            try:
                state = _read(self.folder / str(step), abstract, data)
            except READ_ERRORS as error:
                failed[step] = error
                continue
            self._set_aside(failed, step)
            return state
        step, error = next(iter(failed.items()))
        raise _unusable(self.folder / str(step), error, f"; nor can {', '.join(map(str, list(failed)[1:]))}"
                        if len(failed) > 1 else "") from error

    def close(self) -> None:
        """Waits for the writer and stops its threads."""
        self.wait()
        self._manager.close()

    def _set_aside(self, failed: Mapping[int, Exception], used: int) -> None:
        """Nothing is deleted; but the run will come to these steps again and must be able to save them."""
        for step, error in failed.items():
            log.warning("checkpoint %s cannot be used: %s; it is now called %s.unusable, and the run goes on from "
                        "step %d", self.folder / str(step), _brief(error), step, used)
            if is_primary():
                aside = self.folder / f"{step}.unusable"
                (self.folder / str(step)).rename(aside)
        if failed:
            barrier("set aside")
            self._manager.reload()

    def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
        kept = self._manager.latest_step()
        return CheckpointError(
            f"checkpoint{'' if step is None else f' of step {step}'} could not be written to {self.folder}: "
            f"{_brief(error)}; the last complete one is {'none' if kept is None else f'step {kept}'}"
        )


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, the newest first; CheckpointError if none."""
    steps = sorted(ocp.utils.checkpoint_steps(epath.Path(folder)), reverse=True) if folder.is_dir() else []
    if not steps:
        raise CheckpointError(f"no complete checkpoint in {folder}; start again with --overwrite")
    return steps


def saved_run(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration and the tokenizer files of a run folder, from its newest checkpoint that has both."""
    folder, failed = folder.absolute() / "checkpoints", {}
    for step in saved_steps(folder):
        try:
            return read_json(folder / str(step) / "config")["config"], read_folder(folder / str(step) / "tokenizer")
        except READ_ERRORS as error:
            failed[step] = error
    step, error = next(iter(failed.items()))
    raise _unusable(folder / str(step), error) from error


def saved_params(folder: Path, shapes: Any) -> Any:
    """The parameters of the newest complete checkpoint of a run folder, on this process's first device.

    Only they are read, not the optimizer's moments. `shapes` is their tree of `jax.ShapeDtypeStruct`.
    CheckpointError when they are damaged.
    """
    folder = _newest(folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
    try:
        params = _read_arrays(folder, target)
        check_digest(read_json(folder / "digest")["digest"], params)
    except READ_ERRORS as error:
        raise _unusable(folder, error) from error
    return params["params"]


class Saved(NamedTuple):
    """Arrays of another run's checkpoint, on this run's mesh; `check_digest(digest, tree)` is still to be called."""

    tree: dict[str, Any]
    digest: dict[str, int]


def saved_arrays(folder: Path, target: dict[str, Any]) -> Saved:
    """The part `target` of the state in the newest complete checkpoint of a run folder, each array where it belongs.

    Nothing is gathered on a host or a single device, and processes need not wait for each other.

    Args:
      target: `{"params": ..., "opt_state": ...}` or one of them, of `jax.ShapeDtypeStruct` with shardings.
    Raises CheckpointError: arrays that are not there, have another shape or cannot be read.
    """
    folder = _newest(folder)
    try:
        digest = read_json(folder / "digest")["digest"]
        _check_names(set(named_leaves(target)), digest)
        tree = _read_arrays(folder, target)
    except READ_ERRORS as error:
        raise _unusable(folder, error) from error
    return Saved(tree, digest)


def _check_names(wanted: set[str], saved: Collection[str]) -> None:
    """CheckpointError unless the arrays are there, and with moments no other ones: those fit no other parameters.

    Parameters beside those wanted, such as a value head, may stay behind.
    """
    moments = {name for name in saved if name.startswith("opt_state/")}
    asked = {name for name in wanted if name.startswith("opt_state/")}
    if asked and asked != moments:
        differing = asked ^ moments
        raise CheckpointError(f"its optimizer's state has another structure than that of this run: {len(differing)} "
                              f"arrays are in one of them only, such as {min(differing)}")
    missing = wanted - {*saved}
    if missing:
        raise CheckpointError(f"it lacks {len(missing)} arrays of this model, such as {min(missing)}")


def _newest(folder: Path) -> Path:
    folder = folder.absolute() / "checkpoints"
    return folder / str(saved_steps(folder)[0])


def _read(folder: Path, abstract: TrainState, data: Resumable) -> TrainState:
    """One checkpoint, checked. It succeeds in every process or raises in every one, so that all try the same next."""
    def work() -> tuple[TrainState, dict[str, int]]:
        data.set_state(read_json(folder / "data"))
        return _read_arrays(folder, abstract), read_json(folder / "digest")["digest"]

    state, saved = together(work)
    check_digest(saved, state)
    return state


def _read_arrays(folder: Path, target: Any) -> Any:
    """The arrays of `target` (a tree of shape structs with shardings) from a checkpoint; others are not read.

    Called on the handler itself: orbax's managers wait for each other after a restore, so a process that fails would
    leave the others hanging.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.restore(epath.Path(folder) / "state", args=ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True))
    finally:
        handler.close()


def check_digest(saved: Mapping[str, int], tree: Any) -> None:
    """CheckpointError naming the arrays of `tree` that are not those that were saved. All processes must call it."""
    found = digest(tree)
    damaged = [name for name, value in found.items() if saved.get(name) != value]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(found)} arrays are damaged, the first is {damaged[0]}")


def _unusable(folder: Path, error: Exception, more: str = "") -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} cannot be used: {_brief(error)}{more}")


def _brief(error: Exception) -> str:
    """What an error says, without the page of settings that tensorstore puts on the same line."""
    return first_line(error).partition(" [tensorstore_spec")[0]
