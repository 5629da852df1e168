"""What stands for a text when it is searched: one vector, a weight for each word of the vocabulary, or its tokens.

    dense   [n, D]      a pooled hidden state
    sparse  [n, V]      SPLADE: how much the text is about each token, most of them 0
    late    [n, T, D]   a vector for each token, compared by MaxSim (ColBERT, without its projection to fewer numbers)
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.objective.contrastive import SIMILARITIES, Similarity, normalize, own_scores
from jaxlm.objective.late_interaction import max_sim, own_max_sim
from jaxlm.objective.sparse_retrieval import splade
from jaxlm.retrieval.embed import TextEncoder
from jaxlm.retrieval.packed_texts import Texts, hidden_states

Vectors = Literal["dense", "sparse", "late"]


class Encoded(NamedTuple):
    """Texts as they are compared; the first axes count them."""

    x: jax.Array                   # [n, D], [n, V] or [n, T, D], float32
    mask: jax.Array | None = None  # of late: [n, T], 1 at the tokens


class Representation(NamedTuple):
    """One way to stand for a text."""

    # (encoder, params, n texts, dropout key or None) -> leaves [n, ...]
    encode: Callable[[TextEncoder, Any, Texts, jax.Array | None], Encoded]
    # (queries [B, ...], keys [K, ...], similarity, number of parts in which keys are scored) -> [B, K] float32
    scores: Callable[[Encoded, Encoded, Similarity, int], jax.Array]
    # (queries [B, ...], passages [B, P, ...], similarity) -> [B, P] float32, each query against its own
    own_scores: Callable[[Encoded, Encoded, Similarity], jax.Array]
    pooled: bool    # whether the pooling of the encoder decides it
    nested: bool    # whether the first numbers of a vector can serve alone
    mlm_head: bool  # whether it needs the head of masked language modelling


def encode_dense(encoder: TextEncoder, params: Any, texts: Texts, key: jax.Array | None) -> Encoded:
    """The vector of `TextEncoder.pooled`."""
    return Encoded(encoder.pooled(*hidden_states(encoder, params, texts, key)))


def encode_sparse(encoder: TextEncoder, params: Any, texts: Texts, key: jax.Array | None) -> Encoded:
    """max over tokens of log(1 + relu(logits of masked language modelling)); a text without tokens has weights 0."""
    hidden_BTD, mask_BT = hidden_states(encoder, params, texts, key)
    return Encoded(splade(encoder.model.vocabulary(params, hidden_BTD), mask_BT))


def encode_late(encoder: TextEncoder, params: Any, texts: Texts, key: jax.Array | None) -> Encoded:
    """The hidden states of all tokens, special ones and the prompt included, cut to `encoder.width`."""
    hidden_BTD, mask_BT = hidden_states(encoder, params, texts, key)
    return Encoded(hidden_BTD[..., :encoder.width].astype(jnp.float32), mask_BT)


def vector_scores(queries: Encoded, keys: Encoded, similarity: Similarity, num_chunks: int = 1) -> jax.Array:
    """Products or cosines; they are few numbers, so that they are computed in one part whatever is asked for."""
    return SIMILARITIES[similarity](queries.x, keys.x)


def own_vector_scores(queries: Encoded, passages: Encoded, similarity: Similarity) -> jax.Array:
    """Those of each query and its own passages."""
    return own_scores(queries.x, passages.x, similarity)


def token_scores(queries: Encoded, keys: Encoded, similarity: Similarity, num_chunks: int = 1) -> jax.Array:
    """MaxSim of products, or of the cosines of tokens."""
    return max_sim(_tokens(queries, similarity), queries.mask, _tokens(keys, similarity), keys.mask, num_chunks)


def own_token_scores(queries: Encoded, passages: Encoded, similarity: Similarity) -> jax.Array:
    """Those of each query and its own passages."""
    return own_max_sim(_tokens(queries, similarity), queries.mask, _tokens(passages, similarity), passages.mask)


def _tokens(texts: Encoded, similarity: Similarity) -> jax.Array:
    return normalize(texts.x) if similarity == "cosine" else texts.x


REPRESENTATIONS = {
    "dense": Representation(encode_dense, vector_scores, own_vector_scores, pooled=True, nested=True, mlm_head=False),
    "sparse": Representation(encode_sparse, vector_scores, own_vector_scores, pooled=False, nested=False,
                             mlm_head=True),
    "late": Representation(encode_late, token_scores, own_token_scores, pooled=False, nested=True, mlm_head=False),
}
