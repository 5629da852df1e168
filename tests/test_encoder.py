"""The encoder: a plain numpy twin, padding, packing, dropout, layers, mesh, adapters, presets."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh, put_whole, tree_shardings
from jaxlm.core.tree import count_parameters, named_leaves
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig
from jaxlm.model.encoder import build_encoder, dropout, text_positions
from jaxlm.model.encoder_config import EncoderConfig, num_encoder_parameters
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import ENCODER_RULES, LORA_RULES
from jaxlm.model.presets import ENCODERS

TINY = EncoderConfig(vocab_size=24, d_model=16, num_layers=2, num_heads=4, d_ff=24, max_positions=20, num_types=2,
                     first_position=2, norm_eps=1e-6, dropout=0.25, mlm_head=True)
TOKENS = np.random.default_rng(0).integers(0, 24, (8, 8)).astype(np.int32)
SEGMENTS = np.ones((8, 8), np.int32)
SEGMENTS[1, 5:] = SEGMENTS[2, :3] = 0      # padding on the right, on the left
SEGMENTS[3] = [1, 1, 1, 2, 2, 2, 2, 0]     # two texts


@functools.cache
def random_params(config=TINY):
    shapes = jax.eval_shape(build_encoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, segments=None, key=None):
    return model.apply(params, tokens, segments=segments, dropout_key=key)


def numpy_encoder(params, tokens):
    """One text [T], in float64, position by position of the paper: post-norm, erf."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(params).items()}

    def norm(name, x, i=...):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + TINY.norm_eps)
        return x * p[f"{name}/scale"][i] + p[f"{name}/bias"][i]

    erf = np.vectorize(math.erf)
    x = p["embed/embedding"][tokens] + p["positions/embedding"][2:2 + len(tokens)] + p["types/embedding"][0]
    x = norm("embed_norm", x)
    for i in range(TINY.num_layers):
        q, k, v = (np.einsum("td,dnh->nth", x, p[f"layers/attention/{name}/kernel"][i])
                   + p[f"layers/attention/{name}/bias"][i][:, None] for name in ("query", "key", "value"))
        weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(TINY.head_dim))
        y = weights / weights.sum(-1, keepdims=True) @ v
        y = np.einsum("nth,nhd->td", y, p["layers/attention/out/kernel"][i]) + p["layers/attention/out/bias"][i]
        x = norm("layers/attention_norm", x + y, i)
        h = x @ p["layers/mlp/up/kernel"][i] + p["layers/mlp/up/bias"][i]
        h = h * (1 + erf(h / math.sqrt(2))) / 2
        x = norm("layers/mlp_norm", x + h @ p["layers/mlp/down/kernel"][i] + p["layers/mlp/down/bias"][i], i)
    return x


def test_a_plain_numpy_pass_agrees_for_whole_padded_and_packed_rows():
    ours = np.asarray(apply(build_encoder(TINY), random_params(), TOKENS, SEGMENTS))
    for row, start, stop in ((0, 0, 8), (1, 0, 5), (2, 3, 8), (3, 0, 3), (3, 3, 7)):
        theirs = numpy_encoder(random_params(), TOKENS[row, start:stop])
        np.testing.assert_allclose(ours[row, start:stop], theirs, rtol=0, atol=1e-5)
    whole = apply(build_encoder(TINY), random_params(), TOKENS)
    np.testing.assert_allclose(whole[0], ours[0], rtol=0, atol=1e-6)


def test_the_content_of_padding_reaches_no_token():
    other = np.where(SEGMENTS > 0, TOKENS, (TOKENS + 7) % 24)
    ours, changed = (np.asarray(apply(build_encoder(TINY), random_params(), x, SEGMENTS)) for x in (TOKENS, other))
    np.testing.assert_array_equal(ours[SEGMENTS > 0], changed[SEGMENTS > 0])
    assert np.isfinite(ours).all()


def test_positions_within_texts():
    segments = np.array([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    np.testing.assert_array_equal(text_positions(segments), [[0, 0, 0, 1, 2, 0, 1, 0], range(8)])


@pytest.mark.parametrize("compute", [ComputeConfig(scan_unroll=2), ComputeConfig(remat="full"),
                                     ComputeConfig(query_chunk=3)], ids=str)
def test_computing_differently_changes_nothing(compute):
    def loss(model, params, key):
        return jnp.sum(jnp.sin(model.apply(params, TOKENS[:2], segments=SEGMENTS[:2], dropout_key=key)))

    grad = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    ours, theirs = (grad(build_encoder(TINY, one), random_params(), jax.random.key(2))
                    for one in (compute, ComputeConfig()))
    for (path, one), other in zip(named_leaves(ours).items(), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * max(1, np.abs(other).max()), err_msg=path)


def test_bfloat16_is_near():
    model = build_encoder(TINY, ComputeConfig(dtype="bfloat16"))
    ours = apply(model, random_params(), TOKENS, SEGMENTS)
    theirs = np.asarray(apply(build_encoder(TINY), random_params(), TOKENS, SEGMENTS))
    assert ours.dtype == jnp.bfloat16
    assert np.abs(np.asarray(ours, np.float32) - theirs)[SEGMENTS > 0].max() < 0.15


def test_dropout_follows_its_key_alone():
    model, params = build_encoder(TINY), random_params()
    one, same, other = (np.asarray(apply(model, params, TOKENS, SEGMENTS, jax.random.key(i))) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    plain = np.asarray(apply(model, params, TOKENS, SEGMENTS))
    assert np.abs(one - other).max() > 0.1 and np.abs(one - plain).max() > 0.1
    none = build_encoder(replace(TINY, dropout=0.0))
    np.testing.assert_array_equal(apply(none, params, TOKENS, SEGMENTS, jax.random.key(1)), plain)


def test_dropout_keeps_the_mean_and_zeroes_its_rate():
    x = np.asarray(dropout(jnp.ones((200, 200)), jax.random.key(0), 0.25))
    assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
    assert abs((x == 0).mean() - 0.25) < 0.01


@pytest.mark.parametrize("sizes", [
    {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "fsdp": 2}], ids=str)
def test_eight_devices_compute_what_one_does(sizes):
    mesh, model, params = make_mesh(MeshConfig(**{"data": 1, **sizes})), build_encoder(TINY), random_params()
    expected = apply(model, params, TOKENS, SEGMENTS, jax.random.key(1))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, ENCODER_RULES, mesh))
        ours = apply(model, placed, *put_whole((TOKENS, SEGMENTS), mesh), jax.random.key(1))
        assert jax.eval_shape(model.init, jax.random.key(0)) is not None
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_rows_that_a_mesh_does_not_divide_are_refused():
    with jax.set_mesh(make_mesh(MeshConfig(data=8))), pytest.raises(ValueError, match="3 does not divide by 8"):
        build_encoder(TINY).apply(random_params(), TOKENS[:3])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(kind):
    model, base = build_encoder(TINY), random_params()
    params = jax.jit(lora.init, static_argnums=2)(jax.random.key(0), base, LoraConfig(rank=2, kind=kind))
    expected = apply(model, base, TOKENS, SEGMENTS)
    np.testing.assert_allclose(apply(model, params, TOKENS, SEGMENTS), expected, rtol=0, atol=1e-5)
    rng = np.random.default_rng(4)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        if lora.is_adapter("/".join(entry.key for entry in path)) else leaf, params)
    ours = np.asarray(apply(model, moved, TOKENS, SEGMENTS))
    assert np.abs(ours - expected).max() > 0.1
    np.testing.assert_allclose(apply(model, lora.merge(moved), TOKENS, SEGMENTS), ours, rtol=0, atol=2e-5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tree_shardings(params, (*LORA_RULES, *ENCODER_RULES), mesh)  # a leaf without a rule raises


def test_an_adapter_for_a_kernel_that_encoders_lack_is_refused():
    with pytest.raises(ValueError, match=r"'mlp/gate' matches no kernel of this model; it has .*mlp/up"):
        lora.init(jax.random.key(0), random_params(), LoraConfig(rank=2, targets=("mlp/gate",)))


def test_the_head_shares_the_embedding():
    model, params = build_encoder(TINY), random_params()
    hidden = np.random.default_rng(3).normal(size=(2, 3, 16)).astype(np.float32)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(params).items()}
    x = hidden @ p["mlm/transform/kernel"] + p["mlm/transform/bias"]
    x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + TINY.norm_eps)
    x = x * p["mlm/norm/scale"] + p["mlm/norm/bias"]
    np.testing.assert_allclose(model.vocabulary(params, hidden), x @ p["embed/embedding"].T + p["mlm/bias"],
                               rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="no head of masked language modelling"):
        model.vocabulary({name: part for name, part in params.items() if name != "mlm"}, hidden)


# Published sizes without the pooler; MiniLM as in its file.
PUBLISHED = {"bert_base": 108_891_648, "bert_large": 334_092_288, "xlm_r_base": 277_453_056, "minilm_l6": 22_565_376}


@pytest.mark.parametrize("name", ENCODERS)
def test_presets(name):
    for config in (ENCODERS[name], replace(ENCODERS[name], mlm_head=True)):
        tree = jax.eval_shape(build_encoder(config).init, jax.random.key(0))
        assert count_parameters(tree) == num_encoder_parameters(config)
    assert num_encoder_parameters(ENCODERS[name]) == PUBLISHED.get(name, num_encoder_parameters(ENCODERS[name]))
    tree_shardings(tree, ENCODER_RULES, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))


@pytest.mark.parametrize("change, message", [
    ({"num_heads": 3}, "d_model 16 is not divisible by num_heads 3"), ({"dropout": 1.0}, "below 1"),
    ({"max_positions": 0}, "max_positions must be positive"), ({"first_position": -1}, "must not be negative")])
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_wrong_inputs():
    model, params = build_encoder(TINY), random_params()
    with pytest.raises(ValueError, match="21 tokens are more than max_positions 20"):
        model.apply(params, np.zeros((1, 21), np.int32))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="segments must be integers of the tokens' shape"):
        model.apply(params, TOKENS, segments=SEGMENTS[:2])
    with pytest.raises(ValueError, match="saves nothing"):
        build_encoder(TINY, ComputeConfig(remat="full", scan_unroll=2))
