"""Supervised fine-tuning on conversations: the whole model, or low-rank adapters beside it.

Rows `{"messages": [...], "tools": [...]?}` become ids and a mask by the model's own chat template; only what the
assistant wrote is a target; conversations stay whole in packed rows. LoRA (arXiv 2106.09685) and DoRA (2402.09353)
keep the base frozen; `mentor_sft` has the settings of MENTOR's imitation baseline (arXiv 2510.18383).

    python -m recipes.sft                                          embedded data, from scratch, 2 CPU cores, 2 minutes
    python -m recipes.generate --source runs/sft --chat --prompt "What is the currency of Japan?"
    python -m recipes.sft --preset lora --init Qwen3-0.6B --data.path chats.jsonl --data.held-out held_out.jsonl
    python -m recipes.convert --source runs/sft --target exported  adapters merged, chat template beside the weights
    python -m recipes.sft --template kormo --data.thinking hybrid --data.balance equal --pipeline.seq-len 256 \\
        --data.path sample_thinking:both --data.held-out sample_thinking:both/held_out    reasoning, in half of its rows

Left out: dropout in adapters, int8 base weights in training (QLoRA), adapters of embeddings and heads.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.distributed import DistributedConfig
from jaxlm.core.log import human_count
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh
from jaxlm.core.rng import derive
from jaxlm.core.tree import named_leaves
from jaxlm.data.balance import balance_chats, report_buckets
from jaxlm.data.chat_examples import ChatFormat, chat_batches, encode_source, ending_turns
from jaxlm.data.chat_template import chat_template_from_files
from jaxlm.data.conversations import TuningDataConfig, open_corpora
from jaxlm.data.examples import excluded_ids
from jaxlm.data.pipeline import PipelineConfig, resolve_shards
from jaxlm.data.tokenizer import check_vocabulary, tokenizer_from_files
from jaxlm.data.tokenizer_training import TokenizerConfig
from jaxlm.eval.chat_held_out import AnswerConfig, make_chat_evaluation
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import Model, build
from jaxlm.model.lora import LoraConfig
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
from jaxlm.train.step import Step, Trainable, make_step, part_optimizer
from jaxlm.train.tuning import RULES, Language, open_init, open_language, spread_rows, starting_params

PROG = "recipes.sft"
log = logging.getLogger(PROG)  # as a module with flags, this file is called __main__


@dataclass(frozen=True, kw_only=True)
class Config:
    """One fine-tuning run."""

    model: ModelConfig                 # of random initialisation; --init brings its own
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: TuningDataConfig = field(default_factory=TuningDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(packing="first_fit"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    accumulate: int = 1        # micro-batches per step
    loss_chunks: int = 1       # parts of a row whose logits exist at once
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    freeze: tuple[str, ...] = ()  # patterns in the paths of parameters that stay as they are: embed
    seed: int = 42
    init: str = ""             # a run folder, a Hugging Face folder or a GGUF file; empty: random weights
    template: str = ""         # chatml, hermes, hermes_names, kormo, a Jinja file; empty: the model's own, else chatml
    folder: Path = Path("runs/sft")
    resume: bool = False       # continue the run in `folder` from its last complete checkpoint
    overwrite: bool = False    # delete the run in `folder` first
    plan: str = ""             # compile the step for TPUs that are not here (v5p:4x4x8), print what it costs, and stop

    def __post_init__(self) -> None:
        if self.lora.rank and self.freeze:
            raise ValueError("freeze has no effect with lora: only the adapters are learnt")
        if self.lora.rank and not (self.init or self.plan or self.resume):
            raise ValueError("lora.rank adapts weights that exist: name them with --init")


_TUNED = Config(  # of models that exist
    model=MODELS["qwen3_0_6b"],
    compute=ComputeConfig(dtype="bfloat16", remat="dots_no_batch"),
    pipeline=PipelineConfig(batch_size=32, seq_len=2048, packing="first_fit"),
    optim=OptimConfig(lr=1e-5, weight_decay=0.01, schedule=ScheduleConfig(kind="cosine", warmup=0.1)),
    mesh=MeshConfig(data=1, fsdp=-1),
    loop=LoopConfig(steps=1000, eval_every=200),
    checkpoint=CheckpointConfig(every=200),
    accumulate=4,
    loss_chunks=8,
)
# KORMo's fine-tuning (arXiv 2510.09426, specification 8). Its optimiser and batch are not published: they are what is
# usual for such models. Steps: two epochs of 500M tokens; set --loop.steps for other data.
_KORMO = replace(
    _TUNED, model=MODELS["kormo_10b"], init="KORMo-10B-base", template="kormo",
    data=TuningDataConfig(thinking="hybrid"),
    pipeline=PipelineConfig(batch_size=48, seq_len=20480, packing="first_fit"),  # 0.98M tokens
    optim=OptimConfig(lr=2e-5, weight_decay=0.01, schedule=ScheduleConfig(kind="cosine", warmup=0.03)),
    accumulate=1,
    loss_chunks=20,
)
PRESETS = {
    "smoke": Config(
        model=MODELS["tiny"],
        pipeline=PipelineConfig(batch_size=16, seq_len=128, packing="first_fit"),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(decay=0.3)),
        loop=LoopConfig(steps=200, log_every=20, eval_every=100),
        checkpoint=CheckpointConfig(every=100),
    ),
    "lora": replace(_TUNED, lora=LoraConfig(rank=16), init="Qwen3-0.6B", optim=replace(
        _TUNED.optim, lr=2e-4, weight_decay=0.0, schedule=ScheduleConfig(kind="cosine"))),
    # Specification of MENTOR, 4.1: the whole model on the teacher's messages.
    "mentor_sft": replace(
        _TUNED, model=MODELS["qwen2_5_7b"], init="Qwen2.5-7B-Instruct",
        pipeline=PipelineConfig(batch_size=32, seq_len=8192, packing="first_fit"),
        optim=OptimConfig(lr=1e-5, beta1=0.9, beta2=0.95, weight_decay=0.01, clip_norm=1.0,
                          schedule=ScheduleConfig(kind="cosine", warmup=0.1))),
    "kormo_sft": _KORMO,
    # The tutorial of its authors, one row and two micro-batches on each of 8 devices. Theirs is QLoRA: a base of 4
    # bits, dropout 0.05, AdamW of 8 bits; here base and moments are whole and nothing is dropped.
    "kormo_lora": replace(
        _KORMO, lora=LoraConfig(rank=128, alpha=256.0), loop=replace(_KORMO.loop, steps=395),
        pipeline=replace(_KORMO.pipeline, batch_size=16), accumulate=2,
        optim=OptimConfig(lr=5e-5, weight_decay=0.0, schedule=ScheduleConfig(kind="cosine", warmup=0.01))),
}


def check(config: Config, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    check_shapes(config.model, config.compute, config.pipeline, mesh, accumulate=config.accumulate,
                 loss_chunks=config.loss_chunks)


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, plan="", distributed=DistributedConfig())


def open_model(config: Config) -> tuple[Config, Pretrained | None]:
    """What `init` names, without its weights, and the configuration with its model."""
    if not config.init or config.resume:
        return config, None
    opened = open_init(config.init, config.model, config.tokenizer, [preset.model for preset in PRESETS.values()])
    return replace(config, model=opened.config), opened


def resumed(config: Config) -> tuple[Config, Language]:
    """What the run in `config.folder` fixes, in place of what was not asked for, and its language."""
    saved, files = saved_run(config.folder)
    saved = flags.from_json(Config, saved)
    if config.init:
        config = replace(config, model=saved.model)
    if not config.pipeline.shards:
        config = replace(config, pipeline=replace(config.pipeline, shards=saved.pipeline.shards))
    check_resumable(saved, lasting(config), ignored=("folder",), fixed=(
        "model", "data", "tokenizer", "pipeline", "lora", "freeze", "seed", "init", "template"))
    return config, Language(tokenizer_from_files(files), chat_template_from_files(files))


def parameters(config: Config, model: Model) -> tuple[Any, Trainable | None]:
    """`key -> parameters` of the model with its adapters, and which of them are learnt (None: all)."""
    def init(key: jax.Array) -> dict[str, Any]:
        return lora.init(derive(config.seed, "lora"), model.init(key), config.lora)

    if config.lora.rank:
        return init, lora.is_adapter
    if not config.freeze:
        return model.init, None
    paths = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    for pattern in config.freeze:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"freeze: no parameter's path matches {pattern!r}; they are {', '.join(paths)}")
    return model.init, lambda path: not any(re.search(pattern, path) for pattern in config.freeze)


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user: ValueError, before anything is written or trained.

    Every process does this by itself.
    """
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    config, opened = open_model(config)
    mesh = make_mesh(config.mesh)
    if config.resume:
        config, language = resumed(config)
    check(config, mesh)
    loader, loaders = data_shard(mesh)
    config = replace(config, pipeline=resolve_shards(config.pipeline, loaders))
    sources, held_out = open_corpora(config.data)
    if not config.resume:
        language = open_language(opened, config.template, config.tokenizer, config.model.vocab_size,
                                 spread_rows(sources, config.tokenizer.documents))
        if config.template:  # the model learns to end its turns anew
            language = language._replace(tokenizer=ending_turns(language.template, language.tokenizer))
    check_vocabulary(language.tokenizer, config.model.vocab_size)
    log.info("tokenizer: %d tokens, fingerprint %.12s", language.tokenizer.vocab_size, language.tokenizer.fingerprint())
    data, seq_len = config.data, config.pipeline.seq_len
    form = ChatFormat(language.template, language.tokenizer, data.train_on,
                      excluded_ids(language.tokenizer, data.never_predict), reasoning=data.thinking != "drop")
    chats = [encode_source(
        source, form, seq_len=seq_len, too_long=data.too_long, max_bad_rows=data.max_bad_rows, seed=config.seed,
        thinking_share=data.thinking_share if data.thinking == "hybrid" else 1.0) for source in sources]
    if data.balance:
        chats = balance_chats(sources, chats, data.balance)
        log.info("%s", report_buckets(chats, config.loop.steps * config.pipeline.batch_size * seq_len))
    batches = chat_batches(chats, config.pipeline, seed=config.seed, loader=loader, loaders=loaders,
                           steps=config.loop.steps)
    model = build(config.model, config.compute)
    loss = make_loss(model, chunks=config.loss_chunks)
    evaluate = make_chat_evaluation(
        jax.jit(lambda params, batch: loss(params, batch, None)[1]["loss"]), model, form, held_out,
        answers=config.answers, seq_len=seq_len, max_bad_rows=data.max_bad_rows,
        batch_size=config.pipeline.batch_size // config.accumulate, mesh=mesh)
    learning = learning_of(config, model, mesh)
    abstract_state(learning.init, learning.tx, mesh, RULES)  # the mesh must divide every parameter
    if opened is not None:
        learning = replace(learning, params=starting_params(config.init, opened, config.lora, config.seed, mesh))
    backend = attention_backend(config.model, config.compute, seq_len, mesh)
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite), config=lasting(config),
        files=language.files(), mesh=mesh, learning=learning, batches=batches, evaluate=evaluate, loop=config.loop,
        checkpoint=config.checkpoint, seed=config.seed, flops=flops_per_token(config.model, seq_len),
        dtype=config.compute.dtype,
        summary=f"{config.pipeline.shards} data shards, {human_count(config.pipeline.batch_size * seq_len)} tokens a "
                f"batch, {backend} attention in {config.compute.dtype}")


def learning_of(config: Config, model: Model, mesh: Mesh) -> Learning:
    """The training step of a configuration, and what it learns."""
    init, trainable = parameters(config, model)
    tx: optax.GradientTransformation = part_optimizer(make_optimizer(config.optim, config.loop.steps), trainable)
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    step = make_step(make_loss(model, chunks=config.loss_chunks), tx, schedule, mesh=mesh, rules=RULES,
                     accumulate=config.accumulate, seed=config.seed, trainable=trainable)
    return Learning(init=init, tx=tx, step=step, rules=RULES, trainable=trainable)


def step_program(config: Config, mesh: Mesh, accumulate: int) -> tuple[Step, tuple[TrainState, LMBatch]]:
    """The training step and the shapes of its arguments, on devices that need not be here."""
    config = replace(config, accumulate=accumulate)
    check(config, mesh)
    learning = learning_of(config, build(config.model, config.compute), mesh)
    batch = abstract_batch(config.pipeline.batch_size, config.pipeline.seq_len, mesh)
    return learning.step, (abstract_state(learning.init, learning.tx, mesh, RULES), batch)


def work(config: Config, ledger: Ledger) -> None:
    """One run, or the plan of one."""
    if not config.plan:
        launch(config.distributed, partial(prepare, config), ledger)
        return
    if config.resume or config.overwrite:
        raise ValueError("--plan writes nothing: leave out --resume and --overwrite")
    if config.init and Path(config.init).exists():  # else of the model that the preset names
        config, _ = open_model(config)
    tokens = config.pipeline.batch_size * config.pipeline.seq_len
    counted = Work(tokens=tokens, model_flops=tokens * flops_per_token(config.model, config.pipeline.seq_len))
    plan_report(partial(step_program, config), parse_topology(config.plan), config.mesh, config.accumulate, counted,
                print)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
