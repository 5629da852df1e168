"""Texts that share rows: the layout by hand, vectors as of each text alone, groups that devices keep to themselves."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch
from jaxlm.model.encoder import build_encoder
from jaxlm.retrieval.embed import to_batch
from jaxlm.retrieval.packed_texts import Texts, hidden_states, pack, share_rows
from jaxlm.retrieval.representations import REPRESENTATIONS
from tests.test_embed import ENCODER, encoder_of, random_params

WIDTH = 12


def random_texts(count):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 11, rng.integers(1, WIDTH + 1)).tolist() for _ in range(count)]


def test_the_worked_examples():
    texts = pack([[1, 2, 3], [4], [5, 6]], 4)
    assert texts.tokens.tolist() == [[[1, 2, 3, 4], [5, 6, 0, 0]]]
    assert pack([[1] * 9, [2]], 12).tokens.shape == (1, 1, 12) and pack([[1] * 9], 99).tokens.shape == (1, 1, 16)
    assert texts.segments.tolist() == [[[1, 1, 1, 2], [1, 1, 0, 0]]]
    assert texts.places.tolist() == [[[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, -1, -1]]]
    assert share_rows([3, 1, 2, 4], 5) == [[3, 1], [0, 2]]


def test_every_token_has_one_place_in_its_group():
    ids = random_texts(24)
    texts = pack(ids, WIDTH, groups=3)
    assert len({len(group) for group in texts.tokens}) == 1
    assert texts.tokens.shape[1] * WIDTH < 1.25 * max(sum(map(len, ids[i:i + 8])) for i in (0, 8, 16))
    for group in range(3):
        places = texts.places[group][texts.places[group] >= 0]
        assert len(set(places)) == len(places) == (texts.segments[group] > 0).sum()
        for own, found in zip(ids[group * 8:], texts.places[group], strict=False):
            assert texts.tokens[group].ravel()[found[:len(own)]].tolist() == own and (found[len(own):] == -1).all()
            assert len(set(texts.segments[group].ravel()[found[:len(own)]])) == 1
    with pytest.raises(ValueError, match="24 texts do not divide into 5 groups"):
        pack(ids, WIDTH, groups=5)


@pytest.mark.parametrize("vectors", [*REPRESENTATIONS, "decoder"])
def test_packed_is_each_text_alone(vectors):
    """In both directions: what stands for a text, and the gradient of the parameters."""
    kind = "decoder" if vectors == "decoder" else "encoder"
    encoder, params = encoder_of(kind, pooling="last", max_length=WIDTH)
    if kind == "encoder":
        encoder = replace(encoder, model=build_encoder(replace(ENCODER, num_layers=1, mlm_head=True)))
        params = random_params(encoder.model)
    encode = REPRESENTATIONS["dense" if kind == "decoder" else vectors].encode
    ids = random_texts(8)

    @jax.jit
    def value_and_grad(params, texts):
        def value(params):
            found = encode(encoder, params, texts, None)
            x = found.x if found.mask is None else found.x * found.mask[..., None]
            return (x**2).sum(), x
        return jax.value_and_grad(value, has_aux=True)(params)

    (_, packed), grads = value_and_grad(params, pack(ids, WIDTH, groups=2))
    (_, plain), plain_grads = value_and_grad(params, Texts(*to_batch(ids, len(ids), WIDTH)))
    np.testing.assert_allclose(packed, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(plain_grads))
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest)


def test_devices_keep_their_texts_to_themselves():
    encoder, params = encoder_of(max_length=WIDTH)
    texts = pack(random_texts(16), WIDTH, groups=4)
    states = jax.jit(lambda params, texts: hidden_states(encoder, params, texts, None)[0])
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        arguments = jax.device_put(params, NamedSharding(mesh, P())), put_batch(texts, mesh)
        found, program = states(*arguments), states.lower(*arguments).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)
    seen = texts.places.reshape(16, WIDTH) >= 0
    np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(states(params, texts))[seen], rtol=0, atol=1e-5)
