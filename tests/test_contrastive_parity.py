"""Retrieval objectives against sentence-transformers, value and gradient by the embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.contrastive import (
    ContrastiveConfig,
    MatryoshkaConfig,
    contrastive,
    cosine,
    matryoshka,
    own_scores,
)
from jaxlm.objective.contrastive_distill import margin_mse, score_distillation
from jaxlm.objective.contrastive_masks import GuideConfig, guided, in_batch
from jaxlm.objective.distill import DistillConfig
from jaxlm.objective.sparse_retrieval import flops

torch = pytest.importorskip("torch", reason="the parity tests compare with torch: pip install jaxlm[parity]")
pytest.importorskip("sentence_transformers", reason="the parity tests need pip install jaxlm[parity]")
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sparse_encoder.losses import FlopsLoss  # noqa: E402
from sentence_transformers.util import dot_score  # noqa: E402

B, P, D = 6, 3, 8
RNG = np.random.default_rng(0)
QUERY, PASSAGES = RNG.normal(size=(B, D)).astype(np.float32), RNG.normal(size=(B, P, D)).astype(np.float32)
TEACHER = RNG.normal(size=(B, P)).astype(np.float32)
CANDIDATES = in_batch(jnp.array([[1] + [0] * (P - 1)] * B))


class Columns(torch.nn.Module):
    """A "model" whose embeddings are its inputs, but for a factor of each number."""

    def __init__(self, factors=1.0):
        super().__init__()
        self.factors = factors

    def forward(self, features):
        return {"sentence_embedding": features["x"] * self.factors}

    def get_embedding_dimension(self):
        return D


def theirs(loss, labels=None, columns=P):
    """Value, gradient by queries [B, D] and by passages [B, P, D]."""
    query, passages = (torch.tensor(x, requires_grad=True) for x in (QUERY, PASSAGES))
    value = loss([{"x": query}, *({"x": passages[:, i]} for i in range(columns))], labels)
    value.backward()
    return value.item(), query.grad.numpy(), passages.grad.numpy()


def ours(loss):
    """The same of a mean of per-example losses."""
    value, gradients = jax.jit(jax.value_and_grad(lambda q, p: jnp.mean(loss(q, p)), argnums=(0, 1)))(QUERY, PASSAGES)
    return float(value), *map(np.asarray, gradients)


def in_batch_loss(config, excluded=CANDIDATES.excluded):
    return lambda q, p: contrastive(q, p.reshape(-1, p.shape[-1]), CANDIDATES.positive, excluded, config).loss


def test_multiple_negatives_ranking():
    assert_equal(ours(in_batch_loss(ContrastiveConfig())), theirs(losses.MultipleNegativesRankingLoss(Columns())))


def test_dot_product_and_both_directions():
    peer = losses.MultipleNegativesRankingLoss(
        Columns(), scale=2.0, similarity_fct=dot_score, directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction")
    config = ContrastiveConfig(similarity="dot", temperature=0.5, symmetric=True)
    assert_equal(ours(in_batch_loss(config)), theirs(peer))


def test_matryoshka():
    peer = losses.MatryoshkaLoss(Columns(), losses.MultipleNegativesRankingLoss(Columns()), [8, 4, 2], [1, 0.5, 0.25])
    peer.loss.model = peer.model
    config = MatryoshkaConfig(dims=(8, 4, 2), weights=(1.0, 0.5, 0.25))
    loss = in_batch_loss(ContrastiveConfig())
    assert_equal(ours(lambda q, p: matryoshka(loss, (q, p), config).loss), theirs(peer))


def test_margin_mse():
    loss = lambda q, p: margin_mse(own_scores(q, p, "dot"), TEACHER)
    assert_equal(ours(loss), theirs(losses.MarginMSELoss(Columns()), torch.tensor(TEACHER)))


def test_kl_of_scores():
    config = DistillConfig(temperature=2.0, scale_gradient=True)
    loss = lambda q, p: score_distillation(own_scores(q, p, "dot"), TEACHER, jnp.ones((B, P), bool), config)
    assert_equal(ours(loss), theirs(losses.DistillKLDivLoss(Columns(), temperature=2.0), torch.tensor(TEACHER)))


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_guided_masks(kind):
    factors = np.linspace(0.2, 2.0, D, dtype=np.float32)
    peer = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # its constructor wants two models with tokenizers
    torch.nn.Module.__init__(peer)
    peer.model, peer.guide = Columns(), Columns(torch.tensor(factors))
    peer.similarity_fct, peer.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    peer.temperature, peer.margin, peer.margin_strategy = 0.05, 0.2, kind
    peer.must_retokenize = peer.contrast_anchors = peer.contrast_positives = peer.gather_across_devices = False
    # It takes one negative a query: the others are excluded here.
    third = in_batch(jnp.array([[1, 0, -1]] * B)).excluded
    guide = cosine(QUERY * factors, PASSAGES.reshape(-1, D) * factors)
    mask = guided(guide, CANDIDATES.positive, GuideConfig(margin=0.2, kind=kind))
    assert 5 < jnp.sum(mask & ~third) < 50
    assert_equal(ours(in_batch_loss(ContrastiveConfig(), mask | third)), theirs(peer, columns=2))


def test_flops():
    weights = np.abs(PASSAGES[:, 0])
    theirs = FlopsLoss(Columns()).compute_loss_from_embeddings(torch.tensor(weights))
    np.testing.assert_allclose(flops(weights, np.ones(B)), theirs.item(), rtol=1e-6)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
