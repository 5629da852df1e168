"""int8 weights: each within half a step, the model within rounding, on one device and on a mesh."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch, tree_shardings
from jaxlm.core.tree import named_leaves
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.model.cache import init_cache
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.quantize import Quantized, dequantize, quantize, quantize_leaf
from jaxlm.train.pretrained import Pretrained
from tools import check_quantized

# Every size differs from its neighbours; the widths are large enough for a row of errors to average.
CONFIG = ModelConfig(vocab_size=192, d_model=80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24, d_ff=112,
                     max_positions=64, qkv_bias=True, qk_norm=True)
TIED = replace(CONFIG, tie_embeddings=True, qkv_bias=False, norm_offset=1.0, scale_embeddings=True)
CONFIGS = {"head": CONFIG, "tied": TIED}


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    init = jax.eval_shape(build(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.1 + (path[-1].key == "scale"), jnp.float32), init)


def tokens_of(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, shape), jnp.int32)


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens, **arguments):
    return model.apply(params, tokens, **arguments).logits


def quantized_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves if isinstance(leaf, Quantized)}


def inputs_of(path):
    """The axes of a weight that its product sums over."""
    if path == "embed/embedding":
        return (1,)
    if path == "head/kernel":
        return (0,)
    return (1, 2) if path.endswith("out/kernel") else (1,)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_moves_by_half_a_step_at_most(name):
    params = params_of(CONFIGS[name])
    tree = jax.jit(quantize)(params)
    leaves, floats, restored = quantized_leaves(tree), named_leaves(params), named_leaves(dequantize(tree))
    assert set(leaves) == {path for path in floats if path.endswith(("kernel", "embedding"))}
    assert restored.keys() == floats.keys()
    for path, w in floats.items():
        if path not in leaves:
            np.testing.assert_array_equal(restored[path], w)
            continue
        leaf, axes = leaves[path], inputs_of(path)
        assert leaf.numbers.dtype == jnp.int8 and leaf.numbers.shape == w.shape and leaf.scale.dtype == jnp.float32
        np.testing.assert_allclose(leaf.scale, np.abs(w).max(axis=axes) / 127, rtol=1e-6, err_msg=path)
        assert np.all(np.abs(leaf.numbers).max(axis=axes) == 127), path
        steps = np.abs(w - restored[path]) / np.expand_dims(leaf.scale, axes)
        assert 0.49 < steps.max() <= 0.5001, path


def test_what_is_restored_rounds_to_itself():
    tree = quantize(params_of(CONFIG))
    again = quantize(dequantize(tree))
    for path, leaf in quantized_leaves(tree).items():
        np.testing.assert_array_equal(quantized_leaves(again)[path].numbers, leaf.numbers, err_msg=path)


def test_a_channel_of_zeros_stays_one():
    leaf = quantize_leaf("head/kernel", np.zeros((4, 3), np.float32))
    assert not np.any(leaf.numbers) and not np.any(leaf.scale)


def test_a_quarter_of_the_bytes():
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert 0.25 < size(quantize(params_of(CONFIG))) / size(params_of(CONFIG)) < 0.27


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_with_the_restored_weights(name, cached):
    """Exactly: only the order of the factors differs."""
    config = CONFIGS[name]
    model, tree, tokens = build(config), quantize(params_of(config)), tokens_of(2, 9)
    arguments = {"cache": init_cache(config, 2, 12)} if cached else {}
    actual = logits_of(model, tree, tokens, **arguments)
    expected = logits_of(model, dequantize(tree), tokens, **arguments)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=2e-5 * float(jnp.abs(expected).max()), rtol=0)
    np.testing.assert_allclose(model.head(tree), model.head(dequantize(tree)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_error_is_that_of_noise_of_half_a_step(name):
    """The yardstick: every weight moved by a random amount, uniform between -scale / 2 and scale / 2."""
    config, rng = CONFIGS[name], np.random.default_rng(2)
    model, params, tokens = build(config), params_of(config), tokens_of(4, 16)
    tree = quantize(params)
    exact = logits_of(model, params, tokens)
    error = jnp.sqrt(jnp.mean((logits_of(model, tree, tokens) - exact) ** 2))

    def move(path, w):
        path = "/".join(entry.key for entry in path)
        if path not in quantized_leaves(tree):
            return w
        scale = np.expand_dims(quantized_leaves(tree)[path].scale, inputs_of(path))
        return w + scale * rng.uniform(-0.5, 0.5, w.shape).astype(np.float32)

    noisy = logits_of(model, jax.tree_util.tree_map_with_path(move, params), tokens)
    yardstick = jnp.sqrt(jnp.mean((noisy - exact) ** 2))
    assert 0.7 < error / yardstick < 1.4


def test_bfloat16_activations_do_not_round_the_numbers():
    """So that the restored weights are met at least as well as float32 weights, which bfloat16 does round."""
    model, exact = build(CONFIG, ComputeConfig(dtype="bfloat16")), build(CONFIG)
    params, tokens = params_of(CONFIG), tokens_of(4, 16)
    tree = quantize(params)
    error = jnp.std(logits_of(model, tree, tokens) - logits_of(exact, dequantize(tree), tokens))
    yardstick = jnp.std(logits_of(model, params, tokens) - logits_of(exact, params, tokens))
    assert 0 < error < yardstick


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_computes_the_same(name):
    config = CONFIGS[name]
    model, tree, tokens = build(config), quantize(params_of(config)), tokens_of(8, 16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(tree, PARAM_RULES, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tree, shardings)
        actual = jax.device_get(logits_of(model, placed, put_batch(np.asarray(tokens), mesh)))
    up = placed["layers"]["mlp"]["up"]["kernel"]
    assert up.numbers.addressable_shards[0].data.size * 4 == up.numbers.size
    assert up.scale.addressable_shards[0].data.size == up.scale.size
    expected = logits_of(model, tree, tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * float(jnp.abs(expected).max()), rtol=0)


def test_loading_leaf_by_leaf_is_quantizing_the_tree(tmp_path):
    config = replace(CONFIG, qk_norm=False)
    save_hf(tmp_path / "model", config, params_of(config), architecture="qwen2")
    loaded = load_hf(tmp_path / "model", put=quantize_leaf)[1]
    expected = quantize(params_of(config))
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_there_is_no_gradient():
    """Neither for the weights nor through them, and never a silent zero."""
    model, tree, tokens = build(TIED), quantize(params_of(TIED)), tokens_of(1, 4)
    loss = lambda params: jnp.sum(model.apply(params, tokens).logits)
    with pytest.raises(TypeError, match="got int8"):
        jax.grad(loss)(tree)
    with pytest.raises(ValueError, match="quantized weights are for inference and have no gradient"):
        jax.grad(loss, allow_int=True)(tree)
    norm = tree["final_norm"]["scale"]
    with pytest.raises(ValueError, match="quantized weights are for inference and have no gradient"):
        jax.jit(jax.grad(lambda scale: loss({**tree, "final_norm": {"scale": scale}})))(norm)


def test_unknown_names_and_a_second_time():
    with pytest.raises(ValueError, match="parameter 'layers/mlp/gote/kernel' is not one that can be quantized; known"):
        quantize({"layers": {"mlp": {"gote": {"kernel": jnp.zeros((2, 3, 4))}}}})
    with pytest.raises(ValueError, match="parameter 'head/kernel' is quantized already"):
        quantize({"head": {"kernel": quantize_leaf("head/kernel", np.ones((2, 2)))}})
    with pytest.raises(ValueError, match="parameter 'lora/a' is not one that can be quantized"):
        quantize({"lora": {"a": jnp.zeros(3)}})
    paths = quantized_leaves(quantize(params_of(CONFIG)))
    assert all(any(path.endswith(name) for path in paths) for name in ("embedding", "out/kernel", "head/kernel"))


def test_the_check_prints_one_line_a_variant(monkeypatch, capsys):
    """The reference is exact, and what is rounded differs a little."""
    config = ModelConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=48,
                         max_positions=64, init_std=0.2)
    loaded = Pretrained(config, build(config).init(jax.random.key(0)), ByteTokenizer(), ())
    monkeypatch.setattr(check_quantized, "load_pretrained", lambda source: loaded)
    check_quantized.main(["--source", "tiny", "--tokens", "200", "--batch-size", "2", "--seq-len", "32", "--piece",
                          "8", "--data.documents", "20"])
    head, _, titles, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny on sample:en: 256 tokens, 1.00 bytes each")
    cells = [dict(zip(titles.split("|"), line.split("|"), strict=True)) for line in lines]
    cells = [{name.strip(): cell.strip() for name, cell in line.items()} for line in cells]
    assert [(line["weights"], line["cache"]) for line in cells] == [
        ("float32", "float32"), ("int8", "float32"), ("float32", "bfloat16"), ("float32", "int8"), ("int8", "int8")]
    reference, *others = cells
    assert reference["difference"] == "" and float(reference["same argmax"]) == 1 and float(reference["KL"]) == 0
    assert 0.9 < float(reference["nll"]) / np.log(300) < 1.6
    for line in others:
        assert 0.9 < float(line["same argmax"]) <= 1 and 1e-8 < float(line["KL"]) < 0.01
        assert abs(float(line["difference"].split()[0])) < 0.05


@pytest.mark.parametrize(("flags", "message"), [
    (["--piece", "48"], "seq_len a multiple of piece"),
    (["--source", "nowhere"], "neither a .gguf file nor a run folder"),
])
def test_wrong_flags_of_the_check(flags, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        check_quantized.main(flags)
    assert message in capsys.readouterr().err or message in str(error.value)
