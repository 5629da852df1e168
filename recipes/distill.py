"""White-box distillation: a student learns the next-token distributions of a teacher on given text or conversations.

Any divergence of `jaxlm.objective.distill` over the whole vocabulary or the teacher's K most probable tokens and a
class for the rest, at a temperature (Hinton et al. 2015; GKD, arXiv 2306.13649; DistiLLM, 2402.03898), mixed with the
next-token loss. Teacher and student may differ in all but the tokenizer. While it trains: the evaluation of
`recipes.pretrain` or `recipes.sft`, and KL and top-1 agreement with the teacher on held-out text.

    make demo; python -m recipes.distill                 a student of half the demo's width, 2 CPU cores, 2 minutes
    python -m recipes.distill --preset chats             conversations, the teacher is runs/sft of recipes.sft
    python -m recipes.distill --distill.divergence jsd_normalized --distill.mix 0.5 --top-k 64 --hard-weight 0.1
    python -m recipes.distill --preset pretrained --teacher Qwen3-8B --init Qwen3-0.6B --data.path chats.jsonl \
      --data.held-out held_out.jsonl

Expected of the first command, minutes 1 to 2: bits per byte en 0.87, ko 0.62; KL from the teacher (en 0.80, ko 0.60)
0.21 nats, agreement 83 %. By next-token loss alone the same student has en 0.87, ko 0.63, but 1.00, 0.71 at step 200,
where distillation is at 0.95, 0.67.

The teacher is frozen and stays out of checkpoints: a resumed run reads it again and refuses another one. Left out:
on-policy distillation, where the student samples and the teacher scores, which is `recipes.rl_distill --teacher`;
teachers of another tokenizer; adapters.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.distributed import DistributedConfig
from jaxlm.core.log import human_count
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh, place_leaf
from jaxlm.core.tree import count_parameters
from jaxlm.data.chat_examples import ChatFormat, chat_batches, chat_example, check_symbols, encode_source, with_bos
from jaxlm.data.chat_template import TEMPLATES, ChatTemplate, chat_template_from_files, named_template
from jaxlm.data.conversations import ConversationsConfig, open_corpora
from jaxlm.data.corpus import CorpusConfig, open_corpus
from jaxlm.data.examples import excluded_ids
from jaxlm.data.pipeline import Batches, PipelineConfig, eval_batches, make_pipeline, resolve_shards, whole_batches
from jaxlm.data.tokenizer import Tokenizer, check_vocabulary, tokenizer_from_files
from jaxlm.eval.chat_held_out import AnswerConfig, make_chat_evaluation
from jaxlm.eval.held_out import Evaluation, SampleConfig, make_evaluation
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.objective.distill import DistillConfig
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.train.checkpoint import CheckpointConfig, saved_run
from jaxlm.train.distill import (
    DistillStep,
    Pair,
    check_loss,
    check_same_tokenizer,
    load_teacher,
    make_agreement_evaluation,
    make_distill_loss,
    make_distill_step,
    student_nll,
    with_teacher,
)
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.loop import LoopConfig
from jaxlm.train.measure import Ledger
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained
from jaxlm.train.run import Learning, Run, attention_backend, check_shapes, launch, mode_of, run_training
from jaxlm.train.state import abstract_state

PROG = "recipes.distill"
MADE_BY = {"runs/demo": "make demo", "runs/sft": "python -m recipes.sft"}  # the teachers of presets
log = logging.getLogger(PROG)  # as a module with flags, this file is called __main__


@dataclass(frozen=True, kw_only=True)
class DataConfig(ConversationsConfig):
    """Documents, or with `chats` conversations, of which only what the assistant wrote counts."""

    chats: bool = False
    template: str = ""  # chatml, hermes, hermes_names or a Jinja file; empty: the teacher's own, else chatml

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chats:
            for name, default in (("template", ""), ("train_on", "all"), ("too_long", "drop")):
                if getattr(self, name) != default:
                    raise ValueError(f"data.{name} has an effect on conversations only: give --data.chats, or drop it")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One distillation run."""

    teacher: str = "runs/demo"   # a run folder, a Hugging Face folder or a GGUF file
    init: str = ""               # the student, the same kinds; empty: random weights of `model`
    model: ModelConfig           # of a student from random weights; --init brings its own
    compute: ComputeConfig = field(default_factory=ComputeConfig)  # of both
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    top_k: int = 0               # compare the teacher's K most probable tokens and one class for the rest; 0: all
    hard_weight: float = 0.0     # share of the next-token loss, the divergence has the rest
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    accumulate: int = 1          # micro-batches per step
    loss_chunks: int = 1         # parts of a row whose logits exist at once
    samples: SampleConfig = field(default_factory=SampleConfig)  # of documents
    answers: AnswerConfig = field(default_factory=AnswerConfig)  # of conversations
    seed: int = 42
    folder: Path = Path("runs/distill")
    resume: bool = False         # continue the run in `folder` from its last complete checkpoint
    overwrite: bool = False      # delete the run in `folder` first
    teacher_checksum: str = ""   # of its weights; filled in, and checked if it is there


_SMOKE = Config(
    model=replace(MODELS["tiny"], d_model=64, num_heads=2, num_kv_heads=1, d_ff=192),
    data=DataConfig(path=CorpusConfig().path, held_out=CorpusConfig().held_out),
    pipeline=PipelineConfig(batch_size=16, seq_len=128),
    optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(decay=0.3)),
    loop=LoopConfig(steps=300, log_every=20, eval_every=100),
    checkpoint=CheckpointConfig(every=100),
)
PRESETS = {
    "smoke": _SMOKE,
    "chats": replace(
        _SMOKE, teacher="runs/sft", data=DataConfig(chats=True),
        pipeline=PipelineConfig(batch_size=16, seq_len=128, packing="first_fit")),
    "pretrained": replace(  # models that exist
        _SMOKE, teacher="Qwen3-8B", init="Qwen3-0.6B", data=DataConfig(chats=True),
        compute=ComputeConfig(dtype="bfloat16", remat="dots_no_batch"),
        pipeline=PipelineConfig(batch_size=32, seq_len=2048, packing="first_fit"),
        optim=OptimConfig(lr=1e-5, weight_decay=0.01, schedule=ScheduleConfig(kind="cosine", warmup=0.1)),
        mesh=MeshConfig(data=1, fsdp=-1), loop=LoopConfig(steps=1000, eval_every=200),
        checkpoint=CheckpointConfig(every=200), loss_chunks=16),
}


class Models(NamedTuple):
    """Who teaches, who starts (None: random weights, or a resumed run), and the language of both."""

    teacher: Pretrained
    student: Pretrained | None
    tokenizer: Tokenizer
    template: ChatTemplate | None  # of conversations; of documents what the student had


class Corpus(NamedTuple):
    """What is learnt from, and what is measured on."""

    batches: Batches
    held_out: dict[str, list[LMBatch]]
    evaluation: Evaluation


def check(config: Config, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    if config.model.mtp_depth:
        raise ValueError("no loss of distillation trains multi-token prediction; leave out model.mtp_depth")
    check_shapes(config.model, config.compute, config.pipeline, mesh, accumulate=config.accumulate,
                 loss_chunks=config.loss_chunks)


def check_teacher(config: Config, models: Models, mesh: Mesh) -> None:
    """ValueError if the teacher cannot read what the student reads, or the loss cannot be."""
    check_vocabulary(models.tokenizer, config.model.vocab_size)
    check_loss(models.tokenizer.vocab_size, top_k=config.top_k, hard_weight=config.hard_weight)
    try:
        check_shapes(models.teacher.config, config.compute, config.pipeline, mesh, accumulate=config.accumulate,
                     loss_chunks=config.loss_chunks)
    except ValueError as error:
        raise ValueError(f"--teacher {config.teacher}: {error}") from None


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, distributed=DistributedConfig())


def open_teacher(config: Config) -> Pretrained:
    """The teacher without its weights."""
    if not Path(config.teacher).exists():
        hint = f"; `{MADE_BY[config.teacher]}` makes it" if config.teacher in MADE_BY else ""
        raise ValueError(f"--teacher {config.teacher} does not exist{hint}")
    return open_pretrained(Path(config.teacher))


def open_models(config: Config) -> tuple[Config, Models]:
    """Both models of a new run without their weights, and the configuration with the student's."""
    teacher, student = open_teacher(config), None
    name = f"--teacher {config.teacher}"
    if config.init:
        student = open_pretrained(Path(config.init))
        if config.model not in (student.config, *(preset.model for preset in PRESETS.values())):
            raise ValueError("--init brings its own model configuration; leave out the --model flags")
        config = replace(config, model=student.config)
    check_same_tokenizer(teacher, student or teacher, (name, f"--init {config.init}" if student else name))
    if not config.data.chats:
        return config, Models(teacher, student, teacher.tokenizer, student and student.chat)
    template = named_template(config.data.template) or teacher.chat or ChatTemplate(TEMPLATES["chatml"])
    check_symbols(template, teacher.tokenizer)
    # As in recipes.sft: Hugging Face models begin as their template says, our own runs with BOS.
    if teacher.start or teacher.chat is None:
        template = with_bos(template, teacher.tokenizer)
    return config, Models(teacher, student, teacher.tokenizer, template)


def resumed(config: Config) -> tuple[Config, Models]:
    """What the run in `config.folder` fixes, in place of what was not asked for, and its models."""
    saved, files = saved_run(config.folder)
    saved = flags.from_json(Config, saved)
    config = replace(config, teacher_checksum=config.teacher_checksum or saved.teacher_checksum)
    if config.init:
        config = replace(config, model=saved.model)
    if not config.pipeline.shards:
        config = replace(config, pipeline=replace(config.pipeline, shards=saved.pipeline.shards))
    # Not the path of the teacher: it may have moved, its weights may not.
    check_resumable(saved, lasting(config), ignored=("folder",), fixed=(
        "model", "data", "pipeline", "seed", "init", "teacher_checksum"))
    teacher = open_teacher(config)
    tokenizer = tokenizer_from_files(files)
    own = Pretrained(config.model, None, tokenizer)
    check_same_tokenizer(teacher, own, (f"--teacher {config.teacher}", f"the run in {config.folder}"))
    return config, Models(teacher, None, tokenizer, chat_template_from_files(files))


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user: ValueError, before anything is written or trained.

    Every process does this by itself.
    """
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    mesh = make_mesh(config.mesh)
    config, models = resumed(config) if config.resume else open_models(config)
    check(config, mesh)
    check_teacher(config, models, mesh)
    config = replace(config, pipeline=resolve_shards(config.pipeline, data_shard(mesh).count))
    tokenizer, seq_len = models.tokenizer, config.pipeline.seq_len
    log.info("tokenizer: %d tokens, fingerprint %.12s", tokenizer.vocab_size, tokenizer.fingerprint())
    # No backward pass goes through the teacher, so there is nothing to compute again.
    pair = Pair(build(config.model, config.compute), build(models.teacher.config, replace(
        config.compute, remat="none")), tokenizer.vocab_size, config.loss_chunks)
    corpus = (open_chats if config.data.chats else open_documents)(config, models, pair, mesh)
    tx = make_optimizer(config.optim, config.loop.steps)
    abstract_state(pair.student.init, tx, mesh, PARAM_RULES)  # the mesh must divide every parameter
    teacher, checksum = load_teacher(Path(config.teacher), models.teacher, dtype=config.compute.dtype, mesh=mesh,
                                     rules=PARAM_RULES)
    if config.teacher_checksum not in ("", checksum):
        raise ValueError(f"--teacher {config.teacher} has not the weights that this run began with (checksum "
                         f"{checksum}, then {config.teacher_checksum})")
    log.info("teacher %s: %s parameters, checksum %s", config.teacher, human_count(count_parameters(teacher)), checksum)
    params = None
    if models.student is not None:
        put = partial(place_leaf, mesh=mesh, rules=PARAM_RULES)
        params = load_weights(Path(config.init), models.student, put=put).params
    learning = Learning(init=pair.student.init, tx=tx, step=with_teacher(step_of(config, pair, tx, mesh), teacher),
                        rules=PARAM_RULES, params=params)
    backend = attention_backend(config.model, config.compute, seq_len, mesh)
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite),
        config=lasting(replace(config, teacher_checksum=checksum)),
        files=tokenizer.files() | (models.template.files() if models.template else {}), mesh=mesh, learning=learning,
        batches=corpus.batches, evaluate=_together(corpus.evaluation, make_agreement_evaluation(
            pair, teacher, corpus.held_out, mesh)),
        loop=config.loop, checkpoint=config.checkpoint, seed=config.seed,
        # A third of the teacher's: it has a forward pass only.
        flops=flops_per_token(config.model, seq_len) + flops_per_token(models.teacher.config, seq_len) / 3,
        dtype=config.compute.dtype,
        summary=f"{human_count(config.pipeline.batch_size * seq_len)} tokens a batch, {config.pipeline.shards} data "
                f"shards, {backend} attention in {config.compute.dtype}")


def open_documents(config: Config, models: Models, pair: Pair, mesh: Mesh) -> Corpus:
    """Text, as recipes.pretrain reads it."""
    data, tokenizer, rows = config.data, models.tokenizer, config.pipeline.batch_size // config.accumulate
    sources, held_out = open_corpus(CorpusConfig(
        path=data.path, held_out=data.held_out, max_bad_rows=data.max_bad_rows))
    shard = data_shard(mesh)
    batches = make_pipeline(sources, tokenizer, config.pipeline, excluded=excluded_ids(tokenizer, data.never_predict),
                            seed=config.seed, loader=shard.index, loaders=shard.count, steps=config.loop.steps)
    evaluation = make_evaluation(student_nll(pair), pair.student, tokenizer, held_out, samples=config.samples,
                                 seq_len=config.pipeline.seq_len, batch_size=rows, mesh=mesh)
    measured = {source.name: eval_batches((source[i] for i in range(len(source))), tokenizer, batch_size=rows,
                                          seq_len=config.pipeline.seq_len)[0] for source in held_out}
    return Corpus(batches, measured, evaluation)


def open_chats(config: Config, models: Models, pair: Pair, mesh: Mesh) -> Corpus:
    """Conversations, as recipes.sft reads them."""
    data, seq_len, rows = config.data, config.pipeline.seq_len, config.pipeline.batch_size // config.accumulate
    sources, held_out = open_corpora(data)
    form = ChatFormat(models.template, models.tokenizer, data.train_on,
                      excluded_ids(models.tokenizer, data.never_predict))
    encoded, measured = ([encode_source(source, form, seq_len=seq_len, too_long=data.too_long,
                                        max_bad_rows=data.max_bad_rows) for source in part]
                         for part in (sources, held_out))
    shard = data_shard(mesh)
    batches = chat_batches(encoded, config.pipeline, seed=config.seed, loader=shard.index, loaders=shard.count,
                           steps=config.loop.steps)
    evaluation = make_chat_evaluation(
        student_nll(pair), pair.student, form, held_out, answers=config.answers, seq_len=seq_len,
        max_bad_rows=data.max_bad_rows, batch_size=rows, mesh=mesh)
    return Corpus(batches, {chats.name: whole_batches(chats, chat_example, batch_size=rows, seq_len=seq_len)
                            for chats in measured}, evaluation)


def _together(*evaluations: Evaluation) -> Evaluation:
    """All of them, one after the other."""
    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        found = [one(params, step) for one in evaluations]
        return {name: value for values, _ in found for name, value in values.items()}, "\n".join(
            text for _, text in found)

    return evaluate


def step_of(config: Config, pair: Pair, tx: optax.GradientTransformation, mesh: Mesh) -> DistillStep:
    """The training step of a configuration."""
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    loss = make_distill_loss(pair, config.distill, top_k=config.top_k, hard_weight=config.hard_weight)
    return make_distill_step(loss, tx, schedule, mesh=mesh, rules=PARAM_RULES, accumulate=config.accumulate,
                             seed=config.seed)


def work(config: Config, ledger: Ledger) -> None:
    """One run."""
    launch(config.distributed, partial(prepare, config), ledger)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
