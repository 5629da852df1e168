"""The vectors of a corpus on disk: encoded shard by shard, resumed where it stopped, never mixed with others.

    vectors/manifest.json                    what made the vectors, of which corpus, and how they are stored
    vectors/00000.npy, 00001.npy, ...        [rows_per_shard, D] each, the last one what is left
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.core.files import replacing
from jaxlm.core.tree import digest

MANIFEST = "manifest.json"
Storage = Literal["float32", "float16"]
log = logging.getLogger(__name__)


def fingerprint(params: Any) -> str:
    """A parameter tree as a short name, the same on any mesh; differs when any number of any leaf does."""
    return hashlib.sha256(json.dumps(digest(params), sort_keys=True).encode()).hexdigest()[:16]


def encode_corpus(
    encode: Callable[[list[str]], np.ndarray], texts: Sequence[str], folder: str | Path, *, encoder: Mapping[str, Any],
    rows_per_shard: int = 65536, storage: Storage = "float32",
) -> list[np.ndarray]:
    """Writes the vectors of texts to a folder, and returns them memory-mapped, one array [rows, D] a shard.

    Each shard appears whole or not at all; a call after an interruption encodes those that are missing.

    Args:
      encode: texts to [len(texts), D].
      encoder: all that decides the vectors, as JSON: `fingerprint` of the parameters, pooling, prompts, length.
      storage: float16 halves the folder; about three digits of each number stay.

    ValueError: a folder with vectors of another encoder, other texts or another layout (named), no text, vectors of
    a wrong shape, not finite, or too large for float16; several processes (encode in one, on a mesh of its devices).
    """
    folder = Path(folder)
    if jax.process_count() > 1:
        raise ValueError("encode_corpus writes from one process; run it in one, and search in many")
    if not texts:
        raise ValueError(f"{folder}: there are no texts to encode")
    if rows_per_shard < 1 or storage not in ("float32", "float16"):
        raise ValueError(f"rows_per_shard must be at least 1 and storage float32 or float16, got {rows_per_shard} and "
                         f"{storage!r}")
    manifest = {"encoder": json.loads(json.dumps(encoder)), "corpus": _corpus_digest(texts), "rows": len(texts),
                "rows_per_shard": rows_per_shard, "storage": storage}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _check_same(folder, _read_manifest(folder), manifest)
    elif any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no {MANIFEST}; choose a new folder for the vectors")
    else:
        with replacing(folder / MANIFEST) as scratch:
            scratch.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    missing = [path for path in _shard_paths(folder, manifest) if not path.exists()]
    log.info("%s: %d of %d shards are to be encoded", folder, len(missing), len(_shard_paths(folder, manifest)))
    for path in missing:
        start = int(path.stem) * rows_per_shard
        vectors = _encoded(encode, list(texts[start:start + rows_per_shard]), start, storage)
        # Through a stream: given a path, numpy would add an ending to it.
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.save(file, vectors)
        log.info("%s: %d of %d texts", path, start + len(vectors), len(texts))
    return open_vectors(folder)


def open_vectors(folder: str | Path) -> list[np.ndarray]:
    """The shards of a folder that `encode_corpus` filled, memory-mapped, in order: `blocks` of `index.search`.

    ValueError: no such folder, shards that are missing or of another shape than the manifest says.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    paths = _shard_paths(folder, manifest)
    if missing := [path.name for path in paths if not path.exists()]:
        raise ValueError(f"{folder}: {len(missing)} of {len(paths)} shards are missing, {missing[0]} first; run the "
                         "encoding again, it goes on there")
    shards = []
    for number, path in enumerate(paths):
        try:
            shard = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{path}: not a sound .npy file ({error}); delete it and run the encoding again") from None
        rows = min(manifest["rows_per_shard"], manifest["rows"] - number * manifest["rows_per_shard"])
        width = shards[0].shape[1] if shards else shard.shape[-1]
        if shard.shape != (rows, width) or shard.dtype != manifest["storage"]:
            raise ValueError(f"{path}: holds {shard.dtype} {shard.shape} instead of {manifest['storage']} "
                             f"{(rows, width)}; delete it and run the encoding again")
        shards.append(shard)
    return shards


def _encoded(encode: Callable[[list[str]], np.ndarray], texts: list[str], start: int, storage: Storage) -> np.ndarray:
    where = f"texts {start} to {start + len(texts) - 1}"
    vectors = np.asarray(encode(texts))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{where}: the encoder gave shape {vectors.shape} for {len(texts)} texts")
    with np.errstate(over="ignore"):  # found below
        stored = vectors.astype(storage)
    if bad := np.flatnonzero(~np.isfinite(stored).all(axis=1)).tolist():
        kind = "too large for float16" if np.isfinite(vectors[bad]).all() else "not finite"
        raise ValueError(f"{where}: {len(bad)} vectors are {kind}, that of text {start + bad[0]} first")
    return stored


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if different := [key for key in new if old.get(key) != new[key]]:
        shown = "; ".join(f"{key} was {json.dumps(old.get(key), ensure_ascii=False):.200}, is now "
                          f"{json.dumps(new[key], ensure_ascii=False):.200}" for key in different)
        raise ValueError(f"{folder}: holds vectors that were made differently ({shown}); choose another folder")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        # What follows relies on these; the rest is only compared.
        sound = min(manifest["rows"], manifest["rows_per_shard"]) > 0 and manifest["storage"] in ("float32", "float16")
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no {MANIFEST}, so no vectors of a corpus") from None
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: is not the manifest of a corpus; delete the folder and encode again")
    return manifest


def _shard_paths(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    count = -(-manifest["rows"] // manifest["rows_per_shard"])
    return [folder / f"{number:05d}.npy" for number in range(count)]


def _corpus_digest(texts: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(b"%d:" % len(data))  # so that "ab", "c" is another corpus than "a", "bc"
        total.update(data)
    return total.hexdigest()
