"""Token databases for drafting, built from tokenised texts on the host, and their files.

What is built here holds numpy arrays; `jax.device_put` moves it to where `draft_sources` reads it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.generate.draft_sources import NONE, Corpus, ModelTable
from jaxlm.generate.suffix_array import suffix_array

FORMAT = "jaxlm-draft-1"
KINDS = {"model_table": ModelTable, "corpus": Corpus}


def build_model_table(
    texts: Iterable[Sequence[int]], vocab_size: int, n: int = 7, m: int = 4, keep: int = 100_000,
) -> ModelTable:
    """Hierarchy Drafting's model-dependent database: continuations that the model's own outputs often take.

    Counts in how many texts each (m+1)-gram stands, keeps the `keep` most common, and of each first token the `n`
    most common, most common first. Ties go to the smaller token ids, so the order of the texts does not matter.
    """
    if min(n, m, keep) < 1:
        raise ValueError(f"n, m and keep must be positive, got {n}, {m} and {keep}")
    tokens, text = _joined(texts, vocab_size)
    size = max(len(tokens) - m, 0)
    starts = np.flatnonzero(text[:size] == text[m:])  # a separator belongs to no text
    # Rank the grams in lexicographic order, as many tokens at a time as an int64 holds.
    rank, distinct = np.zeros(len(starts), np.int64), 1
    for j in range(m + 1):
        if distinct * vocab_size >= 2**62:
            distinct, rank = _dense(rank)
        rank = rank * vocab_size + tokens[starts + j]
        distinct *= vocab_size
    distinct, rank = _dense(rank)
    example = np.zeros(distinct, np.int64)
    example[rank] = starts
    once = np.unique(text[starts].astype(np.int64) * max(distinct, 1) + rank)
    counts = np.bincount(once % max(distinct, 1), minlength=distinct)
    kept = np.lexsort((np.arange(distinct), -counts))[:keep]
    grams = tokens[example[kept][:, None] + np.arange(m + 1)]
    by_key = np.argsort(grams[:, 0], kind="stable")  # most common first within a key
    grams = grams[by_key]
    place = np.arange(len(grams)) - np.searchsorted(grams[:, 0], grams[:, 0])
    grams, place = grams[place < n], place[place < n]
    table = ModelTable(np.full((vocab_size, n, m), NONE, np.int32), np.zeros((vocab_size, n), np.uint8))
    table.tokens[grams[:, 0], place] = grams[:, 1:]
    table.lengths[grams[:, 0], place] = m
    return table


def build_corpus(texts: Iterable[Sequence[int]], vocab_size: int) -> Corpus:
    """All texts one after another, and their suffixes sorted by the first 32 tokens (`suffix_array`)."""
    tokens, _ = _joined(texts, vocab_size)
    suffixes = suffix_array(tokens)[np.count_nonzero(tokens == NONE):]
    counts = np.bincount(tokens[tokens != NONE], minlength=vocab_size)
    return Corpus(tokens, suffixes, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def save_database(
    path: Path, database: ModelTable | Corpus, tokenizer_fingerprint: str, facts: Mapping[str, str | int | float],
) -> None:
    """One .safetensors file, whole or not at all. Its header keeps `facts` (such as the number of texts) and sizes."""
    if path.suffix != ".safetensors":
        raise ValueError(f"a database is a .safetensors file, got {path}")
    arrays = {name: np.ascontiguousarray(array) for name, array in database._asdict().items()}
    if isinstance(database, ModelTable):
        sizes = dict(zip(("vocab_size", "n", "m"), database.tokens.shape, strict=True))
    else:
        sizes = {"vocab_size": len(database.starts) - 1, "tokens": len(database.tokens)}
    kind = next(name for name, cls in KINDS.items() if type(database) is cls)
    about = {"kind": kind, "tokenizer": tokenizer_fingerprint, "sha256": _digest(arrays), "facts": sizes | dict(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        # One entry, since the library writes several in random order.
        save_file(arrays, scratch, metadata={FORMAT: json.dumps(about, sort_keys=True, ensure_ascii=False)})
        scratch.chmod(path.parent.stat().st_mode & 0o666)  # the library writes 0600
        scratch.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        scratch.unlink(missing_ok=True)


def load_database(path: Path, tokenizer_fingerprint: str, kind: str | None = None) -> ModelTable | Corpus:
    """Reads a file that `save_database` wrote.

    ValueError names the file if it is damaged, is no database or not of this `kind` ("model_table", "corpus"), or was
    made with another tokenizer.
    """
    with _opened(path) as (file, about):
        if kind is not None and about["kind"] != kind:
            raise ValueError(f"{path} is a database of kind {about['kind']}, not {kind}")
        if about["tokenizer"] != tokenizer_fingerprint:
            raise ValueError(f"{path} was made with another tokenizer ({about['tokenizer'][:12]}, "
                             f"here {tokenizer_fingerprint[:12]}); build it again")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    cls = KINDS[about["kind"]]
    if set(arrays) != set(cls._fields) or _digest(arrays) != about["sha256"]:
        raise ValueError(f"{path} is damaged: its contents do not match the checksum in its header")
    database = cls(**arrays)
    problem = _problem(database)
    if problem:
        raise ValueError(f"{path} is not a valid database: {problem}")
    return database


def database_facts(path: Path) -> dict[str, str | int | float]:
    """Sizes and the facts that `save_database` was given, from the header alone."""
    with _opened(path) as (_, about):
        return about["facts"]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file, and what `save_database` wrote about it."""
    try:
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with file:
        try:
            about = json.loads((file.metadata() or {})[FORMAT])
            if not {"tokenizer", "sha256", "facts"} < set(about) or about["kind"] not in KINDS:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is not a draft database of format {FORMAT}") from None
        yield file, about


def _joined(texts: Iterable[Sequence[int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens with NONE after every text, and the number of each one's text (-1, -2, ... at separators)."""
    parts, numbers, separator = [], [], np.full(1, NONE, np.int32)
    for i, ids in enumerate(texts):
        part = np.asarray(ids, np.int64).reshape(-1)
        if len(part) and not 0 <= part.min() <= part.max() < vocab_size:
            raise ValueError(f"text {i} holds the id {part[(part < 0) | (part >= vocab_size)][0]}, "
                             f"but the vocabulary has {vocab_size}")
        parts += [part.astype(np.int32), separator]
        numbers += [np.full(len(part), i, np.int32), np.full(1, -1 - i, np.int32)]
    empty = [np.zeros(0, np.int32)]
    return np.concatenate(parts or empty), np.concatenate(numbers or empty)


def _dense(keys: np.ndarray) -> tuple[int, np.ndarray]:
    values, rank = np.unique(keys, return_inverse=True)
    return len(values), rank.astype(np.int64)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _problem(database: ModelTable | Corpus) -> str:
    """What a file with a right checksum may still get wrong; empty if nothing."""
    tokens = database.tokens
    if isinstance(database, ModelTable):
        vocab_size, shape = len(tokens), tokens.shape[:2]
        if tokens.ndim != 3 or database.lengths.shape != shape:
            return f"tokens {tokens.shape} and lengths {database.lengths.shape} do not fit each other"
        inside = np.arange(tokens.shape[2]) < database.lengths[..., None]
        if np.any((tokens == NONE) == inside):
            return "tokens and lengths disagree"
    else:
        vocab_size, real = len(database.starts) - 1, np.count_nonzero(tokens != NONE)
        if len(database.suffixes) != real or database.starts[-1] != real or np.any(np.diff(database.starts) < 0):
            return "its index does not fit its tokens"
        if real and not 0 <= database.suffixes.min() <= database.suffixes.max() < len(tokens):
            return "its index points outside its tokens"
    if any(array.dtype != np.int32 for name, array in database._asdict().items() if name != "lengths"):
        return "its arrays are not int32"
    if tokens.size and not NONE <= tokens.min() <= tokens.max() < vocab_size:
        return f"it holds ids outside the vocabulary of {vocab_size}"
    return ""
