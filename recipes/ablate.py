"""What a choice does: variants of a training run, the same seeds for each, compared on the same held-out measures.

    python -m recipes.ablate                                    documents of a row apart or not, three seeds
    python -m recipes.ablate --arguments="--preset smoke" --seeds 1 2 3 --folder runs/mix_ln \\
        --variants pre_ln= "mix_ln=--model.post-norm-layers 1" --tasks facts_ko facts_en
    python -m recipes.ablate --recipe sft --arguments="--init runs/demo" \\
        --variants whole= "lora=--lora.rank 8 --optim.lr 1e-3"

Each run is a process of the recipe with `--seed`, in FOLDER/VARIANT/seed_N; its measures are those of its last
evaluation, and of `--tasks` of lm-evaluation-harness (extra eval). A run that is there is not made again, one that was
interrupted goes on. Several processes may share a folder if their seeds or variants differ; called with all of them at
the end, the recipe writes FOLDER/summary.md and figure.png. Studies of KORMo (arXiv 2510.09426): docs/results.md.
"""

import json
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxlm.core.command import run_command, run_recipe, run_training_recipe
from jaxlm.core.files import replacing
from jaxlm.core.log import read_metrics
from jaxlm.eval.ablation import Scores, ablation_figure, ablation_table

PROG = "recipes.ablate"
OWN = ("--seed", "--folder", "--resume", "--overwrite", "--config")  # flags that this recipe gives
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared."""

    recipe: Literal["pretrain", "sft", "preference", "distill"] = "pretrain"
    arguments: str = "--preset smoke"    # flags of every run, behind an equals sign: --arguments="--preset smoke"
    # NAME=FLAGS, the first is what the others are compared with
    variants: tuple[str, ...] = ("masked=--pipeline.no-reset-positions",
                                 "unmasked=--pipeline.no-reset-positions --pipeline.no-mask-documents")
    seeds: tuple[int, ...] = (1, 2, 3)
    tasks: tuple[str, ...] = ()          # of lm-evaluation-harness, on the model at the end of a run
    measures: tuple[str, ...] = ()       # in the table; default: all that runs have
    folder: Path = Path("runs/ablation")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds needs different numbers, and one at least; got {self.seeds}")
        names = [one.partition("=")[0] for one in self.variants]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError("--variants needs two at least, NAME=FLAGS, each name once; got "
                             f"{', '.join(names) or 'none'}")
        for name, one in zip(names, self.variants, strict=True):
            if "=" not in one or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"--variants {one!r}: write NAME=FLAGS, the name of letters, digits, '_', '-' and '.'")
        for flags in self.flags().values():
            if own := [word for word in flags if word.partition("=")[0] in OWN]:
                raise ValueError(f"{own[0]} is given by {PROG} itself; leave it out")

    def flags(self) -> dict[str, list[str]]:
        """Of every variant."""
        return {name: [*shlex.split(self.arguments), *shlex.split(rest)]
                for name, _, rest in (one.partition("=") for one in self.variants)}


def measure(config: Config, name: str, flags: Sequence[str], seed: int) -> dict[str, float]:
    """The measures of a run, which is made if it is not there."""
    folder = config.folder / name / f"seed_{seed}"
    scores = folder / "task_scores.json"
    run_training_recipe(config.recipe, folder, *flags, "--seed", seed)
    found: dict[str, float] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        found |= {key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")}
    if config.tasks:
        run_recipe("evaluate", scores, "--model", folder, "--tasks", *config.tasks, "--output", scores)
        results = json.loads(scores.read_bytes())["results"]
        if missing := [task for task in config.tasks if task not in results]:
            raise ValueError(f"{scores} has no task {missing[0]}; delete it to measure again")
        found |= {f"{task}/{key.partition(',')[0]}": value for task in config.tasks
                  for key, value in results[task].items()
                  if isinstance(value, float) and not key.partition(",")[0].endswith("_stderr")}
    return found


def compare(config: Config) -> None:
    """All runs, seed by seed, then the table and the figure."""
    scores: dict[str, dict[int, dict[str, float]]] = {name: {} for name in config.flags()}
    for seed in config.seeds:
        for name, flags in config.flags().items():
            scores[name][seed] = measure(config, name, flags, seed)
    summarise(config, scores)


def summarise(config: Config, scores: Scores) -> None:
    """Table and figure of the measures that all runs have; ValueError names one that a run lacks."""
    runs = {f"{name}/seed_{seed}": run for name, seeds in scores.items() for seed, run in seeds.items()}
    first = next(iter(runs.values()))
    shared = [key for key in first if all(run.get(key) is not None for run in runs.values())]
    for key in sorted({key for run in runs.values() for key in run} - set(shared)):
        log.warning("%s is left out: not every run has it", key)
    measures = config.measures or shared
    if not measures:
        raise ValueError("no measure is in every run: evaluate them (held-out data) or name --tasks")
    if missing := [key for key in measures if key not in shared]:
        raise ValueError(f"--measures: no {missing[0]!r} in every run; there are {', '.join(shared)}")
    lines = [f"# {config.recipe} {config.arguments}", "", *(f"- {name}: `{shlex.join(flags)}`"
             for name, flags in config.flags().items()), "", ablation_table(scores, measures), ""]
    print("\n".join(lines))
    with replacing(config.folder / "summary.md") as scratch:
        scratch.write_text("\n".join(lines), encoding="utf-8")
    ablation_figure(config.folder / "figure.png", scores, measures)
    log.info("written: %s, figure.png", config.folder / "summary.md")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(compare, {"default": Config()}, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
