"""What attempts are made in, opened from settings: tasks with their prompts, tools, the chat template, the reward."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from jaxlm.data.chat_template import ChatTemplate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.reward.compose import RewardConfig, compose
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv, episode_template
from jaxlm.rl.evaluation import EvalSet, make_eval_set
from jaxlm.rl.learner import Scene
from jaxlm.rl.rollout import make_prompts
from jaxlm.rl.search_tools import SearchConfig
from jaxlm.rl.task_set import open_task_set

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is attempted; see `jaxlm.rl.task_sources` for the lines that name tasks."""

    train: tuple[str, ...] = ("words:train?count=2000",)
    held_out: tuple[str, ...] = ("words:held_out?count=60", "words:unseen?count=60")  # a set each
    search: SearchConfig = field(default_factory=SearchConfig)


class OpenedScene(NamedTuple):
    """A scene, held-out tasks in it, and how conversations are written."""

    scene: Scene
    sets: dict[str, EvalSet]
    template: ChatTemplate


def open_scene(config: TaskConfig, env: EnvConfig, reward: RewardConfig, own: ChatTemplate | None, tokenizer: Tokenizer,
               *, max_prompt: int, at_least: int) -> OpenedScene:
    """Everything that a user may have got wrong about tasks, tools and templates is a ValueError here.

    Tasks with a prompt of more than `max_prompt` tokens are left out, with a warning; fewer than `at_least` are an
    error. `own`: the model's template.
    """
    parts, tools = open_task_set((*config.train, *config.held_out), config.search)
    train, held_out = list(chain.from_iterable(parts[:len(config.train)])), parts[len(config.train):]
    template = episode_template(env, own, tokenizer)
    log.info("chat template: %s", env.template or ("the model's own" if own else "hermes, for the model brings none"))
    dialogue = Dialogue(tools, template, tokenizer, env)
    prompts = make_prompts(dialogue, train, max_prompt)
    if len(prompts) < len(train):
        log.warning("%d of %d tasks are left out: their prompts are longer than rollout.max_prompt %d",
                    len(train) - len(prompts), len(train), max_prompt)
    if len(prompts) < at_least:
        raise ValueError(f"{len(prompts)} tasks are fewer than batch.prompts {at_least}")
    sets = {name: make_eval_set(dialogue, tasks, max_prompt)
            for name, tasks in zip(_set_names(config.held_out), held_out, strict=True)}
    scene = Scene(train, prompts, ToolEnv(tools, env), dialogue, compose(reward, Trajectory._fields),
                  tuple(term.weight for term in reward.terms))
    return OpenedScene(scene, sets, template)


def _set_names(specs: Sequence[str]) -> list[str]:
    """Without their options, where that still tells them apart."""
    short = [spec.partition("?")[0] for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)
