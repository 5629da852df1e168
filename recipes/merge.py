"""Merge checkpoints into one Hugging Face folder, tensor by tensor: no more than a few tensors are in memory.

    python -m recipes.merge --models finetuned-a finetuned-b --base original --merge.method ties --merge.density 0.2 \\
      --target merged
    python -m recipes.merge --config merge.json      # the same settings in a file; one is written beside every merge

Linear, task arithmetic, SLERP, NuSLERP, Karcher, TIES, DARE, DELLA, Breadcrumbs, Model Stock, SCE, RAM and more:
`jaxlm.merge.methods`. Folders of any architecture are merged by the names of their tensors; run folders and GGUF files
join under the names that the folders beside them use. The merged folder has the configuration and the tokenizer of the
first model, and a card (README.md) that says what it is made of; it appears whole or not at all.

`--search.steps 4` evaluates every combination of weights that are multiples of 1/4 and sum to 1 (with
`--search.scales 0.5 1` each at these scales of the task vector) and writes the best: decoders by bits per byte of the
texts `--search.held-out`, retrievers by `--search.measure` on the BEIR folders `--search.data`. `--search.kind losses`
weighs each model by its loss on the texts instead (LM-Cocktail). Each candidate is written to disk, then removed.

Run folders and GGUF files are exported beside the target first, whole and in float32; of a retriever's run its export
is taken. Minutes on a laptop CPU for 1 GB; with several devices each merges a part of every tensor. Left out: layers of
different models in one (passthrough).
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.tokenizer import JSON_FILE, Tokenizer
from jaxlm.eval.merge_measures import Measure, retrieval_measure, text_loss, text_measure
from jaxlm.merge.methods import METHODS
from jaxlm.merge.search import SearchConfig, candidates, check_search, from_losses
from jaxlm.merge.spec import MergeConfig, check_models
from jaxlm.merge.stream import merge_stream
from jaxlm.merge.tensors import check_same
from jaxlm.model.safetensors_io import (
    COMPANIONS,
    Stored,
    check_new_folder,
    new_folder,
    open_checkpoint,
    write_checkpoint,
    write_json,
)
from jaxlm.train.pretrained import export_pretrained, load_pretrained, open_pretrained

PROG = "recipes.merge"
CARD = "README.md"
SETTINGS = "merge.json"
EXPORTED = "exported"  # of a retriever's run
FORMATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64,
           "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
BOOKKEEPING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One merge."""

    models: tuple[str, ...] = ()        # Hugging Face folders, run folders, .gguf files
    base: str = ""                      # what task vectors start from; methods without them take none
    target: Path = Path("merged")       # a new Hugging Face folder
    merge: MergeConfig = field(default_factory=MergeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "kormo"] = "llama"  # names for run folders
    max_shard_gb: float = 1.0           # size of a written file at most
    other_tokens: bool = False          # merge models whose tokenizers give tokens other ids
    overwrite: bool = False             # replace an earlier merge in `target`

    def __post_init__(self) -> None:
        places = [os.path.realpath(one) for one in self.models]
        if len(set(places)) < len(places):
            raise ValueError("--models names a checkpoint twice; give it a larger weight instead")
        if self.base and os.path.realpath(self.base) in places:
            raise ValueError(f"--base {self.base} is one of --models as well; its task vector is zero, so leave it out")
        if not self.max_shard_gb > 0:
            raise ValueError(f"--max-shard-gb must be positive, got {self.max_shard_gb}")


class Checkpoint(NamedTuple):
    """An open checkpoint."""

    folder: Path
    tensors: dict[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]


@contextmanager
def open_all(config: Config) -> Iterator[dict[str, Checkpoint]]:
    """Every model, and the base last, by the name it was given; what is no Hugging Face folder becomes one first."""
    with ExitStack() as stack:
        opened = {}
        for name in (*config.models, *([config.base] if config.base else [])):
            folder = Path(name)
            if (folder / EXPORTED / "config.json").is_file():
                folder = folder / EXPORTED
                log.info("%s is a retriever's run: its export is merged", name)
            elif (folder / "checkpoints").is_dir() or not (folder / "config.json").is_file():
                model = load_pretrained(name)
                folder = stack.enter_context(scratch_folder(config.target))
                export_pretrained(model, folder / "model", architecture=config.architecture)
                folder = folder / "model"
            tensors, read = stack.enter_context(open_checkpoint(folder))
            opened[name] = Checkpoint(folder, {key: abstract(key, tensor, name) for key, tensor in tensors.items()},
                                      read)
        yield opened


def abstract(name: str, tensor: Stored, where: str) -> jax.ShapeDtypeStruct:
    """Shape and type of a stored tensor. ValueError for a number format that has no arithmetic here."""
    if tensor.dtype not in FORMATS:
        raise ValueError(f"{where}: tensor {name} is stored as {tensor.dtype}, which is not merged; formats: "
                         f"{', '.join(FORMATS)}")
    return jax.ShapeDtypeStruct(tensor.shape, FORMATS[tensor.dtype])


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, on its disk, that vanishes."""
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}.tmp-", suffix=f"-{os.getpid()}") as folder:
        yield Path(folder)


def merge(config: Config) -> None:
    """Compares all headers, then reads, merges and writes tensor by tensor."""
    if not config.models:
        raise ValueError("--models needs the checkpoints to merge")
    check_models(config.merge, len(config.models), bool(config.base))
    check_new_folder(config.target, overwrite=config.overwrite)
    measure = open_measure(config)
    with open_all(config) as opened:
        checkpoints = list(opened.values())
        named = {name: checkpoint.tensors for name, checkpoint in opened.items()}
        check_same(named, config.merge)
        check_tokens(opened, config.other_tokens)
        warn_of_configs(opened)
        if measure is not None:
            found = search(config, checkpoints, measure)
            config = replace(config, merge=found, search=SearchConfig())  # which merges again without a search
        with new_folder(config.target, overwrite=config.overwrite) as scratch:
            write(config, checkpoints, scratch)
            flags.save_config(config, scratch / SETTINGS)
            (scratch / CARD).write_text(card(config), encoding="utf-8")
    log.info("%d tensors of %d models written to %s", len(checkpoints[0].tensors), len(config.models), config.target)


def write(config: Config, checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    """The merged model, with what lies beside the weights of the first; the base is the last checkpoint."""
    names = sorted(checkpoints[0].tensors)
    merged = merge_stream(names, lambda model, name: checkpoints[model].read(name), config.merge,
                          num_models=len(config.models), has_base=bool(config.base), labels=config.models,
                          mesh=make_mesh(MeshConfig()) if len(jax.devices()) > 1 else None)
    write_checkpoint(folder, {name: written(checkpoints[0].tensors[name], config.merge) for name in names}, merged,
                     max_shard_bytes=int(config.max_shard_gb * 1e9))
    copy_companions(checkpoints[0].folder, folder, config.merge.dtype)


def open_measure(config: Config) -> Measure | Callable[[Path], float] | None:
    """What a search goes by, opened before any work: a measure of candidates, or the loss of each model."""
    how = config.search
    if not how.asked:
        return None
    if how.kind == "grid":
        candidates(config.merge, how, len(config.models))
    else:
        check_search(config.merge)
    if how.data:
        return retrieval_measure(how.data, how.measure)
    make = text_loss if how.kind == "losses" else text_measure
    return make(tokenizer_of(config.models[0]), how.held_out, batch_size=how.batch_size, seq_len=how.seq_len)


def tokenizer_of(model: str) -> Tokenizer:
    """That of a decoder. ValueError for one without."""
    tokenizer = open_pretrained(model).tokenizer
    if tokenizer is None:
        raise ValueError(f"a search measures text, and {model} has no tokenizer")
    return tokenizer


def search(config: Config, checkpoints: Sequence[Checkpoint], measure: Measure | Callable[[Path], float]
           ) -> MergeConfig:
    """The best candidate, each measured and shown; or the weights that the losses of the models give."""
    if not isinstance(measure, Measure):
        losses = [measure(checkpoint.folder) for checkpoint in checkpoints[:len(config.models)]]
        found = from_losses(config.merge, losses, config.search.temperature)
        log.info("losses in nats a token: %s; weights %s", " ".join(f"{loss:.4f}" for loss in losses), told(found))
        return found
    tried, values = candidates(config.merge, config.search, len(config.models)), []
    for one in tried:
        with scratch_folder(config.target) as folder:
            write(replace(config, merge=one), checkpoints, folder)
            values.append(measure.of(folder))
        log.info("weights %s: %s %.4f", told(one), measure.name, values[-1])
    best = measure.best(values)
    log.info("best of %d candidates: weights %s", len(tried), told(tried[best]))
    return tried[best]


def told(config: MergeConfig) -> str:
    """Weights and scale, for the log."""
    return (" ".join(f"{weight:.3g}" for weight in config.weights)
            + ("" if config.scale is None else f", scale {config.scale:g}"))


def check_tokens(opened: dict[str, Checkpoint], allowed: bool) -> None:
    """ValueError for tokens that have another id in another model, and ids that are other tokens: embeddings would mix.

    What is compared is `tokenizer.json`, where it is there. Tokens that a model has not are said.
    """
    vocabularies = {name: vocabulary(checkpoint.folder / JSON_FILE) for name, checkpoint in opened.items()
                    if (checkpoint.folder / JSON_FILE).is_file()}
    first, *others = vocabularies or [None]
    for name in others:
        own, other = vocabularies[first], vocabularies[name]
        ids = set(own.values()) & set(other.values())
        mixed = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token)
                       and (own.get(token) in ids or other.get(token) in ids))
        said = f"the tokenizers of {first} and {name}: {len(mixed)} tokens"
        if mixed and not allowed:
            raise ValueError(f"{said} have other ids or share theirs, {', '.join(map(repr, mixed[:3]))} among them, so "
                             "that embeddings would be mixed; --other-tokens merges all the same")
        if own != other:
            log.warning("%s have other ids, %d are in one only; that of the first is kept", said,
                        len(own.keys() ^ other.keys()))


def vocabulary(path: Path) -> dict[str, int]:
    """Token to id."""
    return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)


def written(tensor: jax.ShapeDtypeStruct, config: MergeConfig) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type in the merged file."""
    floats = jnp.issubdtype(tensor.dtype, jnp.floating)
    return tensor.shape, jnp.dtype(config.dtype if floats and config.dtype else tensor.dtype)


def warn_of_configs(opened: dict[str, Checkpoint]) -> None:
    """Says in which fields the models' config.json differ: the first one's are kept."""
    values = {name: json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
              for name, checkpoint in opened.items()}
    first, *others = values
    for name in others:
        fields = sorted(key for key in values[first].keys() | values[name].keys()
                        if key not in BOOKKEEPING and values[first].get(key) != values[name].get(key))
        if fields:
            log.warning("config.json of %s differs from that of %s, which is kept, in: %s", name, first,
                        ", ".join(f"{key} ({values[name].get(key)!r}, {values[first].get(key)!r})" for key in fields))


def copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Configuration, tokenizer and modules of sentence-transformers, as they lie beside the first model's weights."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and str(name) in COMPANIONS:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, target / name)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype:
        values = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")} | {"dtype": dtype}
    write_json(values, target / "config.json")


def card(config: Config) -> str:
    """What the merged model is made of, in Markdown."""
    method, count = METHODS[config.merge.method], len(config.models)
    weights = [f" {weight} |" for weight in config.merge.weights or (f"1/{count}",) * count]
    rows = "\n".join(f"| {name} |{weight if method.weighted else ''}"
                     for name, weight in zip(config.models, weights, strict=True))
    head = "| model | weight |\n| --- | --- |" if method.weighted else "| model |\n| --- |"
    notes = " ".join([*([f"The base is {config.base}."] if config.base else []),
                      *(["Rules give some tensors other values, see below."] if config.merge.rules else [])])
    settings = json.dumps(flags.to_json(config.merge), indent=2)
    return (f"---\ntags:\n- merge\n- jaxlm\n---\n\n# {config.target.name}\n\nMerged by `recipes.merge` of jaxlm with "
            f"the method {config.merge.method}. {notes}\n\n{head}\n{rows}\n\n"
            f"```json\n{settings}\n```\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(merge, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
