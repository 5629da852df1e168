"""Rows of JSONL files as they stand there, plain or gzipped; every fault is named with its line."""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.rows import decode_json, missing_field


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; blank lines are left out. ValueError for a file or line that cannot be read."""
    path, number = Path(path), 0
    try:
        with (gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a sound gzip file (after line {number}): {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a row. ValueError if it is missing or no `kind`."""
    if name not in row:
        raise ValueError(f"{where}: {missing_field(name, row)}")
    if not isinstance(row[name], kind):
        raise ValueError(f"{where}: field {name!r} must be a {_KINDS[kind]}, got {row[name]!r:.80}")
    return row[name]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = decode_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {row!r:.80}")
    return row


_KINDS = {str: "text", list: "list", dict: "JSON object"}
