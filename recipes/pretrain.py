"""Pretrain a bilingual decoder from text to checkpoint.

Reproduces the pretraining of KORMo (arXiv 2510.09426) at any scale: tokenizer, mixture, packing with an
intra-document mask, AdamW with warmup-stable-decay, held-out bits per byte and greedy samples while it trains.

    python -m recipes.pretrain --preset smoke                      embedded data, 2 CPU cores, about 2 minutes
    python -m recipes.pretrain --preset smoke --data.path my.jsonl.gz --optim.lr 1e-3
    python -m recipes.pretrain --config runs/pretrain/config.json --resume
    python -m recipes.pretrain --preset kormo_10b --plan v5p:4x4x8   what a step costs on a pod that is not here
    python -m recipes.pretrain --init smollm2 --data.path more.jsonl.gz    go on from a run, a HF folder or a GGUF file

KORMo's stages are presets, each of which goes on from the one before: `kormo_10b`, `kormo_10b_stage2`, `_long_8k`,
`_long_16k`, `_long_32k`, `_reasoning`, and the same of `kormo_1b`; docs/pretraining.md has a command for each.
Results and exact commands: docs/results.md. Left out: KORMo's data.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.distributed import DistributedConfig
from jaxlm.core.log import human_count
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh
from jaxlm.data.corpus import CorpusConfig, open_corpus
from jaxlm.data.examples import excluded_ids
from jaxlm.data.pipeline import PipelineConfig, make_pipeline, resolve_shards
from jaxlm.data.tokenizer import check_vocabulary, tokenizer_from_files
from jaxlm.data.tokenizer_training import TokenizerConfig, make_tokenizer
from jaxlm.eval.held_out import SampleConfig, make_evaluation
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import Model, build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.train.checkpoint import CheckpointConfig, saved_run
from jaxlm.train.chips import parse_topology
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.loop import LoopConfig
from jaxlm.train.measure import Ledger
from jaxlm.train.plan import Work, plan_report
from jaxlm.train.pretrained import Pretrained
from jaxlm.train.run import (
    Learning,
    Run,
    abstract_batch,
    attention_backend,
    check_shapes,
    launch,
    make_loss,
    mode_of,
    run_training,
)
from jaxlm.train.state import TrainState, abstract_state
from jaxlm.train.step import Step, make_step
from jaxlm.train.tuning import StageConfig, open_init, starting_state

PROG = "recipes.pretrain"
log = logging.getLogger(PROG)  # as a module with flags, this file is called __main__


@dataclass(frozen=True, kw_only=True)
class Config:
    """One pretraining run."""

    model: ModelConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    accumulate: int = 1        # micro-batches per step
    z_loss: float = 0.0        # weight of log(Z)^2 per token
    mtp_weight: float = 0.0    # of multi-token prediction, with model.mtp_depth; DeepSeek-V3: 0.3, later 0.1
    loss_chunks: int = 1       # parts of a row whose logits exist at once
    samples: SampleConfig = field(default_factory=SampleConfig)
    seed: int = 42
    init: str = ""             # go on from a run folder, a Hugging Face folder or a GGUF file, its model and tokenizer
    stage: StageConfig = field(default_factory=StageConfig)  # what else is taken from `init`, what changes
    folder: Path = Path("runs/pretrain")
    resume: bool = False       # continue the run in `folder` from its last complete checkpoint
    overwrite: bool = False    # delete the run in `folder` first
    plan: str = ""             # compile the step for TPUs that are not here (v5p:4x4x8), print what it costs, and stop

    def __post_init__(self) -> None:
        if not self.init and self.stage != StageConfig():
            raise ValueError("stage.keep_optimizer, max_positions and rope_theta have an effect with --init only")


def _ladder(name: str, first: Config) -> dict[str, Config]:
    """KORMo's stages (specification, sections 4, 5 and 7) after `first`, whose tokens stand for the 1 T of stage 1.

    Each goes on from the folder of the one before with its moments, in batches of as many tokens. Not published, and
    therefore the field's custom [STD]: lengths beyond 4096, the split of the long stage, rates after stage 2.
    """
    tokens = first.pipeline.batch_size * first.pipeline.seq_len
    shared = first.loop.steps * tokens / 1e12  # of KORMo-10B's own tokens
    middle = first.optim.lr / 7  # [STD] 1e-4 for KORMo-10B

    def stage(before: str, ending: str, billions: float, seq_len: int, optim: OptimConfig) -> Config:
        return replace(
            first, init=f"runs/{before}", folder=Path(f"runs/{name}_{ending}"),
            stage=StageConfig(keep_optimizer=True), optim=optim,
            pipeline=replace(first.pipeline, seq_len=seq_len, batch_size=tokens // seq_len),
            loop=replace(first.loop, steps=round(billions * 1e9 * shared / tokens)))

    rate = lambda lr, **schedule: replace(first.optim, lr=lr, schedule=ScheduleConfig(warmup=0.0, **schedule))
    long = rate(middle, kind="constant")
    return {
        name: replace(first, folder=Path(f"runs/{name}")),
        f"{name}_stage2": stage(name, "stage2", 1800, 4096, rate(first.optim.lr, kind="constant")),
        f"{name}_long_8k": stage(f"{name}_stage2", "long_8k", 10.27 / 3, 8192, long),
        f"{name}_long_16k": stage(f"{name}_long_8k", "long_16k", 10.27 / 3, 16_384, long),
        f"{name}_long_32k": stage(f"{name}_long_16k", "long_32k", 10.27 / 3, 32_768, long),
        # Traces in <think>...</think>; never_predict keeps <think> from being a target, as in all stages.
        f"{name}_reasoning": stage(f"{name}_long_32k", "reasoning", 157.76, 32_768,
                                   rate(middle, kind="linear", min_ratio=0.1)),
    }


_KORMO = Config(
    model=MODELS["kormo_1b"],
    compute=ComputeConfig(dtype="bfloat16", remat="dots_no_batch"),
    data=CorpusConfig(never_predict=("<think>",)),
    pipeline=PipelineConfig(batch_size=1024, seq_len=4096, boundary_targets=True, reset_positions=False, workers=8),
    optim=OptimConfig(lr=1e-3),  # warm-up, then constant: decay belongs to later stages
    mesh=MeshConfig(data=1, fsdp=-1),
    loop=LoopConfig(steps=14_305, eval_every=1000),  # 60 G tokens
    checkpoint=CheckpointConfig(every=1000, keep_every=5000),
    loss_chunks=8,
)
PRESETS = {
    "smoke": Config(
        model=MODELS["tiny"],
        pipeline=PipelineConfig(batch_size=16, seq_len=128),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(decay=0.3)),
        loop=LoopConfig(steps=300, log_every=20, eval_every=100),
        checkpoint=CheckpointConfig(every=100),
    ),
    "base": Config(
        model=MODELS["base"],
        compute=ComputeConfig(dtype="bfloat16", scan_unroll=8),
        pipeline=PipelineConfig(batch_size=16, seq_len=256),
        optim=OptimConfig(lr=1.5e-3, schedule=ScheduleConfig(decay=0.3)),
        loop=LoopConfig(steps=1400, eval_every=350),
        checkpoint=CheckpointConfig(every=200),
        accumulate=2,
        loss_chunks=8,
    ),
    **_ladder("kormo_1b", _KORMO),
    **_ladder("kormo_10b", replace(
        _KORMO, model=MODELS["kormo_10b"], optim=replace(_KORMO.optim, lr=7e-4),
        pipeline=replace(_KORMO.pipeline, batch_size=2048), loop=LoopConfig(steps=119_209, eval_every=1000))),  # 1 T
}


def check(config: Config, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    check_shapes(config.model, config.compute, config.pipeline, mesh, accumulate=config.accumulate,
                 loss_chunks=config.loss_chunks)


def open_model(config: Config) -> tuple[Config, Pretrained | None]:
    """What `init` names, without its weights, and the configuration with its model."""
    if not config.init or config.resume:
        return config, None
    opened = open_init(config.init, config.model, config.tokenizer, [preset.model for preset in PRESETS.values()],
                       config.stage)
    return replace(config, model=config.stage.model(opened.config)), opened


def resumed(config: Config) -> tuple[Config, dict[str, bytes]]:
    """What the run in `config.folder` fixes, in place of what was not asked for; the files of its tokenizer."""
    saved, files = saved_run(config.folder)
    saved = flags.from_json(Config, saved)
    if config.init:
        config = replace(config, model=saved.model)
    if not config.pipeline.shards:
        config = replace(config, pipeline=replace(config.pipeline, shards=saved.pipeline.shards))
    check_resumable(saved, lasting(config), fixed=(
        "model", "data", "tokenizer", "pipeline", "seed", "init", "stage"), ignored=("folder",))
    return config, files


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, plan="", distributed=DistributedConfig())


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user: ValueError, before anything is written or trained.

    Every process does this by itself.
    """
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    if config.init and Path(config.init).resolve() == config.folder.resolve():
        raise ValueError(f"--init and --folder are the same folder, {config.folder}; a stage needs its own")
    config, opened = open_model(config)
    mesh = make_mesh(config.mesh)
    if config.resume:
        config, files = resumed(config)
    check(config, mesh)
    loader, loaders = data_shard(mesh)
    config = replace(config, pipeline=resolve_shards(config.pipeline, loaders))
    sources, held_out = open_corpus(config.data)
    if config.resume:
        tokenizer = tokenizer_from_files(files)
    else:
        tokenizer = (opened and opened.tokenizer) or make_tokenizer(config.tokenizer, sources, config.model.vocab_size)
    check_vocabulary(tokenizer, config.model.vocab_size)
    excluded = excluded_ids(tokenizer, config.data.never_predict)
    batches = make_pipeline(sources, tokenizer, config.pipeline, excluded=excluded, seed=config.seed,
                            loader=loader, loaders=loaders, steps=config.loop.steps)
    log.info("tokenizer: %d tokens, fingerprint %.12s", tokenizer.vocab_size, tokenizer.fingerprint())
    model = build(config.model, config.compute)
    loss = make_loss(model, chunks=config.loss_chunks, mtp_weight=config.mtp_weight)
    evaluate = make_evaluation(
        jax.jit(lambda params, batch: loss(params, batch, None)[1]["loss"]), model, tokenizer, held_out,
        samples=config.samples, seq_len=config.pipeline.seq_len,
        batch_size=config.pipeline.batch_size // config.accumulate, mesh=mesh)
    tx = make_optimizer(config.optim, config.loop.steps)
    abstract = abstract_state(model.init, tx, mesh, PARAM_RULES)  # the mesh must divide every parameter
    learning = Learning(init=model.init, tx=tx, step=step_of(config, model, tx, mesh), rules=PARAM_RULES)
    if opened is not None:
        tree, digest = starting_state(config.init, opened, abstract, keep_optimizer=config.stage.keep_optimizer,
                                      mesh=mesh)
        learning = replace(learning, params=tree["params"], opt_state=tree.get("opt_state"), digest=digest)
    tokens = human_count(config.pipeline.batch_size * config.pipeline.seq_len)
    backend = attention_backend(config.model, config.compute, config.pipeline.seq_len, mesh)
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite), config=lasting(config),
        files=tokenizer.files(), mesh=mesh, learning=learning, batches=batches, evaluate=evaluate, loop=config.loop,
        checkpoint=config.checkpoint, seed=config.seed,
        flops=flops_per_token(config.model, config.pipeline.seq_len), dtype=config.compute.dtype,
        summary=f"{config.pipeline.shards} data shards, {tokens} tokens a batch, {backend} attention in "
                f"{config.compute.dtype}")


def step_of(config: Config, model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> Step:
    """The training step of a configuration."""
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    loss = make_loss(model, z_loss=config.z_loss, chunks=config.loss_chunks, mtp_weight=config.mtp_weight)
    return make_step(loss, tx, schedule, mesh=mesh, rules=PARAM_RULES, accumulate=config.accumulate, seed=config.seed)


def step_program(config: Config, mesh: Mesh, accumulate: int) -> tuple[Step, tuple[TrainState, LMBatch]]:
    """The training step and the shapes of its arguments, on devices that need not be here."""
    config = replace(config, accumulate=accumulate)
    check(config, mesh)
    model, tx = build(config.model, config.compute), make_optimizer(config.optim, config.loop.steps)
    batch = abstract_batch(config.pipeline.batch_size, config.pipeline.seq_len, mesh)
    return step_of(config, model, tx, mesh), (abstract_state(model.init, tx, mesh, PARAM_RULES), batch)


def step_work(config: Config) -> Work:
    """What a step of the configuration is for."""
    tokens = config.pipeline.batch_size * config.pipeline.seq_len
    return Work(tokens=tokens, model_flops=tokens * flops_per_token(config.model, config.pipeline.seq_len))


def work(config: Config, ledger: Ledger) -> None:
    """One run, or the plan of one."""
    if not config.plan:
        launch(config.distributed, partial(prepare, config), ledger)
        return
    if config.resume or config.overwrite:
        raise ValueError("--plan writes nothing: leave out --resume and --overwrite")
    if config.init and Path(config.init).exists():
        config, _ = open_model(config)
    elif config.init:
        log.warning("--init %s is not there: the plan is of the model that the configuration names", config.init)
        config = replace(config, model=config.stage.model(config.model))
    plan_report(partial(step_program, config), parse_topology(config.plan), config.mesh, config.accumulate,
                step_work(config), print)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
