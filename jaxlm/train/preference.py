"""Preference learning: log-probabilities of completions by policy and reference, the step, the held-out measures.

The reference runs inside the policy's step, without a backward pass. With adapters it is the base beneath them, which
stays as it is; else a copy of the weights, an argument of the compiled step that no checkpoint holds. So both read the
same batch in the same program: where they are equal, so are their numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlm.core.batch import LMBatch
from jaxlm.core.masked import Mean
from jaxlm.core.mesh import BATCH, Rules, constrain, put_whole
from jaxlm.core.tree import select
from jaxlm.data.preference_batches import PreferenceBatch
from jaxlm.model.decoder import Model
from jaxlm.model.lora import ADAPTER_PARTS, is_adapter
from jaxlm.objective.lm import chunked_cross_entropy
from jaxlm.objective.preference import (
    METHODS,
    PreferenceConfig,
    Rows,
    kto_anchor,
    preference_loss,
    preference_metrics,
)
from jaxlm.train.state import TrainState
from jaxlm.train.step import Loss, Metrics, make_step

REFERENCE = "reference"  # its place beside the policy's parameters, within a step only

# state, parameters of the reference or None, batch -> state, metrics; the state is donated
PreferenceStep = Callable[[TrainState, Any, PreferenceBatch], tuple[TrainState, Metrics]]


class Completions(NamedTuple):
    """What a model gives to B completions, float32."""

    logp: jax.Array    # [B] sum over the targets that count, nats
    length: jax.Array  # [B] how many these are


def completion_logp(model: Model, params: Any, batch: LMBatch, chunks: int = 1) -> Completions:
    """sum_t log p(target_t) over the targets that count; their mask is 0 or 1. 0 where none does."""
    hidden = model.apply(
        params, batch.tokens, positions=batch.positions, segments=batch.segments, logits=False).hidden
    nll = chunked_cross_entropy(hidden, model.head(params), batch.targets, chunks).nll
    counts = batch.loss_mask > 0
    return Completions(-jnp.sum(jnp.where(counts, nll, 0), axis=1), jnp.sum(counts, axis=1, dtype=jnp.float32))


def policy_part(params: Any) -> Any:
    """The parameters without the reference's."""
    return {name: part for name, part in params.items() if name != REFERENCE}


def reference_part(params: Any) -> Any:
    """The reference's own parameters, or the base beneath the adapters."""
    if REFERENCE in params:
        return params[REFERENCE]
    return select(params, lambda path: path.rpartition("/")[2] not in ADAPTER_PARTS)


def make_preference_loss(model: Model, config: PreferenceConfig, *, chunks: int = 1) -> Loss:
    """The sum of the rows' losses over batches of `data.preference_batches`; those judged alone come with their anchor.

    The parameters are the policy's, and the reference's under `REFERENCE` unless the policy has adapters.

    Args:
      chunks: parts of a row whose logits exist at once.
    """
    method = METHODS[config.method]

    def loss(params: Any, batch: PreferenceBatch, key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        sides = 2 if method.paired else 1
        # Neighbours, so that no row changes its device: one pass instead of two.
        whole = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, leaves[0].shape[1]),
                             *(batch.first, batch.second)[:sides])
        reads = lambda part: Completions(*(x.reshape(-1, sides) for x in completion_logp(model, part, whole, chunks)))
        policy = reads(policy_part(params))
        reference = jax.lax.stop_gradient(reads(reference_part(params)).logp) if method.reference else None
        rows = Rows(policy.logp, policy.length, reference, batch.desirable, batch.anchor)
        metrics = preference_metrics(rows, preference_loss(rows, config))
        return metrics["loss"].total, metrics

    return loss


def make_anchor(model: Model, *, chunks: int = 1, micro: int = 1) -> Callable[[Any, PreferenceBatch], PreferenceBatch]:
    """`params, batch -> batch` with KTO's reference point: one of the whole batch, whatever its micro-batches.

    Args:
      micro: parts of the batch that are read one after the other.
    """
    def part(params: Any, batch: LMBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        policy = completion_logp(model, policy_part(params), batch, chunks)
        return policy.logp, completion_logp(model, reference_part(params), batch, chunks).logp, policy.length

    def split(leaf: jax.Array) -> jax.Array:
        # As `train.step` does: each device cuts the rows that it holds already.
        rows = jnp.swapaxes(leaf.reshape(-1, micro, *leaf.shape[1:]), 0, 1)
        return constrain(rows, P(None, *BATCH[: leaf.ndim]))

    def anchored(params: Any, batch: PreferenceBatch) -> PreferenceBatch:
        logp, ref_logp, length = jax.lax.map(lambda one: part(params, one), jax.tree.map(split, batch.second))
        anchor = kto_anchor(logp.reshape(-1), ref_logp.reshape(-1), length.reshape(-1) > 0)
        return batch._replace(anchor=jnp.broadcast_to(anchor, batch.desirable.shape))

    return anchored


def make_preference_step(
    model: Model, config: PreferenceConfig, tx: optax.GradientTransformation, schedule: optax.Schedule, *, mesh: Mesh,
    rules: Rules, adapters: bool = False, chunks: int = 1, accumulate: int = 1, seed: int = 0,
) -> PreferenceStep:
    """`train.step.make_step` for a loss that also reads a reference; the state is the policy's alone.

    Args:
      adapters: only they are learnt; `tx` is then `part_optimizer(tx, is_adapter)`.
    """
    learnt = lambda path: not path.startswith(f"{REFERENCE}/") and (is_adapter(path) or not adapters)
    sides = lambda batch: (batch.first, batch.second)[:2 if METHODS[config.method].paired else 1]
    inner = make_step(make_preference_loss(model, config, chunks=chunks), tx, schedule, mesh=mesh, rules=rules,
                      accumulate=accumulate, seed=seed, trainable=learnt,
                      tokens=lambda batch: sum(jnp.sum(side.loss_mask) for side in sides(batch)))
    anchored = make_anchor(model, chunks=chunks, micro=accumulate)

    def step(state: TrainState, reference: Any, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        params = state.params if reference is None else {**state.params, REFERENCE: reference}
        if not METHODS[config.method].paired:
            batch = anchored(params, batch)
        state, metrics = inner(state._replace(params=params), batch)
        return state._replace(params=policy_part(state.params)), metrics

    return jax.jit(step, donate_argnums=0)


def with_reference(step: PreferenceStep, reference: Any) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The step of a run, with its reference."""
    return lambda state, batch: step(state, reference, batch)


def make_preference_evaluation(
    model: Model, config: PreferenceConfig, reference: Any, batches: Mapping[str, Sequence[PreferenceBatch]],
    mesh: Mesh, *, chunks: int = 1,
) -> Callable[[Any, int], tuple[dict[str, float], str]]:
    """`params, step -> ({"eval/loss_NAME", "eval/accuracy_NAME", "eval/margin_NAME", ...}, a line a set)`.

    The metrics of `preference_metrics`, over all rows of a set; KTO's reference point is that of each batch.
    """
    loss, anchored = make_preference_loss(model, config, chunks=chunks), make_anchor(model, chunks=chunks)

    @jax.jit
    def measure(params: Any, reference: Any, batch: PreferenceBatch) -> dict[str, Mean]:
        params = params if reference is None else {**params, REFERENCE: reference}
        if not METHODS[config.method].paired:
            batch = anchored(params, batch)
        return loss(params, batch, None)[1]

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values, lines = {}, []
        for name, part in batches.items():
            found = jax.device_get([measure(params, reference, put_whole(batch, mesh)) for batch in part])
            sums = {label: [sum(one[label].total for one in found), sum(one[label].weight for one in found)]
                    for label in found[0]}
            means = {label: float(total / weight) for label, (total, weight) in sums.items() if weight}
            values |= {f"eval/{label}_{name}": value for label, value in means.items()}
            lines.append(f"{name} at step {step}: " + "  ".join(
                f"{label} {means[label]:.4f}" for label in ("loss", "accuracy", "margin") if label in means))
        return values, "\n".join(lines)

    return evaluate
