"""Hugging Face checkpoints: safetensors to a parameter tree and back, by tables of names."""

import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.tree import named_leaves
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.hf_config import ARCHITECTURES, read_config, to_hf_config
from jaxlm.model.safetensors_io import COMPANIONS, DTYPES, new_folder, open_checkpoint, write_checkpoint, write_json

Shape = tuple[int, ...]
Put = Callable[[str, np.ndarray], Any]

log = logging.getLogger(__name__)


class Transform(NamedTuple):
    """How a stored tensor and our parameter (of one layer) correspond; all three are views or copies, never sums."""

    stored_shape: Callable[[Shape], Shape]         # our shape -> stored shape
    load: Callable[[np.ndarray, Shape], np.ndarray]  # stored, our shape -> ours
    save: Callable[[np.ndarray], np.ndarray]       # ours -> stored


def _linear(inputs: int) -> Transform:
    """torch keeps [outputs, inputs], each flattened; ours are `inputs` input axes, then the output axes."""
    def stored_shape(shape: Shape) -> Shape:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    return Transform(stored_shape, lambda stored, shape: stored.T.reshape(shape),
                     lambda ours: ours.reshape(stored_shape(ours.shape)[::-1]).T)


TRANSFORMS = {
    "same": Transform(lambda shape: shape, lambda stored, shape: stored, lambda ours: ours),
    "flat": Transform(lambda shape: (math.prod(shape),), lambda stored, shape: stored.reshape(shape),
                      lambda ours: ours.reshape(-1)),
    "linear": _linear(1),        # [D, ...] or [F, D]
    "linear_heads": _linear(2),  # [N, H, D]
}

# Our path -> (name in the file, transform).
TENSORS = {
    "embed/embedding": ("model.embed_tokens.weight", "same"),
    "layers/attention_norm/scale": ("model.layers.{layer}.{attention_norm}.weight", "same"),
    "layers/attention/query/kernel": ("model.layers.{layer}.self_attn.q_proj.weight", "linear"),
    "layers/attention/query/bias": ("model.layers.{layer}.self_attn.q_proj.bias", "flat"),
    "layers/attention/key/kernel": ("model.layers.{layer}.self_attn.k_proj.weight", "linear"),
    "layers/attention/key/bias": ("model.layers.{layer}.self_attn.k_proj.bias", "flat"),
    "layers/attention/value/kernel": ("model.layers.{layer}.self_attn.v_proj.weight", "linear"),
    "layers/attention/value/bias": ("model.layers.{layer}.self_attn.v_proj.bias", "flat"),
    "layers/attention/query_norm/scale": ("model.layers.{layer}.self_attn.q_norm.weight", "same"),
    "layers/attention/key_norm/scale": ("model.layers.{layer}.self_attn.k_norm.weight", "same"),
    "layers/attention/out/kernel": ("model.layers.{layer}.self_attn.o_proj.weight", "linear_heads"),
    "layers/mlp_norm/scale": ("model.layers.{layer}.{mlp_norm}.weight", "same"),
    "layers/mlp/gate/kernel": ("model.layers.{layer}.mlp.gate_proj.weight", "linear"),
    "layers/mlp/up/kernel": ("model.layers.{layer}.mlp.up_proj.weight", "linear"),
    "layers/mlp/down/kernel": ("model.layers.{layer}.mlp.down_proj.weight", "linear"),
    "final_norm/scale": ("model.norm.weight", "same"),
    "head/kernel": ("lm_head.weight", "linear"),
}
BODY = "model."  # before every name of a model that has a head
EMBEDDING, HEAD = TENSORS["embed/embedding"][0], TENSORS["head/kernel"][0]

# Buffers that old files carry although they follow from the configuration.
IGNORED = (r"(^|\.)rotary_emb\.inv_freq$",)


class Slot(NamedTuple):
    """One leaf of the tree and the stored tensors that fill it: one, or one a layer."""

    path: str
    shape: Shape
    names: tuple[str, ...]
    transform: Transform

    @property
    def part(self) -> Shape:
        """Our shape of what one stored tensor fills."""
        return self.shape[1:] if self.path.startswith("layers/") else self.shape


@lru_cache(maxsize=16)
def leaf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shapes of a decoder's parameters by path."""
    tree = jax.eval_shape(build(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in named_leaves(tree).items()}


def slots(shapes: Mapping[str, Shape], tensors: Mapping[str, tuple[str, str]], transforms: Mapping[str, Transform],
          **names: str) -> list[Slot]:
    """Every leaf of a model, given by path and shape, with the names a table of tensors gives it."""
    result = []
    for path, shape in shapes.items():
        pattern, transform = tensors[path]
        count = shape[0] if path.startswith("layers/") else 1
        stored = tuple(pattern.format(layer=layer, **names) for layer in range(count))
        result.append(Slot(path, shape, stored, transforms[transform]))
    return result


def find_problems(plan: Sequence[Slot], found: Mapping[str, Shape], also_known: Collection[str] = ()) -> list[str]:
    """What is missing, unknown or of another shape, one line a tensor."""
    expected = {name: slot.transform.stored_shape(slot.part) for slot in plan for name in slot.names}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name not in expected and name not in also_known:
            problems.append(f"unknown: {name} {shape}")
        elif name in expected and shape != expected[name]:
            problems.append(f"wrong shape: {name} is {shape}, the configuration says {expected[name]}")
    return problems


def raise_problems(problems: Sequence[str], where: Path | str) -> None:
    """One ValueError for all of them (the first 40 in words)."""
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        raise ValueError(f"{where}: {len(problems)} tensor(s) do not fit the model:\n  "
                         + "\n  ".join([*problems[:40], *more]))


def fill(plan: Sequence[Slot], read: Callable[[str], np.ndarray], dtype: Any, put: Put | None,
         pad_vocab_to: int | None = None) -> dict[str, Any]:
    """The parameter tree, leaf by leaf and layer by layer: one leaf and one stored tensor are in memory beside it."""
    tree: dict[str, Any] = {}
    for slot in plan:
        leaf = np.empty(slot.shape, dtype)
        parts = leaf if slot.path.startswith("layers/") else leaf[None]
        for part, name in zip(parts, slot.names, strict=True):
            part[...] = slot.transform.load(read(name), slot.part)
        if pad_vocab_to and slot.path in ("embed/embedding", "head/kernel"):
            axis = slot.path == "head/kernel"
            missing = pad_vocab_to - leaf.shape[axis]
            leaf = np.pad(leaf, ((0, 0), (0, missing)) if axis else ((0, missing), (0, 0)))
        *parents, last = slot.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf if put is None else put(slot.path, leaf)
    return tree


def load_hf(
    folder: Path | str, *, dtype: Any = jnp.float32, put: Put | None = None, pad_vocab_to: int | None = None,
    ignore: Collection[str] = (), backbone: bool = False,
) -> tuple[ModelConfig, dict[str, Any]]:
    """A Hugging Face model folder (`config.json` and safetensors) as configuration and parameters.

    Args:
      dtype: of the parameters; the model computes in another one if asked to (`ComputeConfig`).
      put: called with path and leaf, `lambda path, leaf: jax.device_put(leaf, shardings[path])` for example; its
        result goes into the tree in place of the numpy array. Every process reads every leaf.
      pad_vocab_to: grows embedding and head to this many tokens with rows of 0, so that a mesh divides them. The new
        tokens get logit 0 (they are no part of the loaded function); `save_hf(vocab_size=...)` takes them off.
      ignore: fields of `config.json` to disregard, see `from_hf_config`.
      backbone: for a model whose logits nobody wants. A head is neither expected nor loaded, the configuration comes
        back tied, and names may lack the `model.` of a model with a head.

    A tied model may store its head if that equals the embedding; else, as for every tensor that is missing, unknown
    or of another shape (an embedding larger than `vocab_size` included), there is one ValueError that lists them.
    """
    folder = Path(folder)
    architecture, config = read_config(folder, ignore)
    if pad_vocab_to is not None and pad_vocab_to < config.vocab_size:
        raise ValueError(f"pad_vocab_to {pad_vocab_to} is less than the {config.vocab_size} tokens of {folder}")
    config = replace(config, tie_embeddings=True) if backbone else config
    plan = _hf_slots(config, architecture)
    with open_checkpoint(folder) as (found, read):
        found = {name: tensor for name, tensor in found.items()
                 if not any(re.search(pattern, name) for pattern in IGNORED) and not (backbone and name == HEAD)}
        if backbone and not any(name.startswith(BODY) for name in found):
            found, read_own = {BODY + name: tensor for name, tensor in found.items()}, read
            read = lambda name: read_own(name.removeprefix(BODY))
        shapes = {name: tensor.shape for name, tensor in found.items()}
        problems = find_problems(plan, shapes, [HEAD] if config.tie_embeddings else [])
        problems += [f"number format {tensor.dtype} is not read (only {', '.join(DTYPES)}): {name}"
                     for name, tensor in found.items() if tensor.dtype not in DTYPES]
        if not problems and config.tie_embeddings and HEAD in found \
                and not np.array_equal(read(HEAD), read(EMBEDDING)):
            problems.append(f"contradiction: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
        raise_problems(problems, folder)
        params = fill(plan, read, dtype, put, pad_vocab_to)
    return (config if pad_vocab_to is None else replace(config, vocab_size=pad_vocab_to)), params


def tree_from_hf(
    config: ModelConfig, architecture: str, read: Callable[[str], np.ndarray], *, dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The parameter tree from tensors by their names in a Hugging Face folder, wherever `read` takes them from."""
    return fill(_hf_slots(config, architecture), read, dtype, None)


def save_hf(
    folder: Path | str, config: ModelConfig, params: Any, *, architecture: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", max_shard_bytes: int = 4 * 10**9,
    vocab_size: int | None = None, token_ids: Mapping[str, Any] | None = None, files: Sequence[Path | str] = (),
    overwrite: bool = False,
) -> None:
    """Writes a model folder that transformers and `load_hf` read: `config.json`, safetensors, given files.

    Args:
      params: the parameter tree, numpy or jax arrays that this process can read whole.
      architecture: a key of `ARCHITECTURES`. dtype: of the stored weights, rounded to nearest even.
      vocab_size: keeps the first tokens only, to take off padding of the vocabulary.
      token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for `config.json`.
      files: of a tokenizer, copied beside the weights. overwrite: replaces an earlier export.

    The folder appears whole or not at all, and an earlier export stays as it was until then. Parameters of multi-token
    prediction are left out, and the log says so: no architecture has a place for them, and nothing else reads them.
    Raises ValueError for what the architecture cannot express (post-norm layers, for one) and for a tree that does not
    fit `config`, OSError when the disk is full.
    """
    check_written(dtype, files)
    if vocab_size is not None and not 0 < vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size must be 1 to {config.vocab_size}, got {vocab_size}")
    leaves = fitting_leaves(params, leaf_shapes(config))
    if config.mtp_depth:
        log.warning("%s: the parameters of multi-token prediction (mtp_depth %d) are not exported, the decoder is",
                    folder, config.mtp_depth)
    config = replace(config, vocab_size=vocab_size or config.vocab_size, mtp_depth=0)
    values = to_hf_config(config, architecture, dtype=dtype, token_ids=token_ids)
    plan = _hf_slots(config, architecture)
    write_model(Path(folder), plan, leaves, values, files, dtype, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def check_written(dtype: str, files: Sequence[Path | str]) -> None:
    """ValueError for a number format that is not written, or a file that may not lie beside weights."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    for file in map(Path, files):
        if file.name not in COMPANIONS or not file.is_file():
            raise ValueError(f"{file} is not one of the files that may lie beside weights: {', '.join(COMPANIONS)}")


def fitting_leaves(params: Any, expected: Mapping[str, Shape]) -> dict[str, Any]:
    """The leaves by path. ValueError lists those that are missing, unknown or of another shape."""
    leaves = named_leaves(params)
    raise_problems([f"missing: {path} {shape}" for path, shape in expected.items() if path not in leaves]
                   + [f"unknown: {path}" for path in leaves if path not in expected]
                   + [f"wrong shape: {path} is {leaf.shape}, the configuration says {expected[path]}"
                      for path, leaf in leaves.items() if expected.get(path, leaf.shape) != leaf.shape], "parameters")
    return leaves


def write_model(folder: Path, plan: Sequence[Slot], leaves: Mapping[str, Any], values: Mapping[str, Any],
                files: Sequence[Path | str], dtype: str, *, max_shard_bytes: int, overwrite: bool) -> None:
    """The folder of `save_hf`: weights, `values` as `config.json`, copies of `files`; whole or not at all."""
    specs = {name: (slot.transform.stored_shape(slot.part), jnp.dtype(dtype)) for slot in plan for name in slot.names}
    with new_folder(folder, overwrite=overwrite) as scratch:
        write_checkpoint(scratch, specs, _stored(plan, leaves, jnp.dtype(dtype)), max_shard_bytes=max_shard_bytes)
        write_json(values, scratch / "config.json")
        for file in files:
            shutil.copy(file, scratch)


def _hf_slots(config: ModelConfig, architecture: str) -> list[Slot]:
    family = ARCHITECTURES[architecture]
    return slots(leaf_shapes(config), TENSORS, TRANSFORMS, attention_norm=family.attention_norm,
                 mlp_norm=family.mlp_norm)


def _stored(plan: Sequence[Slot], leaves: Mapping[str, Any], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for slot in plan:
        leaf = np.asarray(leaves[slot.path])[tuple(slice(size) for size in slot.shape)]  # without padded tokens
        if dtype == np.float16 and np.abs(leaf).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(f"{slot.path} has values beyond the range of float16; use bfloat16")
        parts = leaf if slot.path.startswith("layers/") else leaf[None]
        for name, part in zip(slot.names, parts, strict=True):
            yield name, slot.transform.save(part).astype(dtype)
