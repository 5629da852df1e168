"""Documents from files, data sets, lists and the embedded sample, behind one random-access view.

JSONL, TSV, parquet and lists are read and checked at open, so their faults show before any device work; ArrayRecord
and TFDS records are decoded when asked for, and a part of them is tried at open. What is dropped is counted and logged.
"""

import glob
import itertools
import logging
import os
import re
import urllib.parse
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from jaxlm.core.config import nearest
from jaxlm.data.record_files import LazyRows, open_array_record, open_tfds, read_parquet
from jaxlm.data.rows import Document, RowReader, SourceConfig
from jaxlm.data.sample import Sample, sample_documents
from jaxlm.data.text_files import read_jsonl, read_tsv

READERS = {".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".jsonl.zst": read_jsonl, ".ndjson": read_jsonl,
           ".tsv": read_tsv, ".tsv.gz": read_tsv, ".tsv.zst": read_tsv, ".parquet": read_parquet}
_ARRAY_RECORD = re.compile(r"\.(array_?record)(-\d{5}-of-\d{5})?$")
DEFAULT_SAMPLE = 1000
NO_TEXT = ("text", "source_field", "language", "language_field")  # options that only documents of text have
MIXED = ("weight", "epochs", "cap")  # options that only a mixture of training data has
PROBED_RECORDS, FINGERPRINT_DOCUMENTS = 1000, 64

logger = logging.getLogger(__name__)


def parse_source(spec: str, *, unread: Sequence[str] = ()) -> SourceConfig:
    """`PATH?key=value&key=value` as a configuration; `include` and `exclude` may come several times.

    `unread`: options without effect where the source is read (`MIXED`: it is no part of a mixture); ValueError for one
    that is given.

    Values are percent-decoded (`%0A` newline, `%26` ampersand); `+` stays a plus. The first `?` ends the path, so a
    glob uses `*` and `[...]` here. ValueError for an unknown key, a repeated key or a value of the wrong kind.
    """
    path, _, query = spec.partition("?")
    hints = get_type_hints(SourceConfig)
    del hints["path"]
    values: dict[str, Any] = {}
    for item in query.split("&") if query else []:
        key, equals, value = item.partition("=")
        if key not in hints:
            raise ValueError(f"source {spec!r}: unknown option {key!r}{nearest(key, hints)}; options: "
                             f"{', '.join(hints)}")
        if not equals:
            raise ValueError(f"source {spec!r}: option {key!r} needs a value")
        if key in unread:
            raise ValueError(f"source {spec!r}: {key} has an effect on mixtures of training data only")
        try:
            value = urllib.parse.unquote(value, errors="strict")
            if key in ("include", "exclude"):
                values[key] = (*values.get(key, ()), value)
                continue
            if key in values:
                raise ValueError("is given twice")
            kind = float if key in ("weight", "epochs", "cap") else int if key in ("documents", "seed") else str
            values[key] = kind(value)
        except ValueError as error:
            raise ValueError(f"source {spec!r}: option {key!r}: {error}") from None
    return SourceConfig(path=path, **values)


class Source:
    """Documents by index. None stands for a filtered, empty or bad row of a format that is decoded lazily."""

    def __init__(self, config: SourceConfig, rows: Sequence[Document | None], reader: RowReader) -> None:
        self.name, self.config = config.name or default_name(config.path), config
        self._rows, self._reader = rows, reader

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Document | None:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} documents, asked for {i}")
        return self._rows[int(i) % len(self)]

    @property
    def bad_rows(self) -> list[str]:
        """`path:line: reason` of each bad row met so far; of a lazy format in a worker, that worker's."""
        return self._reader.bad_rows

    @property
    def dropped(self) -> dict[str, int]:
        """Counts of rows dropped so far, by cause: bad, empty, filtered."""
        return {"bad": len(self.bad_rows), "empty": self._reader.empty, "filtered": self._reader.filtered}

    def fingerprint(self) -> int:
        """CRC-32 of the length and of 64 spread documents' texts, to notice that a path holds other data than before.

        A change that keeps the length and misses these documents is not seen.
        """
        value = zlib.crc32(str(len(self)).encode())
        for i in spread(len(self), FINGERPRINT_DOCUMENTS):
            document = self[i]
            text = document.text.encode("utf-8") if document else b""
            # The length before each text keeps ["ab", "c"] and ["a", "bc"] apart.
            value = zlib.crc32(text, zlib.crc32(f":{len(text)}:".encode(), value))
        return value


def open_source(config: SourceConfig | Sequence[str | Mapping[str, Any]], *, max_bad_rows: int = 0,
                reader: type[RowReader] = RowReader) -> Source:
    """Opens what a configuration names, or a list of strings or of `{"text", "language"?, "source"?}`.

    ValueError, in one sentence: a missing file, a glob without match, an unknown ending, a missing field, a damaged
    file, more than `max_bad_rows` bad rows (the first are listed), a filter that matches nothing, no row left.
    Of ArrayRecord and TFDS up to 1000 evenly spread records are tried for this, all if there are no more: beyond these
    a bad row counts when it is read, and a filter is refused only if no record tried is left.
    `reader`: what turns rows of files into documents.
    """
    if max_bad_rows < 0:
        raise ValueError(f"max_bad_rows must not be negative, got {max_bad_rows}")
    if not isinstance(config, SourceConfig):
        return _open_list(config, max_bad_rows)
    reader = reader(config, max_bad_rows)
    if config.path.startswith("sample:"):
        rows = sample_documents(config.path.removeprefix("sample:"), config.documents or DEFAULT_SAMPLE,
                                split=config.split or "train", seed=config.seed)
        return Source(config, rows, reader)
    if config.path.startswith("tfds:"):
        return _lazy(config, open_tfds(config, reader), reader)
    paths = find_files(config.path)
    kinds = {path: _kind(path) for path in paths}
    lazy = [path for path in paths if kinds[path] == "array_record"]
    if lazy and len(lazy) < len(paths):
        raise ValueError(f"{config.path}: mixes ArrayRecord with other formats; open them as two sources")
    if lazy:
        return _lazy(config, open_array_record(paths, reader), reader)
    return packed_source(config, (doc for path in paths for doc in READERS[kinds[path]](path, reader)), reader)


def find_files(path: str) -> list[Path]:
    """The file, or the sorted files that a glob matches. ValueError if there is none or it is a folder."""
    path = os.path.expanduser(path)
    if os.path.exists(path):
        found = [Path(path)]
    elif glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(name)]
        if not found:
            raise ValueError(f"{path}: no file matches")
    else:
        folder = Path(path).parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(Path(path).name, names) if folder.is_dir() else f" (nor does the folder {folder})"
        raise ValueError(f"{path}: no such file{hint}")
    if found[0].is_dir():
        raise ValueError(f"{path}: is a folder; name its files with a glob such as {path.rstrip('/')}/*.jsonl.gz")
    return found


def default_name(path: str) -> str:
    """`nsmc_reviews` for `/data/nsmc_reviews.tsv.gz`, `ko` for `sample:ko`; stars of a glob are left out."""
    name = re.sub("[:/]", "_", path) if path.startswith(("sample:", "tfds:")) else Path(path).name
    name = re.sub(r"\.array_?record(-.*)?$", "", name)
    ending = next((ending for ending in sorted(READERS, key=len, reverse=True) if name.endswith(ending)), "")
    return re.sub(r"[*?\[\]]+", "", name.removesuffix(ending)).strip("-_. ") or "source"


def _kind(path: Path) -> str:
    if _ARRAY_RECORD.search(path.name):
        return "array_record"
    for ending in READERS:
        if path.name.endswith(ending):
            return ending
    raise ValueError(f"{path}: unknown ending; known: {' '.join(READERS)} .array_record")


def _open_list(rows: Sequence[str | Mapping[str, Any]], max_bad_rows: int) -> Source:
    if isinstance(rows, str):
        raise ValueError(f"a source is a SourceConfig or a list, got the string {rows!r}; parse_source reads specs")
    config = SourceConfig(path="memory")
    reader = RowReader(config, max_bad_rows)
    return packed_source(config, _list_documents(rows, reader), reader)


def _list_documents(rows: Sequence[str | Mapping[str, Any]], reader: RowReader) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        document = reader.read({"text": row} if isinstance(row, str) else row, "memory", number)
        if document is not None:
            labels = row if isinstance(row, Mapping) else {}
            yield Document(document.text, labels.get("language"), labels.get("source"))


class PackedRows(Sequence):
    """Documents as one buffer of UTF-8 and its offsets: millions cost their bytes, and a worker gets them by copy."""

    def __init__(self, documents: Iterable[Document]) -> None:
        buffer, offsets, labels = bytearray(), array("q", [0]), array("i")
        known: dict[tuple[str | None, str | None], int] = {}
        for document in documents:
            buffer += document.text.encode("utf-8")
            offsets.append(len(buffer))
            labels.append(known.setdefault(document[1:], len(known)))
        self._buffer, self._known = bytes(buffer), list(known)
        self._offsets, self._labels = np.array(offsets, np.int64), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> Document:
        text = self._buffer[self._offsets[i]:self._offsets[i + 1]].decode("utf-8")
        return Document(text, *self._known[self._labels[i]])


def open_rows(
    config: SourceConfig | Iterable[Mapping[str, Any]], *, reader: type[RowReader], sample: type[Sample], what: str,
    max_bad_rows: int, unread: Sequence[str] = NO_TEXT, text_field: str = "text",
) -> Source:
    """Rows of another kind than documents: `reader` makes documents of them whose text is a row as JSON.

    Args:
      config: what names them, or rows in memory.
      sample: the embedded ones, for `sample:ko|en|both`.
      what: such rows are called in errors.
      unread: options that mean nothing for them; ValueError for one that is given, and as `open_source`.
      text_field: what `text_field` is unless it is given.
    """
    if not isinstance(config, SourceConfig):
        config, rows = SourceConfig(path="memory"), config
        reading = reader(config, max_bad_rows)
        found = (reading.read(row, "memory", number) for number, row in enumerate(rows, 1))
        return packed_source(config, (one for one in found if one is not None), reading)
    for name in unread:
        if getattr(config, name) != getattr(SourceConfig(path=config.path), name):
            raise ValueError(f"source {config.path!r}: {name} has no effect on {what}")
    if config.path.startswith("sample:"):
        rows = sample(config.path.removeprefix("sample:"), config.documents or DEFAULT_SAMPLE,
                      config.split or "train", config.seed)
        return Source(config, rows, reader(config, max_bad_rows))
    if config.text_field == "text":
        config = replace(config, text_field=text_field)
    return open_source(config, max_bad_rows=max_bad_rows, reader=reader)


def packed_source(config: SourceConfig, documents: Iterable[Document], reader: RowReader) -> Source:
    """Documents as a source, all read now; ValueError as `open_source` says."""
    source = Source(config, PackedRows(documents), reader)
    reader.check()
    if not len(source):
        raise ValueError(f"{config.path}: empty corpus: no row left of {reader.empty + reader.filtered} "
                         f"({reader.empty} without text, {reader.filtered} filtered)")
    reader.check_filters()
    bad, empty = len(reader.bad_rows), reader.empty
    if bad or empty:
        logger.warning("%s: dropped %d bad rows and %d without text%s", config.path, bad, empty,
                       f"; first bad: {reader.bad_rows[0]}" if bad else "")
    return source


def _lazy(config: SourceConfig, rows: LazyRows, reader: RowReader) -> Source:
    if not len(rows):
        raise ValueError(f"{config.path}: empty corpus: no record")
    rows.probe(spread(len(rows), PROBED_RECORDS))
    return Source(config, rows, reader)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` increasing indices, one from each of equal parts; their distances have no period, as data may."""
    count = min(length, count)
    starts = [part * length // count for part in range(count + 1)]
    # Multiples of the golden ratio modulo 1 (here in 32 bits) place the index within its part.
    return [start + (part * 0x9E3779B1 % 2**32 * (end - start) >> 32)
            for part, (start, end) in enumerate(itertools.pairwise(starts))]


def check_bad(source: Source, bad: Sequence[str], max_bad_rows: int, what: str = "rows") -> int:
    """How many rows could not be read, or were found `bad` afterwards; ValueError, with the first, for too many."""
    unread = len(source.bad_rows)
    if len(bad) + unread > max_bad_rows:
        first = "".join(f"\n  {line}" for line in bad[:5]) + ("\n  ..." if len(bad) > 5 else "")
        raise ValueError(f"{source.config.path}: {len(bad) + unread} of {len(source) + unread} {what} are bad, "
                         f"{max_bad_rows} allowed (max_bad_rows):{first}")
    return len(bad) + unread
