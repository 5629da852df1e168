"""The loader: documents to an endless stream of `LMBatch`, whose position is a small JSON value.

    sources -> shuffle, repeat -> examples -> pack -> mix -> batch -> (workers) -> LMBatch
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxlm.core.batch import LMBatch
from jaxlm.data.examples import ToExample
from jaxlm.data.mixture import stream_rows
from jaxlm.data.packing import Packing, pack, to_inputs
from jaxlm.data.sources import Document, Source
from jaxlm.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Shape and order of the training batches."""

    batch_size: int = 16             # rows of a global batch
    seq_len: int = 512               # T, input tokens of a row
    packing: Packing = "concat"
    num_bins: int | None = None      # first_fit only: open rows; None is 64
    boundary_targets: bool = False   # KORMo: True
    reset_positions: bool = True     # KORMo: False
    workers: int = 0                 # loader processes; 0 loads in the training process

    def __post_init__(self):
        if min(self.batch_size, self.seq_len, self.num_bins or 1) < 1 or self.workers < 0:
            raise ValueError("pipeline.batch_size, seq_len and num_bins must be positive, workers not negative")
        if self.num_bins and self.packing != "first_fit":
            raise ValueError(f"pipeline.num_bins has no effect with packing {self.packing}")


class Batches:
    """An endless iterator of `LMBatch`. Its state is a JSON value; `set_state` continues bit-identically.

    A state belongs to one configuration, one list of sources and one number of processes and workers.
    """

    def __init__(self, rows: Iterator[Mapping[str, np.ndarray]], sources: Sequence[Source], config: PipelineConfig):
        self._rows, self._sources, self._config = rows, sources, config
        self._fingerprints = [source.fingerprint() for source in sources]
        self._draws = np.zeros(len(sources), np.int64)
        self._places = self._padding = self._targets = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> LMBatch:
        rows = next(self._rows)
        np.maximum.at(self._draws, rows["source"], rows["draw"].astype(np.int64) + 1)
        batch = to_inputs(rows, boundary_targets=self._config.boundary_targets,
                          reset_positions=self._config.reset_positions)
        self._places += batch.tokens.size
        self._padding += int((batch.segments == 0).sum())
        self._targets += int(batch.loss_mask.sum())
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"rows": _to_json(self._rows.get_state()), "draws": self._draws.tolist(), "sources": self._fingerprints}

    def set_state(self, state: dict[str, Any]) -> None:
        for source, then in zip(self._sources, state["sources"], strict=True):
            if then != source.fingerprint():
                raise ValueError(f"{source.config.path} is not the data that this run began with; a position in it "
                                 "means nothing now")
        self._rows.set_state(_from_json(state["rows"]))
        self._draws[:] = state["draws"]

    def stats(self) -> dict[str, float]:
        """Shares of padding and of positions without a target since this process started; epochs of each source."""
        places = max(1, self._places)
        stats = {"padding": self._padding / places, "no_target": 1 - self._targets / places}
        return stats | {f"epoch/{source.name}": float(draws / len(source))
                        for source, draws in zip(self._sources, self._draws, strict=True)}

    def close(self) -> None:
        """Stops loader processes and threads."""
        self._rows.close()


def make_pipeline(
    sources: Sequence[Source], tokenizer: Tokenizer, config: PipelineConfig, *, excluded: tuple[int, ...] = (),
    seed: int = 0, process_index: int = 0, process_count: int = 1,
) -> Batches:
    """The training stream of one process: `batch_size / process_count` rows a batch.

    Args:
      sources: mixed by their `config.weight`.
      excluded: ids that are never a target.
    """
    if config.batch_size % process_count:
        raise ValueError(f"batch_size {config.batch_size} does not divide over {process_count} processes")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two sources have the same name: {', '.join(names)}; give them a name=")
    rows = stream_rows(
        sources, ToExample(tokenizer, excluded), packing=config.packing, seq_len=config.seq_len,
        num_bins=config.num_bins or 64, seed=seed, process_index=process_index, process_count=process_count)
    rows = rows.batch(config.batch_size // process_count, drop_remainder=True)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only an absl app parses
            flags.FLAGS.mark_as_parsed()
        rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=4))
    return Batches(iter(rows), sources, config)


def eval_batches(
    documents: Iterable[Document], tokenizer: Tokenizer, *, batch_size: int, seq_len: int
) -> tuple[list[LMBatch], int]:
    """All batches of a text, and its size in bytes.

    Every token but BOS is a target exactly once; a document longer than T goes on in another window, whose context
    starts anew. The text of a document is its UTF-8 bytes and one byte for its end, which EOS predicts.
    """
    documents = [document for document in documents if document is not None]
    if not documents:
        raise ValueError("there is no document to evaluate on")
    examples = grain.MapDataset.source(documents).map_with_index(ToExample(tokenizer)).to_iter_dataset(
        grain.ReadOptions(num_threads=0))
    rows = list(pack(examples, packing="first_fit", seq_len=seq_len))
    missing = -len(rows) % batch_size
    rows += [{name: np.zeros_like(array) for name, array in rows[0].items()}] * missing
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch = to_inputs(stacked)
    batches = [LMBatch(*(leaf[start : start + batch_size] for leaf in batch))
               for start in range(0, len(rows), batch_size)]
    return batches, sum(len(document.text.encode()) + 1 for document in documents)


def _to_json(state: Any) -> Any:
    """Grain's concat packer compares tuples in its state, which JSON would turn into lists: they are marked."""
    if isinstance(state, dict):
        return {key: _to_json(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return {"tuple": [_to_json(value) for value in state]}
    return [_to_json(value) for value in state] if isinstance(state, list) else state


def _from_json(state: Any) -> Any:
    if isinstance(state, dict):
        return tuple(_from_json(value) for value in state["tuple"]) if state.keys() == {"tuple"} else {
            key: _from_json(value) for key, value in state.items()}
    return [_from_json(value) for value in state] if isinstance(state, list) else state
