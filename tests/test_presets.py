"""Presets: their exact parameter counts, their shardings, their arithmetic."""

import re
from dataclasses import replace

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxlm.core.mesh import AXES, tree_shardings
from jaxlm.core.tree import count_parameters, named_leaves
from jaxlm.model.config import ComputeConfig, ModelConfig, RopeScaling, flops_per_token, num_parameters
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS

# As published with the weights; `tiny` and `base` are this project's own, counted by hand.
PARAMETERS = {
    "kormo_10b": 10_756_624_384,
    "kormo_1b": 16 * (2048 * 6144 + 3 * 2048 * 6144 + 2 * 2048) + 2048 + 2 * 125_184 * 2048,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "gemma_2b": 2_506_172_416,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "tiny": 4 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 384 + 2 * 128) + 128 + 2 * 2048 * 128,
    "base": 8 * (384 * (2 * 384 + 2 * 128) + 3 * 384 * 1024 + 2 * 384) + 384 + 2 * 16_384 * 384,
}
SMALL = ModelConfig(
    vocab_size=10, d_model=4, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=8, max_positions=100)


def abstract_params(config):
    return jax.eval_shape(build(config).init, jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    params = abstract_params(MODELS[name])
    assert count_parameters(params) == num_parameters(MODELS[name]) == PARAMETERS[name]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_kormo_1b_is_the_published_proxy():
    assert PARAMETERS["kormo_1b"] == 1_318_127_616  # 1.318B: 805.4M and 512.8M of embedding and head


@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True},
    {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True, "norm_offset": 1.0, "num_kv_heads": 1},
])
def test_parameter_count_of_features(change):
    config = replace(SMALL, **change)
    assert count_parameters(abstract_params(config)) == num_parameters(config)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_sharding(name):
    config = MODELS[name]
    tensor = 2 if config.num_kv_heads % 2 == 0 else 1
    mesh = AbstractMesh((2, 4 // tensor, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 4)
    params = abstract_params(config)
    for path, sharding in named_leaves(tree_shardings(params, PARAM_RULES, mesh)).items():
        shape = named_leaves(params)[path].shape
        assert len(sharding.spec) <= len(shape)
        if path.startswith("layers/"):
            assert not sharding.spec or sharding.spec[0] is None  # the scan slices the layer axis
        if not path.endswith(("scale", "bias")):
            assert {"fsdp", "tensor"} <= set(sharding.spec), path


def test_every_rule_matches_one_kind_of_parameter():
    names = {name for config in MODELS.values() for name in named_leaves(abstract_params(config))}
    assert all(any(re.search(pattern, name) for name in names) for pattern, _ in PARAM_RULES)
    assert all(sum(bool(re.search(pattern, name)) for pattern, _ in PARAM_RULES) == 1 for name in names)


def test_optimizer_moments_are_split_like_their_parameters():
    mesh = AbstractMesh((2, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    params = abstract_params(MODELS["tiny"])
    moments = tree_shardings({"opt_state": {"mu": params}}, PARAM_RULES, mesh)
    assert moments["opt_state"]["mu"] == tree_shardings(params, PARAM_RULES, mesh)


def test_flops_by_hand():
    # A layer multiplies 4 x 24 queries, 2 x (4 x 12) keys and values, 24 x 4 outputs and 3 x (4 x 8) of the MLP,
    # and scales twice 4; then 4 of the last norm and 4 x 10 logits.
    matmul = 2 * (96 + 96 + 96 + 96 + 8) + 4 + 40
    # Of T=5: 4 heads x 6 channels against 2.5 keys on average, for scores and values, 2 FLOPs each, and 2 layers.
    attention = 2 * (2 * 2 * 4 * 6 * 2.5)
    assert flops_per_token(SMALL, 5) == 3 * (2 * matmul + attention)
    tied = replace(SMALL, tie_embeddings=True)
    assert flops_per_token(tied, 5) == flops_per_token(SMALL, 5)  # the same products
    # Window 2 of T=5: triangle of the first 2, then 2 a query: (2 * 2 / 2 + 3 * 2) / 5 keys on average.
    windowed = 2 * (2 * 2 * 4 * 6 * (2 + 6) / 5)
    assert flops_per_token(replace(SMALL, window=2), 5) == pytest.approx(3 * (2 * matmul + windowed))
    assert flops_per_token(replace(SMALL, window=9), 5) == flops_per_token(SMALL, 5)


def test_flops_of_a_published_model():
    # 6 N dominates: attention adds 12 L N H T/2 = 12 * 32 * 4096 * 1024 to 6 * (6.738e9 - 0.131e9).
    assert flops_per_token(MODELS["llama2_7b"], 2048) == 6 * (6_738_415_616 - 32_000 * 4096) + 12 * 32 * 4096 * 1024


@pytest.mark.parametrize(("change", "message"), [
    ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ({"d_model": -4}, "d_model must be positive, got -4"),
    ({"rope_theta": 0.0}, "rope_theta must be positive"),
    ({"init_std": 0.0}, "init_std must be positive"),
    ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
    ({"window": 0}, "window must be positive or None, got 0"),
])
def test_impossible_models(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(("change", "message"), [
    ({"factor": 0.5}, "rope scaling factor must be at least 1, got 0.5"),
    ({"low_freq_factor": 4.0}, "needs 0 < low_freq_factor < high_freq_factor, got 4.0 and 4.0"),
    ({"original_max_positions": 0}, "original_max_positions must be positive, got 0"),
])
def test_impossible_rope_scaling(change, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 8.0, **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"scan_unroll": 0}, "scan_unroll must be positive, got 0"),
    ({"query_chunk": 0}, "query_chunk must be positive or None, got 0"),
    ({"query_chunk": 64, "attention": "cudnn"}, "query_chunk has no effect on cudnn attention"),
])
def test_impossible_compute(change, message):
    with pytest.raises(ValueError, match=message):
        ComputeConfig(**change)
