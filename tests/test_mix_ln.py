"""Mix-LN: the first layers post-norm, against an independent decoder, and that nothing else changes."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config as flags
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch, tree_shardings
from jaxlm.model.cache import init_cache
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token, num_parameters
from jaxlm.model.decoder import build, unstack
from jaxlm.model.hf import save_hf
from jaxlm.model.hf_config import ARCHITECTURES
from jaxlm.model.partition import PARAM_RULES
from tests.test_model import close

PRE = ModelConfig(vocab_size=64, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=24,
                  max_positions=64)
MIX = replace(PRE, post_norm_layers=1)  # KORMo's and the paper's quarter
VARIANTS = {
    "quarter": MIX,
    "three of four, gemma's norm": replace(PRE, post_norm_layers=3, norm_offset=1.0, tie_embeddings=True),
    "all": replace(PRE, post_norm_layers=4),
}


@functools.cache
def params_of(config):
    """Parameters far from their initial values: no norm is the identity, and no two are alike."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + (1 - config.norm_offset) * (
            path[-1].key == "scale"), jnp.float32), shapes)


def tokens_of(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, PRE.vocab_size, shape), jnp.int32)


# An independent decoder of one document without a batch axis; `xp` is numpy, or jax.numpy where gradients are wanted.


def rms(xp, x, scale, config):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * (config.norm_offset + scale)[None, :]


def turn(xp, x, config):
    """Rotary positions of heads [T, N, H]."""
    half = config.head_dim // 2
    angles = np.outer(np.arange(len(x)), config.rope_theta ** (-np.arange(half) / half))[:, None]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    return xp.concatenate((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)


def attend(xp, y, weights, config):
    q, k, v = (xp.einsum("td,dnh->tnh", y, weights[name]["kernel"]) for name in ("query", "key", "value"))
    q, k, group = turn(xp, q, config), turn(xp, k, config), config.num_heads // config.num_kv_heads
    heads = []
    for n in range(config.num_heads):
        scores = q[:, n] @ k[:, n // group].T / math.sqrt(config.head_dim)
        scores = xp.exp(xp.where(np.tri(len(y), dtype=bool), scores, -np.inf))
        heads.append(scores / xp.sum(scores, axis=-1, keepdims=True) @ v[:, n // group])
    return xp.einsum("tnh,nhd->td", xp.stack(heads, 1), weights["out"]["kernel"])


def feed_forward(xp, y, weights, config):
    gate = y @ weights["gate"]["kernel"]
    return (gate / (1 + xp.exp(-gate)) * (y @ weights["up"]["kernel"])) @ weights["down"]["kernel"]


def block(xp, x, layer, config, post=False):
    """Formulas of Mix-LN: norm(x + f(x)) post-norm, x + f(norm(x)) pre-norm."""
    for f, name in ((attend, "attention"), (feed_forward, "mlp")):
        norm = lambda y, name=name: rms(xp, y, layer[f"{name}_norm"]["scale"], config)
        x = norm(x + f(xp, x, layer[name], config)) if post else x + f(xp, norm(x), layer[name], config)
    return x


def reference_hidden(xp, config, params, tokens):
    """Hidden states after the final norm, [T, D]."""
    x = params["embed"]["embedding"][tokens]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = block(xp, x, layer, config, post=i < config.post_norm_layers)
    return rms(xp, x, params["final_norm"]["scale"], config)


def reference_head(config, params):
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens, **arguments):
    return model.apply(params, tokens, **arguments)


@functools.partial(jax.jit, static_argnames="model")
def loss_and_grads(model, params, tokens):
    return jax.value_and_grad(lambda params: total(model, params, tokens))(params)


def total(model, params, tokens):
    return jnp.sum(jax.nn.log_softmax(model.apply(params, tokens).logits)[..., 3])


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_formula(name):
    config = VARIANTS[name]
    params, tokens = params_of(config), tokens_of(1, 2, 9)
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected, other = (np.stack([
        reference_hidden(np, one, double, row) @ reference_head(one, double) for row in np.asarray(tokens)])
        for one in (config, replace(config, post_norm_layers=config.post_norm_layers - 1)))
    assert np.abs(expected - other).max() > 0.1  # one layer more or less shows
    close(forward(build(config), params, tokens).logits, expected)


def test_remat_and_unrolling_change_nothing():
    params, tokens = params_of(MIX), tokens_of(4, 4, 8)
    close(loss_and_grads(build(MIX, ComputeConfig(remat="full", scan_unroll=2)), params, tokens),
          loss_and_grads(build(MIX), params, tokens))


def test_cached_decoding_equals_the_full_forward():
    """Of the first 6 columns the second row keeps 3; then three tokens more, with the layers stacked and unstacked."""
    model, params, tokens = build(MIX), params_of(MIX), tokens_of(3, 2, 9)
    full = [forward(model, params, tokens[row, kept][None]).logits[0] for row, kept in (
        (0, np.r_[:9]), (1, np.r_[:3, 6:9]))]
    for layers in (params, unstack(params)):
        start = forward(model, layers, tokens[:, :6], cache=init_cache(MIX, 2, 12))
        close(start.logits[0], full[0][:6])
        cache = start.cache._replace(length=jnp.asarray([6, 3]))
        more = forward(model, layers, tokens[:, 6:], cache=cache).logits
        close(list(more), [full[0][6:], full[1][3:]])


def test_eight_devices_equal_one():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    model, params, tokens = build(MIX), params_of(MIX), tokens_of(4, 4, 8)
    shardings = tree_shardings(params, PARAM_RULES, mesh)
    with jax.set_mesh(mesh):
        f = jax.jit(jax.value_and_grad(lambda params, tokens: total(model, params, tokens)),
                    out_shardings=(None, shardings))
        found = jax.device_get(f(jax.device_put(params, shardings), put_batch(np.asarray(tokens), mesh)))
    close(found, loss_and_grads(model, params, tokens))


def test_a_pre_norm_model_does_not_pay_for_it():
    """Two norms a layer and the last one; with post-norm layers each place has one, of which a layer uses half."""
    def norms(config):
        return str(jax.make_jaxpr(build(config).apply)(params_of(PRE), tokens_of(5, 1, 4))).count("rsqrt")

    assert (norms(PRE), norms(MIX)) == (2 + 1, 4 + 1)


def test_the_parameters_are_those_of_a_pre_norm_model():
    plain, mixed = (jax.jit(build(config).init)(jax.random.key(0)) for config in (PRE, MIX))
    jax.tree.map(np.testing.assert_array_equal, mixed, plain)
    assert num_parameters(MIX) == num_parameters(PRE) and flops_per_token(MIX, 8) == flops_per_token(PRE, 8)


def test_a_configuration_file_carries_it():
    values = flags.to_json(MIX)
    assert flags.from_json(ModelConfig, values) == MIX
    del values["post_norm_layers"]  # a run of before
    assert flags.from_json(ModelConfig, values) == PRE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_can_hold_it(architecture, tmp_path):
    config = replace(MIX, **ARCHITECTURES[architecture].fixed)
    with pytest.raises(ValueError, match=f"'{architecture}' cannot express this model .*: post_norm_layers: 1 -> 0"):
        save_hf(tmp_path / "model", config, params_of(config), architecture=architecture)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [-1, 5])
def test_layers_that_are_not_there(count):
    with pytest.raises(ValueError, match=r"post_norm_layers must be 0 \(pre-norm\) to num_layers 4 \(post-norm\)"):
        replace(PRE, post_norm_layers=count)
