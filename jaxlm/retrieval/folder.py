"""Folders of sentence-transformers: a model with the modules that make a vector of its hidden states.

    config.json, model.safetensors, tokenizer.json     the model, as transformers reads it
    modules.json                                       the chain: Transformer, Pooling and perhaps Normalize (or SPLADE)
    1_Pooling/config.json                              which pooling
    sentence_bert_config.json                          max_seq_length
    config_sentence_transformers.json                  prompts, similarity
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxlm.data.tokenizer import JSON_FILE, JSON_NAMES_FILE, JsonTokenizer, load_tokenizer, save_tokenizer
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build
from jaxlm.model.encoder import Encoder, build_encoder
from jaxlm.model.hf import Put, load_hf, save_hf
from jaxlm.model.hf_config import ARCHITECTURES, read_config
from jaxlm.model.hf_encoder import load_encoder, save_encoder
from jaxlm.model.hf_encoder_config import ENCODERS, read_encoder_config
from jaxlm.model.safetensors_io import new_folder, write_json
from jaxlm.retrieval.embed import POOLINGS, Pooling, TextEncoder
from jaxlm.retrieval.representations import REPRESENTATIONS, Vectors

MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling", "2_Normalize"
LENGTHS, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"
# Ours -> the name since version 5, and the flag of older files.
POOLING_NAMES = {"mean": ("mean", "pooling_mode_mean_tokens"), "cls": ("cls", "pooling_mode_cls_token"),
                 "last": ("lasttoken", "pooling_mode_lasttoken"),
                 "weighted": ("weightedmean", "pooling_mode_weightedmean_tokens")}
FLAG = "pooling_mode_"
# The names of the classes before version 6, which every version resolves.
CLASSES = {"Transformer": "", "Pooling": POOLING, "Normalize": NORMALIZE}
SPLADE = "1_SpladePooling"
SPARSE_CLASSES = {"MLMTransformer": "", "SpladePooling": SPLADE}
# Settings of the first module that leave text, model and output as they are.
PLAIN_MODULE = {
    "max_seq_length": None, "do_lower_case": False, "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings", "unpad_inputs": None, "processing_kwargs": {}, "query_length": None,
    "document_length": None, "query_expansion": None, "model_args": {}, "model_kwargs": {},
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}
log = logging.getLogger(__name__)


def said_vectors(folder: Path | str) -> Vectors | None:
    """The representation that a folder's modules are made for; None without `modules.json`: any, by a flag."""
    if not (Path(folder) / MODULES).exists():
        return None
    return "sparse" if _chain(Path(folder)) == list(SPARSE_CLASSES) else "dense"


def open_text_encoder(
    folder: Path | str, *, pooling: Pooling | None = None, compute: ComputeConfig | None = None,
    vectors: Vectors = "dense",
) -> TextEncoder:
    """An encoder or decoder with its tokenizer and modules, without its weights.

    Args:
      pooling: for a model folder without `modules.json`, which does not say it; such vectors have no unit length.
      vectors: what will stand for a text. Sparse ones need the head of masked language modelling. Late ones of a
        folder that does not say how they are compared are compared by cosine, as in ColBERT, sparse ones and those of
        a folder without modules by products.

    Raises ValueError that names every module and setting which would change the vectors and is not computed here
    (Dense, pooling by maximum, prompts outside the pooling, ...), for a folder that is not there or holds no model, and
    for a tokenizer that is no `tokenizer.json`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a folder of sentence-transformers or transformers")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so no model of sentence-transformers or transformers")
    mlm_head = REPRESENTATIONS[vectors].mlm_head
    chosen, normalize = _modules(folder, pooling, vectors)
    by_cosine = vectors == "late" or (vectors == "dense" and (folder / MODULES).exists())
    settings = _settings(folder / SETTINGS, unsaid="cosine" if by_cosine else "dot")
    if architecture_of(folder) in ENCODERS:
        model = build_encoder(read_encoder_config(folder, mlm_head=mlm_head)[1], compute)
    elif mlm_head:
        raise ValueError(f"{folder}: a {architecture_of(folder)} model has no head of masked language modelling")
    else:
        model = build(replace(read_config(folder)[1], tie_embeddings=True), compute)  # no head is loaded
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, JsonTokenizer):
        raise ValueError(f"{folder}: a text encoder is read with its {JSON_FILE}, which is not there")
    before, after = tokenizer.frame
    return TextEncoder(
        model=model, tokenizer=tokenizer, pooling=chosen, normalize=normalize, before=before, after=after,
        max_length=_max_length(folder, model.config.max_positions), **settings)


def load_text_encoder(
    folder: Path | str, *, pooling: Pooling | None = None, compute: ComputeConfig | None = None,
    dtype: Any = jnp.float32, put: Put | None = None,
) -> tuple[TextEncoder, Any]:
    """`open_text_encoder` of dense vectors, and its parameters (numpy arrays without `put`).

    Args:
      dtype, put: of the parameters, as in `load_hf`.
    """
    encoder = open_text_encoder(folder, pooling=pooling, compute=compute)
    return encoder, load_weights(folder, encoder, dtype=dtype, put=put)


def load_weights(folder: Path | str, encoder: TextEncoder, *, dtype: Any = jnp.float32, put: Put | None = None) -> Any:
    """The parameters of an encoder that `open_text_encoder` made of the folder."""
    if isinstance(encoder.model, Encoder):
        return load_encoder(folder, dtype=dtype, put=put, mlm_head=encoder.model.config.mlm_head)[1]
    return load_hf(folder, dtype=dtype, put=put, backbone=True)[1]


def architecture_of(folder: Path | str) -> str:
    """The family of a model folder; ValueError for one that is not read here."""
    kind = _read(Path(folder) / "config.json").get("model_type")
    if kind not in {**ENCODERS, **ARCHITECTURES}:
        raise ValueError(f"{folder}: model_type {kind!r} is not supported, only "
                         f"{', '.join([*ENCODERS, *ARCHITECTURES])}")
    return kind


def save_text_encoder(
    folder: Path | str, encoder: TextEncoder, params: Any, *, architecture: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", overwrite: bool = False,
    vectors: Vectors = "dense",
) -> None:
    """Writes a folder with which `SentenceTransformer(folder)` gives the same vectors; whole or not at all.

    Args:
      architecture: a key of `jaxlm.model.hf_encoder_config.ENCODERS`, or of `hf_config.ARCHITECTURES` for a decoder.
      vectors: sparse ones are those of `SparseEncoder(folder)`; for late ones the model is written without modules,
        with its settings (similarity, prompts), which `open_text_encoder(folder, vectors="late")` reads.

    With `dimension` sentence-transformers cuts after the normalisation, so that its vectors are shorter than 1; their
    cosines are the same. Raises ValueError for a tokenizer that is no `tokenizer.json`, a frame that is not that of its
    post-processor, and as `save_hf` does.
    """
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        raise ValueError("only a tokenizer.json can say what stands around a text; this tokenizer is another kind")
    if (encoder.before, encoder.after) != tokenizer.frame:
        raise ValueError(f"the encoder puts {encoder.before} and {encoder.after} around a text, its tokenizer.json "
                         f"{tokenizer.frame[0]} and {tokenizer.frame[1]}: change the file's post_processor")
    save = save_encoder if isinstance(encoder.model, Encoder) else save_hf
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    with new_folder(Path(folder), overwrite=overwrite) as scratch, tempfile.TemporaryDirectory() as beside:
        save_tokenizer(tokenizer, Path(beside))
        names = _read(Path(beside) / JSON_NAMES_FILE)
        # The plain class takes the file as it is; a model's own would build another tokenizer from the same words.
        write_json({**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": encoder.max_length,
                    "model_input_names": ["input_ids", "attention_mask"]}, Path(beside) / JSON_NAMES_FILE)
        save(scratch, encoder.model.config, params, architecture=architecture, dtype=dtype, token_ids=ids,
             files=[Path(beside) / JSON_FILE, Path(beside) / JSON_NAMES_FILE])
        for name, values in WRITTEN[vectors](encoder).items():
            (scratch / name).parent.mkdir(exist_ok=True)
            write_json(values, scratch / name)


def _dense_files(encoder: TextEncoder) -> dict[str, Any]:
    chain = [name for name in CLASSES if name != "Normalize" or encoder.normalize]
    flags = {flag: name == encoder.pooling for name, (_, flag) in POOLING_NAMES.items()}
    classes = {name: f"sentence_transformers.models.{name}" for name in chain}
    files = _common_files(encoder, classes, _truncated(encoder)) | {
        f"{POOLING}/config.json": {"word_embedding_dimension": encoder.model.config.d_model, **flags,
                                   "include_prompt": True}}
    return files | ({f"{NORMALIZE}/config.json": {}} if encoder.normalize else {})


def _sparse_files(encoder: TextEncoder) -> dict[str, Any]:
    classes = {name: f"sentence_transformers.sparse_encoder.models.{name}" for name in SPARSE_CLASSES}
    return _common_files(encoder, classes, {"model_type": "SparseEncoder"}) | {f"{SPLADE}/config.json": {
        "pooling_strategy": "max", "activation_function": "relu",
        "word_embedding_dimension": encoder.model.config.vocab_size}}


def _common_files(encoder: TextEncoder, classes: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    paths = CLASSES | SPARSE_CLASSES
    return {
        MODULES: [{"idx": i, "name": str(i), "path": paths[name], "type": kind}
                  for i, (name, kind) in enumerate(classes.items())],
        LENGTHS: {"max_seq_length": encoder.max_length, "do_lower_case": False},
        SETTINGS: _settings_file(encoder) | more,
    }


def _late_files(encoder: TextEncoder) -> dict[str, Any]:
    return {SETTINGS: _settings_file(encoder) | _truncated(encoder)}


def _settings_file(encoder: TextEncoder) -> dict[str, Any]:
    return {"prompts": {"query": encoder.query_prompt, "document": encoder.passage_prompt},
            "default_prompt_name": None, "similarity_fn_name": encoder.similarity}


def _truncated(encoder: TextEncoder) -> dict[str, Any]:
    return {} if encoder.dimension is None else {"truncate_dim": encoder.dimension}


WRITTEN = {"dense": _dense_files, "sparse": _sparse_files, "late": _late_files}


def _modules(folder: Path, given: Pooling | None, vectors: Vectors) -> tuple[Pooling, bool]:
    """Pooling, and whether vectors get length 1; they say nothing about vectors that are not pooled."""
    pooled = REPRESENTATIONS[vectors].pooled
    if given is not None and not pooled:
        raise ValueError(f"pooling has no effect on {vectors} vectors; leave it out")
    if not (folder / MODULES).exists():
        if given is None and pooled:
            raise ValueError(f"{folder} has no {MODULES}, so it does not say how to pool: give pooling, one of "
                             f"{', '.join(POOLINGS)}")
        return given or "mean", False
    chain = _chain(folder)
    if chain == list(SPARSE_CLASSES):
        if vectors != "sparse":
            raise ValueError(f"{folder} is a SparseEncoder: its vectors are sparse, not {vectors}")
        _check_plain(_read(folder / SPLADE / "config.json"), {
            "pooling_strategy": "max", "activation_function": "relu",
            **dict.fromkeys(("word_embedding_dimension", "embedding_dimension"),
                            _read(folder / "config.json").get("vocab_size"))}, folder / SPLADE / "config.json")
        _check_plain({"max_active_dims": _read(folder / SETTINGS, {}).get("max_active_dims")}, {}, folder / SETTINGS)
        return "mean", False
    if unknown := [name for name in chain if name not in CLASSES]:
        raise ValueError(f"{folder / MODULES}: module(s) {', '.join(unknown)} are not supported, only "
                         f"{', '.join(CLASSES)}")
    if chain not in (list(CLASSES)[:2], list(CLASSES)):
        raise ValueError(f"{folder / MODULES}: the chain {', '.join(chain)} is not supported, only "
                         f"{', '.join(CLASSES)} in this order, with or without the last")
    paths = [str(module.get("path", "")) for module in _read(folder / MODULES)]
    found = _pooling(folder / paths[1] / "config.json")
    if given not in (None, found):
        raise ValueError(f"{folder} pools by {found}, not by {given}: leave pooling out, or change the result")
    if len(chain) == 3:
        _check_plain(_read(folder / paths[2] / "config.json", {}), {
            "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
            folder / paths[2] / "config.json")
    return found, len(chain) == 3


def _chain(folder: Path) -> list[str]:
    """The classes of the modules."""
    return [str(module.get("type", "")).rpartition(".")[2] for module in _read(folder / MODULES)]


def _pooling(path: Path) -> Pooling:
    values = _read(path)
    modes = values.get("pooling_mode")
    if modes is None:
        names = {flag: name for name, flag in POOLING_NAMES.values()}
        modes = [names.get(flag, flag) for flag, on in values.items() if flag.startswith(FLAG) and on]
    modes = [modes] if isinstance(modes, str) else modes
    ours = [ours for ours, (name, _) in POOLING_NAMES.items() if modes == [name]]
    if not ours:
        raise ValueError(f"{path}: pooling by {', '.join(modes) or 'nothing'} is not supported, only by one of "
                         f"{', '.join(name for name, _ in POOLING_NAMES.values())}")
    if not values.get("include_prompt", True):
        raise ValueError(f"{path}: include_prompt=false, pooling without the tokens of the prompt, is not supported")
    return ours[0]


def _settings(path: Path, unsaid: str) -> dict[str, Any]:
    """The fields of a `TextEncoder` in the file for the whole model, if it is there; and the similarity else."""
    values = _read(path, {})
    similarity = values.get("similarity_fn_name") or unsaid
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"{path}: similarity_fn_name={similarity!r} is not supported, only 'cosine' and 'dot'")
    prompts = {name: text or "" for name, text in (values.get("prompts") or {}).items()}
    passage = next((name for name in ("document", "passage", "corpus") if name in prompts), "document")
    if others := [name for name, text in prompts.items() if text and name not in ("query", passage)]:
        log.warning("%s: only the prompts of queries and passages are kept, not: %s", path, ", ".join(others))
    return {"similarity": similarity, "dimension": values.get("truncate_dim"),
            "query_prompt": prompts.get("query", ""), "passage_prompt": prompts.get(passage, "")}


def _max_length(folder: Path, positions: int) -> int:
    values = _read(folder / LENGTHS, {})
    _check_plain(values, PLAIN_MODULE | {"max_seq_length": values.get("max_seq_length")}, folder / LENGTHS)
    # Where it is not said, transformers writes 10^30.
    said = values.get("max_seq_length") or _read(folder / JSON_NAMES_FILE, {}).get("model_max_length") or positions
    return min(int(said), positions)


def _check_plain(values: Mapping[str, Any], plain: Mapping[str, Any], path: Path) -> None:
    odd = [f"{name}={value!r}" for name, value in values.items()
           if value is not None and (name not in plain or value != plain[name])]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd)} is not supported, as it would change the vectors")


def _read(path: Path, default: Any = None) -> Any:
    """A JSON file; ValueError names one that is missing (without a default) or damaged."""
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
