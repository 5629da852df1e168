"""The steps that read and write files: raw rows, a parquet file of each task between stages, the output."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.core.files import replacing
from jaxlm.curate.config import LanguageConfig, OutputFormat, QualityConfig, RawConfig
from jaxlm.curate.dedup import HASH_BYTES, content_hash, first_of_each
from jaxlm.curate.extras import extra
from jaxlm.curate.language import judge
from jaxlm.curate.quality import keep_threshold, score
from jaxlm.curate.raw import read_raw
from jaxlm.curate.report import Tally

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("id", pyarrow.string()), ("source", pyarrow.string()),
                         ("language", pyarrow.string()), ("score", pyarrow.float32()),
                         ("hash", pyarrow.binary(HASH_BYTES))])
OUTPUT_FIELDS = ("text", "language", "source", "id", "score")
BATCH_ROWS = 1000


@dataclass(frozen=True)
class ReadRaw:
    """Of T tasks, task r reads the files r, r + T, ... What is repaired or cannot be read is counted."""

    files: tuple[Path, ...]
    config: RawConfig
    records: Path
    examples: int

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        document, tally = extra("datatrove.data").Document, Tally(self.examples)
        for path in self.files[rank::world_size]:
            for row in read_raw(path, self.config):
                tally.counts["documents_in"] += 1
                tally.counts["bytes_in"] += row.size
                tally.notes.update(f"repaired: {name}" for name in row.repairs)
                if row.text is None:
                    tally.drop(row.reason, row.id, "")
                else:
                    yield from tally.outgoing([document(row.text, row.id, metadata={"source": path.name})])
        tally.save(self.records / "read" / f"{rank:05d}.json")


@dataclass(frozen=True)
class WriteRows:
    """All documents of a task as one parquet file, which appears whole; also without documents."""

    folder: Path
    model: Path | None = None  # of the classifier: scores are computed here, and its step cuts them later

    def __call__(self, documents: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        with replacing(self.folder / f"{rank:05d}.parquet") as scratch, \
                pyarrow.parquet.ParquetWriter(scratch, SCHEMA, compression="zstd") as writer:
            for document in documents:
                found = {name: document.metadata.get(name) for name in ("source", "language", "score")}
                if self.model is not None and found["score"] is None:
                    found["score"] = score(self.model, document.text)
                rows.append(found | {"text": document.text, "id": document.id, "hash": content_hash(document.text)})
                if len(rows) == BATCH_ROWS:
                    writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
                    rows.clear()
                yield document
            if rows:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))


@dataclass(frozen=True)
class ReadRows:
    """The documents that the same task wrote in an earlier stage, with `row`, their number, in the metadata."""

    folder: Path

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        document = extra("datatrove.data").Document
        number = 0
        with pyarrow.parquet.ParquetFile(self.folder / f"{rank:05d}.parquet") as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    labels = {name: row[name] for name in ("source", "language", "score")}
                    yield document(row["text"], row["id"], metadata=labels | {"row": number})
                    number += 1


@dataclass(frozen=True)
class Choose:
    """One task between two stages: marks the first of equal texts, and finds the score that cuts each language."""

    rows: Path
    folder: Path
    exact: bool
    quality: QualityConfig

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> None:
        tables = [pyarrow.parquet.read_table(path, columns=["hash", "language", "score"])
                  for path in sorted(self.rows.glob("*.parquet"))]
        keep = [np.ones(len(table), bool) for table in tables]
        if self.exact:
            keep = first_of_each([np.array(table["hash"].to_pylist(), f"V{HASH_BYTES}") for table in tables])
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, own in enumerate(keep):
            np.save(self.folder / f"{number:05d}.npy", own)
        thresholds: dict[str, float] = {}
        if self.quality.model is not None:
            whole, first = pyarrow.concat_tables(tables), np.concatenate(keep)
            languages = np.array(whole["language"].to_pylist(), object)
            for language in sorted({*languages[first]}):
                scores = whole["score"].to_numpy()[first & (languages == language)]
                thresholds[language] = self.quality.threshold if self.quality.threshold is not None else \
                    keep_threshold(scores, self.quality.keep_share)
        with replacing(self.folder / "thresholds.json") as scratch:
            scratch.write_text(json.dumps(thresholds))


@dataclass(frozen=True)
class Only:
    """Passes the documents on to datatrove's stage, which is made where it runs."""

    build: Callable[[], Any]

    def __call__(self, documents: Any, rank: int = 0, world_size: int = 1) -> Any:
        return self.build()(documents, rank, world_size)


@dataclass(frozen=True)
class WriteOutput:
    """The rows of a task as one file of the output, none if it has no document."""

    folder: Path
    format: OutputFormat

    def __call__(self, documents: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{rank:05d}.{self.format}"
        count = 0
        with replacing(path) as scratch:
            write, close = OUTPUTS[self.format](scratch)
            try:
                for document in documents:
                    row = {name: document.metadata.get(name) for name in OUTPUT_FIELDS}
                    write(row | {"text": document.text, "id": document.id})
                    count += 1
                    yield document
            finally:
                close()
        if not count:
            path.unlink()


def build_language(config: LanguageConfig) -> Any:
    """A datatrove filter that notes the language of a document and drops those that are not wanted."""

    def keeps(document: Any) -> bool | tuple[bool, str]:
        document.metadata["language"], reason = judge(document.text, config)
        return True if reason is None else (False, reason)

    return extra("datatrove.pipeline.filters").LambdaFilter(keeps)


def build_exact(folder: Path) -> Any:
    """A datatrove filter that drops the documents which `Choose` did not mark."""
    base = extra("datatrove.pipeline.filters").LambdaFilter

    class Exact(base):
        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
            keep = np.load(folder / f"{rank:05d}.npy", allow_pickle=False)
            self.filter_function = lambda document: bool(keep[document.metadata["row"]]) or (False, "exact duplicate")
            yield from super().run(data, rank, world_size)

    return Exact(None)


def build_quality(folder: Path) -> Any:
    """A datatrove filter that drops scores below the threshold of the language."""
    thresholds = json.loads((folder / "thresholds.json").read_text())

    def keeps(document: Any) -> bool | tuple[bool, str]:
        value = document.metadata["score"]
        if value >= np.float32(thresholds[document.metadata["language"]]):
            return True
        document.metadata["detail"] = {"score": round(value, 4)}
        return False, "low quality"

    return extra("datatrove.pipeline.filters").LambdaFilter(keeps)


def _open_parquet(path: Path) -> tuple[Callable[[dict], None], Callable[[], None]]:
    schema = pyarrow.schema([SCHEMA.field(name) for name in OUTPUT_FIELDS])
    writer, rows = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd"), []

    def flush() -> None:
        if rows:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
            rows.clear()

    def write(row: dict) -> None:
        rows.append(row)
        if len(rows) == BATCH_ROWS:
            flush()

    def close() -> None:
        flush()
        writer.close()

    return write, close


def _open_array_record(path: Path) -> tuple[Callable[[dict], None], Callable[[], None]]:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    return lambda row: writer.write(json.dumps(row, ensure_ascii=False).encode("utf-8")), writer.close


# A path to `write(row)` and `close()`.
OUTPUTS: dict[str, Callable[[Path], tuple[Callable[[dict], None], Callable[[], None]]]] = {
    "parquet": _open_parquet,
    "array_record": _open_array_record,
}
