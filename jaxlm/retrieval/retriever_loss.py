"""What a retriever minimises: a contrastive loss, that of a teacher's scores, or both; of any representation."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.masked import Mean, Metric, aggregate, safe_divide
from jaxlm.objective.contrastive import ContrastiveConfig, MatryoshkaConfig, dot, from_scores, matryoshka
from jaxlm.objective.contrastive_distill import margin_mse, score_distillation
from jaxlm.objective.contrastive_masks import GuideConfig, guided, in_batch
from jaxlm.objective.distill import DistillConfig
from jaxlm.objective.sparse_retrieval import flops, quadratic_warmup
from jaxlm.retrieval.gradcache import cached_loss
from jaxlm.retrieval.packed_texts import Texts
from jaxlm.retrieval.representations import Encoded
from jaxlm.retrieval.towers import KINDS, Towers, has_dropout

LossKind = Literal["contrastive", "margin_mse", "kl"]
# (params, batch, key) -> (sum over queries, metrics), as `train.step.make_step` takes it.
RetrievalLoss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Metric]]]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetrievalLossConfig(ContrastiveConfig):
    """What a retriever minimises. Its scores are always divided by `temperature`."""

    kind: LossKind = "contrastive"
    teacher_temperature: float = 1.0  # divides the scores of the teacher
    add_contrastive: float = 0.0      # times the contrastive loss, beside that of the teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.teacher_temperature < float("inf") or not 0 <= self.add_contrastive < float("inf"):
            raise ValueError("loss.teacher_temperature must be a number above 0, loss.add_contrastive 0 or more, got "
                             f"{self.teacher_temperature} and {self.add_contrastive}")
        if not self.teacher and (self.teacher_temperature, self.add_contrastive) != (1.0, 0.0):
            raise ValueError("loss.teacher_temperature and loss.add_contrastive have an effect with a teacher only: "
                             "loss.kind margin_mse or kl")
        if not self.contrastive and (self.symmetric or self.several_positives != "info_nce"):
            raise ValueError(f"loss.symmetric and loss.several_positives have no effect on {self.kind} alone; "
                             "loss.add_contrastive gives the contrastive loss a weight")

    @property
    def teacher(self) -> bool:
        """Whether the scores of a teacher are needed."""
        return self.kind != "contrastive"

    @property
    def contrastive(self) -> float:
        """The weight of the contrastive loss."""
        return self.add_contrastive if self.teacher else 1.0


@dataclass(frozen=True, kw_only=True)
class NestedConfig(MatryoshkaConfig):
    """Prefixes of the vectors that must serve alone, the whole one among them if it shall; none: the whole one only."""

    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dims:
            super().__post_init__()
        elif self.weights is not None or not self.normalize:
            raise ValueError("nested settings have no effect without nested.dims")


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """What keeps most weights of sparse vectors at 0: each times the expected products of two texts."""

    query: float = 5e-5    # sentence-transformers' example; tevatron has 1e-2 for both
    passage: float = 3e-5
    warmup: int = 1000     # steps in which both grow to this, quadratically

    def __post_init__(self) -> None:
        quadratic_warmup(min(self.query, self.passage), self.warmup)


def check_nested(config: NestedConfig, towers: Towers) -> None:
    """ValueError for prefixes that the vectors do not have."""
    width = towers.passage.width
    if not config.dims:
        return
    if not towers.representation.nested:
        raise ValueError(f"nested.dims: {towers.vectors} vectors have no prefixes that could serve alone")
    if max(config.dims) > width:
        raise ValueError(f"nested.dims {max(config.dims)} is more than the {width} numbers of a vector")
    if width not in config.dims:
        log.warning("nested.dims leaves out %d: the whole vector is learnt by its prefixes only", width)


def teacher_margins(student: jax.Array, teacher: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of `margin_mse` over the negatives of a query, [B]; 0 for one without any."""
    some = valid[:, 1:] & valid[:, :1]
    squares = jnp.where(some, margin_mse(jnp.where(valid, student, 0), jnp.where(valid, teacher, 0)), 0)
    return safe_divide(jnp.sum(squares, axis=1), jnp.sum(some, axis=1).astype(jnp.float32))


def teacher_distribution(student: jax.Array, teacher: jax.Array, valid: jax.Array) -> jax.Array:
    """KL(softmax of the teacher, softmax of the student) over the passages of a query, [B]."""
    return score_distillation(student, teacher, valid, DistillConfig())


# (student [B, P], teacher [B, P], valid [B, P] bool) -> [B]; scores divided by their temperatures, the positive first.
TEACHER_LOSSES = {"margin_mse": teacher_margins, "kl": teacher_distribution}


class PerQuery(NamedTuple):
    """[B] float32 each."""

    loss: jax.Array
    correct: jax.Array
    counted: jax.Array


def per_query(queries: Encoded, passages: Encoded, batch: Any, towers: Towers, config: RetrievalLossConfig,
              guide: GuideConfig | None, num_chunks: int) -> PerQuery:
    """The losses of encoded queries [B, ...] and passages [B * P, ...], every query against the passages of all.

    A query is correct when its positive scores above all that it is compared with: without a contrastive part, its own
    negatives.
    """
    relevance = batch["relevance"]
    by_query = lambda texts: jax.tree.map(lambda x: x.reshape(*relevance.shape, *x.shape[1:]), texts)
    own = towers.representation.own_scores(queries, by_query(passages), config.similarity) if config.teacher else None
    if config.contrastive:
        positive, excluded = in_batch(relevance)
        excluded |= batch["excluded"]
        if guide is not None:
            scores = dot(batch["guide"]["query"], _flat(batch["guide"]["passage"]))
            excluded |= guided(scores, positive, guide)
        scores = towers.representation.scores(queries, passages, config.similarity, num_chunks)
        loss, correct, counted = from_scores(scores, positive, excluded, config)
    else:
        loss, correct, counted = from_scores(own, relevance == 1, relevance < 0, config)
    loss = config.contrastive * loss
    if config.teacher:
        loss += TEACHER_LOSSES[config.kind](own / config.temperature, batch["scores"] / config.teacher_temperature,
                                            relevance >= 0)
    return PerQuery(loss, correct, counted)


def make_retrieval_loss(
    towers: Towers, config: RetrievalLossConfig, *, chunks: int = 1, dropout: bool = True,
    nested: NestedConfig | None = None, regulariser: FlopsConfig | None = None, guide: GuideConfig | None = None,
) -> RetrievalLoss:
    """The loss over batches of `learn.EncodedBatches`, all of them global.

    Args:
      chunks: parts in which queries and passages are encoded with GradCache, and keys scored by MaxSim; 1 keeps all
        activations. It divides the groups of a batch.
      dropout: of encoders that have one; decoders have none.
      nested: prefixes of the vectors that must serve alone too.
      regulariser: of sparse vectors.
      guide: keys that the vectors of a guide call answers are excluded; they are in the batch then.
    """
    def encoder_of(kind: str) -> Callable[[Any, Any, jax.Array], Encoded]:
        encoder = towers.encoder(kind)
        dropped = dropout and has_dropout(encoder)

        def encode(params: Any, texts: Texts, key: jax.Array) -> Encoded:
            own = towers.part(params, kind)
            found = towers.representation.encode(encoder, own, texts, key if dropped else None)
            return jax.tree.map(lambda x: x.reshape(len(texts.tokens), -1, *x.shape[1:]), found)

        return encode

    def loss(params: Any, texts: dict[str, Encoded], batch: Any) -> tuple[jax.Array, dict[str, Metric]]:
        queries, passages = (_flat(texts[kind]) for kind in KINDS)
        score = lambda q, p: per_query(queries._replace(x=q), passages._replace(x=p), batch, towers, config, guide,
                                       chunks)
        out = score(queries.x, passages.x)
        losses = out.loss
        if nested is not None and nested.dims:
            losses = matryoshka(lambda q, p: score(q, p).loss, (queries.x, passages.x), nested).loss
        total = aggregate(losses, out.counted)
        metrics = {"loss": total, "accuracy": aggregate(out.correct, out.counted)}
        if regulariser is None:
            return total.total, metrics
        penalty, found = _sparsity(queries.x, passages.x, batch["step"][0], regulariser)
        total = Mean(total.total + penalty * jax.lax.stop_gradient(total.weight), total.weight)
        return total.total, metrics | found | {"loss": total}

    return cached_loss({kind: encoder_of(kind) for kind in KINDS}, loss, dict.fromkeys(KINDS, chunks),
                       cached=chunks > 1)


def _sparsity(queries: jax.Array, passages: jax.Array, step: jax.Array, config: FlopsConfig
              ) -> tuple[jax.Array, dict[str, Metric]]:
    """The regulariser of a batch at a step, and how many words a text has."""
    penalty, found = jnp.zeros(()), {}
    for kind, weights, peak in (("query", queries, config.query), ("passage", passages, config.passage)):
        all_rows = jnp.ones(len(weights))
        value = flops(weights, all_rows)
        penalty += quadratic_warmup(peak, config.warmup)(step) * value
        found[f"flops/{kind}"] = Mean(value, jnp.ones(()))
        found[f"words/{kind}"] = aggregate(jnp.sum(weights > 0, axis=1), all_rows)
    return penalty, found


def _flat(texts: Any) -> Any:
    """Leaves [G, n, ...] as [G n, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), texts)
