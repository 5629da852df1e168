"""A weighted mixture of endless sources.

Each source is shuffled anew every epoch, split over data shards and packed by itself; then rows are mixed. Weights are
therefore shares of rows, that is of tokens, whatever the lengths of the documents.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from jaxlm.data.examples import Example
from jaxlm.data.packing import Packing, pack
from jaxlm.data.sources import Source


def stream_rows(
    sources: Sequence[Source], to_example: Callable[[int, Any], Example], *, packing: Packing, seq_len: int,
    num_bins: int, seed: int, shard: int, num_shards: int,
) -> grain.IterDataset:
    """Endless packed rows with the number of their source, and the number of draws from it so far.

    The documents of a shard are disjoint from those of the others within an epoch.
    """
    # Tokenizing threads beyond the cores only take turns; grain's default is 16.
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    streams = []
    for number, source in enumerate(sources):
        own_seed = zlib.crc32(f"{seed} {number} {source.name}".encode()) % 2**31  # sources of one length differ
        documents = grain.MapDataset.source(source).shuffle(seed=own_seed).repeat()
        examples = documents.map_with_index(to_example)[shard::num_shards].to_iter_dataset(reading)
        rows = pack(examples, packing=packing, seq_len=seq_len, num_bins=num_bins, seed=own_seed)
        streams.append(rows.map(_Account(number)))
    if len(streams) == 1:
        return streams[0]
    return grain.IterDataset.mix(streams, weights=[source.config.weight for source in sources])


class _Account:
    """Replaces the draws of a row's tokens by their maximum, and adds the source."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return row | {"draw": np.max(row["draw"]), "source": np.int32(self._number)}
