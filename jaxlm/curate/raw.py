"""Raw files as documents: bytes of any encoding are repaired or dropped, and both are counted."""

import codecs
import functools
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from jaxlm.curate.config import RawConfig
from jaxlm.curate.extras import extra
from jaxlm.data.text_files import numbered_lines

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
MAX_REPLACEMENT = 0.001  # U+FFFD per character: what was lost cannot be repaired


class Decoded(NamedTuple):
    """A text and how it was repaired, or None and why it could not be."""

    text: str | None
    repairs: tuple[str, ...] = ()
    reason: str = ""


class RawRow(NamedTuple):
    """One row of a file. `size` is in bytes; `text` None has a `reason`."""

    id: str
    text: str | None
    size: int
    repairs: tuple[str, ...]
    reason: str


def check_ending(path: Path) -> None:
    """ValueError for a file that is none of `ENDINGS`."""
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path}: unknown ending; raw files are {' '.join(ENDINGS)}")


def decode(data: bytes) -> Decoded:
    """Bytes as text: UTF-8, else CP949 (which contains EUC-KR) if that gives Hangul; nothing else is guessed."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return Decoded(data.decode("utf-8"))
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        return Decoded(None, (), "neither UTF-8 nor CP949")
    # Bytes of Western code pages are often valid CP949, but then as rare Hanja, not as words of Hangul.
    foreign = [char for char in text if char.isalpha() and not char.isascii()]
    if sum("가" <= char <= "힣" for char in foreign) < 0.5 * len(foreign):
        return Decoded(None, (), "neither UTF-8 nor CP949")
    return Decoded(text, ("cp949",))


def repair(text: str) -> Decoded:
    """UTF-8 read as a Western code page is put right (ftfy), Hangul composed (NFC), control characters removed."""
    repairs = []
    for name, step in (("mojibake", _fix_encoding), ("nfc", functools.partial(unicodedata.normalize, "NFC")),
                       ("control characters", _without_controls)):
        fixed = step(text)
        if fixed != text:
            repairs.append(name)
            text = fixed
    if text.count("\ufffd") > MAX_REPLACEMENT * len(text):
        return Decoded(None, (), "replacement characters")
    return Decoded(text, tuple(repairs))


def read_raw(path: Path, config: RawConfig) -> Iterator[RawRow]:
    """Every row of a file. ValueError for one that is damaged or cannot be read."""
    if path.name.endswith(".parquet"):
        rows = _parquet_rows(path, config)
    elif ".jsonl" in path.name:
        rows = _json_rows(path, config)
    else:
        rows = _txt_rows(path, config)
    for number, size, found in rows:
        repairs = found.repairs
        if found.text is not None:
            found = repair(found.text)
            if found.text is not None and len(found.text.strip()) < config.min_chars:
                found = Decoded(None, (), "empty")
        yield RawRow(f"{path}:{number}", found.text, size, (*repairs, *found.repairs), found.reason)


def _json_rows(path: Path, config: RawConfig) -> Iterator[tuple[int, int, Decoded]]:
    for number, line in numbered_lines(path):
        found = decode(line)
        if found.text is not None and not found.text.strip():
            found = Decoded(None, (), "empty")
        elif found.text is not None:
            found = _text_of(found, config.text_field)
        yield number, len(line), found


def _text_of(line: Decoded, name: str) -> Decoded:
    try:
        row = json.loads(line.text)
    except (ValueError, RecursionError):
        return Decoded(None, (), "not JSON")
    text: Any = row.get(name) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return Decoded(None, (), f"no text in field {name!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Decoded(None, (), "lone surrogate")
    return Decoded(text, line.repairs)


def _txt_rows(path: Path, config: RawConfig) -> Iterator[tuple[int, int, Decoded]]:
    lines = numbered_lines(path)
    if config.txt_documents == "file":
        data = b"\n".join(line for _, line in lines)
        lines = iter([(1, data)])
    for number, line in lines:
        yield number, len(line), decode(line)


def _parquet_rows(path: Path, config: RawConfig) -> Iterator[tuple[int, int, Decoded]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if config.text_field not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column {config.text_field!r}; columns: "
                                 f"{', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[config.text_field]):
                # As bytes: pyarrow does not check that strings are UTF-8, and one bad value would end the batch.
                for value in batch.column(0).cast(pyarrow.binary()).to_pylist():
                    number += 1
                    found = Decoded(None, (), "empty") if value is None else decode(value)
                    yield number, len(value or b""), found
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a sound parquet file with texts (after row {number}): {error}") from None


def _fix_encoding(text: str) -> str:
    return text if text.isascii() else extra("ftfy").fix_encoding(text)


def _without_controls(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
