"""Contrastive losses of retrieval: scores of queries against keys in, one loss per query out.

A key is a passage that any query of the batch may be compared with: the positives and hard negatives of all queries.
`positive` [B, K] marks the keys that answer a query, `excluded` [B, K] those that it must not be compared with
(`objective.contrastive_masks` makes both); a key that is positive for a query is never excluded from it. All arrays are
global: under jit on a mesh every query meets the keys of all devices, and the loss and its gradient are those of one
device. Micro-batches are not so: a query meets the keys of its own micro-batch only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

Similarity = Literal["dot", "cosine"]
SeveralPositives = Literal["info_nce", "sup_con", "mil_nce"]

NEVER = -1e30  # score of a key that does not count: exp is 0, and unlike -inf it leaves no NaN where none counts


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """What a retriever minimises."""

    similarity: Similarity = "cosine"
    temperature: float = 0.05                      # divides the scores
    several_positives: SeveralPositives = "info_nce"  # all are equal where every query has one
    symmetric: bool = False                        # half of the loss: each positive finds its query among all queries

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"contrastive.temperature must be a number above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig:
    """Prefixes of the embedding that must serve alone."""

    dims: tuple[int, ...]
    weights: tuple[float, ...] | None = None  # of each prefix; None: 1 each
    normalize: bool = True                    # each prefix to length 1; without effect on cosine similarity

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1 or len({*self.dims}) < len(self.dims):
            raise ValueError(f"matryoshka.dims must be different numbers from 1 up, got {self.dims}")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(f"matryoshka has {len(self.dims)} dims but {len(self.weights)} weights; give one each")
        if self.weights is not None and not min(self.weights) > 0:
            raise ValueError(f"matryoshka.weights must be above 0, got {self.weights}")


class ContrastiveLoss(NamedTuple):
    """Per-query results, [B] float32 each."""

    loss: jax.Array     # nats; 0 where `counted` is
    correct: jax.Array  # 1 where a positive scores above every other key; ties are wrong, or a constant would be right
    counted: jax.Array  # 1 where the query has a positive: the mask for `core.masked.aggregate`


class MatryoshkaLoss(NamedTuple):
    """Per-example results, float32."""

    loss: jax.Array   # [B], weighted sum
    parts: jax.Array  # [number of dims, B], unweighted


def normalize(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, float32; a zero vector stays zero and gets no gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def dot(query: jax.Array, keys: jax.Array) -> jax.Array:
    """<q, k>: [B, D] and [K, D] to [B, K] float32."""
    chex.assert_rank([query, keys], 2)
    chex.assert_equal_shape_suffix([query, keys], 1)
    # Divided by a temperature of 0.01, an error in the fourth digit would be one in the second: no TF32, no bfloat16.
    return jnp.einsum("bd,kd->bk", query.astype(jnp.float32), keys.astype(jnp.float32), precision="highest")


def cosine(query: jax.Array, keys: jax.Array) -> jax.Array:
    """<q, k> / (|q| |k|), as `dot`; 0 for a zero vector."""
    return dot(normalize(query), normalize(keys))


SIMILARITIES = {"dot": dot, "cosine": cosine}


def own_scores(query: jax.Array, passages: jax.Array, similarity: Similarity) -> jax.Array:
    """Each query against its own passages: [B, D] and [B, P, D] to [B, P] float32."""
    chex.assert_rank([query, passages], [2, 3])
    return jax.vmap(SIMILARITIES[similarity])(query[:, None], passages)[:, 0]


# Of the three, scores are divided by the temperature already, and `NEVER` where a key is excluded.


def info_nce(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """mean over positives p of -log(e^s_p / (e^s_p + sum over negatives e^s_n)): no positive competes with another.

    With one positive the softmax cross-entropy of van den Oord et al. 2018, arXiv:1807.03748.
    """
    negatives = _log_sum(scores, ~positive)
    return _mean_over(jax.nn.softplus(negatives[:, None] - scores), positive)


def sup_con(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """mean over positives p of -log(e^s_p / sum over all keys e^s_k): L_out of Khosla et al. 2020, arXiv:2004.11362.

    Least at log(number of positives), where all positives score alike.
    """
    return _mean_over(jax.nn.logsumexp(scores, axis=1, keepdims=True) - scores, positive)


def mil_nce(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """-log(sum over positives e^s_p / sum over all keys e^s_k): one good positive is enough.

    MIL-NCE of Miech et al. 2020, arXiv:1912.06430.
    """
    return jax.nn.logsumexp(scores, axis=1) - _log_sum(scores, positive)


CONTRASTIVE_LOSSES = {"info_nce": info_nce, "sup_con": sup_con, "mil_nce": mil_nce}


def from_scores(
    scores: jax.Array, positive: jax.Array, excluded: jax.Array, config: ContrastiveConfig
) -> ContrastiveLoss:
    """The configured loss of scores not yet divided by the temperature, whatever similarity they are (MaxSim too).

    Symmetric: half of it is the mean, over the positives of a query, of the loss by which each finds its query among
    all queries.

    Args:
      scores: [B, K]; those of excluded keys may be anything.
      positive: [B, K] bool.
      excluded: [B, K] bool.
    """
    chex.assert_rank(scores, 2)
    chex.assert_equal_shape([scores, positive, excluded])
    scores = jnp.where(~excluded | positive, scores.astype(jnp.float32) / config.temperature, NEVER)
    counted = jnp.any(positive, axis=1)
    one_direction = CONTRASTIVE_LOSSES[config.several_positives]
    loss = one_direction(scores, positive)
    if config.symmetric:
        # Selected first: the value at a key that is nobody's positive is no loss.
        back = jnp.where(jnp.any(positive, axis=0), one_direction(scores.T, positive.T), 0)
        loss = (loss + _mean_over(jnp.broadcast_to(back[None], scores.shape), positive)) / 2
    best, other = (jnp.max(jnp.where(which, scores, NEVER), axis=1) for which in (positive, ~positive))
    correct = (counted & (best > other)).astype(jnp.float32)
    return ContrastiveLoss(jnp.where(counted, loss, 0), correct, counted.astype(jnp.float32))


def contrastive(
    query: jax.Array, keys: jax.Array, positive: jax.Array, excluded: jax.Array, config: ContrastiveConfig
) -> ContrastiveLoss:
    """`from_scores` of embeddings [B, D] and [K, D]."""
    return from_scores(SIMILARITIES[config.similarity](query, keys), positive, excluded, config)


def matryoshka(
    objective: Callable[..., jax.Array], embeddings: tuple[jax.Array, ...], config: MatryoshkaConfig
) -> MatryoshkaLoss:
    """sum_d w_d L(x[..., :d]), prefixes scaled to length 1 (Kusupati et al. 2022, arXiv:2205.13147).

    Args:
      objective: losses [B] of embeddings, such as `lambda q, k: contrastive(q, k, positive, excluded, config).loss`.
      embeddings: what `objective` takes, [..., D] each.

    Raises ValueError: a prefix longer than D.
    """
    width = min(x.shape[-1] for x in embeddings)
    if max(config.dims) > width:
        raise ValueError(f"matryoshka.dims {config.dims}: embeddings have only {width} numbers")
    scale = normalize if config.normalize else lambda x: x
    parts = jnp.stack([objective(*(scale(x[..., :dim]) for x in embeddings)) for dim in config.dims])
    weights = jnp.asarray(config.weights or (1.0,) * len(config.dims), jnp.float32)
    return MatryoshkaLoss(jnp.tensordot(weights, parts, axes=1), jax.lax.stop_gradient(parts))


def _log_sum(scores: jax.Array, which: jax.Array) -> jax.Array:
    """log of the sum of e^s over the marked keys, [B]; about `NEVER` where none is."""
    return jax.nn.logsumexp(jnp.where(which, scores, NEVER), axis=1)


def _mean_over(values: jax.Array, which: jax.Array) -> jax.Array:
    """Mean over the marked keys, [B]; 0 where none is."""
    return jnp.sum(jnp.where(which, values, 0), axis=1) / jnp.maximum(jnp.sum(which, axis=1), 1)
