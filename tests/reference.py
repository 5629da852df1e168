"""Tiny random models of transformers, built in the test: the reference of the parity tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="the parity tests compare with torch: pip install jaxlm[parity]")
transformers = pytest.importorskip("transformers", reason="the parity tests need pip install jaxlm[parity]")

# Two layers, and no two sizes equal, so that a transposed or misnamed tensor cannot fit by chance.
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
# Wavelengths on both sides of the blend: with H=12 and theta 100 they run from 6 to 290 positions.
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name -> (model_type, settings over SIZES)
MODELS = {
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_gqa_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_mqa_head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-3}),
    "llama_rope_linear": ("llama", {"rope_parameters": ROPE_LINEAR}),
    "llama_rope_llama3": ("llama", {"rope_parameters": ROPE_LLAMA3, "head_dim": 12}),
    "smollm2": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}),
    "mistral_window": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "mistral_wide_window": ("mistral", {"sliding_window": 100}),
    "mistral_no_window": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    "qwen3_gqa": ("qwen3", {"head_dim": 16}),
    "qwen3_mha_tied": ("qwen3", {"head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma_mqa": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma_mha": ("gemma", {"num_key_value_heads": 4, "head_dim": 6}),
    "kormo": ("kormo", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-5}),
}
KORMO_NORMS = {"input_layernorm": "pre_attention_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}


def build_reference(name: str, seed: int = 1) -> "transformers.PreTrainedModel":
    """A float32 model with weights large enough that every part of it shows in the logits. KORMo: its Llama twin.

    Embeddings enter the residual stream near 1, which keeps it from cancelling: a token whose stream nearly vanishes
    magnifies rounding a hundredfold at the next norm, in both libraries.
    """
    model_type, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(
        "llama" if model_type == "kormo" else model_type, **{**SIZES, **settings}, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gemma = model_type == "gemma"  # scales its embeddings, and stores norms less 1
            centre = 1.0 if path.endswith("norm.weight") and not gemma else 0.0
            spread = 1.0 if "embed_tokens" in path and not gemma else 0.2
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))
        if config.tie_word_embeddings and not gemma:
            model.model.norm.weight *= 0.2  # for logits near 1 here too
    return model


def save_reference(model: "transformers.PreTrainedModel", name: str, folder: Path, **kwargs) -> Path:
    """`save_pretrained`, and for KORMo the renaming that its own class would have written."""
    model.save_pretrained(folder, **kwargs)
    if MODELS[name][0] == "kormo":
        rename_norms(folder, KORMO_NORMS)
        change_config(folder, model_type="kormo", architectures=["KORMoForCausalLM"])
    return folder


def rename_norms(folder: Path, names: dict[str, str]) -> None:
    """Renames tensors of a one-file checkpoint."""
    file = folder / "model.safetensors"
    renamed = {}
    for name, array in load_file(file).items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = array
    save_file(renamed, file, metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    """Sets fields of `config.json`; an ellipsis removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def reference_logits(model: "transformers.PreTrainedModel", tokens, mask=None, positions=None) -> np.ndarray:
    """Logits [B, T, V] for tokens, mask (1 is a token) and positions [B, T]."""
    def tensor(x):
        return None if x is None else torch.tensor(np.asarray(x, np.int64))

    with torch.no_grad():
        return model(input_ids=tensor(tokens), attention_mask=tensor(mask), position_ids=tensor(positions),
                     use_cache=False).logits.numpy()
