"""Exact search: the k largest inner products (or cosines) of queries with a corpus that is streamed block by block.

Every device of the mesh scores its slice of a block and keeps the best documents it has met; nothing crosses the
network before the end, when these are merged. Memory holds a few blocks, whatever the size of the corpus.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.batch import power_of_two
from jaxlm.core.mesh import AXES, MeshConfig, make_mesh

Similarity = Literal["dot", "cosine"]
NO_ROW = -1
LAST = np.iinfo(np.int32).max  # the place of what is no document
BLOCKS_AHEAD = 2               # blocks that may wait for the devices while the next one is read


class Hits(NamedTuple):
    """The best documents of each query, the best first. A place without a document has score -inf and row -1."""

    scores: np.ndarray  # [Q, k] float32
    rows: np.ndarray    # [Q, k] int64, into the corpus


class Best(NamedTuple):
    """What each of n devices found so far."""

    scores: jax.Array  # [n, Q, k] float32
    places: jax.Array  # [n, Q, k] int32: which of equal scores comes first


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], k: int, *, similarity: Similarity = "dot",
    ids: Sequence[str] | None = None, block_rows: int = 16384, query_rows: int = 1024,
) -> Hits:
    """The k documents of highest score for each query, min(k, number of documents) wide.

    Documents of equal score stand in descending order of their ids, as in trec_eval, or without ids in the order of the
    corpus. Products are float32 in full precision, also of vectors stored as float16; on the mesh of the context
    (`jax.set_mesh`) all devices share the work, without one the first device does it.

    Args:
      queries: [Q, D].
      blocks: the corpus in order, arrays [any, D], memory-mapped ones too (`corpus_vectors.open_vectors`); read once.
      ids: of all documents; must be known before the search because they decide which of equal ones is kept.
      block_rows: documents scored at once over all devices. query_rows: queries scored at once.

    ValueError: shapes that do not fit, vectors that are not finite, ids that are not one a document.
    """
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or not len(queries) or not np.isfinite(queries).all():
        raise ValueError(f"queries must be finite and of shape [Q, D], got shape {queries.shape}")
    if min(k, block_rows, query_rows) < 1:
        raise ValueError(f"k, block_rows and query_rows must be at least 1, got {k}, {block_rows}, {query_rows}")
    if similarity not in ("dot", "cosine"):
        raise ValueError(f"similarity is dot or cosine, not {similarity!r}")
    mesh = jax.sharding.get_mesh()
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh.empty else mesh
    places = descending_places(ids) if ids is not None else None
    chunk = min(query_rows, power_of_two(len(queries)))
    chunks = [_put(_filled(queries[i:i + chunk], chunk), P(), mesh) for i in range(0, len(queries), chunk)]
    best = [_nothing(chunk, k, mesh) for _ in chunks]
    count, waiting = 0, deque()
    for block in _pieces(blocks, queries.shape[1], block_rows):
        stop = count + len(block)
        if stop > (LAST if places is None else len(places)):
            raise ValueError(f"the corpus has more than {LAST} documents" if places is None else
                             f"the corpus has more documents than the {len(places)} ids")
        own = np.arange(count, stop, dtype=np.int32) if places is None else places[count:stop]
        arrays = _block(block, own, mesh, block_rows)
        found = [_step(x, one, *arrays, mesh=mesh, cosine=similarity == "cosine")
                 for x, one in zip(chunks, best, strict=True)]
        best = [one for one, _ in found]
        waiting.append((count, stop, [ok for _, ok in found]))
        count = stop
        if len(waiting) > BLOCKS_AHEAD:
            _check_finite(*waiting.popleft())
    while waiting:
        _check_finite(*waiting.popleft())
    if places is not None and count != len(places):
        raise ValueError(f"the corpus has {count} documents, but there are {len(places)} ids")
    if not count:
        raise ValueError("the corpus holds no document")
    merged = [jax.device_get(_merged(one, mesh=mesh)) for one in best]
    scores, found = (np.concatenate(parts)[:len(queries), :min(k, count)] for parts in zip(*merged, strict=True))
    return Hits(scores, (found if places is None else np.argsort(places)[found]).astype(np.int64))


def descending_places(ids: Sequence[str]) -> np.ndarray:
    """The place of each id in descending order, [N] int32: `["d1", "d10", "d9"]` gives `[2, 1, 0]`.

    ValueError for an id that is there twice.
    """
    order = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    for i, j in itertools.pairwise(order):
        if ids[i] == ids[j]:
            raise ValueError(f"the id {ids[i]!r} is given to two documents")
    places = np.empty(len(ids), np.int32)
    places[order] = np.arange(len(ids), dtype=np.int32)
    return places


def as_run(hits: Hits, query_ids: Sequence[str], ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Hits as query to document to score, the form of `jaxlm.eval.ranking`. ValueError for a query id given twice."""
    if len(set(query_ids)) != len(query_ids) or len(query_ids) != len(hits.rows):
        raise ValueError(f"{len(hits.rows)} queries need as many different ids, got {len(set(query_ids))} different of "
                         f"{len(query_ids)}")
    return {query: {ids[row]: float(score) for row, score in zip(rows, scores, strict=True) if row != NO_ROW}
            for query, rows, scores in zip(query_ids, hits.rows, hits.scores, strict=True)}


@partial(jax.jit, static_argnames=("mesh", "cosine"))
def _step(queries_QD: jax.Array, best: Best, block_RD: jax.Array, places_R: jax.Array, *, mesh: Mesh, cosine: bool
          ) -> tuple[Best, jax.Array]:
    """The best of what was found and a block; and whether all its scores are finite."""
    k = best.scores.shape[-1]

    def own(queries_QD, scores_1Qk, places_1Qk, block_RD, places_R):
        queries_QD, block_RD = queries_QD.astype(jnp.float32), block_RD.astype(jnp.float32)
        if cosine:
            queries_QD, block_RD = _unit(queries_QD), _unit(block_RD)
        scores_QR = jnp.einsum("qd,rd->qr", queries_QD, block_RD, precision=jax.lax.Precision.HIGHEST)
        finite = jnp.all(jnp.isfinite(scores_QR))
        # 0 for -0, which top_k would put behind; what fills up the block is behind everything.
        scores_QR = jnp.where(scores_QR == 0, 0.0, scores_QR)
        scores_QR = jnp.where(places_R == LAST, -jnp.inf, scores_QR)
        # Of equal scores top_k takes the first, and the documents of a block stand in the order of their places.
        new_Qk, chosen_Qk = jax.lax.top_k(scores_QR, min(k, scores_QR.shape[1]))
        scores = jnp.concatenate([scores_1Qk[0], new_Qk], axis=1)
        places = jnp.concatenate([places_1Qk[0], places_R[chosen_Qk]], axis=1)
        scores, places = _first(scores, places, k)
        return scores[None], places[None], finite[None]

    each = P(AXES)
    scores, places, finite = jax.shard_map(own, mesh=mesh, in_specs=(P(), each, each, each, each), out_specs=each)(
        queries_QD, best.scores, best.places, block_RD, places_R)
    return Best(scores, places), jnp.all(finite)


@partial(jax.jit, static_argnames="mesh")
def _merged(best: Best, *, mesh: Mesh) -> Best:
    """The best of all devices, [Q, k], on each of them."""
    k = best.scores.shape[-1]
    whole = (jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())) for x in best)
    return Best(*_first(*(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in whole), k))


def _first(scores: jax.Array, places: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The first k of each row by descending score, then by place."""
    negated, places = jax.lax.sort((-scores, places), num_keys=2)
    return -negated[:, :k], places[:, :k]


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1; those of length 0 stay, and have cosine 0 with everything."""
    # Scaled first: the squares of small numbers would vanish, those of large ones overflow.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0.5)


def _pieces(blocks: Iterable[np.ndarray], width: int, block_rows: int) -> Iterator[np.ndarray]:
    for number, block in enumerate(blocks):
        if block.ndim != 2 or block.shape[1] != width:
            raise ValueError(f"block {number} of the corpus has shape {block.shape}, the queries need [any, {width}]")
        for start in range(0, len(block), block_rows):
            yield block[start:start + block_rows]


def _block(block: np.ndarray, places: np.ndarray, mesh: Mesh, block_rows: int) -> tuple[jax.Array, jax.Array]:
    """A block in the order of its places, filled up so that few shapes are compiled, split over all devices."""
    if np.any(places[1:] < places[:-1]):
        order = np.argsort(places)
        block, places = block[order], places[order]
    devices = math.prod(mesh.shape.values())
    rows = devices * min(power_of_two(-(-len(block) // devices)), -(-block_rows // devices))
    return (_put(_filled(block, rows), P(AXES), mesh),
            _put(_filled(places, rows, LAST), P(AXES), mesh))


def _filled(x: np.ndarray, rows: int, value: int = 0) -> np.ndarray:
    if len(x) == rows:
        return x
    return np.concatenate([x, np.full((rows - len(x), *x.shape[1:]), value, x.dtype)])


def _put(x: np.ndarray, spec: P, mesh: Mesh) -> jax.Array:
    """As a global array; each process reads the slices of its own devices only."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x[index]))


def _nothing(queries: int, k: int, mesh: Mesh) -> Best:
    shape = (math.prod(mesh.shape.values()), queries, k)
    return Best(_put(np.full(shape, -np.inf, np.float32), P(AXES), mesh), _put(np.full(shape, LAST), P(AXES), mesh))


def _check_finite(start: int, stop: int, finite: list[jax.Array]) -> None:
    if not all(jax.device_get(finite)):
        raise ValueError(f"documents {start} to {stop - 1} of the corpus hold vectors that are not finite, or whose "
                         "products with the queries are not")
