"""Folders of safetensors files: one file or numbered shards with an index, read lazily, written whole or not at all."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  numpy learns the name bfloat16 here, which safetensors looks up
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")  # stored number formats that are read
WRITTEN = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
           "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # numpy's names in safetensors
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Files of a tokenizer, and of the modules that sentence-transformers puts behind a model: they may lie beside weights.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "sentencepiece.bpe.model",
              "chat_template.jinja", "generation_config.json", "modules.json", "sentence_bert_config.json",
              "config_sentence_transformers.json", "1_Pooling/config.json", "2_Normalize/config.json",
              "1_SpladePooling/config.json")
# What an export may contain; a folder that holds anything else is never replaced.
EXPORTED = (SINGLE, INDEX, "model-*-of-*.safetensors", "config.json", "merge.json", "README.md", *COMPANIONS,
            "1_Pooling", "2_Normalize", "1_SpladePooling")
log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # one of DTYPES, or a format that is not read


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[tuple[dict[str, Stored], Callable[[str], np.ndarray]]]:
    """The tensors of a folder by name, and a function that reads one of them from the memory-mapped file.

    Raises ValueError naming the file that is missing, corrupt, truncated, a pickle, or at odds with the index.
    """
    files = checkpoint_files(folder)
    with ExitStack() as stack:
        handles, tensors = {}, {}
        for path, expected in files.items():
            try:
                handle = stack.enter_context(safe_open(path, framework="np"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
            names = set(handle.keys())
            if expected is not None and names != expected:
                raise ValueError(f"{path} and {INDEX} disagree about {', '.join(sorted(names ^ expected)[:5])}")
            for name in sorted(names):
                part = handle.get_slice(name)
                handles[name], tensors[name] = handle, Stored(tuple(part.get_shape()), part.get_dtype())
        yield tensors, lambda name: handles[name].get_tensor(name)


def checkpoint_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, with the tensors that an index expects in each (None: no index)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single.exists():
        return {single: None}
    if not index.exists():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        hint = f": {pickles[0]} is a pickle, which can run any code when it is read; save the model again with " \
               "safe_serialization=True" if pickles else ""
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in weight_map.values()):
            raise ValueError("a shard lies outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        files.setdefault(folder / file, set()).add(name)
    return files


def write_checkpoint(
    folder: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[tuple[str, np.ndarray]],
    *, max_shard_bytes: int,
) -> None:
    """Writes tensors in the order of `specs`, their shapes and types, as they come: one of them is in memory.

    A tensor larger than `max_shard_bytes` gets a shard of its own. Raises OSError when the disk is full.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[dict[str, int]] = []
    for name, (shape, dtype) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    stream, weight_map = iter(tensors), {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, {name: specs[name] for name in shard}, stream)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = {"total_size": sum(sum(shard.values()) for shard in shards)}
        write_json({"metadata": total, "weight_map": weight_map}, folder / INDEX)


def write_shard(
    path: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """One safetensors file, marked as transformers expects it, of the next tensors of a stream.

    The library writes a file of arrays that are all there. Shapes and types say where each will lie, so here the header
    (8 bytes of its length, JSON, spaces up to a multiple of 8) goes first and every tensor behind it once it is made.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": WRITTEN[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in specs.items():
            streamed, array = next(tensors)
            assert streamed == name and array.shape == tuple(shape)
            # Stored is the buffer in row-major order, whatever the strides say.
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)


def write_json(values: object, path: Path) -> None:
    """Indented UTF-8 JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new_folder(folder: Path, *, overwrite: bool) -> None:
    """ValueError where `new_folder` would write over what is there: files of others, or without `overwrite` any."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a file or a link, not a folder")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise ValueError(f"{folder} is not empty; overwrite=True replaces an earlier export")
    foreign = [name for name in present if not any(Path(name).match(pattern) for pattern in EXPORTED)]
    if foreign:
        raise ValueError(f"{folder} holds files that no export writes, so it is not replaced: {', '.join(foreign[:5])}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block succeeds, and vanishes when it fails.

    The scratch folder is a sibling, so that the last step is a rename. With `overwrite` an earlier export is moved
    aside first and comes back if that rename fails; a process killed in between leaves it as `.NAME.old-PID`. The
    scratch folder of a process that was killed is named in a warning. ValueError: see `check_new_folder`.
    """
    folder = folder.absolute()
    check_new_folder(folder, overwrite=overwrite)
    for left in folder.parent.glob(f".{folder.name}.tmp-*") if folder.parent.is_dir() else ():
        if left.name.rpartition("-")[2].isdigit() and not _alive(int(left.name.rpartition("-")[2])):
            log.warning("%s may be left by a process that was killed: delete it if nothing writes there", left)
    scratch, aside = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            folder.rename(aside)
        try:
            scratch.rename(folder)
        except OSError:
            if aside.exists():
                aside.rename(folder)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
