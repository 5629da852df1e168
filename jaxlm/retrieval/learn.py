"""Training a text encoder: batches of tokens from rows of texts, and the contrastive loss of their vectors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core.masked import Metric, aggregate
from jaxlm.data.retrieval_batches import RetrievalBatch, RetrievalBatchConfig, RetrievalBatches
from jaxlm.data.retrieval_rows import RetrievalRow
from jaxlm.objective.contrastive import ContrastiveConfig, MatryoshkaConfig, contrastive, matryoshka
from jaxlm.objective.contrastive_masks import in_batch
from jaxlm.retrieval.embed import Kind, TextEncoder, bucket, to_batch, tokenize
from jaxlm.retrieval.gradcache import cached_loss, per_passage

# (params, batch, key) -> (sum over queries, metrics), as `train.step.make_step` takes it.
RetrievalLoss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Metric]]]


class Texts(NamedTuple):
    """Texts as the encoder takes them."""

    tokens: np.ndarray  # [..., T] int32
    mask: np.ndarray    # [..., T] int32, 1 is a token


class DataSet(NamedTuple):
    """Rows with what names them: `fingerprint` says whether a position in them still means the same."""

    name: str
    rows: Sequence[RetrievalRow]
    digest: str

    def fingerprint(self) -> str:
        """Of the content."""
        return self.digest


class EncodedBatches:
    """An endless iterator of dicts of arrays, for `train.loop.fit`: this process's part of every batch.

        query      Texts [B, T]
        passage    Texts [B, P, S]: the positive, then the negatives
        relevance  [B, P] int32: 1 the positive, 0 a negative (`objective.contrastive_masks`)
        excluded   [B, K] bool: keys that answer the query too, but are not its positive in this batch

    Widths are those of `bucket`, so there are few of them. Every process makes the whole batch and keeps its rows;
    the K keys are always those of the whole batch.
    """

    def __init__(self, encoder: TextEncoder, sources: Sequence[DataSet], config: RetrievalBatchConfig, *,
                 loader: int = 0, loaders: int = 1) -> None:
        if config.batch_size % loaders:
            raise ValueError(f"batch.batch_size {config.batch_size} does not divide among {loaders} data shards")
        self.sources, self._encoder = sources, encoder
        self._batches = RetrievalBatches([source.rows for source in sources], config)
        self._rows = slice(loader * config.batch_size // loaders, (loader + 1) * config.batch_size // loaders)
        self._places = self._tokens = self._cut = self._excluded = 0

    def __iter__(self) -> "EncodedBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        passages = [one for row in zip(batch.positives, batch.negatives, strict=True) for one in (row[0], *row[1])]
        count, each = len(batch.queries), len(passages) // len(batch.queries)
        query = self._encode(batch.queries, "query")
        passage = self._encode([one.text for one in passages], "passage")
        relevance = np.zeros((count, each), np.int32)
        relevance[:, 0] = 1
        excluded = other_answers(batch, each)
        self._excluded += int(excluded.sum())
        whole = {"query": query, "passage": Texts(*(x.reshape(count, each, -1) for x in passage)),
                 "relevance": relevance, "excluded": excluded}
        return jax.tree.map(lambda x: x[self._rows], whole)

    def _encode(self, texts: Sequence[str], kind: Kind) -> Texts:
        ids, num_cut = tokenize(self._encoder, texts, kind)
        width = min(bucket(max(map(len, ids))), self._encoder.max_length)
        self._places, self._tokens = self._places + width * len(ids), self._tokens + sum(map(len, ids))
        self._cut += num_cut
        return Texts(*to_batch(ids, len(ids), width))

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state() | {"sources": [source.fingerprint() for source in self.sources]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a state, and counts from there; ValueError if it is of other data."""
        for source, then in zip(self.sources, state["sources"], strict=True):
            if then != source.fingerprint():
                raise ValueError(f"{source.name} is not the data that this run began with; a position in it means "
                                 "nothing now")
        self._batches.set_state({"drawn": state["drawn"]})
        self._places = self._tokens = self._cut = self._excluded = 0

    def stats(self) -> dict[str, float]:
        """Shares and counts since this process began, or since `set_state`."""
        return {"data/padding": 1 - self._tokens / max(self._places, 1), "data/cut_texts": self._cut,
                "data/excluded_keys": self._excluded}

    def close(self) -> None:
        """Nothing is open."""


def other_answers(batch: RetrievalBatch, each: int) -> np.ndarray:
    """Keys that answer a query and are not its own positive of this batch, [B, B * each] bool.

    Facts of one entity often share a passage: then the positive of one row would be a negative of another.
    """
    keys = [one.id for positive, negatives in zip(batch.positives, batch.negatives, strict=True)
            for one in (positive, *negatives)]
    excluded = np.array([[key in answers for key in keys] for answers in batch.positive_ids])
    own = np.arange(len(batch.queries))
    excluded[own, own * each] = False
    return excluded


def make_retrieval_loss(
    encoder: TextEncoder, config: ContrastiveConfig, *, chunks: int = 1, dropout: bool = True,
    nested: MatryoshkaConfig | None = None,
) -> RetrievalLoss:
    """The loss over batches of `EncodedBatches`: every query against all passages of the global batch.

    Args:
      chunks: parts in which queries and passages are encoded with GradCache; 1 keeps all activations.
      dropout: of encoders that have one; decoders have none.
      nested: prefixes of the vectors that must serve alone too.
    """
    def encode(params: Any, texts: Texts, key: jax.Array) -> jax.Array:
        return encoder.vectors(params, texts.tokens, texts.mask, key if dropout else None)

    def loss(params: Any, vectors: dict[str, jax.Array], batch: Any) -> tuple[jax.Array, dict[str, Metric]]:
        keys = vectors["passage"].reshape(-1, vectors["passage"].shape[-1])
        positive, padding = in_batch(batch["relevance"])
        excluded = padding | batch["excluded"]
        out = contrastive(vectors["query"], keys, positive, excluded, config)
        per_query = out.loss
        if nested is not None:
            per_query = matryoshka(lambda q, k: contrastive(q, k, positive, excluded, config).loss,
                                   (vectors["query"], keys), nested).loss
        total = aggregate(per_query, out.counted)
        return total.total, {"loss": total, "accuracy": aggregate(out.correct, out.counted)}

    return cached_loss({"query": encode, "passage": per_passage(encode)}, loss,
                       {"query": chunks, "passage": chunks}, cached=chunks > 1)
