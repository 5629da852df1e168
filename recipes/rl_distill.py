"""Distil tool use into a small model with reinforcement learning (MENTOR, arXiv 2510.18383, and its baselines).

A student attempts tasks with tools, a few times each; what it did is judged, compared with how a teacher solved the
task, and learnt from: GRPO with a dense composite reward. Everything is one program: the sampler and the learner share
parameters and numerics.

    python -m recipes.rl_distill --preset smoke --init runs/sft        embedded tasks, 2 CPU cores; recipes.sft warms up
    python -m recipes.rl_distill --preset sparse --init MODEL          outcome only; mentor_f1, mentor_ordered, ...
    python -m recipes.rl_distill --preset mentor --plan v5p:2x2x2      the paper's settings for a 7B, what a step costs
    python -m recipes.rl_distill --init S --lora.rank 16               only adapters learn; DoRA: --lora.kind dora
    python -m recipes.rl_distill --init S --tasks.search.corpus c.jsonl  every task offers keyword_search
    python -m recipes.rl_distill --init S --env.max-turns 1 --tasks.train bfcl:BFCL_v4_simple_python.json
    python -m recipes.rl_distill --preset smoke --init S --teacher T --objective.teacher.coefficient 1 \
      --objective.teacher.estimator k1 --objective.teacher.place advantage   on-policy distillation; k2 in loss: KDRL
    python -m recipes.rl_distill --config runs/rl/config.json --resume

MODEL is a run folder, a Hugging Face folder or a GGUF file. `runs/rl/pages` shows attempts in colour,
`runs/rl/metrics.jsonl` everything else. Adapters stand beside a frozen base, which is also the reference of a KL; the
next run, `recipes.generate` and `recipes.convert` merge them. Results: docs/results.md. Left out: the paper's data and
teacher, which are not public (embedded tasks take their place). `--tasks.search.model MiniLM` adds dense_search.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.distributed import DistributedConfig
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.lora import LoraConfig
from jaxlm.model.presets import MODELS
from jaxlm.objective.algorithm import ALGORITHMS, PolicyConfig
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.reward.compose import RewardConfig
from jaxlm.reward.presets import PRESETS as REWARDS
from jaxlm.rl.env import EnvConfig
from jaxlm.rl.learner import BatchConfig, PolicyLearner, Scene
from jaxlm.rl.loop import PHASES, RLLoopConfig
from jaxlm.rl.plan import plan_update
from jaxlm.rl.policy_params import RULES, Additions, abstract_policy, load_policy
from jaxlm.rl.rollout import RolloutConfig
from jaxlm.rl.run import Run, launch
from jaxlm.rl.scene import TaskConfig, open_scene
from jaxlm.rl.settings import Settings, check_settings
from jaxlm.rl.update import Policy
from jaxlm.train.checkpoint import CheckpointConfig
from jaxlm.train.chips import parse_topology
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.measure import Ledger
from jaxlm.train.pretrained import Pretrained, open_pretrained
from jaxlm.train.run import run_training
from jaxlm.train.step import part_optimizer

PROG = "recipes.rl_distill"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    init: str = ""                        # the student: a run folder, a Hugging Face folder or a .gguf file
    teacher: str = ""                     # a model of the same tokenizer that scores attempts (objective.teacher)
    model: ModelConfig = MODELS["tiny"]   # that of `init`
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: the whole model is learnt
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
    # Rows of twice the longest attempt: of typical ones several fit into each, and few of their places stay empty.
    batch=BatchConfig(prompts=8, samples=8, micro_rows=8, seq_len=880),
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


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, plan="", distributed=DistributedConfig())


def compared(config: Config) -> Config:
    """What a resumed run must share: without what changes its speed and memory only."""
    return replace(lasting(config), rollout=replace(config.rollout, engine=EngineConfig()),
                   batch=replace(config.batch, micro_rows=1, loss_chunks=1))


def settings_of(config: Config) -> Settings:
    """What decides an update."""
    return Settings(config.model, config.compute, config.rollout, config.batch, config.objective, config.reward,
                    Additions(config.lora, config.objective.advantage == "gae", config.seed))


def open_init(config: Config) -> tuple[Config, Pretrained]:
    """The student without its weights, and the configuration with its model."""
    opened = open_pretrained(Path(config.init))
    if opened.tokenizer is None:
        raise ValueError(f"--init {config.init} has no tokenizer")
    if not config.resume and config.model not in (opened.config, *(preset.model for preset in PRESETS.values())):
        raise ValueError("--init brings its own model configuration; leave out the --model flags")
    return replace(config, model=opened.config), opened


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


def check_start(config: Config) -> None:
    """ValueError for folders and names that do not fit what was asked for."""
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    if not config.init:
        raise ValueError("--init names the student: a run folder (recipes.sft makes one), a Hugging Face folder or a "
                         ".gguf file")
    for name in ("init", "teacher"):
        if getattr(config, name) and Path(getattr(config, name)).resolve() == config.folder.resolve():
            raise ValueError(f"--{name} and --folder are the same folder, {config.folder}; this run needs its own")


def num_updates(config: Config) -> int:
    """Updates of the whole run if every iteration has something to learn."""
    return config.loop.iterations * config.batch.minibatches * config.batch.epochs


def make_tx(config: Config) -> optax.GradientTransformation:
    """The optimizer of what is learnt, over all updates of the run."""
    return part_optimizer(make_optimizer(config.optim, num_updates(config)), settings_of(config).additions.trainable())


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user, before anything is written or trained."""
    check_start(config)
    mesh = make_mesh(config.mesh)
    config, opened = open_init(config)
    if config.resume:
        saved = flags.load_config(Config, config.folder / "config.json")
        check_resumable(compared(saved), compared(config), ignored=("folder",), fixed=(
            "init", "teacher", "model", "lora", "tasks", "env", "rollout", "batch", "reward", "objective", "seed"))
    settings, tokenizer = settings_of(config), opened.tokenizer
    check_settings(settings, mesh)
    teacher = open_teacher(config, opened)
    scene, sets, template = open_scene(
        config.tasks, config.env, config.reward, opened.chat, tokenizer, max_prompt=config.rollout.max_prompt,
        at_least=config.batch.prompts)
    tx = make_tx(config)
    abstract = abstract_policy(config.model, tx, mesh, settings.additions)  # the mesh must divide every parameter
    params, reference = load_student(config, opened, mesh)
    if teacher is not None:
        policy = settings._replace(model=teacher.config).make_policy(tokenizer.vocab_size)
        teacher = policy, load_policy(config.teacher, teacher, mesh, Additions())
    return Run(
        folder=config.folder, config=lasting(config), files=tokenizer.files() | template.files(), params=params,
        abstract=abstract, additions=settings.additions, tx=tx, sets=sets, loop=config.loop,
        checkpoint=config.checkpoint, learner=make_learner(config, opened, mesh, scene, tx, reference, teacher))


def load_student(config: Config, opened: Pretrained, mesh: Mesh) -> tuple[Any, Any]:
    """Parameters to start from, and those that a KL keeps to; None where a checkpoint, or the run itself, has them."""
    separate = config.objective.kl.coefficient and not config.lora.rank  # adapters stand beside the reference
    if config.resume and not separate:
        return None, None
    params = load_policy(config.init, opened, mesh, settings_of(config).additions)
    if config.resume:
        return None, params
    return params, jax.tree.map(jnp.copy, params) if separate else None  # a new run gives its own away


def make_learner(config: Config, opened: Pretrained, mesh: Mesh, scene: Scene, tx: optax.GradientTransformation,
                 reference: Any, teacher: tuple[Policy, Any] | None) -> PolicyLearner:
    """The parts of the loop."""
    settings, tokenizer = settings_of(config), opened.tokenizer
    policy = settings.make_policy(tokenizer.vocab_size)
    engine = Engine(model=policy.model, params=None, eos_id=tokenizer.eos_id, tokenizer=tokenizer,
                    config=config.rollout.engine)
    return PolicyLearner(
        policy, engine, scene, config.objective, rollouts=config.rollout, batch=config.batch, tx=tx,
        schedule=make_schedule(config.optim.schedule, config.optim.lr, num_updates(config)), mesh=mesh, rules=RULES,
        seed=config.seed, reference=reference, teacher=teacher, trainable=settings.additions.trainable())


def plan(config: Config) -> None:
    """Compiles an update for chips that are not here and prints what it costs."""
    if config.resume or config.overwrite:
        raise ValueError("--plan writes nothing: leave out --resume and --overwrite")
    if config.init:  # else of the model that the preset names
        config, _ = open_init(config)
    plan_update(settings_of(config), make_tx(config), config.optim.lr, parse_topology(config.plan), config.mesh, print)


def work(config: Config, ledger: Ledger) -> None:
    """One run, or the plan of one."""
    if config.plan:
        plan(config)
    else:
        launch(config.distributed, lambda: prepare(config), ledger)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__, phases=PHASES)


if __name__ == "__main__":
    main()
