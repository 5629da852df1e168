"""Train a dense retriever on rows of queries, positives and negatives; any mesh, batches larger than memory.

    python -m recipes.train_retriever --init MODEL --data.train triples.jsonl --data.dev scifact --batch.num-negatives 5
    python -m recipes.train_retriever --preset tsm --init contriever --data.train in.jsonl --folder runs/in
    python -m recipes.train_retriever --config runs/retriever/config.json --resume

MODEL is a folder of sentence-transformers, or with `--pooling` one of transformers (BERT, MiniLM, Contriever, E5, BGE,
XLM-R, a decoder). Every query of a batch is compared with the passages of all of them, over all devices, but not with
passages that answer it too; `--chunks 8` encodes the batch in 8 parts (GradCache), with the same gradients. What is
learnt lies in `runs/retriever/exported`, which SentenceTransformer opens; `recipes.merge` merges such folders. Dev sets
are BEIR folders: nDCG@10, MRR@10 and recall@100 at every evaluation. Accumulation is left out: it would not enlarge the
set of negatives, `--chunks` does.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core import config as flags
from jaxlm.core.distributed import DistributedConfig, is_primary
from jaxlm.core.mesh import MeshConfig, data_shard, make_mesh
from jaxlm.core.tree import count_parameters
from jaxlm.data.beir import BeirSet, beir_rows, read_beir, split_of
from jaxlm.data.retrieval_batches import RetrievalBatchConfig
from jaxlm.data.retrieval_rows import read_retrieval_rows
from jaxlm.eval.ranking import evaluate_run, means
from jaxlm.model.config import ComputeConfig
from jaxlm.model.hf import Put
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.objective.contrastive import ContrastiveConfig
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.retrieval.embed import Pooling, TextEncoder
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from jaxlm.retrieval.learn import DataSet, EncodedBatches, make_retrieval_loss
from jaxlm.retrieval.rank import rank
from jaxlm.train.checkpoint import CheckpointConfig, saved_params
from jaxlm.train.folder import check_folder, check_resumable
from jaxlm.train.loop import LoopConfig, NonFiniteError
from jaxlm.train.measure import Ledger
from jaxlm.train.run import Learning, Run, launch, mode_of
from jaxlm.train.state import abstract_state, place_leaf
from jaxlm.train.step import make_step

PROG = "recipes.train_retriever"
MEASURES = ("ndcg@10", "mrr@10", "recall@100")
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and what is measured on."""

    train: tuple[str, ...] = ()  # JSONL files, see `jaxlm.data.retrieval_rows`; every batch is of one of them
    dev: tuple[str, ...] = ()    # BEIR folders


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    init: str = ""                       # the model to start from
    pooling: Pooling | None = None       # of a folder without modules.json
    max_length: int | None = None        # tokens of a text; None: what the folder says
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: RetrievalBatchConfig = field(default_factory=RetrievalBatchConfig)
    loss: ContrastiveConfig = field(default_factory=ContrastiveConfig)
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


_DEFAULT = Config(
    batch=RetrievalBatchConfig(batch_size=32),
    optim=OptimConfig(lr=2e-5, weight_decay=0.01, schedule=ScheduleConfig(kind="linear", warmup=0.1)),
    loop=LoopConfig(steps=1000, eval_every=250),
    checkpoint=CheckpointConfig(every=250),
)
PRESETS = {
    "default": _DEFAULT,
    # Specification of TSM, 5 and 6: raw dot products, temperature 1, 5 negatives, AdamW on all parameters, no clipping.
    "tsm": replace(
        _DEFAULT, pooling="mean", max_length=256,
        batch=RetrievalBatchConfig(batch_size=16, num_negatives=5),
        loss=ContrastiveConfig(similarity="dot", temperature=1.0),
        optim=OptimConfig(lr=1e-4, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=0.0,
                          schedule=ScheduleConfig(kind="linear", warmup=0.0)),
    ),
}


def lasting(config: Config) -> Config:
    """The part of a configuration that describes the run, not this start of it."""
    return replace(config, resume=False, overwrite=False, distributed=DistributedConfig())


def open_train(specs: Sequence[str]) -> list[DataSet]:
    """The data sets; a folder is one of BEIR, of which the split train is taken unless another is named."""
    if not specs:
        raise ValueError("--data.train names the rows to learn from: JSONL files or BEIR folders")
    found = []
    for spec in specs:
        folder, split = split_of(spec, "train")
        rows = beir_rows(read_beir(folder, split)) if Path(folder).is_dir() else read_retrieval_rows(spec).rows
        found.append(DataSet(spec, rows, hashlib.sha256(repr(rows).encode()).hexdigest()))
        log.info("%s: %d rows", spec, len(rows))
    return found


def open_encoder(config: Config, put: Put | None = None) -> tuple[TextEncoder, Any]:
    """The encoder of `init` and its parameters, placed by `put`."""
    if not config.init:
        raise ValueError("--init names the model to start from: a folder of sentence-transformers or transformers")
    encoder, params = load_text_encoder(config.init, pooling=config.pooling, compute=config.compute, put=put)
    if config.max_length:
        encoder = dataclasses.replace(encoder, max_length=config.max_length)
    return encoder, params


def make_evaluation(encoder: TextEncoder, sets: dict[str, BeirSet]) -> Callable[[Any, int], tuple[dict, str]]:
    """`params, step -> (measures by set, a line each)`: exact search over every corpus."""
    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values, lines = {}, []
        for name, data in sets.items():
            found = means(evaluate_run(rank(encoder, params, data), data.qrels, MEASURES))
            values |= {f"eval/{name}/{measure}": value for measure, value in found.items()}
            lines.append(f"{name} at step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in found.items()))
        return values, "\n".join(lines)

    return evaluate


def prepare(config: Config) -> Run:
    """Everything that can fail for reasons of the user: ValueError, before anything is written or trained."""
    check_folder(config.folder, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        check_resumable(flags.load_config(Config, config.folder / "config.json"), lasting(config), ignored=("folder",),
                        fixed=("init", "pooling", "max_length", "data", "batch", "loss", "seed"))
    mesh = make_mesh(config.mesh)
    if mesh.shape["context"] > 1:
        raise ValueError("mesh.context splits texts over time, which training a retriever does not; use data or fsdp")
    shard = data_shard(mesh)
    encoder, params = open_encoder(
        config, lambda path, leaf: place_leaf(path, np.asarray(leaf), mesh=mesh, rules=ENCODER_RULES))
    sources = open_train(config.data.train)
    batches = EncodedBatches(encoder, sources, config.batch, loader=shard.index, loaders=shard.count)
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * config.chunks
    if config.batch.batch_size % rows:
        raise ValueError(f"batch.batch_size {config.batch.batch_size} does not divide into {config.chunks} chunks on "
                         f"the devices of the mesh; use a multiple of {rows}")
    dev = {Path(folder).name: read_beir(folder, split) for folder, split in (split_of(one, "dev")
                                                                             for one in config.data.dev)}
    tx = make_optimizer(config.optim, config.loop.steps)
    schedule = make_schedule(config.optim.schedule, config.optim.lr, config.loop.steps)
    loss = make_retrieval_loss(encoder, config.loss, chunks=config.chunks, dropout=config.dropout)
    learning = Learning(init=encoder.model.init, tx=tx, rules=ENCODER_RULES, params=params,
                        step=make_step(loss, tx, schedule, mesh=mesh, rules=ENCODER_RULES, seed=config.seed))
    abstract_state(learning.init, tx, mesh, ENCODER_RULES)  # the mesh must divide every parameter
    start = batches.get_state()
    first = next(batches)
    batches.set_state(start)
    tokens = sum(first[name].tokens.size for name in ("query", "passage")) / len(first["relevance"])
    table = params["embed"]["embedding"].size
    return Run(
        folder=config.folder, mode=mode_of(resume=config.resume, overwrite=config.overwrite), config=lasting(config),
        files=encoder.tokenizer.files(), mesh=mesh, learning=learning, batches=batches,
        evaluate=make_evaluation(encoder, dev) if dev else None, loop=config.loop, checkpoint=config.checkpoint,
        seed=config.seed,
        flops=6 * (count_parameters(params) - table) * tokens, dtype=config.compute.dtype,
        summary=f"{sum(len(source.rows) for source in sources)} rows, {config.batch.batch_size} queries a batch with "
                f"{config.batch.batch_size * (1 + config.batch.num_negatives)} passages in {config.chunks} chunks")


def export(config: Config) -> None:
    """What the last checkpoint holds, as a folder of sentence-transformers."""
    kind = json.loads((Path(config.init) / "config.json").read_text(encoding="utf-8"))["model_type"]
    encoder, params = open_encoder(config)
    params = saved_params(config.folder, jax.eval_shape(lambda: params))
    save_text_encoder(config.folder / "exported", encoder, jax.device_get(params), architecture=kind, overwrite=True)
    log.info("exported to %s", config.folder / "exported")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    ledger = Ledger()
    config = flags.parse(PRESETS, argv, prog=PROG, description=__doc__)
    try:
        launch(config.distributed, partial(prepare, config), ledger)
        if is_primary():
            export(config)
    except (ValueError, OSError, NonFiniteError) as error:
        flags.fail(error, PROG)
    finally:
        ledger.close()


if __name__ == "__main__":
    main()
