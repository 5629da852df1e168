"""Rows of JSONL files as they stand there, plain, gzip or zstd; every fault is named with its line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.rows import BadRow, decode_json, missing_field
from jaxlm.data.text_files import numbered_lines

KINDS = {str: "text", list: "list", dict: "JSON object"}


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; blank lines are left out. ValueError for a file or line that cannot be read."""
    path = Path(path)
    for number, line in numbered_lines(path):
        if not line or line.isspace():
            continue
        try:
            row = decode_json(line)
        except BadRow as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a row must be an object, got {row!r:.80}")
        yield number, row


def field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a row. ValueError if it is missing or no `kind` (a key of `KINDS`)."""
    if name not in row:
        raise ValueError(f"{where}: {missing_field(name, row)}")
    if not isinstance(row[name], kind):
        raise ValueError(f"{where}: field {name!r} must be a {KINDS[kind]}, got {row[name]!r:.80}")
    return row[name]
