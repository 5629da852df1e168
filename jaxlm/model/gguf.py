"""GGUF files of the llama architecture: weights, dequantized, and the byte-level tokenizer they carry.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs the extra `gguf`, whose package reads and dequantizes.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.core.extras import extra
from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.hf import TRANSFORMS, Put, Shape, fill, find_problems, leaf_shapes, raise_problems, slots
from jaxlm.model.layers import rope_frequencies

# Our path -> (name in the file, transform); shapes as in Hugging Face files.
TENSORS = {
    "embed/embedding": ("token_embd.weight", "same"),
    "layers/attention_norm/scale": ("blk.{layer}.attn_norm.weight", "same"),
    "layers/attention/query/kernel": ("blk.{layer}.attn_q.weight", "linear_pairs"),
    "layers/attention/key/kernel": ("blk.{layer}.attn_k.weight", "linear_pairs"),
    "layers/attention/value/kernel": ("blk.{layer}.attn_v.weight", "linear"),
    "layers/attention/out/kernel": ("blk.{layer}.attn_output.weight", "linear_heads"),
    "layers/mlp_norm/scale": ("blk.{layer}.ffn_norm.weight", "same"),
    "layers/mlp/gate/kernel": ("blk.{layer}.ffn_gate.weight", "linear"),
    "layers/mlp/up/kernel": ("blk.{layer}.ffn_up.weight", "linear"),
    "layers/mlp/down/kernel": ("blk.{layer}.ffn_down.weight", "linear"),
    "final_norm/scale": ("output_norm.weight", "same"),
    "head/kernel": ("output.weight", "linear"),
}
ROPE_FACTORS = "rope_freqs.weight"

# Metadata below `llama.` -> field of ModelConfig.
FIELDS = {
    "embedding_length": "d_model", "block_count": "num_layers", "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads", "attention.key_length": "head_dim", "feed_forward_length": "d_ff",
    "context_length": "max_positions", "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
# More metadata, with the value that leaves the function as it is.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0}
ROPE_KEYS = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
             "rope.scaling.finetuned", "rope.dimension_count", "attention.value_length")

# llama.cpp's name of a pre-tokenizer -> the splits before byte-level BPE, as `tokenizer.json` states them.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}
CONTROL, USER_DEFINED = 3, 4  # token types
# Keyword of `jaxlm.data.tokenizer.JsonTokenizer` -> metadata below `tokenizer.ggml.`.
SPECIAL_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}


def load_gguf(
    path: Path | str, *, dtype: Any = jnp.float32, put: Put | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """A GGUF file of the llama architecture as configuration and parameters; `dtype` and `put` as in `load_hf`.

    Every quantization that the gguf package can undo is read. Queries and keys are stored with the two channels of a
    rotary pair side by side; here they lie H/2 apart. Without `output.weight` the embedding is tied. Raises one
    ValueError with all settings that are not supported, or one with all tensors that do not fit.
    """
    package, reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    unread = _unread_formats(package, reader.tensors)

    def read(name: str) -> np.ndarray:
        return package.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(shapes[name])

    factors = read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None
    config = _config(path, _llama_metadata(reader), shapes, factors)
    transforms = {**TRANSFORMS, "linear_pairs": TRANSFORMS["linear"]._replace(load=_load_pairs)}
    plan = slots(leaf_shapes(config), TENSORS, transforms)
    raise_problems(find_problems(plan, shapes, [ROPE_FACTORS]) + unread, path)
    return config, fill(plan, read, dtype, put)


def gguf_tokenizer_json(path: Path | str) -> str:
    """The byte-level BPE tokenizer of a GGUF file, as the text of a `tokenizer.json`.

    Raises ValueError for other kinds of tokenizer, for a pre-tokenizer that is not in `PRE_TOKENIZERS`, and for files
    whose tokenizer adds tokens of its own.
    """
    metadata = _metadata(_open(path)[1], "tokenizer.ggml.")
    kind, pre = metadata.get("model"), metadata.get("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only 'gpt2' with "
                         f"{', '.join(PRE_TOKENIZERS)}")
    if any(metadata.get(name) for name in ("add_bos_token", "add_eos_token", "add_space_prefix")):
        raise ValueError(f"{path}: a tokenizer that adds tokens or spaces of its own is not supported")
    if missing := [name for name in ("tokens", "token_type", "merges") if name not in metadata]:
        raise ValueError(f"{path}: {', '.join(missing)} are missing from its tokenizer")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(metadata["tokens"], metadata["token_type"], strict=True))
             if kind in (CONTROL, USER_DEFINED)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": {token: i for i, token in enumerate(metadata["tokens"])}, "merges": metadata["merges"]}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                       "normalizer": None, "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": None,
                       "decoder": BYTE_LEVEL, "model": model}, ensure_ascii=False)


def gguf_special_tokens(path: Path | str) -> dict[str, str]:
    """The names of `bos`, `eos` and `pad` that a GGUF file states, without those that it does not state.

    Raises ValueError for an id outside its vocabulary.
    """
    metadata = _metadata(_open(path)[1], "tokenizer.ggml.")
    tokens = metadata.get("tokens", [])
    ids = {kind: metadata[name] for kind, name in SPECIAL_TOKENS.items() if name in metadata}
    for kind, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ValueError(f"{path}: {SPECIAL_TOKENS[kind]}={i} is outside its vocabulary of {len(tokens)} tokens")
    return {kind: tokens[i] for kind, i in ids.items()}


def gguf_chat_template(path: Path | str) -> str | None:
    """The chat template (Jinja) that a GGUF file states, if it does."""
    field = _open(path)[1].fields.get("tokenizer.chat_template")
    return field.contents() if field else None


def _open(path: Path | str) -> tuple[ModuleType, Any]:
    gguf = extra("gguf", "gguf")
    try:
        return gguf, gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from None


def _metadata(reader: Any, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): field.contents() for name, field in reader.fields.items()
            if name.startswith(prefix)}


def _llama_metadata(reader: Any) -> dict[str, Any]:
    architecture = reader.fields.get("general.architecture")
    name = architecture.contents() if architecture else None
    if name != "llama":
        raise ValueError(f"GGUF architecture {name!r} is not supported, only 'llama'")
    return _metadata(reader, "llama.")


def _unread_formats(package: ModuleType, tensors: list[Any]) -> list[str]:
    """Tensors whose number format the package knows by name only: found out on one row of each format."""
    unread = set()
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            package.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            unread.add(kind)
    return [f"number format {tensor.tensor_type.name} is not read: {tensor.name}" for tensor in tensors
            if tensor.tensor_type in unread]


def _config(path: Path | str, metadata: dict[str, Any], shapes: dict[str, Shape],
            factors: np.ndarray | None) -> ModelConfig:
    values = {"attention.head_count_kv": metadata.get("attention.head_count"), "rope.freq_base": 10_000.0,
              "vocab_size": shapes.get(TENSORS["embed/embedding"][0], (None,))[0], **metadata}
    width, heads = values.get("embedding_length"), values.get("attention.head_count")
    if type(width) is int and type(heads) is int and heads > 0:
        values.setdefault("attention.key_length", width // heads)
    # The shortest decimal that names the float32 of the file: 1e-05, not 9.999999747378752e-06.
    values |= {name: float(str(np.float32(values[name]))) for name in FLOATS if name in values}
    problems = [f"{name} is missing" for name in FIELDS if values.get(name) is None]
    problems += [f"{name}={values[name]!r} differs by layer" for name in FIELDS if type(values.get(name)) is list]
    problems += [f"unknown field {name}={value!r}" for name, value in metadata.items()
                 if name not in FIELDS and name not in NEUTRAL and name not in ROPE_KEYS]
    problems += [f"{name}={metadata[name]!r} is not supported" for name, neutral in NEUTRAL.items()
                 if metadata.get(name, neutral) != neutral]
    for name in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(name, values.get("attention.key_length")) != values.get("attention.key_length"):
            problems.append(f"{name}={metadata[name]!r} differs from the head dimension")
    if not problems:
        fields = {ours: values[name] for name, ours in FIELDS.items()}
        try:
            return ModelConfig(**fields, rope_scaling=_rope_scaling(values, factors),
                               tie_embeddings=TENSORS["head/kernel"][0] not in shapes)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError(f"{path}: {len(problems)} problem(s) in the metadata: " + "; ".join(problems))


def _rope_scaling(values: dict[str, Any], factors: np.ndarray | None) -> RopeScaling | None:
    kind = values.get("rope.scaling.type", "none")
    if kind == "linear" and factors is None and "rope.scaling.factor" in values:
        return RopeScaling(kind="linear", factor=values["rope.scaling.factor"])
    if kind != "none":
        raise ValueError(f"rope scaling {kind!r} is not supported, or incomplete")
    if factors is None:
        return None
    # A file holds the divisors of Llama 3's frequencies, not the settings they came from.
    head_dim, theta = values["attention.key_length"], values["rope.freq_base"]
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()))
    if not np.allclose(rope_frequencies(head_dim, theta, None) / factors,
                       rope_frequencies(head_dim, theta, scaling), rtol=1e-5, atol=0):
        raise ValueError(f"{ROPE_FACTORS} does not follow Llama 3.1's rule")
    return scaling


def _load_pairs(stored: np.ndarray, shape: Shape) -> np.ndarray:
    """[N*H, D] with row 2i+j of a head for channel i+j*H/2, to [D, N, H]."""
    _, heads, head_dim = shape
    halves = stored.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2)
    return TRANSFORMS["linear"].load(halves.reshape(stored.shape), shape)
