"""A corpus that answers queries by any representation: dense vectors by an index, all others by scoring every passage.

Late interaction keeps a vector for each token of the corpus in memory where it is asked more than once; a corpus whose
token vectors do not fit there is refused.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.retrieval.embed import TextEncoder, tokenize
from jaxlm.retrieval.faiss_index import IndexConfig, open_index
from jaxlm.retrieval.index import Hits
from jaxlm.retrieval.mine import score_rows
from jaxlm.retrieval.rank import (
    QUERY_ROWS,
    Block,
    block_scores,
    block_search,
    block_shapes,
    corpus_blocks,
    encoded_blocks,
    query_vectors,
)
from jaxlm.retrieval.representations import Encoded
from jaxlm.retrieval.towers import Towers, TowersConfig, load_towers


class Searcher(NamedTuple):
    """A corpus put to work. All three are called on the mesh of the context."""

    encode: Callable[[Sequence[str]], Any]                              # queries to what stands for them
    search: Callable[[Any, int], Hits]                                  # such queries and k to their best passages
    scores: Callable[[Any, Sequence[Sequence[int]]], list[list[float]]]  # of each with rows of the corpus of its own


class Words(NamedTuple):
    """A block of sparse vectors by what is not 0 in it; a thousandth of the vocabulary, as SPLADE learns it."""

    chosen: np.ndarray   # [n]
    places: np.ndarray   # [m]: in the flat block
    weights: np.ndarray  # [m] float32
    shape: tuple[int, int]


def open_searcher(
    config: TowersConfig, mesh: Mesh, texts: Sequence[str], *, ids: Sequence[str] | None = None,
    index: IndexConfig | None = None, folder: Path | None = None, batch_tokens: int = 4096, keep: bool = True,
) -> Searcher:
    """Towers of folders with a corpus, encoded now, or read from `folder`.

    Args:
      ids: of the passages; decide which of equal scores comes first.
      index: of dense vectors; None: none is made, they are only scored.
      folder: keeps dense vectors for the next time.
      keep: sparse and late vectors stay in memory, so that any number of searches is answered; else each search encodes
        the corpus anew, block by block, in memory for one block.

    ValueError before any weights are read: see `open_towers`; an index or a folder for vectors that are not dense, and
    late vectors that do not fit into memory.
    """
    fits = partial(_check, texts=texts, index=index, folder=folder, batch_tokens=batch_tokens, keep=keep)
    with jax.set_mesh(mesh):
        towers = load_towers(config, mesh, check=fits)
        if towers.vectors == "dense":
            return _dense(towers, texts, ids, index, folder, batch_tokens)
        return _blocks(towers, texts, ids, batch_tokens, keep)


def _check(towers: Towers, *, texts: Sequence[str], index: IndexConfig | None, folder: Path | None, batch_tokens: int,
           keep: bool) -> None:
    if towers.vectors == "dense":
        return
    if index is not None and index != IndexConfig():
        raise ValueError(f"--index.kind {index.kind} finds dense vectors; {towers.vectors} ones are searched exactly: "
                         "leave --index out")
    if folder is not None:
        raise ValueError(f"{folder} would keep dense vectors; {towers.vectors} ones are kept in memory only: leave "
                         "--cache out")
    if towers.vectors == "late" and keep:
        needed, there = late_bytes(towers.passage, texts, batch_tokens), memory()
        if needed > there:
            raise ValueError(f"the token vectors of {len(texts)} passages take {needed / 2**30:.1f} GiB, more than the "
                             f"{there / 2**30:.1f} GiB of this machine: search fewer passages, or by dense vectors")


def late_bytes(encoder: TextEncoder, texts: Sequence[str], batch_tokens: int) -> int:
    """What the token vectors of passages take with their padding, counted by tokenizing them."""
    lengths = [len(one) for one in tokenize(encoder, texts, "passage").ids]
    number = 4 * (encoder.width + 1)  # with the mask
    return sum(rows * width * number for _, rows, width in block_shapes(encoder, lengths, batch_tokens))


def memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _dense(towers: Towers, texts: Sequence[str], ids: Sequence[str] | None, index: IndexConfig | None,
           folder: Path | None, batch_tokens: int) -> Searcher:
    blocks = corpus_blocks(towers, texts, folder, batch_tokens=batch_tokens)
    search = None if index is None else open_index(index, blocks, similarity=towers.similarity, ids=ids)

    def find(asked: np.ndarray, k: int) -> Hits:
        assert search is not None, "opened without an index"
        return search(asked, k)

    return Searcher(
        encode=partial(query_vectors, towers, batch_tokens=batch_tokens), search=find,
        scores=lambda asked, rows: score_rows(asked, reader(blocks), rows, similarity=towers.similarity))


def _blocks(towers: Towers, texts: Sequence[str], ids: Sequence[str] | None, batch_tokens: int, keep: bool
            ) -> Searcher:
    def encode(queries: Sequence[str]) -> list[Block]:
        return list(encoded_blocks(towers, queries, "query", batch_tokens=batch_tokens, most=QUERY_ROWS))

    def fresh() -> Iterable[Block]:
        return encoded_blocks(towers, texts, "passage", batch_tokens=batch_tokens)

    kept = [_packed(one) for one in fresh()] if keep else None

    def blocks() -> Iterable[Block]:
        return fresh() if kept is None else map(_unpacked, kept)

    return Searcher(
        encode=encode, search=lambda asked, k: block_search(towers, asked, blocks(), k, ids=ids)[0],
        scores=lambda asked, rows: _picked(towers, asked, blocks(), rows))


def _picked(towers: Towers, asked: Sequence[Block], blocks: Iterable[Block], rows: Sequence[Sequence[int]]
            ) -> list[list[float]]:
    """The scores of each query with its own rows; each block is scored once, for all queries."""
    result = [[0.0] * len(own) for own in rows]
    wanted: dict[int, list[tuple[int, int]]] = {}
    for query, own in enumerate(rows):
        for place, row in enumerate(own):
            wanted.setdefault(int(row), []).append((query, place))
    for block in blocks:
        if not any(row in wanted for row in block.chosen.tolist()):
            continue
        [scores] = block_scores(towers, asked, block)
        for column, row in enumerate(block.chosen.tolist()):
            for query, place in wanted.get(row, ()):
                result[query][place] = float(scores[query, column])
    return result


def _packed(block: Block) -> Block | Words:
    """In the memory of the host."""
    texts = jax.device_get(block.texts)
    if texts.mask is not None:
        return Block(block.chosen, texts)
    flat = texts.x.reshape(-1)
    places = np.flatnonzero(flat)
    return Words(block.chosen, places, flat[places], texts.x.shape)


def _unpacked(block: Block | Words) -> Block:
    if isinstance(block, Block):
        return block
    x = np.zeros(block.shape, np.float32)
    x.reshape(-1)[block.places] = block.weights
    return Block(block.chosen, Encoded(x))


def reader(blocks: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Rows [n] of a corpus in blocks to their vectors [n, D]."""
    starts = np.cumsum([0, *map(len, blocks)])

    def read(rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), blocks[0].shape[1]), blocks[0].dtype)
        for i, (block, row) in enumerate(zip(np.searchsorted(starts, rows, side="right") - 1, rows, strict=True)):
            found[i] = blocks[block][row - starts[block]]
        return found

    return read
