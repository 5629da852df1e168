"""Encoders of Hugging Face: safetensors to a parameter tree and back, by a table of names.

The pooler of BERT (a layer on [CLS] that next-sentence prediction trained) is part of no function here: it is not
loaded and not written, and transformers says when it makes a new one.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.tree import named_leaves
from jaxlm.model.encoder import build_encoder
from jaxlm.model.encoder_config import EncoderConfig
from jaxlm.model.hf import (
    TRANSFORMS,
    Put,
    Shape,
    Slot,
    check_written,
    fill,
    find_problems,
    fitting_leaves,
    raise_problems,
    slots,
    write_model,
)
from jaxlm.model.hf_encoder_config import ENCODERS, read_encoder_config, to_hf_encoder_config
from jaxlm.model.safetensors_io import DTYPES, open_checkpoint

log = logging.getLogger(__name__)


def _dense(ours: str, theirs: str, transform: str = "linear") -> dict[str, tuple[str, str]]:
    return {f"{ours}/kernel": (f"{theirs}.weight", transform), f"{ours}/bias": (f"{theirs}.bias", "flat")}


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    return {f"{ours}/scale": (f"{theirs}.weight", "same"), f"{ours}/bias": (f"{theirs}.bias", "same")}


_TABLES, _LAYER = "{body}embeddings", "{body}encoder.layer.{layer}"

# Our path -> (name in the file, transform).
TENSORS = {
    "embed/embedding": (f"{_TABLES}.word_embeddings.weight", "same"),
    "positions/embedding": (f"{_TABLES}.position_embeddings.weight", "same"),
    "types/embedding": (f"{_TABLES}.token_type_embeddings.weight", "same"),
    **_norm("embed_norm", f"{_TABLES}.LayerNorm"),
    **_dense("layers/attention/query", f"{_LAYER}.attention.self.query"),
    **_dense("layers/attention/key", f"{_LAYER}.attention.self.key"),
    **_dense("layers/attention/value", f"{_LAYER}.attention.self.value"),
    **_dense("layers/attention/out", f"{_LAYER}.attention.output.dense", "linear_heads"),
    **_norm("layers/attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
    **_dense("layers/mlp/up", f"{_LAYER}.intermediate.dense"),
    **_dense("layers/mlp/down", f"{_LAYER}.output.dense"),
    **_norm("layers/mlp_norm", f"{_LAYER}.output.LayerNorm"),
    **_dense("mlm/transform", "{mlm_dense}"),
    **_norm("mlm/norm", "{mlm_norm}"),
    "mlm/bias": ("{mlm_bias}", "same"),
}

# Buffers, and parts of other tasks than those computed here.
IGNORED = (r"(^|\.)embeddings\.(position_ids|token_type_ids)$", r"(^|\.)pooler\.", r"^cls\.seq_relationship\.")
MLM_HEAD = r"^(cls\.predictions|lm_head)\."
TIED_WEIGHT, TIED_BIAS = ("cls.predictions.decoder.weight", "lm_head.decoder.weight"), (
    "cls.predictions.decoder.bias", "lm_head.decoder.bias")


def load_encoder(
    folder: Path | str, *, dtype: Any = jnp.float32, put: Put | None = None, mlm_head: bool = False,
    ignore: Collection[str] = (),
) -> tuple[EncoderConfig, dict[str, Any]]:
    """A folder of a BERT-like model (`config.json` and safetensors) as configuration and parameters.

    Args:
      dtype, put: as in `jaxlm.model.hf.load_hf`.
      mlm_head: loads the head of masked language modelling, which must be there then; else it is left out.
      ignore: fields of `config.json` to disregard, see `from_hf_encoder_config`.

    Raises one ValueError for all tensors that are missing, unknown, of another shape or of an unread number format.
    """
    folder = Path(folder)
    architecture, config = read_encoder_config(folder, ignore=ignore, mlm_head=mlm_head)
    with open_checkpoint(folder) as (stored, read):
        names = {_modern(name): name for name in stored}
        left_out = {name for name in names if any(re.search(pattern, name) for pattern in IGNORED)
                    or (not mlm_head and re.search(MLM_HEAD, name))}
        found = {name: stored[own] for name, own in names.items() if name not in left_out}
        body = ENCODERS[architecture].body
        plan = encoder_slots(config, architecture, body if any(name.startswith(body) for name in found) else "")
        own_read = lambda name: read(names[name])
        problems = find_problems(plan, {name: tensor.shape for name, tensor in found.items()},
                                 [*TIED_WEIGHT, *TIED_BIAS])
        problems += [f"number format {tensor.dtype} is not read (only {', '.join(DTYPES)}): {name}"
                     for name, tensor in found.items() if tensor.dtype not in DTYPES]
        if not problems:
            problems = _untied(plan, found, own_read)
        raise_problems(problems, folder)
        if left_out:
            log.info("%s: left out, as no embedding uses it: %s", folder, ", ".join(sorted(left_out)))
        return config, fill(plan, own_read, dtype, put)


def save_encoder(
    folder: Path | str, config: EncoderConfig, params: Any, *, architecture: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", max_shard_bytes: int = 4 * 10**9,
    token_ids: Mapping[str, Any] | None = None, files: Sequence[Path | str] = (), overwrite: bool = False,
) -> None:
    """Writes a model folder that transformers and `load_encoder` read; the arguments and errors of `save_hf`.

    Args:
      architecture: a key of `ENCODERS`. With `config.mlm_head` the folder is that of the class for masked language
        modelling, else that of the plain model.
    """
    check_written(dtype, files)
    leaves = fitting_leaves(params, encoder_shapes(config))
    values = to_hf_encoder_config(config, architecture, dtype=dtype, token_ids=token_ids)
    plan = encoder_slots(config, architecture, ENCODERS[architecture].body if config.mlm_head else "")
    write_model(Path(folder), plan, leaves, values, files, dtype, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


@lru_cache(maxsize=16)
def encoder_shapes(config: EncoderConfig) -> dict[str, Shape]:
    """The shapes of an encoder's parameters by path."""
    tree = jax.eval_shape(build_encoder(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in named_leaves(tree).items()}


def encoder_slots(config: EncoderConfig, architecture: str, body: str) -> list[Slot]:
    """Every leaf with its names in a file whose tensors of the body begin with `body`."""
    family = ENCODERS[architecture]
    return slots(encoder_shapes(config), TENSORS, TRANSFORMS, body=body, mlm_dense=family.mlm_dense,
                 mlm_norm=family.mlm_norm, mlm_bias=family.mlm_bias)


def _modern(name: str) -> str:
    """BERT's first files call the parameters of a norm as TensorFlow did."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _untied(plan: Sequence[Slot], found: Collection[str], read: Callable[[str], np.ndarray]) -> list[str]:
    """Second copies, in the head, of what is one parameter, where they differ from it."""
    own = {slot.path: slot.names[0] for slot in plan if len(slot.names) == 1}
    pairs = [(name, own["embed/embedding"]) for name in TIED_WEIGHT] \
        + [(name, own.get("mlm/bias")) for name in TIED_BIAS]
    return [f"contradiction: {name} differs from {other}" for name, other in pairs
            if name in found and not np.array_equal(read(name), read(other))]
