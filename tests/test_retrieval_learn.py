"""Losses of every representation: by plain numpy, in chunks on a mesh as on one device, and what the batches hold."""

from dataclasses import replace
from typing import get_args

import jax
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh, place_leaf, put_batch
from jaxlm.core.tree import named_leaves
from jaxlm.data.retrieval_batches import RetrievalBatchConfig
from jaxlm.data.retrieval_rows import Passage, RetrievalRow
from jaxlm.model.encoder import build_encoder
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.objective.contrastive_masks import GuideConfig
from jaxlm.retrieval.embed import embed_texts
from jaxlm.retrieval.learn import DataSet, EncodedBatches, GuidedConfig, check_scores, make_guide
from jaxlm.retrieval.representations import REPRESENTATIONS, Encoded, Vectors
from jaxlm.retrieval.retriever_loss import (
    TEACHER_LOSSES,
    FlopsConfig,
    LossKind,
    NestedConfig,
    RetrievalLossConfig,
    check_nested,
    make_retrieval_loss,
    per_query,
)
from jaxlm.retrieval.towers import Towers, siamese
from tests.test_embed import ENCODER, encoder_of, random_params

MODEL = replace(ENCODER, num_layers=1, mlm_head=True)
B, P = 8, 3


def tower(seed):
    encoder, _ = encoder_of(pooling="mean", max_length=12)
    encoder = replace(encoder, model=build_encoder(MODEL))
    return encoder, jax.tree.map(lambda x: x * (1 + seed / 3), random_params(encoder.model))


def sources():
    """Row 3 and row 4 have positives that answer row 0 too."""
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice([*"abcdefgh"], rng.integers(1, 7)))
    passage = lambda name: Passage(name, text())
    shared = [passage(f"p{i}") for i in range(B)]
    rows = [RetrievalRow(text(), (shared[i],), (passage(f"n{i}"), passage(f"m{i}")),
                         (float(rng.normal(2)),), tuple(map(float, rng.normal(size=2)))) for i in range(B)]
    rows[3] = rows[3]._replace(positives=(shared[0],))
    return [DataSet("rows", rows, "x")]


# All that there is, in few programs: compiling them is what these tests take.
CASES = {
    "dense": ("dense", RetrievalLossConfig(kind="margin_mse", temperature=0.3, teacher_temperature=3.0,
                                           add_contrastive=0.5, symmetric=True), {
        "nested": NestedConfig(dims=(16, 6), weights=(1.0, 0.5)), "guide": GuideConfig(margin=0.05)}),
    "sparse": ("sparse", RetrievalLossConfig(similarity="dot", temperature=1.5), {
        "regulariser": FlopsConfig(query=0.3, passage=0.2, warmup=4)}),
    "late": ("late", RetrievalLossConfig(kind="kl", temperature=0.7, teacher_temperature=0.5, add_contrastive=2.0), {
        "nested": NestedConfig(dims=(5,))}),
}
TWO_TOWERS = {"dense"}


def make(name, groups=1):
    """Towers, parameters, a batch and the settings of a case."""
    vectors, config, more = CASES[name]
    encoder, params = tower(0)
    towers = siamese(encoder, vectors)
    if name in TWO_TOWERS:
        other, query_params = tower(1)
        towers = Towers(other, encoder, shared=False, vectors=vectors)
        params = {"query": query_params, "passage": params}
    batches = EncodedBatches(towers, sources(), RetrievalBatchConfig(batch_size=B, num_negatives=P - 1),
                             teacher=config.teacher, groups=groups)
    if "guide" in more:
        batches.guide = make_guide(*tower(2), sources())
    batches.set_state({"drawn": 2, "sources": ["x"]})
    return towers, params, next(batches), config, more


def value_and_grad(towers, params, batch, config, more, chunks=1):
    loss = make_retrieval_loss(towers, config, chunks=chunks, dropout=False, **more)
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.key(0)))


@pytest.fixture(scope="module")
def plain():
    """Each case on one device, without chunks; made once."""
    found = {}
    return lambda name: found.setdefault(name, value_and_grad(*make(name)))


@pytest.mark.parametrize("name", CASES)
def test_chunks_on_a_mesh_are_the_plain_loss(name, plain):
    (value, metrics), grads = plain(name)
    towers, params, batch, config, more = make(name, groups=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    leaves = [place_leaf(path, np.asarray(x), mesh=mesh, rules=ENCODER_RULES)
              for path, x in named_leaves(params).items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    with jax.set_mesh(mesh):
        (other, found), other_grads = value_and_grad(towers, params, put_batch(batch, mesh), config, more, chunks=2)
    assert other == pytest.approx(value, rel=1e-5)
    assert found["accuracy"].value() == metrics["accuracy"].value()
    for path, x in named_leaves(grads).items():
        np.testing.assert_allclose(named_leaves(other_grads)[path], x, rtol=0, atol=1e-5 * max(1, np.abs(x).max()),
                                   err_msg=path)
    assert np.abs(named_leaves(grads)[("query/" if not towers.shared else "") + "embed/embedding"]).max() > 1e-3


def softmax_loss(scores, positive, excluded):
    scores = np.where(excluded & ~positive, -np.inf, scores)
    return np.log(np.exp(scores).sum(axis=1)) - scores[positive]


@jax.jit
def states(params, tokens, mask):
    """Hidden states and logits."""
    hidden = build_encoder(MODEL).apply(params, tokens, segments=mask)
    return hidden, build_encoder(MODEL).vocabulary(params, hidden)


def alone(texts, i):
    """The ids of text i, in whichever rows it lies."""
    group, place = divmod(i, texts.places.shape[1])
    places = texts.places[group, place]
    return texts.tokens[group].ravel()[places[places >= 0]].tolist()


def by_hand(towers, params, batch, config, more):
    """The mean loss by numpy in float64, from the hidden states of each text alone."""
    rows = [alone(batch[kind], i) for kind, count in (("query", B), ("passage", B * P)) for i in range(count)]
    flat = np.array([[*row, *[0] * (12 - len(row))] for row in rows]), np.array([[1] * len(row) + [0] * (12 - len(row))
                                                                                 for row in rows])
    texts = {}
    for kind, rows in (("query", range(B)), ("passage", range(B, B + B * P))):
        hidden, logits = map(np.float64, states(towers.part(params, kind), *flat))
        texts[kind] = [{"dense": lambda h, _: h.mean(axis=0),
                        "sparse": lambda _, z: np.log1p(np.maximum(z, 0)).max(axis=0),
                        "late": lambda h, _: h}[towers.vectors](hidden[i][flat[1][i] == 1], logits[i][flat[1][i] == 1])
                       for i in rows]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)

    def score(q, k):
        if config.similarity == "cosine":
            q, k = unit(q), unit(k)
        return (q @ k.T).max(axis=1).sum() if towers.vectors == "late" else q @ k

    positive = np.eye(B, dtype=bool).repeat(P, axis=1) & (np.arange(B * P) % P == 0)
    excluded = np.array(batch["excluded"])
    if "guide" in more:
        guide = np.float64(batch["guide"]["query"]) @ np.float64(batch["guide"]["passage"]).reshape(B * P, -1).T
        excluded = excluded | (guide > (guide[positive] - more["guide"].margin)[:, None])

    def losses(dim):
        scale = unit if "nested" in more else lambda x: x
        cut = {kind: [scale(x[..., :dim]) for x in texts[kind]] for kind in texts}
        scores = np.array([[score(q, k) for k in cut["passage"]] for q in cut["query"]]) / config.temperature
        own = scores.reshape(B, B, P)[np.arange(B), np.arange(B)]
        loss = config.contrastive * softmax_loss(scores, positive, excluded)
        if config.symmetric:
            answers = scores[:, ::P].T
            answers = np.where(excluded[:, ::P].T & ~np.eye(B, dtype=bool), -np.inf, answers)
            loss = (loss + config.contrastive * (np.log(np.exp(answers).sum(axis=1)) - np.diag(answers))) / 2
        teacher = np.float64(batch["scores"]) / config.teacher_temperature if config.teacher else None
        if config.kind == "margin_mse":
            loss = loss + (((own[:, :1] - own[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])) ** 2).mean(axis=1)
        elif config.kind == "kl":
            p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (teacher, own))
            loss = loss + (p * np.log(p / q)).sum(axis=1)
        return loss.mean()

    nested = more.get("nested")
    total = losses(None) if nested is None else sum(
        weight * losses(dim) for dim, weight in zip(nested.dims, nested.weights or (1,), strict=True))
    if "regulariser" in more:
        share = min(1, 2 / more["regulariser"].warmup) ** 2
        for kind in texts:
            total += share * getattr(more["regulariser"], kind) * (np.mean(texts[kind], axis=0) ** 2).sum()
    return total


@pytest.mark.parametrize("name", CASES)
def test_the_loss_by_plain_numpy(name, plain):
    (value, metrics), _ = plain(name)
    expected = by_hand(*make(name))
    assert value / metrics["loss"].weight == pytest.approx(expected, rel=2e-5)
    assert metrics["loss"].value() == pytest.approx(expected, rel=2e-5) and metrics["loss"].weight == B


def test_a_teacher_alone():
    """Of scores, without a model; the second query has one passage fewer."""
    rng = np.random.default_rng(2)
    texts = lambda *shape: Encoded(np.float32(rng.normal(size=shape)))
    queries, passages, teacher = texts(2, 4), texts(2, P, 4), np.float32(rng.normal(size=(2, P)))
    batch = {"relevance": np.array([[1, 0, 0], [1, 0, -1]]), "scores": teacher}
    own = np.einsum("bd,bpd->bp", queries.x, passages.x) / 2
    for kind, expected in (
        ("margin_mse", lambda s, t: np.mean([((s[0] - s[i]) - (t[0] - t[i])) ** 2 for i in range(1, len(s))])),
        ("kl", lambda s, t: np.sum(np.exp(t) / np.exp(t).sum() * np.log(
            np.exp(t) / np.exp(t).sum() / (np.exp(s) / np.exp(s).sum())))),
    ):
        config = RetrievalLossConfig(kind=kind, similarity="dot", temperature=2.0, teacher_temperature=4.0)
        out = per_query(queries, Encoded(passages.x.reshape(-1, 4)), batch, siamese(tower(0)[0]), config, None, 1)
        np.testing.assert_allclose(out.loss, [expected(own[0], teacher[0] / 4),
                                              expected(own[1, :2], teacher[1, :2] / 4)], rtol=1e-5)
        np.testing.assert_array_equal(out.correct, [own[0, 0] > own[0, 1:].max(), own[1, 0] > own[1, 1]])


def test_the_tables_are_the_names():
    assert set(REPRESENTATIONS) == set(get_args(Vectors)) == {vectors for vectors, _, _ in CASES.values()}
    assert {"contrastive", *TEACHER_LOSSES} == set(get_args(LossKind)) == {one.kind for _, one, _ in CASES.values()}


def test_what_a_batch_holds():
    _, _, batch, _, _ = make("sparse")
    assert batch["passage"].places.shape[:2] == (1, B * P) and (batch["step"] == 2).all() and "scores" not in batch
    assert batch["excluded"].sum() == 2  # rows 0 and 3 have one positive: each sees it once more
    rows = sources()[0].rows
    _, _, scored, _, _ = make("late")
    found = {(*np.sort(one[1:]), one[0]) for one in scored["scores"]}
    assert found == {(*np.sort(np.float32(row.negative_scores)), np.float32(row.positive_scores[0])) for row in rows}


def test_processes_hold_the_parts_of_one_batch():
    towers, config = siamese(tower(0)[0]), RetrievalBatchConfig(batch_size=B, num_negatives=P - 1)
    whole = next(EncodedBatches(towers, sources(), config, groups=4))
    parts = [next(EncodedBatches(towers, sources(), config, groups=4, loader=i, loaders=2)) for i in range(2)]
    jax.tree.map(lambda x, *own: np.testing.assert_array_equal(x, np.concatenate(own)), whole, *parts)
    assert whole["query"].tokens.shape[0] == 4 and parts[0]["query"].tokens.shape[0] == 2
    with pytest.raises(ValueError, match="does not divide into 4 groups, or these among 3 data shards"):
        EncodedBatches(towers, sources(), config, groups=4, loaders=3)


def test_a_guide_is_its_vectors():
    encoder, params = tower(2)
    guide = make_guide(encoder, params, sources())
    texts = [row.positives[0].text for row in sources()[0].rows[:3]]
    expected = embed_texts(encoder, params, texts, "passage")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(guide.of("passage", texts), expected, rtol=0, atol=1e-6)


def test_settings_without_effect_and_data_without_scores(caplog):
    for make_one, message in (
        (lambda: RetrievalLossConfig(add_contrastive=1.0), "with a teacher only"),
        (lambda: RetrievalLossConfig(kind="kl", symmetric=True), "no effect on kl alone"),
        (lambda: RetrievalLossConfig(kind="kl", teacher_temperature=0.0), "must be a number above 0"),
        (lambda: NestedConfig(normalize=False), "without nested.dims"),
        (lambda: NestedConfig(dims=(0,)), "different numbers from 1 up"),
        (lambda: GuidedConfig(margin=0.1), "without guide.model"),
        (lambda: FlopsConfig(query=-1.0), "0 or more"),
        (lambda: check_nested(NestedConfig(dims=(17,)), siamese(tower(0)[0])), "17 is more than the 16 numbers"),
        (lambda: check_nested(NestedConfig(dims=(4,)), siamese(tower(0)[0], "sparse")), "sparse vectors have no"),
        (lambda: check_scores(sources(), 0), "num_negatives to 1 or more"),
        (lambda: check_scores([DataSet("plain", [sources()[0].rows[0]._replace(positive_scores=None)], "x")], 1),
         "plain has no scores of a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            make_one()
    check_nested(NestedConfig(dims=(4,)), siamese(tower(0)[0]))
    assert "leaves out 16" in caplog.text
