"""A weighted mixture of sources, endless or used up at last.

Each source is shuffled anew every epoch, split over data shards and packed by itself; then rows are mixed. Weights are
therefore shares of rows, that is of tokens, whatever the lengths of the documents.

A source with `epochs=4` ends after each of its documents was drawn four times (2.5: half of them once more), one with
`cap=1e9` after so many tokens, counted as whole rows of T. Its weight then goes to the others in proportion. The data
end when the first shard has no row left. Either limit is one of the whole run; each part that is packed by itself (a
shard, or one of its loader processes) gets an equal share of it.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from jaxlm.data.examples import Example
from jaxlm.data.packing import Packing, pack
from jaxlm.data.sources import Source, spread

ESTIMATED_DOCUMENTS = 64  # whose lengths say how much a source holds, about

log = logging.getLogger(__name__)


def limited(sources: Sequence[Source]) -> bool:
    """Whether any source can be used up."""
    return any(source.config.epochs or source.config.cap for source in sources)


def finite(sources: Sequence[Source]) -> bool:
    """Whether all sources can be used up, so that the data can end."""
    return all(source.config.epochs or source.config.cap for source in sources)


def row_cap(source: Source, seq_len: int, parts: int) -> int | None:
    """Rows of T tokens that each part of the data may take; None without `cap`, ValueError for one below a row each."""
    if source.config.cap is None:
        return None
    rows = int(source.config.cap / (seq_len * parts))
    if not rows:
        raise ValueError(f"source {source.config.path!r}: cap {source.config.cap:g} is less than a row of {seq_len} "
                         f"tokens in each of {parts} parts (shards times workers); at least {seq_len * parts} would be")
    return rows


def document_limit(source: Source) -> int | None:
    """How often a document is drawn, over all parts; None without `epochs`."""
    return None if source.config.epochs is None else max(1, round(source.config.epochs * len(source)))


def stream_rows(
    sources: Sequence[Source], to_example: Callable[[int, Any], Example], *, packing: Packing, seq_len: int,
    num_bins: int, seed: int, shard: int, num_shards: int, num_workers: int = 1,
) -> grain.IterDataset:
    """Packed rows with the number of their source, and the number of draws from it so far.

    The documents of a shard are disjoint from those of the others within an epoch. If a source is limited, rows also
    say which sources have ended (`ended`, bool [sources]).

    Args:
      num_workers: loader processes that a shard is going to be divided over.
    """
    # Tokenizing threads beyond the cores only take turns; grain's default is 16.
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    streams = []
    for number, source in enumerate(sources):
        own_seed = zlib.crc32(f"{seed} {number} {source.name}".encode()) % 2**31  # sources of one length differ
        documents = grain.MapDataset.source(source).shuffle(seed=own_seed).repeat()
        chosen = documents.map_with_index(to_example)[shard:document_limit(source):num_shards]
        rows = pack(chosen.to_iter_dataset(reading), packing=packing, seq_len=seq_len, num_bins=num_bins, seed=own_seed)
        cap = row_cap(source, seq_len, num_shards * num_workers)
        rows = rows if cap is None else grain.experimental.LimitIterDataset(rows, cap)
        streams.append(rows.map(_Account(number)))
    weights = [source.config.weight for source in sources]
    if limited(sources):
        return FiniteMixture(streams, weights)
    return streams[0] if len(streams) == 1 else grain.IterDataset.mix(streams, weights=weights)


class FiniteMixture(grain.IterDataset):
    """Rows of streams by weight; an ended stream leaves its share to the others, and the last one ends the mixture.

    The next row comes from the stream with the smallest `(taken + 1) / weight` (stride scheduling, Waldspurger and
    Weihl 1995; the first of equal ones), so after any number of rows each has its share up to a row or so. Weights 2
    and 1: a a b a a b ...; grain's own mixture stops with its first stream that does.
    """

    def __init__(self, streams: Sequence[grain.IterDataset], weights: Sequence[float]) -> None:
        super().__init__(streams)
        self._weights = tuple(weights)

    def __iter__(self) -> grain.DatasetIterator:
        return _FiniteIterator([iter(stream) for stream in self.parents], self._weights)


class _FiniteIterator(grain.DatasetIterator):
    def __init__(self, streams: Sequence[grain.DatasetIterator], weights: Sequence[float]) -> None:
        super().__init__(streams)
        self._streams, self._weights = streams, weights
        self._taken, self._ended = [0] * len(weights), [False] * len(weights)

    def __next__(self) -> dict[str, np.ndarray]:
        while not all(self._ended):
            alive = [i for i, ended in enumerate(self._ended) if not ended]
            chosen = min(alive, key=lambda i: (self._taken[i] + 1) / self._weights[i])
            try:
                row = next(self._streams[chosen])
            except StopIteration:
                self._ended[chosen] = True
                continue
            self._taken[chosen] += 1
            return row | {"ended": np.array(self._ended)}
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"streams": [stream.get_state() for stream in self._streams], "taken": list(self._taken),
                "ended": list(self._ended)}

    def set_state(self, state: dict[str, Any]) -> None:
        for stream, then in zip(self._streams, state["streams"], strict=True):
            stream.set_state(then)
        self._taken, self._ended = list(state["taken"]), list(state["ended"])


def check_length(
    sources: Sequence[Source], to_example: Callable[[int, Any], Example], *, seq_len: int, batch_size: int, parts: int,
    steps: int,
) -> None:
    """ValueError if the sources' limits cannot fill `steps` batches; a warning if they probably do not.

    What `cap` allows is known; how many tokens `epochs` of a source have is estimated from 64 of its documents.
    """
    most = about = 0.0  # steps
    for source in sources:
        cap, draws = row_cap(source, seq_len, parts), document_limit(source)
        if cap is None and draws is None:
            return
        capped = float("inf") if cap is None else cap * parts / batch_size
        lengths = [len(to_example(i, document)["tokens"]) for i in spread(len(source), ESTIMATED_DOCUMENTS)
                   if (document := source[i]) is not None] if draws is not None else []
        held = float("inf") if draws is None else sum(lengths) / max(1, len(lengths)) * draws / seq_len / batch_size
        most, about = most + capped, about + min(capped, held)
    if most < steps:
        raise ValueError(f"the data end after {int(most)} steps at most, since every source has a cap, but loop.steps "
                         f"is {steps}; raise cap=, or take fewer steps")
    if about < steps:
        log.warning("the data will end after about %d of %d steps (estimated from %d documents of each source with "
                    "epochs=)", about, steps, ESTIMATED_DOCUMENTS)


class _Account:
    """Replaces the draws of a row's tokens by their maximum, and adds the source."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return row | {"draw": np.max(row["draw"]), "source": np.int32(self._number)}
