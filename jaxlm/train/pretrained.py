"""Models that exist, with their tokenizer and chat template: run folders, Hugging Face folders, GGUF files."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import config as flags
from jaxlm.core.tree import path_name
from jaxlm.data.chat_examples import begins_with_bos
from jaxlm.data.chat_template import ChatTemplate, chat_template_from_files, load_chat_template
from jaxlm.data.tokenizer import (
    JSON_FILE,
    JSON_NAMES_FILE,
    SENTENCEPIECE_FILE,
    JsonTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_files,
)
from jaxlm.model import lora
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.gguf import gguf_chat_template, gguf_special_tokens, gguf_tokenizer_json, load_gguf
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.model.hf_config import load_config
from jaxlm.model.lora import LoraConfig
from jaxlm.model.safetensors_io import COMPANIONS
from jaxlm.train.checkpoint import saved_params, saved_run

GENERATION_FILE = "generation_config.json"  # of transformers: which ids end a text
log = logging.getLogger(__name__)

Put = Callable[[str, Any], Any]  # path and leaf to the leaf that goes into the tree


class Pretrained(NamedTuple):
    """A model and its language side; None for what its source lacks."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    start: tuple[int, ...] = ()       # ids before every text: our runs train on documents that begin with BOS
    chat: ChatTemplate | None = None
    lora: LoraConfig = LoraConfig()         # adapters beside the weights of a run, which loading merges
    mtp_depth: int = 0  # of a run: multi-token prediction serves the training it is part of, and loading leaves it out


def load_pretrained(source: str | Path, *, dtype: Any = jnp.float32, put: Put | None = None) -> Pretrained:
    """Reads any of the three kinds; see `load_weights` for the arguments.

    ValueError when `source` is none of them or damaged, and when its tokenizer has more tokens than its embedding.
    """
    return load_weights(source, open_pretrained(source), dtype=dtype, put=put)


def open_pretrained(source: str | Path) -> Pretrained:
    """All but the weights, for checks that need not wait for them; a GGUF file comes with them, as numpy arrays."""
    source = Path(source)
    if source.suffix == ".gguf":
        config, params = load_gguf(source)
        tokenizer = JsonTokenizer(gguf_tokenizer_json(source).encode(), **gguf_special_tokens(source))
        template = gguf_chat_template(source)
        found = Pretrained(config, params, tokenizer, (), ChatTemplate(template) if template else None)
    elif (source / "checkpoints").is_dir():
        saved, files = saved_run(source)
        if "model" not in saved:
            raise ValueError(f"{source} is no run of a language model; of a retriever's give the folders that it "
                             "exported: exported, or exported/query and exported/passage")
        tokenizer = tokenizer_from_files(files)
        config = flags.from_json(ModelConfig, saved["model"], "model.")
        chat = chat_template_from_files(files)
        # Tuned on what its template writes, a model knows BOS if that is part of it.
        start = (tokenizer.bos_id,) if chat is None or begins_with_bos(chat, tokenizer) else ()
        found = Pretrained(replace(config, mtp_depth=0), None, tokenizer, start, chat,
                           flags.from_json(LoraConfig, saved.get("lora", {}), "lora."), config.mtp_depth)
    elif (source / "config.json").is_file():
        there = any((source / name).is_file() for name in (JSON_FILE, SENTENCEPIECE_FILE))
        tokenizer = load_tokenizer(source) if there else None
        found = Pretrained(load_config(source), None, tokenizer, _hf_start(source, tokenizer),
                           load_chat_template(source))
    else:
        raise ValueError(f"{source}: neither a .gguf file nor a run folder (checkpoints/) nor a Hugging Face "
                         "folder (config.json)")
    if found.tokenizer is not None:
        check_vocabulary(found.tokenizer, found.config.vocab_size)
    return found


def load_weights(
    source: str | Path, opened: Pretrained, *, dtype: Any = jnp.float32, put: Put | None = None,
) -> Pretrained:
    """What `open_pretrained` found, with its weights.

    Args:
      dtype: of the parameters. put: path and leaf to the leaf in the tree, `quantize_leaf` for example; without it
        leaves of folders and files are numpy arrays, and those of a run lie on this process's first device.
    """
    source = Path(source)
    if opened.params is None and not (source / "checkpoints").is_dir():
        return opened._replace(params=load_hf(source, dtype=dtype, put=put)[1])
    params = opened.params
    if params is None:
        adapted = lambda key: lora.init(key, build(opened.config).init(key), opened.lora)
        params = lora.merge(saved_params(source, jax.eval_shape(adapted, jax.random.key(0))))
        if opened.mtp_depth:
            log.info("%s: multi-token prediction of depth %d is left out", source, opened.mtp_depth)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), params)
    if put is not None:
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: put(path_name(path), leaf), params)
    return opened._replace(params=params)


def export_pretrained(
    model: Pretrained, folder: Path, *, architecture: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder with the weights, the tokenizer and the chat template; errors of `save_hf`."""
    with tempfile.TemporaryDirectory() as scratch:
        ids, files = None, []
        if model.tokenizer:
            save_tokenizer(model.tokenizer, Path(scratch))
            for name, content in (model.chat.files() if model.chat else {}).items():
                (Path(scratch) / name).write_bytes(content)
            ids = {f"{name}_token_id": getattr(model.tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
            (Path(scratch) / GENERATION_FILE).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
            files = [path for path in Path(scratch).iterdir() if path.name in COMPANIONS]  # others know no byte marker
        save_hf(folder, model.config, model.params, architecture=architecture, dtype=dtype, token_ids=ids, files=files,
                overwrite=overwrite)


def _hf_start(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that transformers would put before a text: BOS where `add_bos_token` or the post-processor says so."""
    if tokenizer is None:
        return ()
    try:
        content = {name: json.loads((folder / name).read_bytes()) for name in (JSON_NAMES_FILE, JSON_FILE)
                   if (folder / name).is_file()}
    except ValueError as error:
        raise ValueError(f"{folder}: a tokenizer file is damaged: {error}") from None
    asked = content.get(JSON_NAMES_FILE, {}).get("add_bos_token")
    if asked is None:
        steps = content.get(JSON_FILE, {}).get("post_processor") or {}
        steps = steps.get("processors") or [steps]
        first = [(step.get("single") or [{}])[0].get("SpecialToken", {}).get("id") for step in steps]
        asked = any(name in tokenizer.symbols and tokenizer.symbols[name].id == tokenizer.bos_id
                    for name in first if name)
    return (tokenizer.bos_id,) if asked else ()
