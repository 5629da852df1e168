"""A teacher's trajectories: let a model solve tasks with tools, and keep what is right.

    python -m recipes.teacher --source MODEL --tasks gsm8k:train.jsonl --output taught.jsonl --samples 4
    python -m recipes.rl_distill --init STUDENT --tasks.train taught.jsonl

Writes the tasks that were solved, one JSON object a line, each with the shortest attempt that is right, came to its end
and made no faulty call (arXiv 2510.18383, as far as its first step is published). MODEL is a run folder, a Hugging Face
folder or a GGUF file. Tasks are attempted `chunk` at a time; a run that was killed goes on behind the last chunk.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.generate.engine import Engine
from jaxlm.generate.requests import Report
from jaxlm.generate.results import Results
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build
from jaxlm.reward.compose import compose
from jaxlm.reward.presets import PRESETS as REWARDS
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv, episode_template
from jaxlm.rl.rollout import Attempt, RolloutConfig, make_prompts, rollout
from jaxlm.rl.score import score
from jaxlm.rl.search_tools import SearchConfig
from jaxlm.rl.task_set import open_task_set
from jaxlm.rl.teacher import taught
from jaxlm.train.pretrained import load_weights, open_pretrained

PROG = "recipes.teacher"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Who solves what."""

    source: Path = Path("runs/sft")
    tasks: tuple[str, ...] = ("words:train?count=200",)
    search: SearchConfig = field(default_factory=SearchConfig)
    output: Path = Path("taught.jsonl")
    overwrite: bool = False
    samples: int = 4                    # attempts at each task
    chunk: int = 64                     # tasks between two looks at the disk
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(temperature=0.6, top_p=0.95, top_k=20))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 42

    def __post_init__(self) -> None:
        if min(self.samples, self.chunk) < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {self.samples} and {self.chunk}")
        if self.output.suffix != ".jsonl":
            raise ValueError(f"output {self.output} must end in .jsonl")


PRESETS = {"default": Config()}


def run(config: Config) -> None:
    """Checks everything, loads, attempts, writes."""
    opened = open_pretrained(config.source)
    if opened.tokenizer is None:
        raise ValueError(f"--source {config.source} has no tokenizer")
    found = open_task_set(config.tasks, config.search)
    tasks, tools = found.tasks(), found.tools
    template = episode_template(config.env, opened.chat, opened.tokenizer)
    dialogue = Dialogue(tools, template, opened.tokenizer, config.env)
    prompts = make_prompts(dialogue, tasks, config.rollout.max_prompt)
    log.info("%d tasks, %d of them with a prompt of at most %d tokens", len(tasks), len(prompts),
             config.rollout.max_prompt)
    settings = {name: value for name, value in flags.to_json(config).items() if name not in ("output", "overwrite")}
    work = config.output.with_suffix(".attempts.jsonl")
    if config.output in map(Path, config.tasks):
        raise ValueError(f"--output {config.output} is a file of tasks that is read; name another")
    if config.output.exists() and not work.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    results = Results(work, {name: json.dumps(value) for name, value in settings.items()}, overwrite=config.overwrite)
    try:
        _attempt_all(config, opened, tasks, prompts, tools, dialogue, results)
    finally:
        results.close()
    solved = [line for record in results.records for line in record["tasks"]]
    with replacing(config.output) as scratch:
        scratch.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in solved), encoding="utf-8")
    log.info("%d of %d tasks solved; written to %s", len(solved), len(prompts), config.output)


def _attempt_all(config, opened, tasks, prompts, tools, dialogue, results: Results) -> None:
    """Chunk by chunk, those that are missing."""
    loaded = load_weights(config.source, opened)
    engine = Engine(model=build(opened.config, config.compute), params=jax.tree.map(jnp.asarray, loaded.params),
                    eos_id=opened.tokenizer.eos_id, tokenizer=opened.tokenizer, config=config.rollout.engine)
    reward, names, report = compose(REWARDS["sparse"], Trajectory._fields), [tool.name for tool in tools], Report()
    numbers, done = list(prompts), {record["chunk"] for record in results.records}
    with ToolEnv(tools, config.env) as env:
        for chunk in range(0, len(numbers), config.chunk):
            if chunk in done:
                continue
            attempts = [Attempt(i, i, sample, config.seed + i * config.samples + sample, prompts[i])
                        for i in numbers[chunk:chunk + config.chunk] for sample in range(config.samples)]
            episodes = rollout(engine, env, dialogue, tasks, attempts, config.rollout, report=report)
            solved = taught(tasks, episodes, score(episodes, tasks, names, reward, config.rollout.max_response))
            record = {"chunk": chunk, "tasks": [task.to_json() for task in solved]}
            results.append(record)
            results.records.append(record)
            log.info("%d of %d tasks attempted, %d of these %d solved", min(chunk + config.chunk, len(numbers)),
                     len(numbers), len(solved), len(attempts) // config.samples)
    if report.tokens:
        log.info("%s", report.line())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, PRESETS, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
