"""`config.json` of Hugging Face models, to `ModelConfig` and back.

Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5); both are written. Every field of a file is either read, known not to change the function, or an error.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.core.config import differences, nearest
from jaxlm.model.config import ModelConfig, RopeScaling


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of decoders: what its name implies, and what its configuration may leave out."""

    class_name: str
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of ModelConfig
    defaults: Mapping[str, Any]                             # of config.json; a field not named here must be present
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


_COMMON = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "rope_theta": 10_000.0, "tie_word_embeddings": False,
           "hidden_act": "silu"}

# Keyed by model_type. The defaults are those of the configuration classes in transformers; KORMo's two published
# classes disagree about theirs, so its files must state them.
ARCHITECTURES = {
    "llama": Architecture(
        class_name="LlamaForCausalLM", defaults={**_COMMON, "max_position_embeddings": 2048}),
    "mistral": Architecture(
        class_name="MistralForCausalLM",
        defaults={**_COMMON, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM", fixed={"qkv_bias": True},
        defaults={**_COMMON, "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
                  "max_window_layers": 28}),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM", fixed={"qk_norm": True},
        defaults={**_COMMON, "max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128,
                  "sliding_window": 4096, "max_window_layers": 28}),
    "gemma": Architecture(
        class_name="GemmaForCausalLM", fixed={"scale_embeddings": True, "norm_offset": 1.0},
        defaults={**_COMMON, "max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256,
                  "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "kormo": Architecture(
        class_name="KORMoForCausalLM", defaults={"hidden_act": "silu", "tie_word_embeddings": False,
                                                 "initializer_range": 0.02},
        attention_norm="pre_attention_layernorm", mlp_norm="pre_mlp_layernorm"),
}

# config.json -> (ModelConfig, type)
FIELDS = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("d_model", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_heads", int),
    "num_key_value_heads": ("num_kv_heads", int),
    "head_dim": ("head_dim", int),
    "intermediate_size": ("d_ff", int),
    "max_position_embeddings": ("max_positions", int),
    "rms_norm_eps": ("norm_eps", float),
    "tie_word_embeddings": ("tie_embeddings", bool),
    "initializer_range": ("init_std", float),
}

HIDDEN_ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
WRITTEN_ACTS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}

# Keys of the rotary settings by kind, and the field of RopeScaling each one sets.
ROPE_KINDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
               "original_max_position_embeddings": "original_max_positions"},
}

# Fields that change the function unless they have this value (or null).
NEUTRAL = {
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "hidden_dropout": 0, "attn_pdrop": 0,
    "resid_pdrop": 0, "embd_pdrop": 0, "partial_rotary_factor": 1, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "use_bidirectional_attention": False, "quantization_config": None,
    "per_layer_config": None, "rope_interleaved": False, "is_encoder_decoder": False, "add_cross_attention": False,
    "chunk_size_feed_forward": 0, "pruned_heads": {}, "use_mrope": False,
}

READ_ELSEWHERE = {"model_type", "hidden_act", "hidden_activation", "rope_theta", "rope_scaling", "rope_parameters",
                  "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}

# Names, number formats, token ids and sampling settings: they do not change logits.
HARMLESS = {
    "architectures", "auto_map", "transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype",
    "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "_attn_implementation", "attn_implementation", "_flash_attn_2_enabled",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version", "id2label", "label2id",
    "num_labels", "problem_type", "output_attentions", "output_hidden_states", "return_dict",
    "torchscript", "is_decoder", "tokenizer_class", "task_specific_params", "max_length", "min_length", "do_sample",
    "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "gradient_checkpointing",
}


def load_config(folder: Path | str, *, ignore: Collection[str] = ()) -> ModelConfig:
    """The configuration of a Hugging Face model folder; see `from_hf_config`. ValueError names the file."""
    return read_config(folder, ignore)[1]


def read_config(folder: Path | str, ignore: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """Architecture (a key of `ARCHITECTURES`) and configuration of a model folder."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("the file must hold one JSON object")
        config = from_hf_config(values, ignore=ignore)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return values["model_type"], config


def from_hf_config(values: Mapping[str, Any], *, ignore: Collection[str] = ()) -> ModelConfig:
    """The configuration that the values of a `config.json` mean.

    Args:
      ignore: fields known to the caller not to change the function of this model; they are taken for absent.

    Raises ValueError with all fields that are unknown, missing, mistyped or ask for what this package does not
    compute (biases elsewhere than in Qwen 2, softcapping, dropout, YaRN, windows in some layers only, ...).
    """
    values = {name: value for name, value in values.items() if name not in ignore}
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is not supported{nearest(str(model_type), ARCHITECTURES)}; "
                         f"supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    problems: list[str] = []
    fields = {**architecture.fixed, **_plain_fields(values, architecture.defaults, problems)}
    fields["activation"] = _activation(values, model_type, architecture.defaults, problems)
    fields["rope_theta"], fields["rope_scaling"] = _rope(values, architecture.defaults, problems)
    fields["window"] = _window(values, model_type, architecture.defaults, fields.get("num_layers") or 0, problems)
    for name, neutral in NEUTRAL.items():
        if values.get(name) not in (None, neutral):
            problems.append(f"{name}={values[name]!r} is not supported, only {neutral!r}")
    for name, value in values.items():
        if value is not None and not any(name in known for known in (FIELDS, NEUTRAL, READ_ELSEWHERE, HARMLESS)):
            problems.append(f"unknown field {name}={value!r} (name it in `ignore` if it does not change the function)")
    if not problems:
        try:
            return ModelConfig(**fields)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError(f"{len(problems)} problem(s) in a {model_type} configuration: " + "; ".join(problems))


def to_hf_config(
    config: ModelConfig, architecture: str, *, dtype: str = "float32", token_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a `config.json`, for transformers 4 and 5.

    Args:
      architecture: a key of `ARCHITECTURES`. dtype: number format of the stored weights.
      token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; null unless given, for the defaults of transformers
        would stop generation at an arbitrary token.

    Raises ValueError with every field that the architecture cannot express.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}{nearest(architecture, ARCHITECTURES)}; "
                         f"known: {', '.join(ARCHITECTURES)}")
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if unknown := set(token_ids or {}) - set(ids):
        raise ValueError(f"unknown token ids {', '.join(sorted(unknown))}; known: {', '.join(ids)}")
    rope = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = {"rope_type": scaling.kind}
        rope |= {name: getattr(scaling, ours) for name, ours in ROPE_KINDS[scaling.kind].items()}
    values = {
        "architectures": [ARCHITECTURES[architecture].class_name],
        "model_type": architecture,
        **{name: getattr(config, ours) for name, (ours, _) in FIELDS.items()},
        "hidden_act": WRITTEN_ACTS[config.activation],
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **ids, **(token_ids or {}),
    }
    values |= _family_fields(config, architecture)
    if lost := differences(config, from_hf_config(values)):
        raise ValueError(f"architecture {architecture!r} cannot express this model (asked for -> what it would mean): "
                         + "; ".join(lost))
    if architecture == "llama" and config.d_model % config.num_heads:
        raise ValueError(f"transformers refuses llama models whose hidden size {config.d_model} is not a multiple of "
                         f"{config.num_heads} heads; 'mistral' is the same function")
    return values


def _family_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    if architecture == "mistral":
        return {"sliding_window": config.window}
    if architecture in ("qwen2", "qwen3"):
        slides = config.window is not None
        return {"use_sliding_window": slides, "sliding_window": config.window,
                "max_window_layers": 0 if slides else config.num_layers,
                "layer_types": ["sliding_attention" if slides else "full_attention"] * config.num_layers}
    if architecture == "gemma":
        return {"attention_bias": False, "hidden_activation": WRITTEN_ACTS[config.activation]}
    return {"attention_bias": False, "mlp_bias": False}


def _plain_fields(values: Mapping[str, Any], defaults: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields of FIELDS; null counts as absent."""
    derived = {}
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if type(hidden) is int and type(heads) is int and heads > 0:
        derived = {"num_key_value_heads": heads} | ({} if hidden % heads else {"head_dim": hidden // heads})
    result = {}
    for name, (ours, kind) in FIELDS.items():
        value = values.get(name)
        if value is None:
            # A null head count means one per query head, whatever the default for an absent one.
            value = derived.get(name) if name in values else defaults.get(name, derived.get(name))
        if value is None:
            problems.append(f"{name} is missing")
        elif type(value) is kind or (kind is float and type(value) is int):
            result[ours] = kind(value)
        else:
            problems.append(f"{name} must be {kind.__name__}, got {value!r}")
    return result


def _activation(values: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any], problems: list[str]) -> str:
    names = [values.get("hidden_act") or defaults["hidden_act"]]
    if model_type == "gemma":
        # The first release said "gelu" where its code meant the tanh form; transformers still reads it so.
        names = ["gelu_pytorch_tanh" if names[0] == "gelu" else names[0]]
    names += [values["hidden_activation"]] if values.get("hidden_activation") else []
    acts = {HIDDEN_ACTS.get(name) for name in names}
    if None in acts or len(acts) > 1:
        problems.append(f"activation {' and '.join(map(repr, names))} is not supported, only one of "
                        f"{', '.join(HIDDEN_ACTS)}")
    return acts.pop() or ""


def _rope(
    values: Mapping[str, Any], defaults: Mapping[str, Any], problems: list[str]
) -> tuple[float, RopeScaling | None]:
    old, new = ({key: value for key, value in (values.get(name) or {}).items() if value is not None}
                for name in ("rope_scaling", "rope_parameters"))
    settings = {**old, **new}
    kinds = {settings.pop(name) for name in ("rope_type", "type") if name in settings} or {"default"}
    thetas = {part["rope_theta"] for part in (values, old, new) if part.get("rope_theta") is not None} \
        or {defaults.get("rope_theta")}
    settings.pop("rope_theta", None)
    if len(kinds) > 1 or len(thetas) > 1 or any(new.get(name, value) != value for name, value in old.items()):
        problems.append("rope_theta, rope_scaling and rope_parameters contradict each other")
    kind, theta = kinds.pop(), thetas.pop()
    if type(theta) not in (int, float):
        problems.append("rope_theta is missing" if theta is None else f"rope_theta must be a number, got {theta!r}")
        theta = 0.0
    if settings.pop("partial_rotary_factor", 1) != 1:
        problems.append("a partial_rotary_factor other than 1 is not supported")
    wanted = ROPE_KINDS.get(kind)
    if wanted is None:
        problems.append(f"rope type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    elif set(settings) != set(wanted):
        problems.append(f"rope type {kind!r} takes the fields {sorted(wanted)}, got {sorted(settings)}")
    elif not all(type(value) in (int, float) for value in settings.values()):
        problems.append(f"rope settings must be numbers, got {settings}")
    elif kind != "default":
        try:
            return float(theta), RopeScaling(kind=kind, **{wanted[key]: value for key, value in settings.items()})
        except ValueError as error:
            problems.append(str(error))
    return float(theta), None


def _window(values: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any], num_layers: int,
            problems: list[str]) -> int | None:
    window = values.get("sliding_window", defaults.get("sliding_window"))
    first = 0
    if "max_window_layers" in defaults:  # Qwen: the layers from this one on have a window
        first = values.get("max_window_layers", defaults["max_window_layers"])
        window = window if values.get("use_sliding_window") else None
    for name in ("sliding_window", "use_sliding_window", "max_window_layers"):
        known = "max_window_layers" in defaults or name in defaults
        if values.get(name) is not None and not known:
            problems.append(f"{name}={values[name]!r} has no effect in {model_type}")
    if window is not None and type(window) is not int:
        problems.append(f"sliding_window must be int, got {window!r}")
    slides = [window is not None and i >= first for i in range(num_layers)]
    types = values.get("layer_types")
    if types is not None:
        listed = [{"sliding_attention": True, "full_attention": False}.get(name) for name in types]
        if "max_window_layers" in defaults and window is not None:
            slides = listed
        if listed != slides:
            problems.append(f"layer_types {sorted(set(types))} contradict the other window settings")
    if len(set(slides)) > 1:
        problems.append("a sliding window in some layers only is not supported")
    return window if any(slides) else None
