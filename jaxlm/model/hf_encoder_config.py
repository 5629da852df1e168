"""`config.json` of BERT-like models of Hugging Face, to `EncoderConfig` and back.

Every field of a file is either read, known not to change the function, or an error.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.config import differences, nearest
from jaxlm.model.encoder_config import EncoderConfig
from jaxlm.model.hf_config import HARMLESS


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """One family: the names it uses, and what its configuration may leave out."""

    class_name: str
    mlm_class: str            # of a file with the head of masked language modelling
    body: str                 # what stands before the names of tensors in such a file
    mlm_dense: str
    mlm_norm: str
    mlm_bias: str
    after_padding: bool       # positions begin after the id of padding
    pad_id: int               # where the file does not say it


_ROBERTA = {"body": "roberta.", "mlm_dense": "lm_head.dense", "mlm_norm": "lm_head.layer_norm",
            "mlm_bias": "lm_head.bias", "after_padding": True, "pad_id": 1}

# Keyed by model_type. MiniLM, Contriever, E5 and BGE are `bert`; the multilingual E5 and BGE-M3 are `xlm-roberta`.
ENCODERS = {
    "bert": EncoderArchitecture(
        class_name="BertModel", mlm_class="BertForMaskedLM", body="bert.",
        mlm_dense="cls.predictions.transform.dense", mlm_norm="cls.predictions.transform.LayerNorm",
        mlm_bias="cls.predictions.bias", after_padding=False, pad_id=0),
    "roberta": EncoderArchitecture(class_name="RobertaModel", mlm_class="RobertaForMaskedLM", **_ROBERTA),
    "xlm-roberta": EncoderArchitecture(class_name="XLMRobertaModel", mlm_class="XLMRobertaForMaskedLM", **_ROBERTA),
}

# config.json -> (EncoderConfig, type)
FIELDS = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("d_model", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_heads", int),
    "intermediate_size": ("d_ff", int),
    "max_position_embeddings": ("max_positions", int),  # with the rows of padding
    "type_vocab_size": ("num_types", int),
    "layer_norm_eps": ("norm_eps", float),
    "hidden_dropout_prob": ("dropout", float),
    "initializer_range": ("init_std", float),
}
# Those of the configuration classes in transformers, which leave out what is equal to them.
DEFAULTS = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
            "hidden_act": "gelu", "max_position_embeddings": 512}

HIDDEN_ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
WRITTEN_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

# Fields that change the function unless they have this value (or null).
NEUTRAL = {
    "position_embedding_type": "absolute", "is_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "chunk_size_feed_forward": 0, "pruned_heads": {}, "quantization_config": None,
    "tie_word_embeddings": True, "per_layer_config": None,
}
READ_ELSEWHERE = {"model_type", "hidden_act", "pad_token_id"}
# Dropout of parts that are not computed here, and sizes of the pooler and of heads that are not loaded.
UNUSED = {"attention_probs_dropout_prob", "classifier_dropout", "directionality", "pooler_fc_size",
          "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
          "cls_token_id", "mask_token_id", "output_past", "adapters", "finetuning_task", "layer_norm_type"}


def read_encoder_config(folder: Path | str, *, ignore: Collection[str] = (), mlm_head: bool = False
                        ) -> tuple[str, EncoderConfig]:
    """Architecture (a key of `ENCODERS`) and configuration of a model folder. ValueError names the file."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("the file must hold one JSON object")
        config = from_hf_encoder_config(values, ignore=ignore, mlm_head=mlm_head)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return values["model_type"], config


def from_hf_encoder_config(
    values: Mapping[str, Any], *, ignore: Collection[str] = (), mlm_head: bool = False,
) -> EncoderConfig:
    """The configuration that the values of a `config.json` mean.

    Args:
      ignore: fields known to the caller not to change the function of this model; they are taken for absent.
      mlm_head: whether the parameters shall include the head of masked language modelling, which no field tells.

    Raises ValueError with all fields that are unknown, missing, mistyped or ask for what this package does not
    compute (relative positions, cross attention, ...).
    """
    values = {name: value for name, value in values.items() if name not in ignore and value is not None}
    model_type = values.get("model_type")
    if model_type not in ENCODERS:
        raise ValueError(f"model_type {model_type!r} is not an encoder that is supported"
                         f"{nearest(str(model_type), ENCODERS)}; supported: {', '.join(ENCODERS)}")
    architecture, fields, problems = ENCODERS[model_type], {"mlm_head": mlm_head}, []
    for name, (ours, kind) in FIELDS.items():
        value = values.get(name, DEFAULTS.get(name))
        if value is None:
            problems.append(f"{name} is missing")
        elif type(value) is kind or (kind is float and type(value) is int):
            fields[ours] = kind(value)
        else:
            problems.append(f"{name} must be {kind.__name__}, got {value!r}")
    act = values.get("hidden_act", DEFAULTS["hidden_act"])
    if act not in HIDDEN_ACTS:
        problems.append(f"hidden_act {act!r} is not supported, only {', '.join(HIDDEN_ACTS)}")
    elif architecture.after_padding and mlm_head and act != "gelu":
        problems.append(f"the head of {model_type} computes with gelu whatever hidden_act says, here {act!r}")
    for name, neutral in NEUTRAL.items():
        if name in values and values[name] != neutral:
            problems.append(f"{name}={values[name]!r} is not supported, only {neutral!r}")
    for name, value in values.items():
        if not any(name in known for known in (FIELDS, NEUTRAL, READ_ELSEWHERE, UNUSED, HARMLESS)):
            problems.append(f"unknown field {name}={value!r} (name it in `ignore` if it does not change the function)")
    if not problems:
        fields["activation"] = HIDDEN_ACTS[act]
        if architecture.after_padding:
            fields["first_position"] = values.get("pad_token_id", architecture.pad_id) + 1
            fields["max_positions"] -= fields["first_position"]
        try:
            return EncoderConfig(**fields)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError(f"{len(problems)} problem(s) in a {model_type} configuration: " + "; ".join(problems))


def to_hf_encoder_config(
    config: EncoderConfig, architecture: str, *, dtype: str = "float32", token_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a `config.json`.

    Args:
      architecture: a key of `ENCODERS`. dtype: number format of the stored weights.
      token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises ValueError for what the architecture cannot express, such as the other one's first position.
    """
    if architecture not in ENCODERS:
        raise ValueError(f"unknown architecture {architecture!r}{nearest(architecture, ENCODERS)}; "
                         f"known: {', '.join(ENCODERS)}")
    family = ENCODERS[architecture]
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": family.pad_id} | dict(token_ids or {})
    if unknown := set(ids) - {"bos_token_id", "eos_token_id", "pad_token_id"}:
        raise ValueError(f"unknown token ids {', '.join(sorted(unknown))}")
    if family.after_padding and config.first_position:
        ids["pad_token_id"] = config.first_position - 1
    values = {
        "architectures": [family.mlm_class if config.mlm_head else family.class_name],
        "model_type": architecture,
        **{name: getattr(config, ours) for name, (ours, _) in FIELDS.items()},
        "max_position_embeddings": config.first_position + config.max_positions,
        "hidden_act": WRITTEN_ACTS[config.activation],
        # Not applied here; elsewhere a model is fine-tuned with the rate that its family has for both.
        "attention_probs_dropout_prob": config.dropout,
        "position_embedding_type": "absolute",
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }
    if lost := differences(config, from_hf_encoder_config(values, mlm_head=config.mlm_head)):
        raise ValueError(f"architecture {architecture!r} cannot express this encoder (asked for -> what it would "
                         "mean): " + "; ".join(lost))
    return values
