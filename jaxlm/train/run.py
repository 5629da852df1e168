"""A training run from its folder to its end, for recipes: what they share besides the loop.

    prepare (checks everything, writes nothing) -> claim the folder -> start or resume -> fit -> curves
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm.core import config as flags
from jaxlm.core import distributed
from jaxlm.core.batch import LMBatch
from jaxlm.core.distributed import DistributedConfig, is_primary
from jaxlm.core.log import MetricLog, human_count, setup_logging
from jaxlm.core.masked import Mean, aggregate
from jaxlm.core.mesh import BATCH, Rules
from jaxlm.core.rng import derive
from jaxlm.core.tree import count_parameters, select
from jaxlm.data.pipeline import Batches, EndOfData, PipelineConfig
from jaxlm.model.attention import resolve_backend
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import Model
from jaxlm.objective.lm import chunked_cross_entropy, look_ahead
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer, check_digest
from jaxlm.train.curves import plot_curves
from jaxlm.train.folder import check_shared, clear_folder
from jaxlm.train.loop import STOPPED, LoopConfig, NonFiniteError, fit
from jaxlm.train.measure import Ledger, peak_flops
from jaxlm.train.state import TrainState, abstract_state, init_state, next_stage, state_of
from jaxlm.train.step import Loss, Step, Trainable, check_batch

Mode = Literal["new", "resume", "overwrite"]

C = TypeVar("C")  # a configuration of a recipe
R = TypeVar("R")  # a run of any kind, with a `folder`

log = logging.getLogger(__name__)


def make_loss(model: Model, *, z_loss: float = 0.0, chunks: int = 1, mtp_weight: float = 0.0) -> Loss:
    """Summed next-token cross-entropy over the mask, plus `z_loss * log(Z)^2` per token (PaLM, section 5).

    The loss of pretraining and of supervised fine-tuning: the batch says which tokens count.

    A model with K depths of multi-token prediction adds `mtp_weight / K` times the sum of their cross-entropies
    (DeepSeek-V3, arXiv:2412.19437, equations 24 and 25). As there every depth is divided by the number of next-token
    targets, although it has fewer of its own: one denominator, so that micro-batches, devices and packing change
    nothing. The metrics `mtp_loss` and `mtp_accuracy` are means over the targets of the depths themselves.

    Raises ValueError for a weight without such a model, and for such a model without a weight.
    """
    depth = model.config.mtp_depth
    if not 0 <= mtp_weight < math.inf:
        raise ValueError(f"mtp_weight must be 0 or a positive number, got {mtp_weight}")
    if mtp_weight and not depth:
        raise ValueError(f"mtp_weight {mtp_weight} needs a model with multi-token prediction: set model.mtp_depth")
    if depth and not mtp_weight:
        raise ValueError(f"nothing would train the multi-token prediction of model.mtp_depth {depth}: set mtp_weight, "
                         "or mtp_depth 0")

    def loss(params: Any, batch: LMBatch, key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        hidden = model.apply(
            params, batch.tokens, positions=batch.positions, segments=batch.segments, logits=False).hidden
        out = chunked_cross_entropy(hidden, model.head(params), batch.targets, chunks)
        nll = aggregate(out.nll, batch.loss_mask)
        total, metrics = nll.total, {"loss": nll, "accuracy": aggregate(out.correct, batch.loss_mask)}
        if z_loss:
            squared = aggregate(out.log_z**2, batch.loss_mask)
            total, metrics = total + z_loss * squared.total, metrics | {"log_z_squared": squared}
        if depth:
            further = _mtp_metrics(model, params, batch, hidden, chunks)
            total, metrics = total + mtp_weight / depth * further["mtp_loss"].total, metrics | further
        return total, metrics

    return loss


def _mtp_metrics(model: Model, params: Any, batch: LMBatch, hidden: jax.Array, chunks: int) -> dict[str, Mean]:
    """Cross-entropy and accuracy over all depths; `hidden` is that of the batch."""
    ahead = look_ahead(batch, model.config.mtp_depth)
    hidden_KBTD = model.ahead(params, hidden, ahead.following, positions=batch.positions, segments=batch.segments)
    head = model.head(params)
    parts = [chunked_cross_entropy(hidden_KBTD[k], head, ahead.targets[k], chunks) for k in range(len(hidden_KBTD))]
    return {"mtp_loss": aggregate(jnp.stack([part.nll for part in parts]), ahead.weights),
            "mtp_accuracy": aggregate(jnp.stack([part.correct for part in parts]), ahead.weights)}


def attention_backend(model: ModelConfig, compute: ComputeConfig, seq_len: int, mesh: Mesh) -> str:
    """The backend of the training step; ValueError if the one asked for cannot compute it exactly."""
    return resolve_backend(
        compute.attention, platform=mesh.devices.flat[0].platform, dtype=compute.dtype, head_dim=model.head_dim,
        q_len=seq_len, segments=True, positions=True, window=model.window, query_chunk=compute.query_chunk,
        context=mesh.shape["context"])


def check_shapes(model: ModelConfig, compute: ComputeConfig, pipeline: PipelineConfig, mesh: Mesh, *, accumulate: int,
                 loss_chunks: int) -> None:
    """ValueError for settings of a step that do not fit together."""
    attention_backend(model, compute, pipeline.seq_len, mesh)
    check_batch(pipeline.batch_size, accumulate, mesh)
    seq_len, context = pipeline.seq_len, mesh.shape["context"]
    if seq_len > model.max_positions:
        raise ValueError(f"pipeline.seq_len {seq_len} exceeds model.max_positions {model.max_positions}")
    if loss_chunks < 1 or seq_len % (loss_chunks * context):
        raise ValueError(f"loss_chunks {loss_chunks} times mesh.context {context} does not divide "
                         f"pipeline.seq_len {seq_len}")


def abstract_batch(batch_size: int, seq_len: int, mesh: Mesh) -> LMBatch:
    """The shapes of a training batch, on devices that need not be here."""
    leaf = partial(jax.ShapeDtypeStruct, (batch_size, seq_len), sharding=NamedSharding(mesh, BATCH))
    ids, mask = leaf(dtype=jnp.int32), leaf(dtype=jnp.float32)
    return LMBatch(tokens=ids, targets=ids, loss_mask=mask, segments=ids, positions=ids)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learnt, and from where."""

    init: Callable[[jax.Array], Any]     # key to all parameters
    tx: optax.GradientTransformation
    step: Step
    rules: Rules
    params: Any = None                   # to start from instead of `init`
    opt_state: Any = None                # of the run that `params` come from, to go on with
    digest: Mapping[str, int] | None = None  # of both as they were saved: `claim` checks them, with all processes
    trainable: Trainable | None = None   # see `step.make_step`


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has been checked and opened; nothing of it is written yet."""

    folder: Path
    mode: Mode
    config: Any                # what is saved of it: a frozen dataclass
    files: dict[str, bytes]    # of the tokenizer and the chat template
    mesh: Mesh
    learning: Learning
    batches: Batches
    evaluate: Callable[[Any, int], tuple[dict[str, float], str]] | None
    loop: LoopConfig
    checkpoint: CheckpointConfig
    seed: int
    flops: float               # of a token, forward and backward
    dtype: str                 # of activations
    summary: str               # for the log


def mode_of(*, resume: bool, overwrite: bool) -> Mode:
    """How a run treats its folder."""
    return "resume" if resume else "overwrite" if overwrite else "new"


def facts(run: Run) -> dict[str, str]:
    """What must be the same in all processes."""
    digest = hashlib.sha256(repr(sorted(run.files.items())).encode()).hexdigest()
    return {"mode": run.mode, "configuration": json.dumps(flags.to_json(run.config)), "tokenizer": digest,
            "data": json.dumps([source.fingerprint() for source in run.batches.sources])}


def claim(run: Run) -> None:
    """Makes the folder of a new run: from here on an old one is gone. A resumed run writes its changed settings.

    First all processes check what the run starts from: damaged weights must not cost the folder that was there.
    """
    part = run.learning
    if part.digest:
        check_digest(part.digest, {"params": part.params} | (
            {} if part.opt_state is None else {"opt_state": part.opt_state}))
    if not is_primary():
        return
    if run.mode != "resume":
        clear_folder(run.folder)
        (run.folder / "tokenizer").mkdir()
        for name, content in run.files.items():
            (run.folder / "tokenizer" / name).write_bytes(content)
    flags.save_config(run.config, run.folder / "config.json")


def start(run: Run, checkpointer: Checkpointer) -> TrainState:
    """The state to train from: the newest checkpoint, given weights, or random ones."""
    part = run.learning
    if run.mode == "resume":
        state = checkpointer.restore(abstract_state(part.init, part.tx, run.mesh, part.rules), run.batches)
        log.info("resumed at step %d", int(state.step))
        return state
    if part.opt_state is not None:
        return next_stage(part.params, part.opt_state, run.mesh, part.rules)
    if part.params is not None:
        return state_of(part.params, part.tx, run.mesh, part.rules)
    return init_state(part.init, part.tx, derive(run.seed, "init"), run.mesh, part.rules)


class _AgreedBatches:
    """Batches that end in all processes together; all must ask for each.

    One agreement a batch, which waits for the step before: only for data that can end, and several processes.
    """

    def __init__(self, batches: Batches):
        self._batches = batches
        self.get_state, self.set_state, self.stats = batches.get_state, batches.set_state, batches.stats

    def __iter__(self) -> "_AgreedBatches":
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except EndOfData:
            batch = None
        if any(distributed.gather("" if batch is not None else "ended")):
            raise EndOfData("every source is used up")
        return batch


def train(run: Run, ledger: Ledger) -> bool:
    """Runs to the end (True), or to a signal; EndOfData, after a checkpoint, if the data end before."""
    mesh = run.mesh
    checkpointer = Checkpointer(run.folder, run.checkpoint, flags.to_json(run.config), run.files)
    state = start(run, checkpointer)
    peak, peak_text = peak_flops(run.dtype)
    total = count_parameters(state.params)
    trained = total if run.learning.trainable is None else count_parameters(
        select(state.params, run.learning.trainable))
    log.info("%s parameters, %s of them trained (%.2f %%), mesh %s, %d processes, %s", human_count(total),
             human_count(trained), 100 * trained / total, dict(mesh.shape), jax.process_count(), run.summary)
    log.info("MFU: %s FLOPs a token, peak %s", human_count(run.flops), peak_text)
    with contextlib.ExitStack() as stack:
        metric_log = MetricLog(run.folder, active=is_primary())
        for part in (run.batches, metric_log, checkpointer):
            stack.callback(part.close)
        batches, ended = run.batches, None
        if getattr(batches, "finite", False) and jax.process_count() > 1:  # others have other streams: endless ones
            batches = _AgreedBatches(batches)
        try:
            _, finished = fit(
                state, run.learning.step, batches, mesh=mesh, config=run.loop, checkpointer=checkpointer,
                metric_log=metric_log, ledger=ledger, flops_ratio=run.flops / (peak * mesh.size),
                evaluate=run.evaluate)
        except EndOfData as error:
            ended = error
    log.info("data: %s", ", ".join(f"{name} {value:.3g}" for name, value in run.batches.stats().items()))
    if is_primary():
        plot_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
    log.info("run folder: %s", run.folder)
    if ended is not None:
        raise ended
    return finished


def run_training(
    work: Callable[[C, Ledger], None], presets: Mapping[str, C], argv: Sequence[str] | None, *, prog: str,
    description: str, phases: Sequence[str] = (),
) -> None:
    """`work` with the configuration that a command line asks for, and a ledger of the process's time.

    Errors of the user, and numbers that are not finite for too long, end the process as `config.fail` says.

    Args:
      phases: of the ledger, beside those that every run has.
    """
    ledger = Ledger(*phases)
    config = flags.parse(presets, argv, prog=prog, description=description)
    try:
        work(config, ledger)
    except (ValueError, OSError, NonFiniteError) as error:
        flags.fail(error, prog)
    finally:
        ledger.close()


def launch(config: DistributedConfig, prepare: Callable[[], Run], ledger: Ledger) -> None:
    """Joins the other processes, prepares, trains. SystemExit with status `STOPPED` if a signal ended the run."""
    if not train(joined(config, prepare, facts, claim), ledger):
        raise SystemExit(STOPPED)


def joined(
    config: DistributedConfig, prepare: Callable[[], R], facts: Callable[[R], Mapping[str, str]],
    claim: Callable[[R], None],
) -> R:
    """A prepared run whose folder is claimed, after all processes have agreed on every step.

    Args:
      facts: what must be the same in all processes. claim: makes the folder, in the first one.
    """
    setup_logging(config.process_id or 0)
    distributed.start(config)
    setup_logging(jax.process_index())
    run = distributed.together(prepare, facts)
    distributed.together(lambda: claim(run))
    distributed.together(lambda: check_shared(run.folder))
    return run
