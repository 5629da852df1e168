"""What teachers of tasks did, as conversations: data for `recipes.sft`, the baseline that imitates.

    python -m recipes.demonstrations --tasks "words:train?count=4000" --output runs/words.jsonl
    python -m recipes.sft --data.path runs/words.jsonl --data.held-out runs/words_held_out.jsonl --template hermes

Tasks are named as in `jaxlm.rl.task_sources`; those without a teacher are left out, and counted.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxlm.core.command import run_command
from jaxlm.rl.demonstration import write_conversations
from jaxlm.rl.env import EnvConfig
from jaxlm.rl.search_tools import SearchConfig
from jaxlm.rl.task_set import open_task_set
from jaxlm.rl.task_sources import statistics

PROG = "recipes.demonstrations"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is written."""

    tasks: tuple[str, ...] = ("words:train?count=2000",)
    search: SearchConfig = field(default_factory=SearchConfig)
    output: Path = Path("runs/demonstrations.jsonl")
    question: str = EnvConfig().question  # as `env.question` of recipes.rl_distill
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise ValueError(f"question must hold {{question}} once, got {self.question!r}")


def run(config: Config) -> None:
    """Reads the tasks and writes the file."""
    if config.output.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    found = open_task_set(config.tasks, config.search)
    tasks, tools = found.tasks(), found.tools
    shown = [task for task in tasks if task.teacher]
    if not shown:
        raise ValueError("none of these tasks has a teacher; recipes.teacher lets a model be one")
    count = write_conversations(config.output, shown, {tool.name: tool for tool in tools}, question=config.question)
    facts = statistics(shown)
    log.info("%d conversations in %s, %d tasks without a teacher left out", count, config.output,
             len(tasks) - len(shown))
    log.info("calls a task: %s; tools: %s", facts.calls, facts.tools)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
