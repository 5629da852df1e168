"""Rows of binary formats: parquet (read at open), ArrayRecord and TFDS (random access, decoded when asked for)."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxlm.core.config import nearest
from jaxlm.data.rows import BadRow, Document, RowReader, SourceConfig, decode_json, decode_text


def read_parquet(path: Path, reader: RowReader) -> Iterator[Document]:
    """Documents of a parquet file; only the columns in use are read. `line` in messages is the row, from 1."""
    name, number = str(path), 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            reader.require_fields(file.schema_arrow.names, name)
            for batch in file.iter_batches(columns=reader.fields()):
                for row in batch.to_pylist():
                    number += 1
                    document = reader.read(row, name, number)
                    if document is not None:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a sound parquet file (after row {number}): {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: text is not valid UTF-8 (after row {number}): {error.reason}") from None


class LazyRows(Sequence):
    """Decodes a record when asked for it; None for a bad, empty or filtered one, which counts once.

    A bad one is named in the log when it is met, and is an error beyond the limit.
    """

    def __init__(self, records: Any, reader: RowReader, place: str) -> None:
        self._records, self._reader, self._place = records, reader, place
        self._dropped = bytearray(len(records))  # by index: a filter may drop most of many millions

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Document | None:
        document = self._read(i)
        self._reader.check()
        return document

    def probe(self, indices: Sequence[int]) -> None:
        """Reads some records. ValueError for more bad ones than allowed, no document, or filters without a match.

        The filters are judged only if all records are read.
        """
        reader = self._reader
        for i in indices:
            self._read(i)
        reader.check()
        if not reader.kept:
            raise ValueError(f"{reader.config.path}: empty corpus: no row left of {len(indices)} tried "
                             f"of {len(self)} ({reader.empty} without text, {reader.filtered} filtered, "
                             f"{len(reader.bad_rows)} bad)")
        if len(indices) == len(self):
            reader.check_filters()
        reader.name_bad_rows()

    def _read(self, i: int) -> Document | None:
        if self._dropped[i]:
            return None
        document = None
        try:
            row = _row(self._records[i])
        except BadRow as error:
            self._reader.bad(str(error), self._place, i + 1)
        except (RuntimeError, ValueError) as error:
            self._reader.bad(f"the record is damaged ({error})", self._place, i + 1)
        else:
            document = self._reader.read(row, self._place, i + 1)
        self._dropped[i] = document is None
        return document


def open_array_record(paths: Sequence[Path], reader: RowReader) -> LazyRows:
    """Records that are JSON objects in UTF-8, read at random from one or several ArrayRecord files."""
    for path in paths:
        if (shards := re.search(r"-of-(\d{5})$", path.name)) and len(paths) != int(shards[1]):
            raise ValueError(f"{reader.config.path}: {len(paths)} of {int(shards[1])} shards are there")
        try:
            len(ArrayRecordDataSource([str(path)]))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not a sound ArrayRecord file: {error or 'no footer, was it copied?'}") from None
    return LazyRows(ArrayRecordDataSource([str(path) for path in paths]), reader, reader.config.path)


def open_tfds(config: SourceConfig, reader: RowReader) -> LazyRows:
    """One split of a prepared TFDS data set in array_record format, without tensorflow."""
    name = config.path.removeprefix("tfds:")
    where = os.path.expanduser(config.data_dir) if config.data_dir else None
    try:
        builder = tfds.builder(name, data_dir=where, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"tfds:{name}: no such data set in {where or 'the tfds data folder'} "
                         f"(data_dir=FOLDER says where): {reason}") from None
    if not builder.info.splits:
        raise ValueError(f"tfds:{name}: nothing is prepared in {builder.data_dir}; "
                         "run download_and_prepare with file_format='array_record'")
    split = config.split or "train"
    base = split.partition("[")[0]
    if base not in builder.info.splits:
        raise ValueError(f"tfds:{name}: no split {base!r}{nearest(base, list(builder.info.splits))}; "
                         f"splits: {', '.join(builder.info.splits)}")
    reader.require_fields(builder.info.features, f"tfds:{name}")
    try:
        records = builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"tfds:{name}: split {split!r} cannot be read at random: {error}") from None
    return LazyRows(records, reader, f"tfds:{name}/{split}")


def _row(record: Any) -> Any:
    if isinstance(record, bytes):
        return decode_json(record)
    if isinstance(record, Mapping):
        return {name: _plain(value) for name, value in record.items()}
    return record


def _plain(value: Any) -> Any:
    """tfds gives text as bytes and numbers as numpy scalars."""
    if isinstance(value, bytes):
        return decode_text(value)
    return value.item() if isinstance(value, np.generic) else value
