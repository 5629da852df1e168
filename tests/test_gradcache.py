"""Encoding in chunks: values, gradients, dropout and devices as without, in memory the batch does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.masked import aggregate
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch
from jaxlm.objective.contrastive import ContrastiveConfig, MatryoshkaConfig, contrastive, matryoshka
from jaxlm.objective.contrastive_masks import duplicates, in_batch
from jaxlm.retrieval.gradcache import cached_loss, encode_chunks
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step

WIDTH, VOCAB, ROWS, PASSAGES = 8, 23, 16, 3
RULES = [("w$", P("fsdp", "tensor")), ("embed$", P(None, "tensor"))]
CONTRASTIVE = ContrastiveConfig(temperature=0.2, symmetric=True, several_positives="sup_con")
MATRYOSHKA = MatryoshkaConfig(dims=(WIDTH, 5), weights=(1.0, 0.5))


def init(key):
    # Scaled so that no tanh saturates: rounding would grow in its gradient.
    tower = lambda key: {"embed": jax.random.normal(key, (VOCAB, WIDTH)),
                         "w": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5}
    return {"query": tower(jax.random.fold_in(key, 0)), "passage": tower(jax.random.fold_in(key, 1))}


def encode(params, tokens, key, rate=0.25):
    """Embedding, dropout, dense layer, mean over tokens; 0 is padding."""
    x = params["embed"][tokens]
    x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
    mask = (tokens != 0)[..., None]
    return jnp.sum(jnp.tanh(x @ params["w"]) * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def per_passage(encode):
    """`encode` for rows of several texts: leaves [n, P, ...] in and out."""
    def encode_all(params, rows, key):
        found = encode(params, rows.reshape(-1, *rows.shape[2:]), key)
        return found.reshape(*rows.shape[:2], *found.shape[1:])

    return encode_all


def two_towers():
    return {"query": lambda params, rows, key: encode(params["query"], rows, key),
            "passage": per_passage(lambda params, rows, key: encode(params["passage"], rows, key))}


def siamese():
    one = lambda params, rows, key: encode(params["query"], rows, key)
    return {"query": one, "passage": per_passage(one)}


def embedding_loss(params, embeddings, batch):
    relevance = batch["relevance"]
    candidates = in_batch(relevance)
    excluded = candidates.excluded | duplicates(batch["ids"], relevance)
    score = lambda q, k: contrastive(q, k, candidates.positive, excluded, CONTRASTIVE).loss
    pair = embeddings["query"], embeddings["passage"].reshape(-1, WIDTH)
    mean = aggregate(matryoshka(score, pair, MATRYOSHKA).loss, jnp.any(candidates.positive, axis=1))
    return mean.total, {"loss": mean}


def make_batch(rows=ROWS):
    rng = np.random.default_rng(3)
    relevance = rng.integers(-1, 2, (rows, PASSAGES))
    relevance[::5] = -1  # rows without any answer: devices hold different numbers of queries that count
    return {"query": rng.integers(0, VOCAB, (rows, 5)), "passage": rng.integers(0, VOCAB, (rows, PASSAGES, 9)),
            "relevance": relevance, "ids": rng.integers(0, 12, (rows, PASSAGES))}


def gradient(encoders, num_chunks, cached):
    loss = cached_loss(encoders, embedding_loss, num_chunks, cached)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.device_get(run(init(jax.random.key(0)), make_batch(), jax.random.key(7)))


def assert_close(a, b, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1))


def test_equals_the_plain_loss_with_dropout():
    chunks = {"query": 2, "passage": 4}
    value, found = gradient(two_towers(), chunks, cached=True)

    def by_hand(params, batch, key):
        """Chunk i holds the rows i, i + number, ... and draws its dropout from a key of its own."""
        embeddings = {}
        for place, (name, one) in enumerate(two_towers().items()):
            rows, number = batch[name], chunks[name]
            parts = [one(params, rows[i::number], jax.random.fold_in(jax.random.fold_in(key, place), i))
                     for i in range(number)]
            embeddings[name] = jnp.stack(parts, axis=1).reshape(ROWS, *parts[0].shape[1:])
        return embedding_loss(params, embeddings, batch)

    run = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    assert_close((value, found), run(init(jax.random.key(0)), make_batch(), jax.random.key(7)))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 0.1
    assert 0 < value[1]["loss"].weight < ROWS


def test_a_siamese_encoder_keeps_its_dropout_without_the_cache():
    found, plain = (gradient(siamese(), {"query": 1, "passage": 2}, cached) for cached in (True, False))
    assert_close(found, plain)
    assert not np.any(found[1]["passage"]["w"])


def train_step(num_devices, sizes, cached, num_chunks=2, accumulate=1):
    """One update with rate 1: the gradient of the mean loss, and the metrics."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])
    rate = optax.constant_schedule(1.0)
    tx = optax.sgd(rate)
    state = init_state(init, tx, jax.random.key(0), mesh, RULES)
    before = jax.device_get(state.params)
    loss = cached_loss(two_towers(), embedding_loss, {"query": 1, "passage": num_chunks}, cached)
    step = make_step(loss, tx, rate, mesh=mesh, rules=RULES, accumulate=accumulate)
    with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(make_batch(), mesh))
    return jax.tree.map(np.subtract, before, jax.device_get(state.params)), jax.device_get(metrics)


@pytest.fixture(scope="module")
def one_device():
    return train_step(1, {}, cached=True)


@pytest.mark.parametrize("num_devices, sizes, cached", [
    (2, {}, True), (4, {"data": 2, "fsdp": 2}, True), (8, {"fsdp": 8}, True), (8, {"fsdp": 4, "tensor": 2}, False),
], ids=str)
def test_devices_change_nothing(one_device, num_devices, sizes, cached):
    grads, metrics = train_step(num_devices, sizes, cached)
    assert_close(grads, one_device[0])
    assert metrics["loss"] == pytest.approx(one_device[1]["loss"], rel=1e-6)
    assert np.abs(grads["passage"]["w"]).max() > 1e-2


def test_micro_batches_see_fewer_negatives(one_device):
    _, metrics = train_step(1, {}, cached=True, accumulate=4)
    assert metrics["tokens"] == one_device[1]["tokens"]
    assert metrics["loss"] < one_device[1]["loss"] - 0.1


def test_memory_does_not_grow_with_the_batch():
    def loss(params, embeddings, batch):
        x = embeddings["text"]
        own = jnp.eye(len(x), dtype=bool)
        return jnp.sum(contrastive(x[:, 0], x[:, 1], own, ~own & False, ContrastiveConfig()).loss), {}

    def temporary(rows, cached):
        text = {"text": per_passage(lambda params, rows, key: encode(params["query"], rows, key))}
        gradient = jax.grad(cached_loss(text, loss, {"text": rows // 8}, cached), has_aux=True)
        arguments = (jax.eval_shape(init, jax.random.key(0)),
                     {"text": jax.ShapeDtypeStruct((rows, 2, 64), jnp.int32)}, jax.random.key(0))
        return jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    few, many = 16, 128
    tokens, embeddings, scores = (4 * 2 * (many - few) * 64, 4 * 2 * (many - few) * WIDTH, 4 * (many**2 - few**2))
    small, large = temporary(few, True), temporary(many, True)
    assert large - small < tokens + 6 * embeddings + 6 * scores
    assert temporary(many, False) - small > tokens * WIDTH  # one activation of each token would be that


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="16 rows do not divide into 3 chunks on 1 devices; use a multiple of 3"):
        encode_chunks(encode, {}, jnp.zeros((16, 5), int), jax.random.key(0), 3)
    with (jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:8])),
          pytest.raises(ValueError, match="4 chunks on 8 devices; use a multiple of 32")):
        encode_chunks(encode, {}, jnp.zeros((16, 5), int), jax.random.key(0), 4)
    with pytest.raises(ValueError, match="named query, passage, but numbers of chunks query"):
        cached_loss(two_towers(), embedding_loss, {"query": 1})
