"""Merge checkpoints into one Hugging Face folder, tensor by tensor: no more than a few tensors are in memory.

    python -m recipes.merge --models finetuned-a finetuned-b --base original --merge.method ties --merge.density 0.2 \\
      --target merged
    python -m recipes.merge --config merge.json      # the same settings in a file; one is written beside every merge

Linear, task arithmetic, SLERP, NuSLERP, Karcher, TIES, DARE, DELLA, Breadcrumbs, Model Stock, SCE, RAM and more:
`jaxlm.merge.methods`. Folders of any architecture are merged by the names of their tensors; run folders and GGUF files
join under the names that the folders beside them use. The merged folder has the configuration and the tokenizer of the
first model, and a card (README.md) that says what it is made of; it appears whole or not at all.

`--search.steps 4` evaluates every combination of weights that are multiples of 1/4 and sum to 1 (with
`--search.scales 0.5 1` each at these scales of the task vector) in bits per byte of `--search.held-out`, and writes the
best; for decoders that fit into memory with their candidates. Minutes on a laptop CPU for 1 GB; with several devices
each merges a part of every tensor. Left out: layers of different models in one (passthrough).
"""

import json
import logging
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
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.pipeline import eval_batches
from jaxlm.data.sources import open_source, parse_source
from jaxlm.eval.likelihood import bits_per_byte
from jaxlm.merge.search import SearchConfig, candidates
from jaxlm.merge.spec import MergeConfig, check_models
from jaxlm.merge.stream import merge_stream
from jaxlm.merge.tensors import check_same
from jaxlm.model.decoder import build
from jaxlm.model.hf import tree_from_hf
from jaxlm.model.hf_config import read_config
from jaxlm.model.safetensors_io import COMPANIONS, Stored, new_folder, open_checkpoint, write_checkpoint, write_json
from jaxlm.train.pretrained import export_pretrained, load_pretrained, open_pretrained
from jaxlm.train.run import make_loss

PROG = "recipes.merge"
CARD = "README.md"
SETTINGS = "merge.json"
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
    overwrite: bool = False             # replace an earlier merge in `target`

    def __post_init__(self) -> None:
        if len(set(self.models)) < len(self.models):
            raise ValueError("--models names a checkpoint twice; give it a larger weight instead")
        if self.base in self.models:
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
    named = [*config.models, *([config.base] if config.base else [])]
    folders = [name for name in named if (Path(name) / "config.json").is_file()
               and not (Path(name) / "checkpoints").is_dir()]
    parent = config.target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch, opened = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent))), {}
        for i, name in enumerate(named):
            folder = Path(name)
            if name not in folders:
                folder = scratch / str(i)
                export_pretrained(load_pretrained(name), folder, architecture=config.architecture)
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


def merge(config: Config) -> None:
    """Compares all headers, then reads, merges and writes tensor by tensor."""
    if not config.models:
        raise ValueError("--models needs the checkpoints to merge")
    check_models(config.merge, len(config.models), bool(config.base))
    with open_all(config) as opened:
        checkpoints = list(opened.values())
        named = {name: checkpoint.tensors for name, checkpoint in opened.items()}
        check_same(named, config.merge)
        warn_of_configs(opened)
        if config.search.steps:
            config = replace(config, merge=search(config, checkpoints))
        names = sorted(checkpoints[0].tensors)
        merged = stream(config, checkpoints, names, make_mesh(MeshConfig()) if len(jax.devices()) > 1 else None)
        with new_folder(config.target, overwrite=config.overwrite) as scratch:
            write_checkpoint(scratch, {name: written(checkpoints[0].tensors[name], config.merge) for name in names},
                             merged, max_shard_bytes=int(config.max_shard_gb * 1e9))
            copy_companions(checkpoints[0].folder, scratch, config.merge.dtype)
            flags.save_config(config, scratch / SETTINGS)
            (scratch / CARD).write_text(card(config), encoding="utf-8")
    log.info("%d tensors of %d models written to %s", len(names), len(config.models), config.target)


def stream(config: Config, checkpoints: Sequence[Checkpoint], names: Sequence[str], mesh: Mesh | None = None
           ) -> Iterator[tuple[str, np.ndarray]]:
    """The merged tensors; the base is the last checkpoint."""
    return merge_stream(names, lambda model, name: checkpoints[model].read(name), config.merge,
                        num_models=len(config.models), has_base=bool(config.base), labels=config.models,
                        mesh=mesh)


def search(config: Config, checkpoints: Sequence[Checkpoint]) -> MergeConfig:
    """The candidate with the fewest bits per byte of the held-out text; each is measured and shown."""
    tried = candidates(config.merge, config.search, len(config.models))
    folder = checkpoints[0].folder
    opened, (architecture, shape) = open_pretrained(folder), read_config(folder)
    if opened.tokenizer is None:
        raise ValueError(f"a search measures text, and {folder} has no tokenizer")
    documents = [source[i] for source in map(open_source, map(parse_source, config.search.held_out))
                 for i in range(len(source))]
    batches, num_bytes = eval_batches(documents, opened.tokenizer, batch_size=config.search.batch_size,
                                      seq_len=config.search.seq_len)
    mesh, loss = make_mesh(MeshConfig(data=1), jax.devices()[:1]), make_loss(build(shape))
    nll = jax.jit(lambda params, batch: loss(params, batch, None)[1]["loss"])
    found = []
    with jax.set_mesh(mesh):
        for one in tried:
            tensors = dict(stream(replace(config, merge=one), checkpoints, list(checkpoints[0].tensors)))
            params = jax.tree.map(jnp.asarray, tree_from_hf(shape, architecture, tensors.__getitem__))
            found.append(bits_per_byte(nll, params, batches, num_bytes, mesh))
            log.info("weights %s%s: %.4f bits per byte", " ".join(f"{weight:.3g}" for weight in one.weights),
                     "" if one.scale is None else f", scale {one.scale:g}", found[-1])
    best = int(np.argmin(found))
    log.info("best of %d candidates: weights %s", len(tried), " ".join(f"{one:.3g}" for one in tried[best].weights))
    return tried[best]


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
    weights = config.merge.weights or (f"1/{len(config.models)}",) * len(config.models)
    rows = "\n".join(f"| {name} | {weight} |" for name, weight in zip(config.models, weights, strict=True))
    base = f"The base is {config.base}." if config.base else ""
    settings = json.dumps(flags.to_json(config.merge), indent=2)
    return (f"---\ntags:\n- merge\n- jaxlm\n---\n\n# {config.target.name}\n\nMerged by `recipes.merge` of jaxlm with "
            f"the method {config.merge.method}. {base}\n\n| model | weight |\n| --- | --- |\n{rows}\n\n"
            f"```json\n{settings}\n```\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(merge, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
