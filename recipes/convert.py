"""Convert a model between run folders, Hugging Face folders and GGUF files, and let it write a line as a check.

    python -m recipes.convert --source runs/demo --target exported --prompt "The currency of Japan is"
    python -m recipes.convert --source SmolLM2-135M-Instruct.Q4_1.gguf --target smollm2 --dtype bfloat16
    python -m recipes.pretrain --preset base --init-from smollm2 --tokenizer.path smollm2 --data.path more.jsonl.gz

The target is a Hugging Face folder that `transformers` opens; it appears whole or not at all. Seconds on a laptop for
models that fit into its memory. Left out: writing GGUF.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import config as flags
from jaxlm.core.log import human_count, setup_logging
from jaxlm.core.tree import count_parameters
from jaxlm.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer, save_tokenizer, tokenizer_from_files
from jaxlm.generate.engine import Engine, generate
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.gguf import gguf_special_tokens, gguf_tokenizer_json, load_gguf
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.model.safetensors_io import COMPANIONS
from jaxlm.train.checkpoint import saved_params, saved_run

PROG = "recipes.convert"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One conversion."""

    source: Path = Path("runs/demo")    # a run folder, a Hugging Face folder or a .gguf file
    target: Path = Path("exported")     # a new Hugging Face folder
    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "kormo"] = "llama"  # under whose names
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the written weights
    prompt: str = ""                    # continue this greedily before writing
    max_new_tokens: int = 32
    overwrite: bool = False             # replace an earlier export in `target`


PRESETS = {"demo": Config()}


class Loaded(NamedTuple):
    """A model with its tokenizer; None where the source has none that can be read."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    start: tuple[int, ...] = ()  # ids before every text: our runs train on documents that begin with BOS


def load(source: Path) -> Loaded:
    """Reads any of the three kinds; ValueError when `source` is none of them or damaged."""
    if source.suffix == ".gguf":
        tokenizer = JsonTokenizer(gguf_tokenizer_json(source).encode(), **gguf_special_tokens(source))
        return Loaded(*load_gguf(source), tokenizer)
    if (source / "checkpoints").is_dir():
        saved, files = saved_run(source)
        model = flags.from_json(ModelConfig, saved["model"], "model.")
        tokenizer = tokenizer_from_files(files)
        params = saved_params(source, jax.eval_shape(build(model).init, jax.random.key(0)))
        return Loaded(model, params, tokenizer, (tokenizer.bos_id,))
    if (source / "config.json").is_file():
        found = (source / "tokenizer.json").is_file() or (source / "tokenizer.model").is_file()
        return Loaded(*load_hf(source), load_tokenizer(source) if found else None)
    raise ValueError(f"--source {source}: neither a .gguf file nor a run folder (checkpoints/) nor a Hugging Face "
                     "folder (config.json)")


def complete(config: Config, model: Loaded) -> str:
    """The greedy continuation of the prompt."""
    if model.tokenizer is None:
        raise ValueError(f"--prompt needs a tokenizer, and {config.source} has none")
    engine = Engine(model=build(model.config), params=jax.tree.map(jnp.asarray, model.params),
                    eos_id=model.tokenizer.eos_id, tokenizer=model.tokenizer)
    prompt = [*model.start, *model.tokenizer.encode(config.prompt)]
    return generate(engine, [prompt], SamplingConfig(max_new_tokens=config.max_new_tokens))[0].text


def convert(config: Config) -> None:
    """Loads, shows, writes."""
    model = load(config.source)
    log.info("%s: %s parameters, vocabulary of %d, tokenizer of %s", config.source,
             human_count(count_parameters(model.params)), model.config.vocab_size,
             model.tokenizer.vocab_size if model.tokenizer else "no")
    if config.prompt:
        print(f"{config.prompt} | {complete(config, model)}")
    with tempfile.TemporaryDirectory() as scratch:
        ids, files = None, []
        if model.tokenizer:
            save_tokenizer(model.tokenizer, Path(scratch))
            ids = {f"{name}_token_id": getattr(model.tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
            files = [path for path in Path(scratch).iterdir() if path.name in COMPANIONS]  # others know no byte marker
        save_hf(config.target, model.config, model.params, architecture=config.architecture, dtype=config.dtype,
                token_ids=ids, files=files, overwrite=config.overwrite)
    log.info("written to %s", config.target)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    setup_logging()
    config = flags.parse(PRESETS, argv, prog=PROG, description=__doc__)
    try:
        convert(config)
    except (ValueError, OSError) as error:
        flags.fail(error, PROG)


if __name__ == "__main__":
    main()
