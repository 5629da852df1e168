"""Towers put to work on a corpus: its vectors, kept in a folder or not, and test sets ranked by whatever they are."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import BATCH, constrain, put_whole, split_axes
from jaxlm.data.beir import BeirSet
from jaxlm.objective.contrastive import Similarity
from jaxlm.objective.contrastive import normalize as unit
from jaxlm.retrieval.corpus_vectors import encode_corpus, fingerprint
from jaxlm.retrieval.embed import Kind, TextEncoder, embed_texts, plan_batches, to_batch, tokenize
from jaxlm.retrieval.index import Hits, as_run, descending_places, search
from jaxlm.retrieval.packed_texts import Texts
from jaxlm.retrieval.representations import REPRESENTATIONS, Encoded, Vectors
from jaxlm.retrieval.towers import Towers

Run = dict[str, dict[str, float]]
QUERY_ROWS = 32  # queries that are scored at once against a batch of documents: MaxSim holds all their token scores
MERGE = 1024     # documents whose scores wait before the best are chosen again
log = logging.getLogger(__name__)


class Block(NamedTuple):
    """A batch of texts as they are compared."""

    chosen: np.ndarray  # [n]: which texts
    texts: Encoded      # [n or more, ...]: rows beyond n are empty


def corpus_blocks(towers: Towers, texts: Sequence[str], folder: Path | None = None, *, batch_tokens: int = 4096,
                  rows_per_shard: int = 16384) -> list[np.ndarray]:
    """The vectors of passages as blocks for `index.search`; with a folder kept there, and read from there next time.

    An interrupted call goes on where it was. ValueError for a folder with vectors of another encoder or other texts.
    """
    encoder, params = towers.at_work("passage")
    encode = lambda part: embed_texts(encoder, params, part, "passage", batch_tokens=batch_tokens)
    if folder is None:
        return [encode(texts)]
    facts = {"params": fingerprint(params), "tokenizer": encoder.tokenizer.fingerprint(), "pooling": encoder.pooling,
             "normalize": encoder.normalize, "dimension": encoder.dimension, "prompt": encoder.passage_prompt,
             "max_length": encoder.max_length, "frame": [*encoder.before, -1, *encoder.after]}
    return encode_corpus(encode, texts, folder, encoder=facts, rows_per_shard=rows_per_shard)


def query_vectors(towers: Towers, texts: Sequence[str], *, batch_tokens: int = 4096) -> np.ndarray:
    """`embed_texts` with the tower of the queries."""
    return embed_texts(*towers.at_work("query"), texts, "query", batch_tokens=batch_tokens)


def rank_towers(
    towers: Towers, data: BeirSet, k: int = 100, *, dims: Sequence[int] = (), normalize: bool = True,
    batch_tokens: int = 4096,
) -> dict[int, Run]:
    """The run of `eval.ranking`, the k best documents of every query by exact search, for each number of numbers.

    The similarity is that of the encoders; documents without text are ranked too. On the mesh of the context all
    devices share the work.

    Args:
      dims: of prefixes, besides the whole; ValueError for vectors that have none. normalize: they have length 1.
    """
    width = towers.passage.width
    if dims and not towers.representation.nested:
        raise ValueError(f"{towers.vectors} vectors have no prefixes that could serve alone")
    ids, queries, passages = list(data.corpus), list(data.queries.values()), list(data.corpus.values())
    if towers.vectors == "dense":
        hits = _dense_hits(towers, queries, passages, ids, k, [*dims, width], normalize, batch_tokens)
    else:
        asked = list(encoded_blocks(towers, queries, "query", batch_tokens=batch_tokens, most=QUERY_ROWS))
        blocks = encoded_blocks(towers, passages, "passage", batch_tokens=batch_tokens)
        hits = block_search(towers, asked, blocks, k, ids=ids, dims=[*dims, width], normalize=normalize)
    return {dim: as_run(one, list(data.queries), ids) for dim, one in zip([*dims, width], hits, strict=True)}


def _dense_hits(towers: Towers, queries: Sequence[str], passages: Sequence[str], ids: Sequence[str], k: int,
                dims: Sequence[int], normalize: bool, batch_tokens: int) -> list[Hits]:
    """By the index; each text is encoded once."""
    asked = query_vectors(towers, queries, batch_tokens=batch_tokens)
    [vectors] = corpus_blocks(towers, passages, batch_tokens=batch_tokens)
    found = []
    for dim in dims:
        cut = dim < towers.passage.width and (normalize or towers.passage.normalize)
        found.append(search(asked[:, :dim], [vectors[:, :dim]], k, ids=ids,
                            similarity="cosine" if cut else towers.similarity))
    return found


def block_search(
    towers: Towers, asked: Sequence[Block], blocks: Iterable[Block], k: int, *, ids: Sequence[str] | None = None,
    dims: Sequence[int] | None = None, normalize: bool = True,
) -> list[Hits]:
    """The k best documents of each query by scoring all of them, a block at a time, for each number of numbers.

    Documents of equal score stand as `index.search` has them. Memory holds the queries and a block.

    Args:
      asked: all queries. blocks: all documents, in any order. ids: of the documents; None: their order.
      dims, normalize: see `rank_towers`; None: the whole.

    ValueError for scores that are not finite.
    """
    dims = dims or [towers.passage.width]
    count = sum(len(one.chosen) for one in asked)
    places = None if ids is None else descending_places(ids)
    best = [Hits(np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)) for _ in dims]
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for block in blocks:
        waiting.append((block.chosen, block_scores(towers, asked, block, dims, normalize)))
        if sum(len(chosen) for chosen, _ in waiting) >= max(MERGE, k):
            best, waiting = _best(best, waiting, k, places), []
    return _best(best, waiting, k, places) if waiting else best


def block_scores(towers: Towers, asked: Sequence[Block], block: Block, dims: Sequence[int] | None = None,
                 normalize: bool = True) -> np.ndarray:
    """The scores of all queries with the documents of a block, [len(dims), Q, n]. ValueError: not finite."""
    dims = dims or [towers.passage.width]
    scores = np.empty((len(dims), sum(len(one.chosen) for one in asked), len(block.chosen)), np.float32)
    for rows, part in asked:
        for number, dim in enumerate(dims):
            pair = [part, block.texts]
            if dim != towers.passage.width:
                pair = [_prefix(one, dim, normalize) for one in pair]
            found = _scores(towers.vectors, *pair, towers.similarity)
            scores[number, rows] = np.asarray(found)[:len(rows), :len(block.chosen)]
    if not np.isfinite(scores).all():
        raise ValueError(f"document {block.chosen[np.flatnonzero(~np.isfinite(scores).all(axis=(0, 1)))[0]]} of the "
                         "corpus has vectors that are not finite, or scores with the queries that are not")
    return scores


def _best(found: Sequence[Hits], waiting: Sequence[tuple[np.ndarray, np.ndarray]], k: int, places: np.ndarray | None
          ) -> list[Hits]:
    """The first k of what was found and what waits, by score and then by place."""
    rows = np.concatenate([chosen for chosen, _ in waiting])
    merged = []
    for number, one in enumerate(found):
        scores = np.concatenate([one.scores, *(part[number] for _, part in waiting)], axis=1)
        own = np.concatenate([one.rows, np.broadcast_to(rows, (len(scores), len(rows)))], axis=1)
        order = np.lexsort((own if places is None else places[own], -scores), axis=-1)[:, :k]
        merged.append(Hits(np.take_along_axis(scores, order, axis=1), np.take_along_axis(own, order, axis=1)))
    return merged


def encoded_blocks(towers: Towers, texts: Sequence[str], kind: Kind, *, batch_tokens: int = 4096,
                   most: int | None = None) -> Iterator[Block]:
    """Texts in batches of about one length, with what stands for them on every device of the mesh whole.

    Args:
      most: texts of a block; None: what `batch_tokens` hold.
    """
    encoder, params = towers.at_work(kind)
    ids, num_cut = tokenize(encoder, texts, kind)
    if num_cut:
        log.warning("%d of %d texts are longer than %d tokens; their ends were cut off", num_cut, len(ids),
                    encoder.max_length)
    mesh = jax.sharding.get_mesh()
    for chosen, rows, width in block_shapes(encoder, [len(one) for one in ids], batch_tokens):
        batch = to_batch([ids[i] for i in chosen], rows, width)
        found = _encode(towers.vectors, encoder, params, *(batch if mesh.empty else put_whole(batch, mesh)))
        for start in range(0, len(chosen), most or rows):
            stop = start + (most or rows)
            yield Block(chosen[start:stop], jax.tree.map(lambda x, part=slice(start, stop): x[part], found))


def block_shapes(encoder: TextEncoder, lengths: Sequence[int], batch_tokens: int
                 ) -> Iterator[tuple[np.ndarray, int, int]]:
    """`plan_batches` on the mesh of the context."""
    mesh = jax.sharding.get_mesh()
    row_parts, time_parts = (1, 1) if mesh.empty else (split_axes(axes, mesh)[1] for axes in BATCH)
    return plan_batches(lengths, batch_tokens, row_parts, time_parts, encoder.max_length)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(vectors: Vectors, encoder: TextEncoder, params: Any, tokens: jax.Array, mask: jax.Array) -> Encoded:
    found = REPRESENTATIONS[vectors].encode(encoder, params, Texts(tokens, mask), None)
    return jax.tree.map(lambda x: constrain(x, P()), found)


@partial(jax.jit, static_argnums=(0, 3))
def _scores(vectors: Vectors, queries: Encoded, keys: Encoded, similarity: Similarity) -> jax.Array:
    return constrain(REPRESENTATIONS[vectors].scores(queries, keys, similarity, 1), P())


def _prefix(texts: Encoded, dim: int, normalize: bool) -> Encoded:
    x = texts.x[..., :dim]
    return texts._replace(x=unit(x) if normalize else x)
