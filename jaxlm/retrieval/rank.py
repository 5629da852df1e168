"""An encoder put to work on a corpus: its vectors, kept in a folder or not, and test sets ranked by it."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from jaxlm.retrieval.representations import REPRESENTATIONS, Encoded, Vectors
from jaxlm.retrieval.towers import Towers, siamese

Run = dict[str, dict[str, float]]
QUERY_ROWS = 32  # queries that are scored at once against a batch of documents: MaxSim holds all their token scores
log = logging.getLogger(__name__)


def corpus_blocks(
    encoder: TextEncoder, params: Any, texts: Sequence[str], folder: Path | None, *, batch_tokens: int = 4096,
    rows_per_shard: int = 16384,
) -> list[np.ndarray]:
    """The vectors of passages as blocks for `index.search`; with a folder kept there, and read from there next time.

    An interrupted call goes on where it was. ValueError for a folder with vectors of another encoder or other texts.
    """
    encode = lambda part: embed_texts(encoder, params, part, "passage", batch_tokens=batch_tokens)
    if folder is None:
        return [encode(texts)]
    facts = {"params": fingerprint(params), "tokenizer": encoder.tokenizer.fingerprint(), "pooling": encoder.pooling,
             "normalize": encoder.normalize, "dimension": encoder.dimension, "prompt": encoder.passage_prompt,
             "max_length": encoder.max_length, "frame": [*encoder.before, -1, *encoder.after]}
    return encode_corpus(encode, texts, folder, encoder=facts, rows_per_shard=rows_per_shard)


def rank(encoder: TextEncoder, params: Any, data: BeirSet, k: int = 100, *, batch_tokens: int = 4096) -> Run:
    """The run of `eval.ranking`: the k best documents of every query with their scores, by exact search.

    The similarity is that of the encoder; documents without text are ranked too. On the mesh of the context all devices
    share the work.
    """
    return rank_towers(siamese(encoder), params, data, k, batch_tokens=batch_tokens)[encoder.width]


def rank_towers(
    towers: Towers, params: Any, data: BeirSet, k: int = 100, *, dims: Sequence[int] = (), normalize: bool = True,
    batch_tokens: int = 4096,
) -> dict[int, Run]:
    """`rank` by whatever stands for a text, and by prefixes of it: a run for each number of numbers.

    Args:
      dims: of prefixes, besides the whole; ValueError for vectors that have none. normalize: they have length 1.
    """
    width = towers.passage.width
    if dims and not towers.representation.nested:
        raise ValueError(f"{towers.vectors} vectors have no prefixes that could serve alone")
    search_by = _dense_hits if towers.vectors == "dense" else _block_hits
    ids = list(data.corpus)
    hits = search_by(towers, params, data, k, [*dims, width], normalize, batch_tokens)
    return {dim: as_run(one, list(data.queries), ids) for dim, one in zip([*dims, width], hits, strict=True)}


def _dense_hits(towers: Towers, params: Any, data: BeirSet, k: int, dims: Sequence[int], normalize: bool,
                batch_tokens: int) -> list[Hits]:
    """By the index; each text is encoded once."""
    vectors = {kind: embed_texts(towers.encoder(kind), towers.part(params, kind), texts, kind,
                                 batch_tokens=batch_tokens) for kind, texts in _texts(data)}
    found = []
    for dim in dims:
        cut = dim < towers.passage.width and (normalize or towers.passage.normalize)
        found.append(search(vectors["query"][:, :dim], [vectors["passage"][:, :dim]], k, ids=list(data.corpus),
                            similarity="cosine" if cut else towers.passage.similarity))
    return found


def _block_hits(towers: Towers, params: Any, data: BeirSet, k: int, dims: Sequence[int], normalize: bool,
                batch_tokens: int) -> list[Hits]:
    """By scoring every query against every document, a batch of documents at a time: for corpora of a test set."""
    (kind, queries), (other, documents) = _texts(data)
    asked = list(_encoded(towers, params, queries, kind, batch_tokens, most=QUERY_ROWS))
    scores = np.full((len(dims), len(queries), len(documents)), -np.inf, np.float32)
    similarity, whole = towers.passage.similarity, towers.passage.width
    for columns, keys in _encoded(towers, params, documents, other, batch_tokens):
        for rows, part in asked:
            for number, dim in enumerate(dims):
                cut = [part, keys] if dim == whole else [_prefix(one, dim, normalize) for one in (part, keys)]
                block = _scores(towers.vectors, *cut, similarity)
                scores[number][np.ix_(rows, columns)] = np.asarray(block)[:len(rows), :len(columns)]
    places = descending_places(list(data.corpus))
    best = [np.stack([np.lexsort((places, -row))[:k] for row in one]) for one in scores]
    return [Hits(np.take_along_axis(one, rows, axis=1), rows) for one, rows in zip(scores, best, strict=True)]


def _texts(data: BeirSet) -> list[tuple[Kind, list[str]]]:
    return [("query", list(data.queries.values())), ("passage", list(data.corpus.values()))]


def _encoded(towers: Towers, params: Any, texts: Sequence[str], kind: Kind, batch_tokens: int, most: int | None = None
             ) -> Iterator[tuple[np.ndarray, Encoded]]:
    """Indices of texts and what stands for them, with rows to spare, on every device of the mesh whole."""
    encoder, params = towers.encoder(kind), towers.part(params, kind)
    ids, num_cut = tokenize(encoder, texts, kind)
    if num_cut:
        log.warning("%d of %d texts are longer than %d tokens; their ends were cut off", num_cut, len(ids),
                    encoder.max_length)
    mesh = jax.sharding.get_mesh()
    row_parts, time_parts = (1, 1) if mesh.empty else (split_axes(axes, mesh)[1] for axes in BATCH)
    for chosen, rows, width in plan_batches([len(one) for one in ids], batch_tokens, row_parts, time_parts,
                                            encoder.max_length):
        batch = to_batch([ids[i] for i in chosen], rows, width)
        found = _encode(towers.vectors, encoder, params, *(batch if mesh.empty else put_whole(batch, mesh)))
        for start in range(0, len(chosen), most or rows):
            stop = start + (most or rows)
            yield chosen[start:stop], jax.tree.map(lambda x, part=slice(start, stop): x[part], found)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(vectors: Vectors, encoder: TextEncoder, params: Any, tokens: jax.Array, mask: jax.Array) -> Encoded:
    found = REPRESENTATIONS[vectors].encode(encoder, params, tokens, mask, None)
    return jax.tree.map(lambda x: constrain(x, P()), found)


@partial(jax.jit, static_argnums=(0, 3))
def _scores(vectors: Vectors, queries: Encoded, keys: Encoded, similarity: Similarity) -> jax.Array:
    return constrain(REPRESENTATIONS[vectors].scores(queries, keys, similarity, 1), P())


def _prefix(texts: Encoded, dim: int, normalize: bool) -> Encoded:
    x = texts.x[..., :dim]
    return texts._replace(x=unit(x) if normalize else x)
