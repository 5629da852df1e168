"""The decoder against an independent one in NumPy, and the properties that training and decoding rely on."""

import functools
import math
import re
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch, tree_shardings
from jaxlm.core.tree import named_leaves
from jaxlm.model.cache import init_cache, keep_path
from jaxlm.model.config import Activation, ComputeConfig, ModelConfig, RematPolicy, RopeScaling
from jaxlm.model.decoder import REMAT_POLICIES, build, unstack
from jaxlm.model.layers import ACTIVATIONS
from jaxlm.model.partition import PARAM_RULES

# d_model differs from heads times head_dim, and every size from its neighbours, so that a swapped axis shows.
CONFIG = ModelConfig(
    vocab_size=61, d_model=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=28, max_positions=64)
GEMMA = replace(CONFIG, num_kv_heads=1, tie_embeddings=True, scale_embeddings=True, norm_offset=1.0,
                activation="gelu_tanh", norm_eps=1e-6)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_positions=16)
VARIANTS = {
    "llama": CONFIG,
    "llama3": replace(CONFIG, rope_theta=500.0, rope_scaling=LLAMA3, tie_embeddings=True),
    "linear": replace(CONFIG, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "mistral": replace(CONFIG, window=3),
    "qwen2": replace(CONFIG, qkv_bias=True),
    "gemma": GEMMA,
    "windowed qwen3": replace(CONFIG, qk_norm=True, window=4),
}

# XLA's own passes run as ever; LLVM's are left out, which halves the time that these many small programs compile.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def params_of(config):
    """Parameters far from their initial values: no bias is 0 and no norm the identity."""
    rng = np.random.default_rng(0)
    init = jax.eval_shape(build(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + (path[-1].key == "scale"), jnp.float32), init)


def tokens_of(seed, *shape, vocab_size=CONFIG.vocab_size):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


def close(actual, expected, tolerance=5e-6):
    """Every leaf within `tolerance` of its largest entry (or of 1, if that is smaller): a sum rounds with its terms."""
    actual, expected = named_leaves(actual), named_leaves(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        size = max(1.0, float(np.max(np.abs(expected[name]))))
        np.testing.assert_allclose(actual[name], expected[name], atol=tolerance * size, rtol=0, err_msg=name)


@functools.partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def forward(model, params, tokens, **arguments):
    return model.apply(params, tokens, **arguments)


def cross_entropy(model, params, tokens, weights=None, **arguments):
    """Sum over the tokens of the negative log-likelihood of the next one, and the logits."""
    logits = model.apply(params, tokens, **arguments).logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll if weights is None else nll * weights), logits


@functools.partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def loss_and_grads(model, params, tokens, **arguments):
    """((loss, logits), gradients)"""
    return jax.value_and_grad(lambda params: cross_entropy(model, params, tokens, **arguments), has_aux=True)(params)


# An independent decoder: NumPy, float64, one document at a time, one layer after the other, one head at a time.


def numpy_norm(x, scale, config):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * (config.norm_offset + scale)


def numpy_rope(x, positions, config):
    half = config.head_dim // 2
    y = np.zeros_like(x)
    for i in range(half):
        frequency, scaling = config.rope_theta ** (-2 * i / config.head_dim), config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None:
            wavelength, original = 2 * math.pi / frequency, scaling.original_max_positions
            if wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength > original / scaling.high_freq_factor:
                smooth = (original / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        cos, sin = np.cos(positions * frequency)[:, None], np.sin(positions * frequency)[:, None]
        y[..., i] = x[..., i] * cos - x[..., i + half] * sin
        y[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return y


def numpy_attention(q, k, v, config):
    y = np.zeros_like(q)
    for n in range(config.num_heads):
        kv = n * config.num_kv_heads // config.num_heads
        for t in range(len(q)):
            first = 0 if config.window is None else max(0, t - config.window + 1)
            scores = k[first:t + 1, kv] @ q[t, n] / math.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            y[t, n] = weights @ v[first:t + 1, kv] / weights.sum()
    return y


def numpy_decoder(config, params, tokens):
    """Logits [T, V] of one document."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = np.arange(len(tokens))
    x = params["embed"]["embedding"][tokens] * (math.sqrt(config.d_model) if config.scale_embeddings else 1)
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda x, index=index: x[index], params["layers"])
        y, weights = numpy_norm(x, layer["attention_norm"]["scale"], config), layer["attention"]
        heads = {name: np.einsum("td,dnh->tnh", y, weights[name]["kernel"]) + weights[name].get("bias", 0)
                 for name in ("query", "key", "value")}
        if config.qk_norm:
            for name in ("query", "key"):
                heads[name] = numpy_norm(heads[name], weights[f"{name}_norm"]["scale"], config)
        q, k = (numpy_rope(heads[name], positions, config) for name in ("query", "key"))
        x = x + np.einsum("tnh,nhd->td", numpy_attention(q, k, heads["value"], config), weights["out"]["kernel"])
        y, weights = numpy_norm(x, layer["mlp_norm"]["scale"], config), layer["mlp"]
        gate = y @ weights["gate"]["kernel"]
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * (y @ weights["up"]["kernel"])) @ weights["down"]["kernel"]
    x = numpy_norm(x, params["final_norm"]["scale"], config)
    return x @ (params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"])


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_numpy_decoder(name):
    config = VARIANTS[name]
    params, tokens = params_of(config), tokens_of(1, 2, 11)
    out = forward(build(config), params, tokens)
    expected = np.stack([numpy_decoder(config, params, row) for row in np.asarray(tokens)])
    assert np.std(expected) > 0.3
    close({"logits": out.logits}, {"logits": expected})
    assert out.logits.dtype == jnp.float32 and out.cache is None


@pytest.mark.parametrize("compute", [
    {"scan_unroll": 2}, {"scan_unroll": 50}, {"scan_unroll": 2, "remat": "full"}, {"query_chunk": 4, "remat": "dots"},
    *({"remat": policy} for policy in get_args(RematPolicy)),
])
def test_computing_otherwise_changes_nothing(compute):
    config = VARIANTS["windowed qwen3"]
    params, tokens = params_of(config), tokens_of(3, 2, 9)
    plain = loss_and_grads(build(config), params, tokens)
    close(loss_and_grads(build(config, ComputeConfig(**compute)), params, tokens), plain)


def test_remat_saves_memory():
    params, tokens = params_of(CONFIG), tokens_of(4, 16, 64)

    def temporary(policy):
        model = build(CONFIG, ComputeConfig(remat=policy))
        grad = jax.jit(jax.grad(lambda params: cross_entropy(model, params, tokens)[0]))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    full, no_batch, dots, none = (temporary(policy) for policy in ("full", "dots_no_batch", "dots", "none"))
    assert full < 0.8 * no_batch < 0.8 * 0.8 * dots < 0.8 * 0.8 * 0.8 * none


def test_causality_by_gradient():
    params, length = params_of(CONFIG), 10
    tokens = jnp.arange(length)[None]  # every token once, so that a row of the table is a place in the text

    def logits(table, t):
        return jnp.sum(build(CONFIG).apply({**params, "embed": {"embedding": table}}, tokens).logits[0, t])

    grad = jax.jit(jax.grad(logits))
    for t in (0, 4, 9):
        by_token = grad(params["embed"]["embedding"], t)
        assert not np.any(by_token[t + 1:])
        assert np.all(np.any(by_token[:t + 1], axis=-1))


@pytest.mark.parametrize(("name", "with_positions"), [("gemma", True), ("mistral", False)])
def test_packed_documents_are_separate(name, with_positions):
    """Rotary positions and the window are relative, so positions may also run on through the row."""
    model, params = build(VARIANTS[name]), params_of(VARIANTS[name])
    documents = [tokens_of(seed, 1, length) for seed, length in ((6, 5), (7, 8), (8, 5))]
    packed = jnp.concatenate([*documents, jnp.zeros((1, 2), jnp.int32)], axis=1)
    labels = {"segments": jnp.asarray([[1] * 5 + [2] * 8 + [3] * 5 + [0] * 2])}
    if with_positions:
        labels["positions"] = jnp.asarray([[*range(5), *range(8), *range(5), 0, 0]])
    parts = [loss_and_grads(model, params, document) for document in documents]
    (loss, logits), grads = loss_and_grads(model, params, packed, weights=within(labels["segments"]), **labels)
    close(logits[:, :18], jnp.concatenate([logits for (_, logits), _ in parts], axis=1))
    close((loss, grads), jax.tree.map(lambda *x: sum(x), *((loss, grads) for (loss, _), grads in parts)))


def within(segments):
    """1 where a token and the next are of one document."""
    return (segments[:, 1:] == segments[:, :-1]) * (segments[:, 1:] > 0)


@pytest.mark.parametrize("chunk", [None, 3])
def test_padded_rows_change_nothing(chunk):
    config = VARIANTS["mistral"]
    model, params, tokens = build(config, ComputeConfig(query_chunk=chunk)), params_of(config), tokens_of(9, 3, 8)
    segments = jnp.asarray([[1] * 8, [0] * 8, [0, 0, 1, 1, 1, 0, 0, 0]])
    (loss, logits), grads = loss_and_grads(model, params, tokens, segments=segments, weights=within(segments))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, logits, grads)))
    rest = segments[::2]
    (expected, _), gradients = loss_and_grads(model, params, tokens[::2], segments=rest, weights=within(rest))
    close((loss, grads), (expected, gradients))


def decode_in_pieces(model, params, tokens, cuts, lengths, dtype="float32"):
    """Logits of tokens that go through a cache piece by piece; row b keeps `lengths[b]` of the first piece."""
    rows, total = tokens.shape
    cache, pieces = init_cache(model.config, rows, total + 2, dtype), []
    for start, stop in zip((0, *cuts), (*cuts, total), strict=True):
        out = forward(model, params, tokens[:, start:stop], cache=cache)
        cache, pieces = out.cache, [*pieces, out.logits]
        if start == 0:
            cache = cache._replace(length=lengths)
    return jnp.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize("name", ["mistral", "gemma"])
@pytest.mark.parametrize("lengths", [(10, 10, 10), (6, 10, 1)])
def test_cached_decoding_equals_the_full_forward(name, lengths):
    """Prompts of the same and of different lengths (the first 10 columns), then four tokens one by one."""
    config = VARIANTS[name]
    model, params, tokens = build(config), params_of(config), tokens_of(10, 3, 14)
    kept = [np.r_[:n, 10:14] for n in lengths]
    expected = [forward(model, params, tokens[row][kept[row]][None]).logits[0] for row in range(3)]
    for cuts in ((10, 11, 12, 13), (10, 13)):
        logits, cache = decode_in_pieces(model, params, tokens, cuts, jnp.asarray(lengths))
        np.testing.assert_array_equal(cache.length, np.asarray(lengths) + 4)
        close([logits[row][kept[row]] for row in range(3)], expected)


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_tree_of_tokens_equals_its_paths(name):
    """Every node sees its path, and the path that is kept leaves the cache of a plain decode."""
    config = VARIANTS[name]
    model, params = build(config), params_of(config)
    prompt, nodes = tokens_of(16, 2, 5), tokens_of(17, 2, 6)
    #           0 -> 1 -> 2 -> 4;  1 -> 3;  0 -> 5
    paths = [(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 2, 4), (0, 5)]
    tree = np.zeros((6, 6), bool)
    for node, path in enumerate(paths):
        tree[node, list(path)] = True
    lengths = jnp.asarray([5, 3])
    start = forward(model, params, prompt, cache=init_cache(config, 2, 12)).cache._replace(length=lengths)
    out = forward(model, params, nodes, cache=start, tree=jnp.asarray(np.stack([tree] * 2)))
    for row, length in enumerate((5, 3)):
        for node, path in enumerate(paths):
            chain = jnp.concatenate((prompt[row, :length], nodes[row, list(path)]))
            close(out.logits[row, node], forward(model, params, chain[None]).logits[0, -1])
    kept = keep_path(out.cache, lengths, jnp.asarray([[1, 2, 4]] * 2))._replace(length=lengths + 4)
    plain = forward(model, params, nodes[:, jnp.asarray([0, 1, 2, 4])], cache=start).cache
    for row, length in enumerate((9, 7)):
        close((kept.k[:, row, :, :length], kept.v[:, row, :, :length]),
              (plain.k[:, row, :, :length], plain.v[:, row, :, :length]))


def test_unstacked_layers_are_the_same_model():
    config = VARIANTS["gemma"]
    model, params, tokens = build(config), params_of(config), tokens_of(10, 3, 14)
    close(forward(model, unstack(params), tokens).logits, forward(model, params, tokens).logits)
    (logits, cache), (other, other_cache) = (
        decode_in_pieces(model, p, tokens, (10, 13), jnp.asarray([10, 4, 7])) for p in (params, unstack(params)))
    close((logits, cache.k, cache.v), (other, other_cache.k, other_cache.v))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.04)])
def test_a_smaller_cache_is_nearly_the_same(dtype, tolerance):
    config = VARIANTS["gemma"]
    model, params, tokens = build(config), params_of(config), tokens_of(10, 3, 14)
    expected = forward(model, params, tokens).logits
    logits, cache = decode_in_pieces(model, params, tokens, (10, 11, 12, 13), jnp.full(3, 10), dtype)
    assert cache.k.dtype == cache.v.dtype == dtype
    error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
    assert 1e-6 < error < tolerance, error


def test_what_lies_beyond_the_length_is_not_seen_and_the_end_is_not_overrun():
    model, params, tokens = build(CONFIG), params_of(CONFIG), tokens_of(18, 2, 8)
    cache = forward(model, params, tokens[:, :6], cache=init_cache(CONFIG, 2, 8)).cache._replace(
        length=jnp.asarray([3, 7]))
    spoilt = cache._replace(k=cache.k.at[:, 0, :, 3:].set(jnp.nan), v=cache.v.at[:, 0, :, 3:].set(1e9))
    spoilt = spoilt._replace(k=spoilt.k.at[:, 0, :, 3:].set(1e9))
    for of in (cache, spoilt):
        out = forward(model, params, tokens[:, 6:], cache=of)
        close(out.logits[0], forward(model, params, tokens[:1][:, jnp.asarray([0, 1, 2, 6, 7])]).logits[0, 3:])
        np.testing.assert_array_equal(out.cache.k[:, 1, :, :7], of.k[:, 1, :, :7])  # the second token found no slot


MESH_CONFIG = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, d_ff=32, max_positions=256,
    qkv_bias=True, qk_norm=True)


@functools.cache
def on_one_device():
    tokens, segments = mesh_batch()
    return loss_and_grads(build(MESH_CONFIG), params_of(MESH_CONFIG), tokens, segments=segments)


def mesh_batch():
    tokens = tokens_of(11, 8, 136, vocab_size=64)
    return tokens, jnp.asarray(np.sort(np.random.default_rng(12).integers(1, 4, tokens.shape), axis=1))


@pytest.mark.parametrize("sizes", [
    {"data": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 4}, {"tensor": 2, "context": 4}, {"data": 4, "fsdp": 2},
    {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2, "context": 2},
    {"fsdp": 4, "context": 2}])
def test_eight_devices_equal_one(sizes):
    """Loss and every gradient, float32; see `close` for the tolerance."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    model, params = build(MESH_CONFIG), params_of(MESH_CONFIG)
    shardings = tree_shardings(params, PARAM_RULES, mesh)
    with jax.set_mesh(mesh):
        tokens, segments = put_batch(jax.device_get(mesh_batch()), mesh)
        f = jax.jit(jax.value_and_grad(lambda params, tokens, segments: cross_entropy(
            model, params, tokens, segments=segments), has_aux=True), out_shardings=(None, shardings),
                    compiler_options=QUICK)
        values, grads = f(jax.device_put(params, shardings), tokens, segments)
    close(jax.device_get((values, grads)), on_one_device())
    kernel = grads["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size


def test_context_sends_keys_values_and_gradients_only():
    """Neither pass gathers an activation of D or F columns over the time axis; each layer gathers keys and values."""
    config = replace(MESH_CONFIG, d_model=24, d_ff=40, max_positions=1024)
    model, mesh = build(config), make_mesh(MeshConfig(data=1, context=8))
    B, T = 2, 1024
    with jax.set_mesh(mesh):
        tokens, segments = put_batch((np.zeros((B, T), np.int32), np.ones((B, T), np.int32)), mesh)
        grad = jax.jit(jax.grad(lambda params: jnp.sum(
            model.apply(params, tokens, segments=segments, logits=False).hidden ** 2)), compiler_options=QUICK)
        text = grad.lower(params_of(config)).compile().as_text()
    sent = re.findall(r"= \(?f32\[([\d,]*)\][^=]*? (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    K, H = config.num_kv_heads, config.head_dim
    assert sent and {shape for shape, _ in sent} == {f"{B},{T},{K},{H}"}


@functools.cache
def initial(config):
    return jax.jit(build(config).init, compiler_options=QUICK)(jax.random.key(3))


def test_init_on_a_mesh_is_the_init_of_one_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, key = build(MESH_CONFIG), jax.random.key(3)
    shardings = tree_shardings(jax.eval_shape(model.init, key), PARAM_RULES, mesh)
    with jax.set_mesh(mesh):
        sharded = jax.jit(model.init, out_shardings=shardings, compiler_options=QUICK)(key)
    close(jax.device_get(sharded), initial(MESH_CONFIG), tolerance=1e-7)


def test_init_is_as_documented():
    params = named_leaves(initial(MESH_CONFIG))
    for name, leaf in params.items():
        if name.endswith(("kernel", "embedding")):
            values, bound = np.asarray(leaf) / MESH_CONFIG.init_std, 4 / math.sqrt(leaf.size)  # four standard errors
            assert abs(values.mean()) < bound and abs(values.std() - 1) < bound / math.sqrt(2), name
        else:
            assert np.all(np.asarray(leaf) == (0.0 if name.endswith("bias") else 1.0)), name
    layers = np.asarray(params["layers/mlp/up/kernel"])
    assert not np.any(layers[0] == layers[1])  # every layer has its own key
    gemma = named_leaves(initial(GEMMA))
    assert not np.any(gemma["final_norm/scale"]) and "head/kernel" not in gemma


@pytest.mark.parametrize("name", ["windowed qwen3", "gemma"])
def test_bfloat16_is_close_to_float32(name):
    """The yardstick is what rounding nothing but the parameters does to the float32 model."""
    params, tokens = params_of(VARIANTS[name]), tokens_of(13, 2, 9)
    exact, model = build(VARIANTS[name]), build(VARIANTS[name], ComputeConfig(dtype="bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    actual, expected, yardstick = (named_leaves(f) for f in (
        loss_and_grads(model, params, tokens), loss_and_grads(exact, params, tokens),
        loss_and_grads(exact, rounded, tokens)))
    for path in expected:
        assert actual[path].dtype == jnp.float32
        if path != "0/0":  # one number may agree by chance
            error, limit = (np.linalg.norm(x[path] - expected[path]) for x in (actual, yardstick))
            assert error < 3 * limit, path
    assert jax.eval_shape(model.apply, params, tokens).hidden.dtype == jnp.bfloat16


def test_gradients_over_many_tokens_are_summed_in_float32():
    """A bfloat16 sum of thousands of near equal terms stops growing at 256 of them."""
    config = replace(CONFIG, num_layers=1, qkv_bias=True)
    params, tokens = params_of(config), jnp.full((128, 32), 7, jnp.int32)

    def grads(dtype):
        model = build(config, ComputeConfig(dtype=dtype))
        total = lambda params: jnp.sum(model.apply(params, tokens).logits[..., 0])
        return named_leaves(jax.jit(jax.grad(total))(params))

    exact, actual = grads("float32"), grads("bfloat16")
    for path in ("layers/attention/value/bias", "layers/attention_norm/scale", "layers/mlp_norm/scale",
                 "final_norm/scale"):
        assert np.linalg.norm(actual[path] - exact[path]) / np.linalg.norm(exact[path]) < 0.02, path
    rows = (tree["embed/embedding"][7] for tree in (exact, actual))
    assert np.linalg.norm(np.subtract(*rows)) / np.linalg.norm(exact["embed/embedding"][7]) < 0.02


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_logits_are_hidden_times_head(name):
    model, params, tokens = build(VARIANTS[name]), params_of(VARIANTS[name]), tokens_of(14, 2, 11)
    out = jax.jit(functools.partial(model.apply, logits=False))(params, tokens)
    assert out.logits is None and model.head(params).shape == (CONFIG.d_model, CONFIG.vocab_size)
    close([out.hidden @ model.head(params)], [forward(model, params, tokens).logits])


def test_models_are_static_arguments():
    assert build(CONFIG) == build(replace(CONFIG)) and hash(build(CONFIG)) == hash(build(replace(CONFIG)))
    assert build(CONFIG) != build(CONFIG, ComputeConfig(remat="full"))


def test_names_equal_the_config():
    assert set(REMAT_POLICIES) == set(get_args(RematPolicy))
    assert set(ACTIVATIONS) == set(get_args(Activation))


def test_a_chosen_backend_is_kept():
    model = build(CONFIG, ComputeConfig(attention="splash"))
    with pytest.raises(ValueError, match="attention backend 'splash' runs on TPU, not on cpu"):
        model.apply(params_of(CONFIG), tokens_of(15, 1, 4))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"tokens": jnp.zeros(4, jnp.int32)}, r"tokens must be integers \[B, T\], got int32 of shape \(4,\)"),
    ({"tokens": jnp.zeros((1, 4))}, r"tokens must be integers \[B, T\], got float32 of shape \(1, 4\)"),
    ({"positions": jnp.zeros((1, 4), jnp.int32)}, r"positions must be integers of the tokens' shape \(2, 4\)"),
    ({"segments": jnp.ones((2, 3), jnp.int32)}, r"segments must be integers of the tokens' shape \(2, 4\)"),
    ({"segments": jnp.ones((2, 4))}, "segments must be integers .* got float32"),
    ({"tokens": jnp.zeros((1, 65), jnp.int32)}, "65 tokens are more than max_positions 64: .* give positions"),
    ({"cache": init_cache(replace(CONFIG, num_layers=2), 2, 8)}, r"the cache has .* \(2, 2, 6\), this model"),
    ({"cache": init_cache(CONFIG, 2, 8), "segments": jnp.ones((2, 4), jnp.int32)}, "leave positions and segments None"),
    ({"cache": init_cache(CONFIG, 2, 8), "tree": jnp.ones((2, 4, 3), bool)}, r"tree must be \[B, T, T\]"),
    ({"tree": jnp.ones((2, 4, 4), bool)}, "a tree of tokens needs a cache"),
    ({"cache": init_cache(CONFIG, 3, 8)}, "2 rows of 4 tokens do not fit a cache of 3 rows and 8 slots"),
    ({"cache": init_cache(CONFIG, 2, 3)}, "2 rows of 4 tokens do not fit a cache of 2 rows and 3 slots"),
])
def test_wrong_inputs(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIG).apply(params_of(CONFIG), **{"tokens": jnp.zeros((2, 4), jnp.int32), **arguments})


def test_positions_may_go_beyond_the_context():
    tokens = jnp.zeros((1, 65), jnp.int32)
    out = forward(build(CONFIG), params_of(CONFIG), tokens, positions=jnp.arange(65)[None])
    assert np.all(np.isfinite(out.logits))

