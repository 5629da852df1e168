"""Rows of JSONL and TSV files, plain or compressed. Every fault is named with its line."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from jaxlm.data.rows import BadRow, Document, RowReader, decode_json, decode_text

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, reader: RowReader) -> Iterator[Document]:
    """Documents of a file with one JSON object a line; blank lines count as empty rows."""
    name = str(path)
    for number, line in numbered_lines(path):
        if not line or line.isspace():
            reader.empty += 1
            continue
        try:
            row = decode_json(line)
        except BadRow as error:
            reader.bad(str(error), name, number)
            continue
        document = reader.read(row, name, number)
        if document is not None:
            yield document


def read_tsv(path: Path, reader: RowReader) -> Iterator[Document]:
    """Documents of a file whose first line names the columns. Nothing is quoted: a `"` is a character."""
    name = str(path)
    lines = numbered_lines(path)
    try:
        header = [column.strip() for column in next(lines, (1, b""))[1].decode("utf-8").split("\t")]
    except UnicodeDecodeError:
        raise ValueError(f"{path}:1: the header is not valid UTF-8") from None
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(f"{path}:1: the header must name each column once, got {header}")
    reader.require_fields(header, str(path))
    for number, line in lines:
        if not line:
            reader.empty += 1
            continue
        try:
            cells = decode_text(line).split("\t")
        except BadRow as error:
            reader.bad(str(error), name, number)
            continue
        if len(cells) != len(header):
            reader.bad(f"{len(cells)} columns, the header has {len(header)}", name, number)
            continue
        document = reader.read(dict(zip(header, cells, strict=True)), name, number)
        if document is not None:
            yield document


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ending. Only \\n and \\r\\n end a line: U+2028 and form feed are text."""
    codec = COMPRESSED.get(path.suffix)
    number = 0
    try:
        if codec and path.stat().st_size < 2:  # gzip calls nothing an empty file and one byte no gzip.
            raise EOFError
        with _open(path, codec) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                yield number, line.rstrip(b"\n").removesuffix(b"\r")
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        if codec is None or (isinstance(error, OSError) and error.errno is not None):
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        if isinstance(error, EOFError) or "Truncated" in str(error):
            raise ValueError(f"{path}: ends in the middle of the {codec} stream (after line {number}); "
                             "was it copied completely?") from None
        raise ValueError(f"{path}: not a sound {codec} file (after line {number}): {error}") from None


def _open(path: Path, codec: str | None) -> BinaryIO:
    if codec == "gzip":
        return gzip.open(path, "rb")
    if codec == "zstd":
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20)
    return path.open("rb")
