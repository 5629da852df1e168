"""The loader: documents to a stream of `LMBatch`, whose position is a small JSON value per data shard.

    sources -> shuffle, repeat -> examples -> shard -> pack -> mix -> batch -> (workers) -> LMBatch

The stream is endless unless every source is limited, see `jaxlm.data.mixture`.
"""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxlm.core.batch import LMBatch
from jaxlm.data.examples import Example, ToExample
from jaxlm.data.mixture import check_length, finite, limited, stream_rows
from jaxlm.data.packing import Packing, pack, to_inputs
from jaxlm.data.sources import Document, Source
from jaxlm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Shape and order of the training batches."""

    batch_size: int = 16             # rows of a global batch
    seq_len: int = 512               # T, input tokens of a row
    packing: Packing = "concat"
    num_bins: int | None = None      # first_fit only: open rows; None is 64
    boundary_targets: bool = False   # KORMo: True
    reset_positions: bool = True     # KORMo: False
    mask_documents: bool = True      # attention stays within a document; False: KORMo's ablation, plain causal rows
    shards: int = 0                  # parts of the data that are packed by themselves; 0: one per loading process
    workers: int = 0                 # loader processes per shard; 0 loads in the training process

    def __post_init__(self):
        if min(self.batch_size, self.seq_len, self.num_bins or 1) < 1 or min(self.workers, self.shards) < 0:
            raise ValueError("pipeline.batch_size, seq_len and num_bins must be positive, workers and shards not "
                             "negative")
        if self.shards and self.batch_size % self.shards:
            raise ValueError(f"pipeline.batch_size {self.batch_size} does not divide over pipeline.shards "
                             f"{self.shards}")
        if self.num_bins and self.packing != "first_fit":
            raise ValueError(f"pipeline.num_bins has no effect with packing {self.packing}")
        if self.reset_positions and not self.mask_documents:
            raise ValueError("pipeline.mask_documents False lets documents of a row see each other, which positions "
                             "that start anew in each would confuse; give --pipeline.no-reset-positions too")


class EndOfData(ValueError):
    """Every source of a data shard is used up."""


class Batches:
    """An iterator of `LMBatch`: the rows of this process's data shards, one shard after the other.

    `EndOfData` where one of the shards has no whole batch left; `finite` says whether that can be.

    The state has one JSON value per shard. A shard goes on bit-identically whichever process continues it, so a run
    may be resumed on any number of processes that divides the number of shards: its batches stay the same.
    """

    def __init__(self, shards: Mapping[str, Iterator[Mapping[str, np.ndarray]]], sources: Sequence[Source],
                 config: PipelineConfig):
        self.sources, self._shards, self._config = sources, shards, config
        self._fingerprints = [source.fingerprint() for source in sources]
        self.limited, self.finite = limited(sources), finite(sources)
        self._draws, self._rows = ({name: np.zeros(len(sources), np.int64) for name in shards} for _ in range(2))
        # Batches in a row, of a shard, whose loader has found a source at its end; several loaders take turns.
        self._ends = {name: np.zeros(len(sources), np.int64) for name in shards}
        self._places = self._padding = self._targets = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> LMBatch:
        parts = [next(shard, None) for shard in self._shards.values()]
        if any(rows is None for rows in parts):
            raise EndOfData("every source is used up")
        for name, rows in zip(self._shards, parts, strict=True):
            np.maximum.at(self._draws[name], rows["source"], rows["draw"].astype(np.int64) + 1)
            np.add.at(self._rows[name], rows["source"], 1)
        if self.limited:
            self._note_ends(parts)
        rows = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
        batch = to_inputs(rows, boundary_targets=self._config.boundary_targets,
                          reset_positions=self._config.reset_positions, mask_documents=self._config.mask_documents)
        self._places += batch.tokens.size
        self._padding += int((batch.segments == 0).sum())
        self._targets += int(batch.loss_mask.sum())
        return batch

    def get_state(self) -> dict[str, Any]:
        return {name: {"position": _to_json(shard.get_state()), "draws": self._draws[name].tolist(),
                       "rows": self._rows[name].tolist(), "ends": self._ends[name].tolist(),
                       "sources": self._fingerprints} for name, shard in self._shards.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a state that holds at least the shards of this process; ValueError if it is of other data."""
        missing = self._shards.keys() - state.keys()
        if missing:
            raise ValueError(f"it has no position for {', '.join(sorted(missing))} of the data")
        for name, shard in self._shards.items():
            for source, then in zip(self.sources, state[name]["sources"], strict=True):
                if then != source.fingerprint():
                    raise ValueError(f"{source.config.path} is not the data that this run began with; a position in "
                                     "it means nothing now")
            shard.set_state(_from_json(state[name]["position"]))
            self._draws[name][:], self._rows[name][:] = state[name]["draws"], state[name]["rows"]
            self._ends[name][:] = state[name]["ends"]

    def stats(self) -> dict[str, float]:
        """Of this process: shares of padding and of positions without a target since its start; by source the epochs
        and tokens (places in rows, of all processes) of the whole run and, if they are limited, the share of its shards
        that used it up.
        """
        places = max(1, self._places)
        stats = {"padding": self._padding / places, "no_target": 1 - self._targets / places}
        draws = np.max(list(self._draws.values()), axis=0)
        # Every shard gives as many rows a batch, so those of this process stand for all.
        tokens = sum(self._rows.values()) * self._config.seq_len * self._config.shards / len(self._shards)
        for number, source in enumerate(self.sources):
            stats |= {f"epoch/{source.name}": float(draws[number] / len(source)),
                      f"tokens/{source.name}": float(tokens[number])}
            if self.limited:
                stats[f"used_up/{source.name}"] = float(np.mean([ended[number] for ended in self._ended()]))
        return stats

    def _note_ends(self, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Logs each source whose last shard here has just used it up, given the rows of each shard."""
        before = np.all(self._ended(), axis=0)
        for name, rows in zip(self._shards, parts, strict=True):
            self._ends[name] = (self._ends[name] + 1) * rows["ended"][-1]
        for number in np.flatnonzero(np.all(self._ended(), axis=0) & ~before):
            source, rows = self.sources[number], sum(self._rows.values())
            log.warning("source %s is used up at step %d, after %.4g tokens: its weight goes to the other sources",
                        source.name, rows.sum() // sum(map(_length, parts)), rows[number] * self._config.seq_len)

    def _ended(self) -> list[np.ndarray]:
        """Which sources are used up, by shard."""
        return [ends >= max(1, self._config.workers) for ends in self._ends.values()]

    def close(self) -> None:
        """Stops loader processes and threads."""
        for shard in self._shards.values():
            shard.close()


def resolve_shards(config: PipelineConfig, loaders: int) -> PipelineConfig:
    """The configuration with its number of shards, given how many processes load different rows.

    Raises ValueError when these processes cannot share the shards evenly.
    """
    config = replace(config, shards=config.shards or loaders)
    if config.shards % loaders:
        raise ValueError(f"{loaders} processes cannot share pipeline.shards {config.shards}; use a number of loading "
                         f"processes that divides {config.shards}, or start a run with more shards")
    return config


def make_pipeline(
    sources: Sequence[Source], tokenizer: Tokenizer, config: PipelineConfig, *, excluded: tuple[int, ...] = (),
    seed: int = 0, loader: int = 0, loaders: int = 1, steps: int | None = None,
) -> Batches:
    """The training stream of documents, each a sequence of tokens that are all targets but for `excluded` ids."""
    return stream_batches(sources, ToExample(tokenizer, excluded), config, seed=seed, loader=loader, loaders=loaders,
                          steps=steps)


def stream_batches(
    sources: Sequence[Source], to_example: Callable[[int, Any], Example], config: PipelineConfig, *, seed: int = 0,
    loader: int = 0, loaders: int = 1, steps: int | None = None,
) -> Batches:
    """The training stream of one process: `batch_size / loaders` rows a batch.

    Args:
      sources: mixed by their `config.weight`; anything with the length, items, name, config and fingerprint of one.
      to_example: number of the draw and item to example; picklable.
      loader, loaders: which part of every batch this process loads, see `core.mesh.data_shard`.
      steps: batches that the run wants, to find now what `check_length` finds.
    """
    config = resolve_shards(config, loaders)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two sources have the same name: {', '.join(names)}; give them a name=")
    if config.workers and not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only an absl app parses
        flags.FLAGS.mark_as_parsed()
    own, num_workers = config.shards // loaders, max(1, config.workers)
    if steps is not None:
        check_length(sources, to_example, seq_len=config.seq_len, batch_size=config.batch_size,
                     parts=config.shards * num_workers, steps=steps)

    def open_shard(index: int) -> Iterator[Mapping[str, np.ndarray]]:
        rows = stream_rows(
            sources, to_example, packing=config.packing, seq_len=config.seq_len,
            num_bins=config.num_bins or 64, seed=seed, shard=index, num_shards=config.shards, num_workers=num_workers)
        rows = rows.batch(config.batch_size // config.shards, drop_remainder=True)
        if config.workers:
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=4),
                                    worker_init_fn=_leave_signals_to_the_trainer)
        return iter(rows)

    shards = {f"shard_{index}": open_shard(index) for index in range(loader * own, (loader + 1) * own)}
    return Batches(shards, sources, config)


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
    batches = whole_batches(documents, ToExample(tokenizer), batch_size=batch_size, seq_len=seq_len)
    return batches, sum(len(document.text.encode()) + 1 for document in documents)


def whole_batches(
    items: Sequence[Any], to_example: Callable[[int, Any], Example], *, batch_size: int, seq_len: int
) -> list[LMBatch]:
    """Every item once, packed first-fit; the last batch is filled up with empty rows."""
    examples = grain.MapDataset.source(items).map_with_index(to_example).to_iter_dataset(
        grain.ReadOptions(num_threads=0))
    rows = list(pack(examples, packing="first_fit", seq_len=seq_len))
    missing = -len(rows) % batch_size
    rows += [{name: np.zeros_like(array) for name, array in rows[0].items()}] * missing
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch = to_inputs(stacked)
    return [LMBatch(*(leaf[start : start + batch_size] for leaf in batch))
            for start in range(0, len(rows), batch_size)]


def _length(rows: Mapping[str, np.ndarray]) -> int:
    return len(rows["source"])


def _leave_signals_to_the_trainer(index: int, count: int) -> None:
    """A signal to the whole process group must not end a loader before the last checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
