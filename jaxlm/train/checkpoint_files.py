"""The small files of a checkpoint: plain, so that people and other programs can open them, and checked when read."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlm.core.distributed import is_primary


class CheckpointError(ValueError):
    """A checkpoint could not be written, found or used."""


class FolderHandler(ocp.CheckpointHandler):
    """Writes `{name: bytes}` as plain files, so that people and other programs can open them."""

    def save(self, directory: epath.Path, args: "FolderSave") -> None:
        if args.by_all or is_primary():
            sums = {name: zlib.crc32(content) for name, content in args.files.items()}
            for name, content in {**args.files, **json_file(f"crc32_{jax.process_index()}", sums)}.items():
                (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, bytes]:
        return read_folder(Path(directory))


@ocp.args.register_with_handler(FolderHandler, for_save=True, for_restore=True)  # orbax insists on both
@dataclass
class FolderSave(ocp.args.CheckpointArgs):
    files: dict[str, bytes]
    by_all: bool = False  # every process writes its own files, not the first one for all


def json_file(name: str, value: Any) -> dict[str, bytes]:
    """One JSON value as a file of a folder."""
    return {f"{name}.json": (json.dumps(value, ensure_ascii=False) + "\n").encode()}


def read_folder(folder: Path) -> dict[str, bytes]:
    """What the processes wrote as FolderSave; CheckpointError when a file is not what was written."""
    lists = sorted(folder.glob("crc32_*.json"))
    if not lists:
        raise CheckpointError(f"{folder} has no list of its files")
    sums = {}
    for path in lists:
        sums |= json.loads(path.read_bytes())
    files = {name: (folder / name).read_bytes() for name in sums}
    for name, content in files.items():
        if zlib.crc32(content) != sums[name]:
            raise CheckpointError(f"{folder / name} is damaged")
    return files


def read_json(folder: Path) -> dict[str, Any]:
    """The JSON values of a folder by name."""
    return {name.removesuffix(".json"): json.loads(content) for name, content in read_folder(folder).items()}
