"""Standard tasks, by lm-evaluation-harness (Gao et al.), on a model of ours: accuracies and perplexities in a table.

    python -m recipes.evaluate --model runs/demo                               the embedded facts; needs no network
    python -m recipes.evaluate --model runs/demo --tasks hellaswag arc_easy --limit 100
    python -m recipes.evaluate --model MODEL --tasks kobest haerae --num-fewshot 5 --output scores.json
    python -m recipes.evaluate --model MODEL --tasks mine --tasks-path folder/    with mine.yaml there; needs no network
    python -m recipes.evaluate --model MODEL --tasks gsm8k --chat                   by the model's chat template

MODEL is a run folder, a Hugging Face folder or a .gguf file. The embedded tasks ask for facts of the embedded text, and
for facts that it leaves out (`jaxlm.eval.fact_tasks`). KORMo (arXiv 2510.09426) is measured on arc, boolq, copa,
hellaswag, mmlu, openbookqa, piqa and social_iqa, and in Korean on haerae, kobest, kmmlu and more; shot counts are
those of the tasks unless `--num-fewshot` says otherwise. The harness fetches data sets by itself, so tasks of its own
need a network; its own `hf` backend gives the same log-likelihoods to 1e-4. Left out: several devices; forward passes
that choices of one token could share.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.data.tokenizer import JSON_NAMES_FILE
from jaxlm.eval.fact_tasks import TASKS, write_fact_tasks
from jaxlm.eval.harness import HarnessModel, harness_scores, open_tasks
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.generate.prompts import Reader
from jaxlm.model.cache import CacheDtype
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained

PROG = "recipes.evaluate"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    model: Path = Path("runs/demo")      # a run folder, a Hugging Face folder or a .gguf file
    tasks: tuple[str, ...] = tuple(TASKS)  # names of tasks, groups or tags; a pattern such as mmlu_* names several
    tasks_path: Path | None = None       # a folder with further tasks
    limit: int | None = None             # documents of each task
    num_fewshot: int | None = None       # examples before each document; default: what the task says
    output: Path | None = None           # .json: everything that was measured
    samples: bool = False                # output: each document's requests and answers, too
    overwrite: bool = False              # replace an output
    chat: bool = False                   # tasks are conversations, by the model's chat template
    system: str = ""                     # the system message of a conversation
    batch_size: int = 8
    max_length: int | None = None        # positions that a text may use; default: those of the model
    prefix: str = ""                     # the token before texts without context; default: as transformers has it
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache_dtype: CacheDtype = "float32"
    bootstraps: int = 1000               # for standard errors that have no formula
    seed: int = 0                        # of sampled texts

    def __post_init__(self) -> None:
        for wrong, message in (
            (not self.tasks, "name tasks; lm-eval ls tasks lists them"),
            (self.tasks_path and self.tasks == tuple(TASKS), "tasks_path has no effect on the embedded tasks; name "
             "--tasks"),
            (len(set(self.tasks)) < len(self.tasks), "tasks names one twice"),
            (self.limit is not None and self.limit < 1, f"limit must be at least 1, got {self.limit}"),
            ((self.num_fewshot or 0) < 0, f"num_fewshot must not be negative, got {self.num_fewshot}"),
            (self.bootstraps < 0, f"bootstraps must not be negative, got {self.bootstraps}"),
            (self.batch_size < 1, f"batch_size must be positive, got {self.batch_size}"),
            (self.output and self.output.suffix != ".json", f"output {self.output} must end in .json"),
            (self.samples and not self.output, "samples has no effect without output"),
            (self.overwrite and not self.output, "overwrite has no effect without output"),
            (self.system and not self.chat, "system has no effect without chat"),
        ):
            if wrong:
                raise ValueError(message)


PRESETS = {"default": Config()}


def prefix_id(config: Config, opened: Pretrained) -> int:
    """The token before texts without context: bos, and eos where a Hugging Face folder says that there is no bos."""
    if config.prefix:
        return opened.tokenizer.token_id(config.prefix)
    names = config.model / JSON_NAMES_FILE
    if not opened.start and names.is_file() and json.loads(names.read_bytes()).get("bos_token") is None:
        return opened.tokenizer.eos_id
    return opened.tokenizer.bos_id


def make_harness_model(config: Config, opened: Pretrained) -> HarnessModel:
    """The model without its weights, checked."""
    engine = Engine(model=build(opened.config, ComputeConfig(dtype=config.dtype)), params=None,
                    eos_id=opened.tokenizer.eos_id, tokenizer=opened.tokenizer,
                    config=EngineConfig(batch_size=config.batch_size, cache_dtype=config.cache_dtype))
    ends = Reader(opened.tokenizer, opened.start, opened.chat).turn_end() if config.chat else ()
    return HarnessModel(engine, opened.start, prefix_id(config, opened), config.max_length or
                        opened.config.max_positions, opened.chat, ends, config.seed)


def measure(config: Config, opened: Pretrained) -> tuple[dict[str, Any], str]:
    """The scores and a table of them; weights are loaded when everything else is checked."""
    with tempfile.TemporaryDirectory() as embedded:
        write_fact_tasks(Path(embedded), [name for name in TASKS if any(
            fnmatchcase(name, one) for one in config.tasks)])
        folders = [Path(embedded), *([config.tasks_path] if config.tasks_path else [])]
        model, manager = make_harness_model(config, opened), open_tasks(config.tasks, *folders)
        loaded = load_weights(config.model, opened, dtype=config.dtype)
        model = model.with_params(jax.tree.map(jnp.asarray, loaded.params))
        return harness_scores(
            model, config.tasks, manager, limit=config.limit, num_fewshot=config.num_fewshot, chat=config.chat,
            system=config.system, samples=config.samples, bootstraps=config.bootstraps)


def run(config: Config) -> None:
    """Checks everything, loads, measures."""
    if config.output and config.output.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    opened = open_pretrained(config.model)
    if opened.tokenizer is None:
        raise ValueError(f"--model {config.model} has no tokenizer")
    if config.chat and opened.chat is None:
        raise ValueError(f"--chat: {config.model} brings no chat template")
    found, table = measure(config, opened)
    if config.limit:
        log.warning("only %d documents of each task: no result to report", config.limit)
    print(table)
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.output) as scratch:
            scratch.write_text(json.dumps(found | {"model": str(config.model)}, ensure_ascii=False, indent=2,
                                          default=str) + "\n", encoding="utf-8")
        log.info("written to %s", config.output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
