"""An RL run from its folder to its end: `train.run` for runs that learn from their own attempts.

    prepare (checks everything, writes nothing) -> claim the folder -> start or resume -> fit_rl
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from jaxlm.core import config as flags
from jaxlm.core.distributed import DistributedConfig, is_primary
from jaxlm.core.log import MetricLog, human_count
from jaxlm.core.tree import count_parameters, select
from jaxlm.rl.evaluation import EvalSet, greedy, make_evaluation
from jaxlm.rl.learner import PolicyLearner
from jaxlm.rl.loop import Progress, RLLoopConfig, fit_rl
from jaxlm.rl.policy_params import RULES, Additions
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer
from jaxlm.train.folder import clear_folder
from jaxlm.train.loop import STOPPED
from jaxlm.train.measure import Ledger
from jaxlm.train.run import joined
from jaxlm.train.state import TrainState, state_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has been checked and opened; nothing of it is written yet."""

    folder: Path
    config: Any                # what is saved of it: a frozen dataclass
    files: dict[str, bytes]    # of the tokenizer and the chat template
    params: Any                # to start from, given away then; None: a run that is resumed
    abstract: TrainState       # the shapes and shardings of its state
    additions: Additions
    tx: optax.GradientTransformation
    learner: PolicyLearner
    sets: Mapping[str, EvalSet]
    loop: RLLoopConfig
    checkpoint: CheckpointConfig


def facts(run: Run) -> dict[str, str]:
    """What must be the same in all processes."""
    return {"configuration": json.dumps(flags.to_json(run.config)),
            "tokenizer": hashlib.sha256(repr(sorted(run.files.items())).encode()).hexdigest(),
            "tasks": json.dumps([task.id for task in run.learner.scene.tasks])}


def claim(run: Run) -> None:
    """Makes the folder of a new run: from here on an old one is gone. A resumed run writes its changed settings."""
    if not is_primary():
        return
    if run.params is not None:
        clear_folder(run.folder)
    flags.save_config(run.config, run.folder / "config.json")


def start(run: Run, checkpointer: Checkpointer, progress: Progress) -> TrainState:
    """The state to train from: given parameters, or the newest checkpoint, which moves `progress`."""
    if run.params is not None:
        return state_of(run.params, run.tx, run.learner.mesh, RULES)
    state = checkpointer.restore(run.abstract, progress)
    log.info("resumed at iteration %d", progress.iteration)
    return state


def train(run: Run, ledger: Ledger) -> bool:
    """Runs to the end (True), or to a signal."""
    learner, progress = run.learner, Progress()
    checkpointer = Checkpointer(run.folder, run.checkpoint, flags.to_json(run.config), run.files)
    state = start(run, checkpointer, progress)
    scene, total, trainable = learner.scene, count_parameters(state.params), run.additions.trainable()
    trained = count_parameters(select(state.params, trainable)) if trainable else total
    log.info("%s parameters, %s of them trained (%.2f %%), %d tasks, %d tools, mesh %s, %d processes",
             human_count(total), human_count(trained), 100 * trained / total, len(scene.prompts), len(scene.env.tools),
             dict(learner.mesh.shape), jax.process_count())
    with contextlib.ExitStack() as stack:
        stack.enter_context(scene.env)
        metric_log = MetricLog(run.folder, active=is_primary())
        for part in (metric_log, checkpointer):
            stack.callback(part.close)
        _, finished = fit_rl(
            state, learner, progress, mesh=learner.mesh, config=run.loop, folder=run.folder, checkpointer=checkpointer,
            metric_log=metric_log, ledger=ledger,
            evaluate=make_evaluation(learner, run.sets, greedy(learner.rollouts), learner.seed))
    log.info("rollouts: %s", learner.report.line())
    log.info("run folder: %s", run.folder)
    return finished


def launch(config: DistributedConfig, prepare: Callable[[], Run], ledger: Ledger) -> None:
    """Joins the other processes, prepares, trains. SystemExit with status `STOPPED` if a signal ended the run."""
    if not train(joined(config, prepare, facts, claim), ledger):
        raise SystemExit(STOPPED)
