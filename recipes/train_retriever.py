"""Train a retriever on rows of queries, positives and negatives; any mesh, batches larger than memory.

    python -m recipes.train_retriever --init MODEL --data.train triples.jsonl --data.dev "scifact?split=test" \\
      --batch.num-negatives 5
    python -m recipes.train_retriever --preset tsm --init contriever --data.train in.jsonl --folder runs/in
    python -m recipes.train_retriever --preset splade --init bert-base-uncased --data.train triples.jsonl
    python -m recipes.train_retriever --config runs/retriever/config.json --resume

MODEL is a folder of sentence-transformers, or with `--pooling` one of transformers (BERT, MiniLM, Contriever, E5, BGE,
XLM-R, a decoder). Every query of a batch is compared with the passages of all of them, over all devices, but not with
passages that answer it too; `--chunks 8` encodes the batch in 8 parts (GradCache), with the same gradients. Texts share
rows, so that a batch of mixed lengths is little padding (`data/padding` in the log).

- `--query-init MODEL`: a second tower for queries, with weights of its own.
- `--query-prompt "query: " --passage-prompt "passage: "`: stand before every text, as E5 wants it; those that are not
  given are what the folder says. The export keeps them.
- `--vectors sparse | late`: SPLADE with its FLOPS regulariser (`--sparse`), or a vector for each token and MaxSim.
- `--loss.kind margin_mse | kl`: learns a teacher's `pos_scores` and `neg_scores`; `--loss.add-contrastive 1` adds both.
- `--nested.dims 384 128 32`: prefixes of the vectors that serve alone (Matryoshka); dev sets are measured by each.
- `--guide.model MODEL`: excludes passages that a guide scores above the positive (GISTEmbed).
- `--lora.rank 16`: learns adapters only.

What is learnt lies in `runs/retriever/exported` (two towers: `exported/query` and `exported/passage`), which
sentence-transformers opens; `recipes.merge` merges such folders. Dev sets are BEIR folders: nDCG@10, MRR@10 and
recall@100 at every evaluation. Left out: accumulation, which would not enlarge the set of negatives as `--chunks` does;
the projection, markers and query expansion of ColBERT.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from jaxlm.core import config as flags
from jaxlm.core.distributed import DistributedConfig, is_primary, together
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh, place_leaf, tree_shardings
from jaxlm.core.rng import derive
from jaxlm.core.tree import count_parameters
from jaxlm.data.beir import BeirSet, read_beir, split_of
from jaxlm.data.retrieval_batches import RetrievalBatchConfig
from jaxlm.eval.ranking import evaluate_run, means
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import ENCODER_RULES, LORA_RULES
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.retrieval.learn import DataSet, EncodedBatches, Guide, GuidedConfig, make_guide, open_data_sets
from jaxlm.retrieval.rank import rank_towers
from jaxlm.retrieval.retriever_loss import (
    FlopsConfig,
    NestedConfig,
    RetrievalLossConfig,
    check_nested,
    make_retrieval_loss,
)
from jaxlm.retrieval.towers import (
    KINDS,
    Towers,
    TowersConfig,
    adapted,
    load_params,
    load_towers,
    open_towers,
    save_towers,
)
from jaxlm.train.checkpoint import CheckpointConfig, saved_params
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.loop import LoopConfig
from jaxlm.train.measure import Ledger
from jaxlm.train.run import Learning, Run, launch, mode_of, run_training
from jaxlm.train.state import abstract_state
from jaxlm.train.step import make_step, part_optimizer

PROG = "recipes.train_retriever"
MEASURES = ("ndcg@10", "mrr@10", "recall@100")
RULES = (*ENCODER_RULES, *LORA_RULES)
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and what is measured on."""

    train: tuple[str, ...] = ()  # JSONL files, see `jaxlm.data.retrieval_rows`; every batch is of one of them
    dev: tuple[str, ...] = ()    # BEIR folders


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    # Their flags have no prefix: --init, --query-init, --vectors, --pooling, --query-prompt, --max-length, ...
    towers: Annotated[TowersConfig, tyro.conf.arg(name="")] = field(default_factory=TowersConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: RetrievalBatchConfig = field(default_factory=RetrievalBatchConfig)
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    nested: NestedConfig = field(default_factory=NestedConfig)
    sparse: FlopsConfig = field(default_factory=FlopsConfig)
    guide: GuidedConfig = field(default_factory=GuidedConfig)
    chunks: int = 1                      # parts of a batch that are encoded one after the other (GradCache)
    dropout: bool = True                 # that of the encoder
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 42
    folder: Path = Path("runs/retriever")
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.sparse != FlopsConfig() and self.towers.vectors != "sparse":
            raise ValueError("--sparse regularises sparse vectors only: --vectors sparse")
        if self.guide.model and not self.loss.contrastive:
            raise ValueError(f"--guide.model has no effect on {self.loss.kind} alone: it excludes passages from the "
                             "contrastive loss")


_DEFAULT = Config(
    batch=RetrievalBatchConfig(batch_size=32),
    optim=OptimConfig(lr=2e-5, weight_decay=0.01, schedule=ScheduleConfig(kind="linear", warmup=0.1)),
    loop=LoopConfig(steps=1000, eval_every=250),
    checkpoint=CheckpointConfig(every=250),
)
PRESETS = {
    "default": _DEFAULT,
    # Specification of TSM, 5 and 6: raw dot products of vectors of any length, temperature 1, 5 negatives, decay of all
    # parameters, no clipping. The authors' rate of update t of T is 1 - t / (T + 1) of the peak, here 1 - (t - 1) / T.
    "tsm": replace(
        _DEFAULT, towers=TowersConfig(pooling="mean", max_length=256),
        batch=RetrievalBatchConfig(batch_size=16, num_negatives=5),
        loss=RetrievalLossConfig(similarity="dot", temperature=1.0),
        optim=OptimConfig(lr=1e-4, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01, decay="all", clip_norm=0.0,
                          schedule=ScheduleConfig(kind="linear", warmup=0.0)),
    ),
    # Formal et al. 2021 (arXiv:2109.10086): products of weights, FLOPS that grow over the first steps.
    "splade": replace(
        _DEFAULT, towers=TowersConfig(vectors="sparse", max_length=256),
        loss=RetrievalLossConfig(similarity="dot", temperature=1.0)),
    # Khattab and Zaharia 2020 (arXiv:2004.12832), without their projection to 128 numbers.
    "colbert": replace(
        _DEFAULT, towers=TowersConfig(vectors="late", max_length=220),
        loss=RetrievalLossConfig(similarity="cosine", temperature=1.0),
        optim=replace(_DEFAULT.optim, lr=3e-6)),
}


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, distributed=DistributedConfig())


def make_evaluation(towers: Towers, sets: dict[str, BeirSet], nested: NestedConfig
                    ) -> Callable[[Any, int], tuple[dict, str]]:
    """`params, step -> (measures by set, a line each)`: exact search over every corpus, by prefixes too."""
    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values, lines, work = {}, [], towers._replace(params=params)
        dims = [dim for dim in nested.dims if dim < towers.passage.width]
        for name, data in sets.items():
            for dim, run in rank_towers(work, data, dims=dims, normalize=nested.normalize).items():
                part = f"{name}/first_{dim}" if dim in dims else name
                found = means(evaluate_run(run, data.qrels, MEASURES))
                values |= {f"eval/{part}/{measure}": value for measure, value in found.items()}
                lines.append(f"{part} at step {step}: " + "  ".join(f"{key} {x:.4f}" for key, x in found.items()))
        return values, "\n".join(lines)

    return evaluate


def num_groups(config: Config, mesh: Mesh) -> int:
    """In how many parts a batch is encoded, over all devices and one after the other."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * config.chunks


def check(config: Config, towers: Towers, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    if mesh.shape["context"] > 1:
        raise ValueError("mesh.context splits texts over time, which training a retriever does not; use data or fsdp")
    groups = num_groups(config, mesh)
    if config.chunks < 1 or config.batch.batch_size % groups:
        raise ValueError(f"batch.batch_size {config.batch.batch_size} does not divide into {config.chunks} chunks on "
                         f"the devices of the mesh; use a multiple of {max(groups, 1)}")
    if groups > 1 and not config.batch.drop_last:
        raise ValueError(f"--batch.no-drop-last keeps the smaller batch that ends a data set, which need not divide "
                         f"into {groups} parts (devices and chunks); leave it out")
    check_nested(config.nested, towers)
    units = config.loss.similarity == "cosine" or towers.passage.normalize
    if config.loss.contrastive and units and towers.vectors == "dense" and config.loss.temperature >= 0.5:
        log.warning("vectors of length 1 at --loss.temperature %g: scores lie within %.2g of each other, so that the "
                    "loss hardly falls; 0.01 to 0.1 is customary", config.loss.temperature, 2 / config.loss.temperature)


def open_guide(config: GuidedConfig, sources: Sequence[DataSet]) -> Guide | None:
    """The vectors of the guide. Each process encodes all texts by its own devices, so that none waits for another."""
    if not config.model:
        return None
    own = make_mesh(MeshConfig(), jax.local_devices())
    with jax.set_mesh(own):
        towers = load_towers(TowersConfig(init=config.model, query_prompt=config.query_prompt,
                                          passage_prompt=config.passage_prompt), own)
        return make_guide(*towers.at_work("passage"), sources)


def learning_of(config: Config, towers: Towers, mesh: Mesh) -> Learning:
    """The training step, and what it learns from where; a resumed run reads no weights but those of its checkpoint."""
    adapt = partial(adapted, towers, config.lora, derive(config.seed, "lora"))
    trainable = lora.is_adapter if config.lora.rank else None
    tx = part_optimizer(make_optimizer(config.optim, config.loop.steps), trainable)
    loss = make_retrieval_loss(
        towers, config.loss, chunks=config.chunks, dropout=config.dropout, nested=config.nested,
        regulariser=config.sparse if towers.vectors == "sparse" else None,
        guide=config.guide if config.guide.model else None)
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    step = make_step(loss, tx, schedule, mesh=mesh, rules=RULES, seed=config.seed, trainable=trainable,
                     tokens=lambda batch: sum(jnp.sum(batch[kind].segments > 0) for kind in KINDS))
    learning = Learning(init=lambda key: adapt(towers.init(key)), tx=tx, rules=RULES, step=step, trainable=trainable)
    abstract_state(learning.init, tx, mesh, RULES)  # the mesh must divide every parameter
    if config.resume:
        return learning
    params = load_params(config.towers, towers, lambda path, leaf: place_leaf(path, leaf, mesh=mesh, rules=RULES))
    if config.lora.rank:
        shardings = tree_shardings(jax.eval_shape(adapt, params), RULES, mesh)
        with jax.set_mesh(mesh):
            params = jax.jit(adapt, out_shardings=shardings, donate_argnums=0)(params)
    return replace(learning, params=params)


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user: ValueError, before anything is written or trained."""
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        check_resumable(flags.load_config(Config, config.folder / "config.json"), lasting(config), ignored=("folder",),
                        fixed=("towers", "lora", "data", "batch", "loss", "nested", "sparse", "guide", "seed"))
    mesh = make_mesh(config.mesh)
    shard = data_shard(mesh)
    towers = open_towers(config.towers, config.compute, config.loss.similarity)
    check(config, towers, mesh)
    log.info("%s: %s", config.towers.init, towers.prompts)
    sources = open_data_sets(config.data.train)
    batches = EncodedBatches(towers, sources, config.batch, teacher=config.loss.teacher,
                             groups=num_groups(config, mesh), loader=shard.index, loaders=shard.count)
    dev = {Path(folder).name: read_beir(folder, split) for folder, split in (split_of(one, "dev")
                                                                             for one in config.data.dev)}
    learning = learning_of(config, towers, mesh)
    batches.guide = open_guide(config.guide, sources)
    start = batches.get_state()
    first = next(batches)
    batches.set_state(start)
    shapes = jax.eval_shape(learning.init, jax.random.key(0))
    counts = {kind: int(np.sum(first[kind].segments > 0)) for kind in KINDS}
    flops = sum(6 * counts[kind] * (count_parameters(part) - part["embed"]["embedding"].size)
                for kind in KINDS for part in [towers.part(shapes, kind)]) / sum(counts.values())
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite), config=lasting(config),
        files=towers.passage.tokenizer.files(), mesh=mesh, learning=learning, batches=batches,
        evaluate=make_evaluation(towers, dev, config.nested) if dev else None, loop=config.loop,
        checkpoint=config.checkpoint, seed=config.seed, flops=flops, dtype=config.compute.dtype,
        summary=f"{sum(len(source.rows) for source in sources)} rows, {config.batch.batch_size} queries a batch with "
                f"{config.batch.batch_size * (1 + config.batch.num_negatives)} passages in {config.chunks} chunks")


def export(config: Config) -> None:
    """What the last checkpoint holds, as folders of sentence-transformers."""
    towers = open_towers(config.towers, config.compute, config.loss.similarity)
    init = lambda key: adapted(towers, config.lora, key, towers.init(key))
    params = saved_params(config.folder, jax.eval_shape(init, jax.random.key(0)))
    save_towers(config.folder / "exported", config.towers, towers, params)
    log.info("exported to %s", config.folder / "exported")


def work(config: Config, ledger: Ledger) -> None:
    """One run and its export."""
    launch(config.distributed, partial(prepare, config), ledger)
    together(lambda: export(config) if is_primary() else None)  # the others wait: to leave is to end the job


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_training(work, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
