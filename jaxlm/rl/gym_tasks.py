"""Tasks of reasoning-gym (arXiv 2505.24760), which has generators for logic, algebra, graphs and games.

Only those of one right answer convert: others come with a judge of their own in Python, which `Task.judge` has no name
for. Needs the extra `gym`.
"""

import types
from dataclasses import dataclass

from jaxlm.core.config import nearest
from jaxlm.core.extras import extra
from jaxlm.reward.verify import numeric_equal
from jaxlm.rl.arithmetic import CALCULATOR
from jaxlm.rl.task import Task


@dataclass(frozen=True, kw_only=True)
class GymConfig:
    """A generator of reasoning-gym with its own settings."""

    name: str
    count: int = 1000
    seed: int = 0
    calculator: bool = False  # on offer; without it a task has no tools

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def gym_tasks(config: GymConfig) -> list[Task]:
    """Tasks without teacher. ValueError for a name that is unknown or has a judge of its own, or a missing package."""
    gym, factory, dataset = _package()
    if config.name not in factory.DATASETS:
        raise ValueError(f"reasoning-gym has no {config.name!r}{nearest(config.name, factory.DATASETS)}; "
                         f"those of one right answer: {', '.join(_convertible(factory, dataset))}")
    if config.name not in _convertible(factory, dataset):
        raise ValueError(f"reasoning-gym's {config.name!r} accepts several answers and judges them with a program of "
                         f"its own; those of one right answer: {', '.join(_convertible(factory, dataset))}")
    entries = gym.create_dataset(config.name, size=config.count, seed=config.seed)
    tools = (CALCULATOR.name,) if config.calculator else ()
    # One judge for all: where every answer is a number, 7 and 7.0 are the same.
    judge = "numeric" if all(numeric_equal(one["answer"], [one["answer"]]) for one in entries) else "exact"
    return [Task(id=f"gym-{config.name}-{config.seed}-{index}", question=one["question"].strip(), tools=tools,
                 answers=(one["answer"],), judge=judge, domain=config.name) for index, one in enumerate(entries)]


def _convertible(factory: types.ModuleType, dataset: types.ModuleType) -> list[str]:
    """Names of generators whose judge is that of the base class: the answer as it stands."""
    base = dataset.ProceduralDataset.score_answer
    return [name for name, (cls, _) in factory.DATASETS.items() if cls.score_answer is base]


def _package() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    whole, factory, dataset = (extra(f"reasoning_gym{part}", "gym") for part in ("", ".factory", ".dataset"))
    return whole, factory, dataset
