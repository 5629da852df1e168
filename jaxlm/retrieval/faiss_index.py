"""Which index answers: exact search over the mesh, or one of FAISS on the host (Douze et al. 2024, arXiv:2401.08281).

FAISS holds the corpus in memory as float32. `faiss_flat` compares a query with all documents; `faiss_hnsw` walks a
graph of near neighbours (Malkov and Yashunin 2018), `faiss_ivf` looks into the nearest clusters: both may miss some.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.core.extras import extra
from jaxlm.core.files import replacing
from jaxlm.retrieval.index import NO_ROW, Hits, Similarity, descending_places, search

IndexKind = Literal["exact", "faiss_flat", "faiss_hnsw", "faiss_ivf"]
Search = Callable[[np.ndarray, int], Hits]  # queries [Q, D] and k to the k best documents of each, min(k, N) wide
# What each kind reads; `neighbors`, `build_depth` and `lists` are built into it, the others may change later.
SETTINGS = {"exact": (), "faiss_flat": ("file",), "faiss_hnsw": ("file", "neighbors", "build_depth", "search_depth"),
            "faiss_ivf": ("file", "lists", "probes")}
BUILT_IN = ("neighbors", "build_depth", "lists")
PIECE = 16384          # rows that are read at once
LEAST, MOST = 39, 256  # documents of a cluster: FAISS warns of fewer, and learns from no more
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How documents are found."""

    kind: IndexKind = "exact"
    file: Path | None = None    # keeps an index of FAISS for the next run
    neighbors: int = 32         # faiss_hnsw: of a document in the graph (M)
    build_depth: int = 200      # faiss_hnsw: candidates while the graph is built (efConstruction)
    search_depth: int = 128     # faiss_hnsw: candidates of a query (efSearch); where k is more, k
    lists: int | None = None    # faiss_ivf: clusters; None: 4 sqrt(documents), fewer where these are too few
    probes: int = 32            # faiss_ivf: clusters that a query looks into, at most all

    def __post_init__(self) -> None:
        if self.kind not in SETTINGS:
            raise ValueError(f"index.kind is one of {', '.join(SETTINGS)}, not {self.kind!r}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in SETTINGS[self.kind]:
                raise ValueError(f"index.{field.name} has no effect with index.kind {self.kind}")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"index.{field.name} must be at least 1, got {value}")
        if self.lists is not None and self.probes > self.lists:
            raise ValueError(f"index.probes {self.probes} is more than index.lists {self.lists}")


def open_index(
    config: IndexConfig, blocks: Sequence[np.ndarray], *, similarity: Similarity = "dot",
    ids: Sequence[str] | None = None,
) -> Search:
    """The search function of a corpus, whose index is built now, or read from `config.file`.

    Documents of equal score stand as `index.search` has them; which of those that tie for the last place is found, only
    exact search says.

    Args:
      blocks: the corpus in order, arrays [any, D], memory-mapped ones too.
      ids: of all documents.

    ValueError: vectors that are not finite or shapes that do not fit, a file that is no index or one of other vectors
    or settings (named), FAISS is not installed (the extra `faiss`) or is asked for in several processes.
    """
    return INDEXES[config.kind](config, blocks, similarity, ids)


def exact(config: IndexConfig, blocks: Sequence[np.ndarray], similarity: Similarity, ids: Sequence[str] | None
          ) -> Search:
    """`index.search`: nothing is built."""
    return lambda queries, k: search(queries, blocks, k, similarity=similarity, ids=ids)


def faiss_flat(config: IndexConfig, blocks: Sequence[np.ndarray], similarity: Similarity, ids: Sequence[str] | None
               ) -> Search:
    """All inner products."""
    faiss = extra("faiss", "faiss")
    index = _opened(faiss, config, blocks, similarity, lambda count, width: faiss.IndexFlatIP(width))
    return _search(index, similarity, ids)


def faiss_hnsw(config: IndexConfig, blocks: Sequence[np.ndarray], similarity: Similarity, ids: Sequence[str] | None
               ) -> Search:
    """A graph, walked from a few entrances towards the query."""
    faiss = extra("faiss", "faiss")

    def empty(count: int, width: int) -> Any:
        index = faiss.IndexHNSWFlat(width, config.neighbors, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.build_depth
        return index

    index = _opened(faiss, config, blocks, similarity, empty)
    return _search(index, similarity, ids, faiss.SearchParametersHNSW(efSearch=config.search_depth))


def faiss_ivf(config: IndexConfig, blocks: Sequence[np.ndarray], similarity: Similarity, ids: Sequence[str] | None
              ) -> Search:
    """Clusters (k-means of a sample), of which the nearest ones are searched."""
    faiss = extra("faiss", "faiss")

    def empty(count: int, width: int) -> Any:
        lists = config.lists or max(1, min(int(4 * math.sqrt(count)), count // LEAST))
        if lists > count:
            raise ValueError(f"index.lists {lists} is more than the {count} documents")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # a choice of the user; it would only print a warning
        rows = np.unique(np.linspace(0, count - 1, min(count, lists * MOST)).astype(np.int64))
        index.train(_rows(blocks, rows, similarity))
        return index

    index = _opened(faiss, config, blocks, similarity, empty)
    return _search(index, similarity, ids, faiss.SearchParametersIVF(nprobe=min(config.probes, index.nlist)))


def _search(index: Any, similarity: Similarity, ids: Sequence[str] | None, depth: Any = None) -> Search:
    """The search function of a filled index of FAISS; `depth` are FAISS's parameters of a search."""
    if ids is not None and len(ids) != index.ntotal:
        raise ValueError(f"the corpus has {index.ntotal} documents, but there are {len(ids)} ids")
    places = np.arange(index.ntotal) if ids is None else descending_places(ids)

    def answer(queries: np.ndarray, k: int) -> Hits:
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or not len(queries) or queries.shape[1] != index.d or not np.isfinite(queries).all():
            raise ValueError(f"queries must be finite and of shape [Q, {index.d}], got shape {queries.shape}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        k = min(k, index.ntotal)
        scores, rows = index.search(_prepared(queries, similarity), k, params=depth)
        if not np.isfinite(scores[rows != NO_ROW]).all():
            raise ValueError("products of the queries with the corpus are not finite")
        scores = np.where(rows == NO_ROW, -np.inf, scores).astype(np.float32)
        order = np.lexsort((places[rows], -scores), axis=1)
        return Hits(*(np.take_along_axis(x, order, axis=1) for x in (scores, rows)))

    return answer


def _opened(faiss: ModuleType, config: IndexConfig, blocks: Sequence[np.ndarray], similarity: Similarity,
            empty: Callable[[int, int], Any]) -> Any:
    """A filled index: that of the file, or a new one, which is kept there. `empty(count, width)` makes one to fill."""
    if similarity not in ("dot", "cosine"):
        raise ValueError(f"similarity is dot or cosine, not {similarity!r}")
    if jax.process_count() > 1:
        raise ValueError("FAISS searches in one process; use index.kind exact in several")
    count, width = sum(map(len, blocks)), blocks[0].shape[-1] if len(blocks) else 0
    if not count:
        raise ValueError("the corpus holds no document")
    for number, block in enumerate(blocks):
        if block.ndim != 2 or block.shape[1] != width:
            raise ValueError(f"block {number} of the corpus has shape {block.shape}, the first one has width {width}")
    facts = {"kind": config.kind, "similarity": similarity} | {
        name: getattr(config, name) for name in BUILT_IN if name in SETTINGS[config.kind]}
    if config.file is not None:
        facts["vectors"] = _digest(blocks)
        if config.file.exists():
            return _read(faiss, config.file, facts)
    index = empty(count, width)
    for piece in _pieces(blocks):
        index.add(_prepared(piece, similarity))
    if config.file is not None:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.file) as scratch, scratch.open("wb") as file:
            file.write(json.dumps(facts).encode() + b"\n")
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        log.info("%s: %s of %d documents is kept", config.file, config.kind, count)
    return index


def _read(faiss: ModuleType, path: Path, facts: Mapping[str, Any]) -> Any:
    with path.open("rb") as file:
        try:
            found = json.loads(file.readline(4096))
            different = [name for name in facts | found if found.get(name) != facts.get(name)]
        except (ValueError, TypeError):
            raise ValueError(f"{path}: is no index that was kept here; choose another index.file") from None
        if different:
            shown = "; ".join(f"{name} was {found.get(name)!r}, is now {facts.get(name)!r}" for name in different)
            raise ValueError(f"{path}: is the index of something else ({shown}); choose another index.file, or delete "
                             "this one")
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except RuntimeError:
            raise ValueError(f"{path}: the index is damaged; delete it, and it will be built again") from None


def _digest(blocks: Sequence[np.ndarray]) -> str:
    """The same for the same numbers in the same type, however they are cut into blocks."""
    total = hashlib.sha256(f"{blocks[0].dtype} {blocks[0].shape[1:]}".encode())
    for piece in _pieces(blocks):
        total.update(np.ascontiguousarray(piece).data)
    return total.hexdigest()[:32]


def _pieces(blocks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        for start in range(0, len(block), PIECE):
            yield block[start:start + PIECE]


def _rows(blocks: Sequence[np.ndarray], rows: np.ndarray, similarity: Similarity) -> np.ndarray:
    """Some rows, in ascending order, of a corpus in blocks."""
    starts = np.cumsum([0, *map(len, blocks)])
    cuts = np.searchsorted(rows, starts)
    return _prepared(np.concatenate([block[rows[a:b] - start] for block, start, a, b in zip(
        blocks, starts[:-1], cuts[:-1], cuts[1:], strict=True)]), similarity)


def _prepared(vectors: np.ndarray, similarity: Similarity) -> np.ndarray:
    """As FAISS takes them; of length 1 where cosines are asked for, and 0 stays 0."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError("the corpus holds vectors that are not finite")
    if similarity == "dot":
        return vectors
    # Scaled first: the squares of small numbers would vanish, those of large ones overflow.
    vectors = vectors / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 0.5)


INDEXES = {"exact": exact, "faiss_flat": faiss_flat, "faiss_hnsw": faiss_hnsw, "faiss_ivf": faiss_ivf}
