"""Convert a model between run folders, Hugging Face folders and GGUF files, and let it write a line as a check.

    python -m recipes.convert --source runs/demo --target exported --prompt "The currency of Japan is"
    python -m recipes.convert --source SmolLM2-135M-Instruct.Q4_1.gguf --target smollm2 --dtype bfloat16
    python -m recipes.pretrain --preset base --init smollm2 --data.path more.jsonl.gz

The target is a Hugging Face folder that `transformers` opens; it appears whole or not at all. Seconds on a laptop for
models that fit into its memory. Left out: writing GGUF.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.core.command import run_command
from jaxlm.core.log import human_count
from jaxlm.core.tree import count_parameters
from jaxlm.generate.engine import Engine, generate
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import Pretrained, export_pretrained, load_pretrained

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


def complete(config: Config, model: Pretrained) -> str:
    """The greedy continuation of the prompt."""
    if model.tokenizer is None:
        raise ValueError(f"--prompt needs a tokenizer, and {config.source} has none")
    engine = Engine(model=build(model.config), params=jax.tree.map(jnp.asarray, model.params),
                    eos_id=model.tokenizer.eos_id, tokenizer=model.tokenizer)
    prompt = [*model.start, *model.tokenizer.encode(config.prompt)]
    return generate(engine, [prompt], SamplingConfig(max_new_tokens=config.max_new_tokens))[0].text


def convert(config: Config) -> None:
    """Loads, shows, writes."""
    model = load_pretrained(config.source)
    log.info("%s: %s parameters, vocabulary of %d, tokenizer of %s, %s chat template", config.source,
             human_count(count_parameters(model.params)), model.config.vocab_size,
             model.tokenizer.vocab_size if model.tokenizer else "no", "a" if model.chat else "no")
    if config.prompt:
        print(f"{config.prompt} | {complete(config, model)}")
    export_pretrained(model, config.target, architecture=config.architecture, dtype=config.dtype,
                      overwrite=config.overwrite)
    log.info("written to %s", config.target)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(convert, PRESETS, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
