"""Which keys of a batch answer a query, and which it must not be compared with.

A batch has P passages for each of its B queries; all of them, row by row, are the K = B P keys of every query.
`relevance` [B, P] tells what a passage is to its own query: 1 an answer, 0 a hard negative, -1 no passage (padding).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

Margin = Literal["absolute", "relative"]


class Candidates(NamedTuple):
    """Of each query and key, [B, K] bool."""

    positive: jax.Array
    excluded: jax.Array


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """From which score of a guide on a key counts as an answer nobody labelled."""

    margin: float = 0.0
    kind: Margin = "absolute"

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"guide.margin must be 0 or more, got {self.margin}")


def in_batch(relevance: jax.Array) -> Candidates:
    """Every query against the passages of all.

        relevance   1 0  0          keys   a b c  d e f
                    1 1 -1
        positive                           x . .  . . .
                                           . . .  x x .
        excluded                           . . .  . . x
                                           . . .  . . x
    """
    chex.assert_rank(relevance, 2)
    rows, passages = relevance.shape
    flat = relevance.reshape(1, -1)
    own = jnp.arange(rows)[:, None] == jnp.arange(rows * passages)[None] // passages
    return Candidates(own & (flat == 1), jnp.broadcast_to(flat < 0, own.shape))


def duplicates(passage_ids: jax.Array, relevance: jax.Array) -> jax.Array:
    """Keys with the id of an answer of the query that lie elsewhere in the batch, [B, K] bool.

        relevance   1 0    ids  7 8     keys       7 8  9 7
                    1 0         9 7     duplicate  . .  . x
                                                   . .  . .

    Args:
      passage_ids: [B, P] int, equal where passages are; those of padding are not read.
      relevance: [B, P].
    """
    chex.assert_rank([passage_ids, relevance], 2)
    chex.assert_equal_shape([passage_ids, relevance])
    same = passage_ids[:, :, None] == passage_ids.reshape(1, 1, -1)
    answers = jnp.any(same & (relevance == 1)[:, :, None], axis=1)
    return answers & (relevance.reshape(1, -1) >= 0) & ~in_batch(relevance).positive


def same_query(query_ids: jax.Array, relevance: jax.Array) -> jax.Array:
    """Keys that answer the same query in another row, [B, K] bool.

        queries  5    relevance  1 0     keys        a b  c d
                 5               1 0     same query  . .  x .
                                                     x .  . .
    """
    chex.assert_rank([query_ids, relevance], [1, 2])
    chex.assert_equal_shape_prefix([query_ids, relevance], 1)
    asks = jnp.repeat(query_ids, relevance.shape[1], total_repeat_length=relevance.size)[None]
    return (query_ids[:, None] == asks) & (relevance.reshape(1, -1) == 1) & ~in_batch(relevance).positive


def absolute(score: jax.Array, margin: float) -> jax.Array:
    """s - margin."""
    return score - margin


def relative(score: jax.Array, margin: float) -> jax.Array:
    """s - margin |s|."""
    return score - margin * jnp.abs(score)


MARGINS = {"absolute": absolute, "relative": relative}


def guided(guide: jax.Array, positive: jax.Array, config: GuideConfig) -> jax.Array:
    """Keys that a guide model scores above an answer of the query, less a margin, [B, K] bool.

    Of several answers the one with the least score decides. GISTEmbed, Solatorio 2024, arXiv:2402.16829.

    Args:
      guide: scores [B, K] of the guide.
      positive: [B, K] bool; a query without any excludes nothing.
    """
    chex.assert_rank(guide, 2)
    chex.assert_equal_shape([guide, positive])
    least = jnp.min(guide, axis=1, where=positive, initial=jnp.inf)
    limit = jnp.where(jnp.any(positive, axis=1), MARGINS[config.kind](least, config.margin), jnp.inf)
    return jax.lax.stop_gradient(guide > limit[:, None]) & ~positive
