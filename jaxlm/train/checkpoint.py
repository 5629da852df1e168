"""Checkpoints: state, data position, configuration and tokenizer in one folder per step, written by orbax.

    checkpoints/1200/state/      the TrainState, tensorstore, any mesh can read it
    checkpoints/1200/data/       position of the data stream, JSON
    checkpoints/1200/config/     the run's configuration
    checkpoints/1200/tokenizer/  the tokenizer's own files

A folder gets its final name only when all of it is written, so a killed run leaves the last complete step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlm.train.state import TrainState


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
    """A stream whose position is a JSON value."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


# A full disk is an OSError in the small files and a ValueError of tensorstore's in the arrays.
WRITE_ERRORS = (OSError, ValueError)
READ_ERRORS = (OSError, ValueError, KeyError)


class CheckpointError(ValueError):
    """A checkpoint could not be written, found or used."""


class FolderHandler(ocp.CheckpointHandler):
    """Writes `{name: bytes}` as plain files, so that people and other programs can open them."""

    def save(self, directory: epath.Path, args: "FolderSave") -> None:
        if jax.process_index() == 0:
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "FolderRestore | None" = None) -> dict[str, bytes]:
        files = (path for path in sorted(directory.iterdir()) if path.name != "commit_success.txt")  # orbax's own
        return {path.name: path.read_bytes() for path in files}


@ocp.args.register_with_handler(FolderHandler, for_save=True)
@dataclass
class FolderSave(ocp.args.CheckpointArgs):
    files: dict[str, bytes]


@ocp.args.register_with_handler(FolderHandler, for_restore=True)
@dataclass
class FolderRestore(ocp.args.CheckpointArgs):
    pass


class Checkpointer:
    """Saves in the background and restores the newest complete checkpoint of one run folder.

    `config` and `files` (the tokenizer's) are written into every checkpoint, so each is usable alone.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, run_config: dict[str, Any], files: dict[str, bytes]):
        self.folder = folder.absolute() / "checkpoints"
        self.every = config.every
        self._config, self._files = run_config, files
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last, keep_period=config.keep_every or None, create=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, data: Resumable) -> None:
        """Starts writing; returns when the arrays are copied. An error of the previous write is raised here."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data.get_state()),
                config=ocp.args.JsonSave(self._config),
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
        """The newest complete state, in the shardings of `abstract`; moves `data` to its position."""
        step = self.latest_step()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore(),
            ))
            data.set_state(restored["data"])
        except READ_ERRORS as error:
            raise _read_error(self._manager, self.folder, error) from error
        return restored["state"]

    def latest_step(self) -> int:
        """Step of the newest complete checkpoint; CheckpointError when there is none."""
        return _latest(self._manager, self.folder)

    def close(self) -> None:
        """Waits for the writer and stops its threads."""
        self.wait()
        self._manager.close()

    def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
        kept = self._manager.latest_step()
        return CheckpointError(
            f"checkpoint{'' if step is None else f' of step {step}'} could not be written to {self.folder}: "
            f"{first_line(error)}; the last complete one is {'none' if kept is None else f'step {kept}'}"
        )


def saved_run(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration and the tokenizer files inside the newest complete checkpoint of a run folder."""
    folder = folder.absolute() / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        step = _latest(manager, folder)
        try:
            restored = manager.restore(step, args=ocp.args.Composite(
                config=ocp.args.JsonRestore(), tokenizer=FolderRestore()))
        except READ_ERRORS as error:
            raise _read_error(manager, folder, error) from error
    return restored["config"], restored["tokenizer"]


def saved_params(folder: Path, shapes: Any) -> Any:
    """The parameters of the newest complete checkpoint of a run folder, on this process's first device.

    Only they are read, not the optimizer's moments. `shapes` is their tree of `jax.ShapeDtypeStruct`.
    """
    folder = folder.absolute() / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        state = folder / str(_latest(manager, folder)) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        target = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
        return reader.restore(state, args=arguments)["params"]


def _read_error(manager: ocp.CheckpointManager, folder: Path, error: Exception) -> CheckpointError:
    *older, newest = sorted(manager.all_steps())
    return CheckpointError(
        f"checkpoint {folder / str(newest)} cannot be used: {first_line(error)}; "
        + (f"delete it to resume from step {older[-1]}" if older else "there is no older one"))


def first_line(error: Exception) -> str:
    """What an error says, without the pages that some libraries append."""
    return (str(error) or repr(error)).splitlines()[0]


def _latest(manager: ocp.CheckpointManager, folder: Path) -> int:
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"no complete checkpoint in {folder}; start again with --overwrite")
    return step
