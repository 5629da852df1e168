"""Retrieval objectives against plain numpy in float64, and what masks, padding and order must not change."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective import contrastive as c
from jaxlm.objective.contrastive_distill import margin_mse, score_distillation
from jaxlm.objective.contrastive_masks import (
    MARGINS,
    GuideConfig,
    Margin,
    duplicates,
    guided,
    in_batch,
    same_query,
)
from jaxlm.objective.distill import DistillConfig
from jaxlm.objective.late_interaction import max_sim, own_max_sim
from jaxlm.objective.sparse_retrieval import flops, l1, quadratic_warmup, splade

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(5, 12)).astype(np.float32)
POSITIVE = np.zeros((5, 12), bool)
POSITIVE[[0, 1, 1, 2, 2, 2, 4], [3, 0, 7, 1, 2, 11, 3]] = True  # row 3 has none; rows 0 and 4 share one
EXCLUDED = (RNG.random((5, 12)) < 0.25) | (np.arange(12) == 9)[None]


def marks(text: str) -> np.ndarray:
    """Rows of `x` and `.`."""
    return np.array([[sign == "x" for sign in line.split()] for line in text.strip().splitlines()])


def reference(scores, positive, excluded, form, temperature):
    """Losses [B] of one direction, term by term."""
    losses = []
    for row, answers, out in zip(scores.astype(np.float64) / temperature, positive, excluded, strict=True):
        good, rest = np.exp(row[answers]), np.exp(row[~answers & ~out]).sum()
        if form == "mil_nce":
            terms = [-np.log(good.sum() / (good.sum() + rest))] if len(good) else []
        else:
            terms = [-np.log(g / (rest + (g if form == "info_nce" else good.sum()))) for g in good]
        losses.append(np.mean(terms) if terms else 0.0)
    return np.array(losses)


@pytest.fixture(scope="module", params=c.CONTRASTIVE_LOSSES)
def form(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["one_way", "symmetric"])
def run(form, request):
    """The loss and its gradient by the scores, compiled once for each entry."""
    config = c.ContrastiveConfig(several_positives=form, temperature=0.3, symmetric=request.param)

    def total(scores, positive, excluded):
        out = c.from_scores(scores, positive, excluded, config)
        return jnp.sum(out.loss), out

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))

    def call(scores, positive=POSITIVE, excluded=EXCLUDED):
        (_, out), gradient = compiled(scores, positive, excluded)
        return config, jax.device_get(out), np.asarray(gradient)

    return call


def test_the_family_is_complete():
    assert set(get_args(c.SeveralPositives)) == set(c.CONTRASTIVE_LOSSES)
    assert set(get_args(c.Similarity)) == set(c.SIMILARITIES)
    assert set(get_args(Margin)) == set(MARGINS)


def test_equals_numpy(run, form):
    config, out, _ = run(SCORES)
    expected = reference(SCORES, POSITIVE, EXCLUDED, form, 0.3)
    if config.symmetric:
        back = reference(SCORES.T, POSITIVE.T, EXCLUDED.T, form, 0.3)
        expected = (expected + [back[answers].mean() if answers.any() else 0 for answers in POSITIVE]) / 2
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.counted, [1, 1, 1, 0, 1])
    kept = np.where(EXCLUDED & ~POSITIVE, -np.inf, SCORES)
    best = [kept[i][POSITIVE[i]].max() > kept[i][~POSITIVE[i]].max() if POSITIVE[i].any() else 0 for i in range(5)]
    np.testing.assert_array_equal(out.correct, best)


def test_excluded_keys_and_queries_without_answer_get_no_gradient(run):
    dirty = np.where(EXCLUDED & ~POSITIVE, np.float32(np.nan), SCORES)
    config, out, gradient = run(dirty)
    np.testing.assert_allclose(out.loss, run(SCORES)[1].loss, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[EXCLUDED & ~POSITIVE].any()
    if not config.symmetric:  # as a candidate for the answers of others a query counts even without its own
        assert not gradient[3].any()
        np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-5)  # a constant added to a row changes nothing


def test_large_scores_stay_finite_and_order_does_not_matter(run):
    _, out, gradient = run(SCORES * np.float32(1e6))
    assert np.isfinite(out.loss).all() and np.isfinite(gradient).all()
    order = np.random.default_rng(1).permutation(12)
    moved = run(SCORES[:, order], POSITIVE[:, order], EXCLUDED[:, order])[1]
    np.testing.assert_allclose(moved.loss, run(SCORES)[1].loss, rtol=1e-5)


def test_one_positive_is_cross_entropy(run):
    labels = np.array([3, 0, 1, 5, 9])
    config, out, _ = run(SCORES, np.eye(12, dtype=bool)[labels], np.zeros_like(POSITIVE))
    def by_rows(scores):
        scores = scores.astype(np.float64) / 0.3
        return np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), np.arange(len(scores))]
    order = [*labels, *(set(range(12)) - {*labels})]
    expected = by_rows(SCORES[:, order])
    if config.symmetric:
        expected = (expected + by_rows(SCORES.T[labels])) / 2
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)


def test_ties_are_wrong():
    run = jax.jit(lambda *arrays: c.from_scores(*arrays, c.ContrastiveConfig()))
    out = run(np.zeros((2, 4)), POSITIVE[:2, :4], np.zeros((2, 4), bool))
    assert not out.correct.any()
    np.testing.assert_allclose(out.loss, np.log(4), rtol=1e-6)


def test_similarities():
    query, keys = RNG.normal(size=(3, 7)).astype(np.float32), RNG.normal(size=(4, 7)).astype(np.float32)
    keys[2] = 0
    length = lambda x: np.maximum(np.linalg.norm(x, axis=1), 1e-30)
    expected = {"dot": query @ keys.T, "cosine": query @ keys.T / length(query)[:, None] / length(keys)[None]}
    for name, similarity in c.SIMILARITIES.items():
        run = lambda q, k, name=name, similarity=similarity: (
            similarity(q, k), c.own_scores(q[:2], k.reshape(2, 2, 7), name))
        scores, own = jax.jit(run)(query, keys)
        np.testing.assert_allclose(scores, expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own, [expected[name][0, :2], expected[name][1, 2:]], rtol=1e-5, atol=1e-6)
    assert not np.asarray(jax.jit(jax.grad(lambda k: jnp.sum(c.cosine(query, k))))(keys))[2].any()


def test_matryoshka():
    query, keys = RNG.normal(size=(4, 8)).astype(np.float32), RNG.normal(size=(8, 8)).astype(np.float32)
    positive, excluded = in_batch(jnp.array([[1, 0]] * 4))
    loss = lambda q, k: c.contrastive(q, k, positive, excluded, c.ContrastiveConfig(similarity="dot")).loss

    def prefix(dim, scaled):
        cut = [x[:, :dim] / (np.linalg.norm(x[:, :dim], axis=1, keepdims=True) if scaled else 1) for x in (query, keys)]
        return reference(cut[0] @ cut[1].T, np.asarray(positive), np.asarray(excluded), "info_nce", 0.05)

    for scaled in (True, False):
        config = c.MatryoshkaConfig(dims=(8, 3), weights=(1.0, 0.5), normalize=scaled)
        out = jax.jit(lambda q, k, config=config: c.matryoshka(loss, (q, k), config))(query, keys)
        np.testing.assert_allclose(out.parts, [prefix(8, scaled), prefix(3, scaled)], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(out.loss, prefix(8, scaled) + 0.5 * prefix(3, scaled), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="only 8 numbers"):
        c.matryoshka(loss, (query, keys), c.MatryoshkaConfig(dims=(16,)))


@pytest.mark.parametrize("make", [
    lambda: c.ContrastiveConfig(temperature=0.0), lambda: c.MatryoshkaConfig(dims=()),
    lambda: c.MatryoshkaConfig(dims=(4, 4)), lambda: c.MatryoshkaConfig(dims=(4, 2), weights=(1.0,)),
    lambda: c.MatryoshkaConfig(dims=(4,), weights=(0.0,)), lambda: GuideConfig(margin=-0.1),
    lambda: quadratic_warmup(1.0, 0), lambda: quadratic_warmup(-1.0, 5),
])
def test_wrong_settings(make):
    with pytest.raises(ValueError):
        make()


def test_in_batch_as_in_its_docstring():
    positive, excluded = in_batch(jnp.array([[1, 0, 0], [1, 1, -1]]))
    np.testing.assert_array_equal(positive, marks("x . . . . . \n . . . x x ."))
    np.testing.assert_array_equal(excluded, marks(". . . . . x \n . . . . . x"))


def test_duplicates_as_in_its_docstring():
    relevance = jnp.array([[1, 0], [1, 0]])
    np.testing.assert_array_equal(duplicates(jnp.array([[7, 8], [9, 7]]), relevance), marks(". . . x \n . . . ."))
    # A negative equal to an answer of its own row, and padding whose id is an answer's by chance.
    ids, relevance = jnp.array([[7, 7], [7, 8]]), jnp.array([[1, 0], [-1, 1]])
    np.testing.assert_array_equal(duplicates(ids, relevance), marks(". x . . \n . . . ."))


def test_same_query_as_in_its_docstring():
    relevance = jnp.array([[1, 0], [1, 0]])
    np.testing.assert_array_equal(same_query(jnp.array([5, 5]), relevance), marks(". . x . \n x . . ."))
    assert not same_query(jnp.array([5, 6]), relevance).any()


def test_guided_margins():
    guide = jnp.array([[0.5, 0.5, 0.45, 0.51, 0.3], [-0.5, -0.55, -0.7, -0.4, -0.5], [0.9, 0.1, 0.2, 0.3, 0.4]])
    positive = jnp.array(marks("x . . . . \n x . . . x \n . . . . ."))
    for config, expected in (
        (GuideConfig(), ". . . x . \n . . . x . \n . . . . ."),
        (GuideConfig(margin=0.1), ". x x x . \n . x . x . \n . . . . ."),
        (GuideConfig(margin=0.05, kind="relative"), ". x . x . \n . . . x . \n . . . . ."),
        (GuideConfig(margin=0.2, kind="relative"), ". x x x . \n . x . x . \n . . . . ."),
    ):
        np.testing.assert_array_equal(guided(guide, positive, config), marks(expected))
    several = jnp.array([[0.5, 0.2, 0.3]])
    np.testing.assert_array_equal(guided(several, jnp.array(marks("x x .")), GuideConfig()), marks(". . x"))


def test_margin_mse_by_hand():
    out = margin_mse(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[0.9, 0.4, 0.9]]))
    np.testing.assert_allclose(out, [[1.5**2, 1.0]], rtol=1e-6)


def test_score_distillation_equals_numpy():
    student, teacher = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    valid = marks("x x x . \n x x . . \n . . . .")
    config = DistillConfig(temperature=2.0, scale_gradient=True)

    @jax.jit
    def run(student, teacher):
        total = lambda s, t: jnp.sum(score_distillation(s, t, valid, config))
        return score_distillation(student, teacher, valid, config), *jax.grad(total, (0, 1))(student, teacher)

    dirty = [np.where(valid, x, np.float32(np.nan)) for x in (student, teacher)]
    expected = []
    for s, t, kept in zip(student / 2, teacher / 2, valid, strict=True):
        p, q = (np.exp(x[kept]) / np.exp(x[kept]).sum() for x in (t, s))
        expected.append(4 * np.sum(p * np.log(p / q)))
    loss, gradient, of_teacher = map(np.asarray, run(*dirty))
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[~valid].any() and gradient[valid].all()
    assert not of_teacher.any()


def test_max_sim_equals_numpy_in_any_number_of_chunks():
    query, keys = RNG.normal(size=(3, 4, 5)).astype(np.float32), RNG.normal(size=(6, 7, 5)).astype(np.float32)
    query_mask, key_mask = RNG.random((3, 4)) < 0.7, RNG.random((6, 7)) < 0.6
    query_mask[1], key_mask[4] = False, False
    expected = np.zeros((3, 6))
    for b in range(3):
        for k in range(6):
            products = query[b][query_mask[b]] @ keys[k][key_mask[k]].T
            expected[b, k] = products.max(axis=1).sum() if products.size else 0
    run = jax.jit(lambda q, k, chunks: max_sim(q, query_mask, k, key_mask, chunks), static_argnums=2)
    weights = RNG.normal(size=(3, 6)).astype(np.float32)
    loss = lambda q, k, chunks: jnp.sum(run(q, k, chunks) * weights)
    pull = lambda chunks: jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(query, keys, chunks)
    whole = [np.asarray(x) for x in pull(1)]
    for chunks in (1, 3):
        np.testing.assert_allclose(run(query, keys, chunks), expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(pull(chunks), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not whole[1][~key_mask].any() and not whole[0][~query_mask].any()
    own = jax.jit(own_max_sim)(query, query_mask, keys.reshape(3, 2, 7, 5), key_mask.reshape(3, 2, 7))
    np.testing.assert_allclose(own, [expected[b, 2 * b:2 * b + 2] for b in range(3)], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="4 chunks do not divide 6"):
        run(query, keys, 4)


def test_max_sim_chunks_bound_the_memory():
    shape = jax.ShapeDtypeStruct
    args = (shape((8, 32, 16), "float32"), shape((8, 32), "bool"), shape((64, 64, 16), "float32"),
            shape((64, 64), "bool"))

    def temporary(chunks):
        total = lambda q, qm, k, km: jnp.sum(max_sim(q, qm, k, km, chunks))
        return jax.jit(jax.grad(total, argnums=(0, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(1) / 4


def test_splade_equals_numpy():
    logits, mask = RNG.normal(size=(3, 4, 6)).astype(np.float32), marks("x x . . \n x x x x \n . . . .")
    expected = np.stack([
        np.log1p(np.maximum(row[kept], 0)).max(axis=0) if kept.any() else np.zeros(6)
        for row, kept in zip(logits, mask, strict=True)])
    dirty = np.where(mask[:, :, None], logits, np.float32(np.inf))
    weights = jax.jit(splade)(dirty, mask)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(splade(x, mask))))(logits))
    assert not gradient[~mask].any() and (np.count_nonzero(gradient, axis=1) == (expected > 0)).all()
    kept = jnp.array([1, 1, 0])
    np.testing.assert_allclose(flops(weights, kept), np.sum(expected[:2].mean(axis=0) ** 2), rtol=1e-6)
    np.testing.assert_allclose(l1(-weights), expected.sum(axis=1), rtol=1e-6)


def test_quadratic_warmup():
    weight = quadratic_warmup(0.4, 10)
    np.testing.assert_allclose([weight(step) for step in (0, 5, 10, 99)], [0, 0.1, 0.4, 0.4], rtol=1e-6)
