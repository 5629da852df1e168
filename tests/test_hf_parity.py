"""Logits of imported and exported models against transformers, float32, one tolerance for all."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxlm.core.tree import named_leaves
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.model.hf_config import ARCHITECTURES, from_hf_config, load_config, to_hf_config
from jaxlm.model.layers import rope_frequencies
from jaxlm.model.presets import MODELS as PRESETS
from tests.reference import (
    KORMO_NORMS,
    MODELS,
    build_reference,
    change_config,
    reference_logits,
    rename_norms,
    save_reference,
    torch,
    transformers,
)

ATOL = 1e-5
T = 12
PACKED = (3, 7, 2)  # lengths of the documents in one row


@partial(jax.jit, static_argnums=0)
def our_logits(model, params, tokens, segments=None, positions=None):
    return model.apply(params, tokens, segments=segments, positions=positions).logits


def rows(seed: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments, positions [4, T]: a plain row, 5 pads on the left, 4 on the right, three documents."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (4, T)).astype(np.int32)
    segments, positions = np.ones((4, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (4, 1))
    segments[1, :5] = segments[2, -4:] = 0
    positions[1] = np.maximum(np.arange(T) - 5, 0)
    segments[3] = np.repeat([1, 2, 3], PACKED)
    positions[3] = np.concatenate([np.arange(n) for n in PACKED])
    return tokens, segments, positions


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_in_both_directions(name, tmp_path, record_property):
    reference = build_reference(name)
    config, params = load_hf(save_reference(reference, name, tmp_path / "theirs"))
    model = build(config)
    tokens, segments, positions = rows(1, config.vocab_size)

    plain = reference_logits(reference, tokens)
    assert plain.std() > 0.5, "logits near zero would agree by themselves"
    errors = [np.abs(our_logits(model, params, tokens) - plain).max()]
    ours = np.asarray(our_logits(model, params, tokens, segments, positions))
    theirs = reference_logits(reference, tokens[:3], segments[:3], positions[:3])
    errors.append(np.abs(ours[:3] - theirs)[segments[:3] > 0].max())
    for start, length in zip(np.cumsum((0, *PACKED)), PACKED, strict=False):
        alone = reference_logits(reference, tokens[3:, start:start + length])[0]
        errors.append(np.abs(ours[3, start:start + length] - alone).max())
    record_property("max_abs_error", float(max(errors)))
    print(f"{name}: max abs error {max(errors):.2e}, logits std {plain.std():.2f}")
    np.testing.assert_array_less(errors, ATOL)

    check_export(name, reference, config, params, tmp_path / "ours", tokens, plain)


def check_export(name, reference, config, params, folder, tokens, plain):
    save_hf(folder, config, params, architecture=MODELS[name][0])
    if MODELS[name][0] == "kormo":
        rename_norms(folder, {new: old for old, new in KORMO_NORMS.items()})
        change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    state, expected = exported.state_dict(), reference.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    np.testing.assert_array_equal(reference_logits(exported, tokens), plain)


@pytest.mark.parametrize("name", ["llama_rope_linear", "llama_rope_llama3"])
def test_positions_beyond_the_original_context_agree(name, tmp_path):
    reference = build_reference(name)
    config, params = load_hf(save_reference(reference, name, tmp_path))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, 100)).astype(np.int32)
    theirs = reference_logits(reference, tokens)
    np.testing.assert_allclose(our_logits(build(config), params, tokens), theirs, rtol=0, atol=ATOL)
    plain = build(replace(config, rope_scaling=None))
    assert np.abs(our_logits(plain, params, tokens) - theirs).max() > 0.1, "the scaling must matter here"


@pytest.mark.parametrize("preset, architecture", [("llama3_1_8b", "llama"), ("llama3_2_1b", "llama"),
                                                  ("kormo_10b", "llama"), ("qwen3_0_6b", "qwen3")])
def test_rotary_frequencies_of_published_models_agree(preset, architecture):
    config = PRESETS[preset]
    values = to_hf_config(config, architecture)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values))
    ours = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(ours, module.inv_freq.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "kormo"])
def test_absent_fields_mean_what_they_mean_in_transformers(architecture):
    config = transformers.AutoConfig.for_model(architecture)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size",
                                                      "num_hidden_layers", "num_attention_heads")}
    assert from_hf_config({"model_type": architecture, **sizes}) == from_hf_config(config.to_dict())


def test_bfloat16_and_shards_of_transformers_are_read_exactly(tmp_path):
    reference = build_reference("qwen2_window").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    config, params = load_hf(tmp_path / "theirs", dtype="bfloat16")
    kernels = np.stack([layer.mlp.up_proj.weight.T.float().detach().numpy() for layer in reference.model.layers])
    assert named_leaves(params)["layers/mlp/up/kernel"].dtype == "bfloat16"
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"].astype(np.float32), kernels)

    save_hf(tmp_path / "ours", config, params, architecture="qwen2", dtype="bfloat16", max_shard_bytes=4000,
            token_ids={"eos_token_id": 3})
    assert load_config(tmp_path / "ours") == config
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert exported.dtype == torch.bfloat16 and exported.generation_config.eos_token_id == 3
    expected = reference.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in exported.state_dict().items())
