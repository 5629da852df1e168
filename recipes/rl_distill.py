"""Distil tool use into a small model with reinforcement learning (MENTOR, arXiv 2510.18383, and its baselines).

A student attempts tasks with tools, a few times each; what it did is judged, compared with how a teacher solved the
task, and learnt from: GRPO with a dense composite reward. Everything is one program: the sampler and the learner share
parameters and numerics.

    python -m recipes.rl_distill --preset smoke                        embedded tasks, 2 CPU cores
    python -m recipes.rl_distill --preset smoke --init runs/sft        a student that recipes.sft has warmed up
    python -m recipes.rl_distill --preset sparse --init MODEL          outcome only; mentor_f1, mentor_ordered, ...
    python -m recipes.rl_distill --preset mentor --plan v5p:2x2x2      the paper's settings for a 7B, what a step costs
    python -m recipes.rl_distill --preset smoke --init S --teacher T --objective.teacher.coefficient 1 \
      --objective.teacher.estimator k1 --objective.teacher.place advantage   on-policy distillation; k2 in loss: KDRL
    python -m recipes.rl_distill --config runs/rl/config.json --resume

MODEL is a run folder, a Hugging Face folder or a GGUF file. `runs/rl/pages` shows attempts in colour,
`runs/rl/metrics.jsonl` everything else. Results: docs/results.md. Left out: the paper's data and teacher, which are not
public; embedded tasks take their place.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core import distributed
from jaxlm.core.distributed import DistributedConfig, is_primary
from jaxlm.core.log import MetricLog, human_count, setup_logging
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.core.tree import count_parameters
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.presets import MODELS
from jaxlm.objective.algorithm import ALGORITHMS, PolicyConfig
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.reward.compose import RewardConfig, compose
from jaxlm.reward.presets import PRESETS as REWARDS
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv, episode_template
from jaxlm.rl.evaluation import EvalSet, greedy, make_eval_set, make_evaluation
from jaxlm.rl.learner import BatchConfig, PolicyLearner, Scene
from jaxlm.rl.loop import PHASES, Progress, RLLoopConfig, fit_rl
from jaxlm.rl.plan import update_program, update_work
from jaxlm.rl.policy_params import RULES, abstract_policy, load_policy
from jaxlm.rl.rollout import RolloutConfig, make_prompts
from jaxlm.rl.settings import check_settings, num_rows
from jaxlm.rl.task_set import open_task_set
from jaxlm.rl.update import Policy
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer
from jaxlm.train.chips import parse_topology
from jaxlm.train.folder import check_folder, check_resumable, check_shared, clear_folder
from jaxlm.train.loop import STOPPED, NonFiniteError
from jaxlm.train.measure import Ledger
from jaxlm.train.plan import plan_report
from jaxlm.train.pretrained import Pretrained, open_pretrained
from jaxlm.train.state import state_of

PROG = "recipes.rl_distill"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is attempted; see `jaxlm.rl.task_sources.open_tasks`."""

    train: tuple[str, ...] = ("words:train?count=2000",)
    held_out: tuple[str, ...] = ("words:held_out?count=60", "words:unseen?count=60")  # a set each


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    init: str = ""                        # the student: a run folder, a Hugging Face folder or a .gguf file
    teacher: str = ""                     # a model of the same tokenizer that scores attempts (objective.teacher)
    model: ModelConfig = MODELS["tiny"]   # that of `init`
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    reward: RewardConfig = REWARDS["mentor"]
    objective: PolicyConfig = ALGORITHMS["mentor"]
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: RLLoopConfig = field(default_factory=RLLoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 42
    folder: Path = Path("runs/rl")
    resume: bool = False
    overwrite: bool = False
    plan: str = ""                        # compile an update for TPUs that are not here, print what it costs, and stop


_SMOKE = Config(
    env=EnvConfig(max_turns=4, observation="template"),
    rollout=RolloutConfig(max_prompt=240, max_response=200, engine=EngineConfig(batch_size=32)),
    batch=BatchConfig(prompts=8, samples=8, micro_rows=8),
    optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(warmup=0.0)),
    loop=RLLoopConfig(iterations=20, eval_every=10),
    checkpoint=CheckpointConfig(every=10),
)
_MENTOR = Config(
    model=MODELS["qwen2_5_7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="dots_no_batch"),
    rollout=RolloutConfig(temperature=0.6, top_k=20, top_p=0.99, max_prompt=1536, max_response=8192,
                          engine=EngineConfig(batch_size=320, cache_dtype="bfloat16")),
    batch=BatchConfig(prompts=32, samples=10, minibatches=4, micro_rows=8, seq_len=9728, loss_chunks=16),
    optim=OptimConfig(lr=1e-6, beta2=0.999, weight_decay=0.01, schedule=ScheduleConfig(warmup=0.0)),
    mesh=MeshConfig(data=1, fsdp=-1),
    loop=RLLoopConfig(iterations=1000, eval_every=10),
    checkpoint=CheckpointConfig(every=10),
)
PRESETS = {
    "smoke": _SMOKE,
    **{name: replace(_SMOKE, reward=reward) for name, reward in REWARDS.items() if name != "mentor"},
    "mentor": _MENTOR,
}


class Prepared(NamedTuple):
    """What `prepare` has checked and opened."""

    config: Config
    mesh: Mesh
    opened: Pretrained
    params: Any                # the student's, on the mesh, with a value head where the objective needs one
    reference: Any             # those that a KL keeps to, or None
    teacher: tuple[Policy, Any] | None
    tx: optax.GradientTransformation
    scene: Scene
    sets: dict[str, EvalSet]


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, plan="", distributed=DistributedConfig())


def prepare(config: Config) -> Prepared:
    """Everything that can fail for reasons of the user, before anything is written or trained."""
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    if not config.init:
        raise ValueError("--init names the student: a run folder (recipes.sft makes one), a Hugging Face folder or a "
                         ".gguf file")
    for name in ("init", "teacher"):
        if getattr(config, name) and Path(getattr(config, name)).resolve() == config.folder.resolve():
            raise ValueError(f"--{name} and --folder are the same folder, {config.folder}; this run needs its own")
    mesh = make_mesh(config.mesh)
    config, opened = open_init(config)
    if config.resume:
        saved = flags.load_config(Config, config.folder / "config.json")
        check_resumable(compared(saved), compared(config), fixed=(
            "init", "teacher", "model", "tasks", "env", "rollout", "batch", "reward", "objective", "seed"),
            ignored=("folder",))
    check_settings(config.model, config.compute, config.rollout, config.batch, config.objective, config.reward, mesh)
    teacher = open_teacher(config, opened)
    parts, tools = open_task_set((*config.tasks.train, *config.tasks.held_out))
    train = list(chain.from_iterable(parts[:len(config.tasks.train)]))
    names = [spec.partition("?")[0] for spec in config.tasks.held_out]
    names = names if len(set(names)) == len(names) else list(config.tasks.held_out)
    held_out = dict(zip(names, parts[len(config.tasks.train):], strict=True))
    template = episode_template(config.env, opened.chat, opened.tokenizer)
    dialogue = Dialogue(tools, template, opened.tokenizer, config.env)
    prompts = make_prompts(dialogue, train, config.rollout.max_prompt)
    if len(prompts) < len(train):
        log.warning("%d of %d tasks are left out: their prompts are longer than rollout.max_prompt %d",
                    len(train) - len(prompts), len(train), config.rollout.max_prompt)
    sets = {name: make_eval_set(dialogue, tasks, config.rollout.max_prompt) for name, tasks in held_out.items()}
    if len(prompts) < config.batch.prompts:
        raise ValueError(f"{len(prompts)} tasks are fewer than batch.prompts {config.batch.prompts}")
    scene = Scene(train, prompts, ToolEnv(tools, config.env), dialogue, compose(config.reward, Trajectory._fields),
                  tuple(term.weight for term in config.reward.terms))
    tx = make_tx(config)
    value_head = config.objective.advantage == "gae"
    abstract_policy(config.model, tx, mesh, value_head)  # the mesh must divide every parameter
    params = load_policy(config.init, opened, mesh, value_head)
    reference = None
    if config.objective.kl.coefficient:  # a new run trains, and gives away, its own copy
        reference = params if config.resume else jax.tree.map(jnp.copy, params)
    return Prepared(config, mesh, opened._replace(params=None), None if config.resume else params, reference,
                    scoring_teacher(config, opened, teacher, mesh), tx, scene, sets)


def open_init(config: Config) -> tuple[Config, Pretrained]:
    """The student without its weights, and the configuration with its model."""
    opened = open_pretrained(Path(config.init))
    if opened.tokenizer is None:
        raise ValueError(f"--init {config.init} has no tokenizer")
    if not config.resume and config.model not in (opened.config, *(preset.model for preset in PRESETS.values())):
        raise ValueError("--init brings its own model configuration; leave out the --model flags")
    return replace(config, model=opened.config), opened


def compared(config: Config) -> Config:
    """What a resumed run must share: without what changes its speed and memory only."""
    same = PRESETS["smoke"]
    return replace(lasting(config), rollout=replace(config.rollout, engine=same.rollout.engine),
                   batch=replace(config.batch, micro_rows=1, loss_chunks=1))


def open_teacher(config: Config, opened: Pretrained) -> Pretrained | None:
    """The model that scores, without its weights; ValueError if it reads other tokens."""
    if bool(config.teacher) != bool(config.objective.teacher.coefficient):
        raise ValueError("--teacher names a model and objective.teacher.coefficient says how much it counts; give both "
                         "or none")
    if not config.teacher:
        return None
    teacher = open_pretrained(Path(config.teacher))
    if teacher.tokenizer is None or teacher.tokenizer.fingerprint() != opened.tokenizer.fingerprint():
        raise ValueError(f"--teacher {config.teacher} has another tokenizer than --init {config.init}, so it cannot "
                         "score its tokens")
    return teacher


def make_tx(config: Config) -> optax.GradientTransformation:
    """The optimizer over all updates of the run."""
    return make_optimizer(config.optim, num_updates(config))


def num_updates(config: Config) -> int:
    """Updates of the whole run if every iteration has something to learn."""
    return config.loop.iterations * config.batch.minibatches * config.batch.epochs


def make_learner(run: Prepared) -> PolicyLearner:
    """The parts of the loop."""
    config, tokenizer = run.config, run.opened.tokenizer
    model = build(config.model, config.compute)
    schedule = make_schedule(config.optim.schedule, config.optim.lr, num_updates(config))
    return PolicyLearner(
        Policy(model, config.rollout.temperature, config.batch.loss_chunks, tokenizer.vocab_size),
        Engine(model=model, params=None, eos_id=tokenizer.eos_id, tokenizer=tokenizer, config=config.rollout.engine),
        run.scene, config.objective, rollouts=config.rollout, batch=config.batch, tx=run.tx, schedule=schedule,
        mesh=run.mesh, rules=RULES, seed=config.seed, reference=run.reference, teacher=run.teacher)


def scoring_teacher(
    config: Config, opened: Pretrained, teacher: Pretrained | None, mesh: Mesh,
) -> tuple[Policy, Any] | None:
    """The teacher with its weights on the mesh."""
    if teacher is None:
        return None
    params = load_policy(config.teacher, teacher, mesh, False)
    model = build(teacher.config, config.compute)
    return Policy(model, config.rollout.temperature, config.batch.loss_chunks, opened.tokenizer.vocab_size), params


def train(run: Prepared, ledger: Ledger) -> bool:
    """Runs to the end (True), or to a signal."""
    config = run.config
    template = episode_template(config.env, run.opened.chat, run.opened.tokenizer)
    checkpointer = Checkpointer(config.folder, config.checkpoint, flags.to_json(lasting(config)),
                                run.opened.tokenizer.files() | template.files())
    progress = Progress()
    if config.resume:
        state = checkpointer.restore(
            abstract_policy(config.model, run.tx, run.mesh, config.objective.advantage == "gae"), progress)
        log.info("resumed at iteration %d", progress.iteration)
    else:
        state = state_of(run.params, run.tx, run.mesh, RULES)  # run.params are given away
    learner = make_learner(run)
    log.info("%s parameters, %d tasks, %d tools, mesh %s, %d processes", human_count(count_parameters(state.params)),
             len(run.scene.prompts), len(run.scene.env.tools), dict(run.mesh.shape), jax.process_count())
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.scene.env)
        metric_log = MetricLog(config.folder, active=is_primary())
        for part in (metric_log, checkpointer):
            stack.callback(part.close)
        _, finished = fit_rl(
            state, learner, progress, mesh=run.mesh, config=config.loop, folder=config.folder,
            checkpointer=checkpointer, metric_log=metric_log, ledger=ledger,
            evaluate=make_evaluation(learner, run.sets, greedy(config.rollout), config.seed))
    log.info("rollouts: %s", learner.report.line())
    log.info("run folder: %s", config.folder)
    return finished


def plan(config: Config) -> None:
    """Compiles an update for chips that are not here and prints what it costs."""
    program = partial(update_program, config.model, config.compute, config.rollout, config.batch, config.objective,
                      config.reward, make_tx(config), config.optim.lr)
    work = update_work(config.model, config.rollout, config.batch)
    plan_report(program, parse_topology(config.plan), config.mesh,
                max(1, num_rows(config.batch) // config.batch.micro_rows), work, print)


def claim(run: Prepared) -> None:
    """Makes the folder of a new run: from here on an old one is gone."""
    if is_primary():
        if not run.config.resume:
            clear_folder(run.config.folder)
        flags.save_config(lasting(run.config), run.config.folder / "config.json")


def facts(run: Prepared) -> dict[str, str]:
    """What must be the same in all processes."""
    return {"configuration": json.dumps(flags.to_json(lasting(run.config))),
            "tokenizer": run.opened.tokenizer.fingerprint(),
            "tasks": json.dumps([task.id for task in run.scene.tasks])}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    ledger = Ledger(*PHASES)
    config = flags.parse(PRESETS, argv, prog=PROG, description=__doc__)
    try:
        if config.plan:
            if config.resume or config.overwrite:
                raise ValueError("--plan writes nothing: leave out --resume and --overwrite")
            if config.init:
                config = open_init(config)[0]
            plan(config)
            return
        setup_logging(config.distributed.process_id or 0)
        distributed.start(config.distributed)
        setup_logging(jax.process_index())
        run = distributed.together(lambda: prepare(config), facts)
        distributed.together(lambda: claim(run))
        distributed.together(lambda: check_shared(config.folder))
        if not train(run, ledger):
            raise SystemExit(STOPPED)
    except (ValueError, OSError, NonFiniteError) as error:
        flags.fail(error, PROG)
    finally:
        ledger.close()


if __name__ == "__main__":
    main()
