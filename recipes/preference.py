"""Preference learning on pairs (chosen, rejected) or judged completions: the whole model, or adapters beside it.

    python -m recipes.preference                                     embedded pairs, ORPO from scratch, 2 CPU cores
    python -m recipes.preference --preset dpo --init runs/sft --optim.lr 1e-4 --loop.steps 200 --batch.batch-size 16
    python -m recipes.preference --preset simpo --init Qwen3-0.6B --data.path pairs.jsonl --data.held-out dev.jsonl
    python -m recipes.preference --preset dpo --init Qwen3-8B --lora.rank 16 --optim.lr 5e-6 ...
    python -m recipes.convert --source runs/preference --target exported

DPO, cDPO (`--loss.label-smoothing`), robust DPO, hinge, IPO, RPO, KTO, ORPO, SimPO: `jaxlm.objective.preference`.
Rows: `jaxlm.data.preference_rows`; KTO takes pairs too, as two judged rows each. The reference is what `--init` names:
with adapters the base beneath them, else a copy in the type of the activations, read in every step; `--reference` names
another model of the same shape. Presets have what the papers recommend for models of 7 to 8 B (IPO, KTO: TRL's
defaults). KORMo (arXiv 2510.09426) does not say its own settings; those of `dpo` are the field's.

Held out: loss, accuracy (the chosen has the greater implicit reward) and margin of every set.
Left out: reference log-probabilities computed once and kept, packed rows, sampling of new pairs, `--plan`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.distributed import DistributedConfig
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh
from jaxlm.core.rng import derive
from jaxlm.data.chat_examples import ChatFormat
from jaxlm.data.chat_template import chat_template_from_files
from jaxlm.data.pipeline import PipelineConfig
from jaxlm.data.preference_batches import PreferenceBatchConfig, PreferenceBatches, held_out_batches
from jaxlm.data.preference_examples import PreferenceSet, encode_preferences
from jaxlm.data.preference_rows import PreferenceDataConfig, open_preferences
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import check_vocabulary, tokenizer_from_files
from jaxlm.data.tokenizer_training import TokenizerConfig
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import Model, build
from jaxlm.model.lora import LoraConfig
from jaxlm.model.presets import MODELS
from jaxlm.objective.preference import METHODS, PreferenceConfig
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.train.checkpoint import CheckpointConfig, saved_run
from jaxlm.train.distill import check_same_tokenizer, load_teacher
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.loop import LoopConfig
from jaxlm.train.measure import Ledger
from jaxlm.train.preference import make_preference_evaluation, make_preference_step, with_reference
from jaxlm.train.pretrained import Pretrained, open_pretrained
from jaxlm.train.run import Learning, Run, attention_backend, check_shapes, launch, mode_of, run_training
from jaxlm.train.state import abstract_state
from jaxlm.train.step import part_optimizer
from jaxlm.train.tuning import RULES, Language, open_init, open_language, spread_rows, starting_params

PROG = "recipes.preference"
log = logging.getLogger(PROG)  # as a module with flags, this file is called __main__


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig                 # of random initialisation; --init brings its own
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    batch: PreferenceBatchConfig = field(default_factory=PreferenceBatchConfig)
    loss: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    accumulate: int = 1        # micro-batches per step
    loss_chunks: int = 1       # parts of a row whose logits exist at once
    seed: int = 42
    init: str = ""             # a run folder, a Hugging Face folder or a GGUF file; empty: random weights
    reference: str = ""        # the same kinds; empty: what `init` names
    reference_checksum: str = ""  # of its weights; filled in, and checked if it is there
    template: str = ""         # chatml, hermes, hermes_names or a Jinja file; empty: the model's own, else chatml
    folder: Path = Path("runs/preference")
    resume: bool = False       # continue the run in `folder` from its last complete checkpoint
    overwrite: bool = False    # delete the run in `folder` first

    def __post_init__(self) -> None:
        needed = METHODS[self.loss.method].reference
        if self.reference and not needed:
            raise ValueError(f"--reference has no effect with {self.loss.method}, which compares with no other model")
        if needed and not (self.init or self.resume):
            raise ValueError(f"{self.loss.method} compares with the weights that it starts from: name them with --init "
                             "(recipes.sft makes some)")
        if self.lora.rank and not (self.init or self.resume):
            raise ValueError("lora.rank adapts weights that exist: name them with --init")


def _tuned(method: str, lr: float, **optim: Any) -> Config:
    """Of models that exist."""
    return Config(
        model=MODELS["qwen3_0_6b"], init="Qwen3-0.6B", loss=PreferenceConfig(method=method),
        compute=ComputeConfig(dtype="bfloat16", remat="dots_no_batch"),
        batch=PreferenceBatchConfig(batch_size=64, seq_len=2048, least_width=256),
        optim=OptimConfig(lr=lr, beta2=0.999, weight_decay=0.0, **optim,
                          schedule=ScheduleConfig(kind="cosine", warmup=0.1)),
        mesh=MeshConfig(data=1, fsdp=-1), loop=LoopConfig(steps=1000, eval_every=200),
        checkpoint=CheckpointConfig(every=200), accumulate=8, loss_chunks=8)


PRESETS = {
    "smoke": Config(
        model=MODELS["tiny"], loss=PreferenceConfig(method="orpo", beta=1.0),
        batch=PreferenceBatchConfig(batch_size=32, seq_len=64, least_width=32),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(decay=0.3)),
        loop=LoopConfig(steps=300, log_every=20, eval_every=100), checkpoint=CheckpointConfig(every=100)),
    "dpo": _tuned("dpo", 5e-7),
    "rpo": _tuned("rpo", 7e-7),
    "ipo": _tuned("ipo", 1e-6),
    "kto": _tuned("kto", 1e-6),
    "orpo": _tuned("orpo", 8e-6),
    "simpo": _tuned("simpo", 6e-7),
}


def check(config: Config, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    for width in config.batch.widths():
        shape = PipelineConfig(batch_size=config.batch.batch_size, seq_len=width)
        try:
            check_shapes(config.model, config.compute, shape, mesh, accumulate=config.accumulate,
                         loss_chunks=config.loss_chunks)
        except ValueError as error:
            raise ValueError(f"batch.seq_len {config.batch.seq_len} and least_width {config.batch.least_width}: "
                             f"{error}") from None


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, distributed=DistributedConfig())


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
    config = replace(config, reference_checksum=config.reference_checksum or saved.reference_checksum)
    if config.init:
        config = replace(config, model=saved.model)
    # Not the path of the reference: it may have moved, its weights may not.
    check_resumable(saved, lasting(config), ignored=("folder", "reference"), fixed=(
        "model", "data", "tokenizer", "batch", "loss", "lora", "seed", "init", "template", "reference_checksum"))
    return config, Language(tokenizer_from_files(files), chat_template_from_files(files))


def conversations(sources: Sequence[Source], count: int | None) -> Iterator[dict[str, Any]]:
    """What a tokenizer of the rows' own is trained on."""
    return ({**row, "messages": [*row["messages"], *row[side]]} for row in spread_rows(sources, count)
            for side in ("chosen", "rejected", "completion") if side in row)


def load_reference(config: Config, language: Language, mesh: Mesh) -> tuple[Any, str]:
    """The parameters of a reference that is no base of adapters, and their checksum; None and nothing without one."""
    if not METHODS[config.loss.method].reference or (config.lora.rank and not config.reference):
        return None, ""
    source = config.reference or config.init
    opened = open_pretrained(Path(source))
    if opened.config != config.model:
        raise ValueError(f"--reference {source} has another shape than the model that learns")
    if opened.tokenizer is not None:  # of --init, --tokenizer.path may say it
        check_same_tokenizer(opened, Pretrained(config.model, None, language.tokenizer), (
            f"the reference {source}", "the model that learns"))
    params, checksum = load_teacher(Path(source), opened, dtype=config.compute.dtype, mesh=mesh, rules=RULES)
    if config.reference_checksum not in ("", checksum):
        raise ValueError(f"the reference {source} has not the weights that this run began with (checksum {checksum}, "
                         f"then {config.reference_checksum})")
    return params, checksum


def learning_of(config: Config, model: Model, reference: Any, mesh: Mesh) -> Learning:
    """The training step of a configuration, and what it learns."""
    init = lambda key: lora.init(derive(config.seed, "lora"), model.init(key), config.lora)
    trainable = lora.is_adapter if config.lora.rank else None
    tx = part_optimizer(make_optimizer(config.optim, config.loop.steps), trainable)
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    step = make_preference_step(
        model, config.loss, tx, schedule, mesh=mesh, rules=RULES, adapters=config.lora.rank > 0,
        chunks=config.loss_chunks, accumulate=config.accumulate, seed=config.seed)
    return Learning(init=init, tx=tx, step=with_reference(step, reference), rules=RULES, trainable=trainable)


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
    sources, held_out = open_preferences(config.data)
    if not config.resume:
        language = open_language(opened, config.template, config.tokenizer, config.model.vocab_size,
                                 conversations(sources, config.tokenizer.documents))
    check_vocabulary(language.tokenizer, config.model.vocab_size)
    log.info("tokenizer: %d tokens, fingerprint %.12s", language.tokenizer.vocab_size, language.tokenizer.fingerprint())
    method = METHODS[config.loss.method]
    encode = partial(
        encode_preferences, form=ChatFormat(language.template, language.tokenizer), seq_len=config.batch.seq_len,
        paired=method.paired, too_long=config.data.too_long, max_bad_rows=config.data.max_bad_rows)
    rows, measured = [encode(source) for source in sources], [encode(source) for source in held_out]
    shard = data_shard(mesh)
    batches = PreferenceBatches(rows, config.batch, seed=config.seed, loader=shard.index, loaders=shard.count)
    model = build(config.model, config.compute)
    reference, checksum = load_reference(config, language, mesh)
    learning = learning_of(config, model, reference, mesh)
    abstract_state(learning.init, learning.tx, mesh, RULES)  # the mesh must divide every parameter
    if opened is not None:
        learning = replace(learning, params=starting_params(config.init, opened, config.lora, config.seed, mesh))
    few = replace(config.batch, batch_size=config.batch.batch_size // config.accumulate)
    evaluate = make_preference_evaluation(
        model, config.loss, reference, {one.name: held_out_batches(one.examples, few) for one in measured}, mesh,
        chunks=config.loss_chunks)
    backend = attention_backend(config.model, config.compute, config.batch.seq_len, mesh)
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite),
        config=lasting(replace(config, reference_checksum=checksum)), files=language.files(), mesh=mesh,
        learning=learning, batches=batches, evaluate=evaluate, loop=config.loop, checkpoint=config.checkpoint,
        seed=config.seed, flops=flops_per_target(config, rows), dtype=config.compute.dtype,
        summary=f"{config.loss.method} on {sum(len(one.examples) for one in rows)} rows, {config.batch.batch_size} a "
                f"batch, {backend} attention in {config.compute.dtype}")


def flops_per_target(config: Config, rows: Sequence[PreferenceSet]) -> float:
    """Of a token of a completion: its share of the prompts, and of what is only read (a third of what is learnt from).

    Each sequence passes through the policy, and through the reference if there is one; for KTO another as long passes
    through both.
    """
    method = METHODS[config.loss.method]
    sides = [(len(one.prompt), side) for part in rows for one in part.examples for side in one[1:3] if side]
    tokens = sum(prompt + len(side.ids) for prompt, side in sides)
    targets = sum(int(side.loss.sum()) for _, side in sides)
    passes = 1 + (method.reference + 2 * (not method.paired)) / 3
    return flops_per_token(config.model, config.batch.seq_len) * passes * tokens / targets


def work(config: Config, ledger: Ledger) -> None:
    """One run."""
    launch(config.distributed, partial(prepare, config), ledger)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
