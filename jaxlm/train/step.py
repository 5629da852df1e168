"""The training step: gradient accumulation, one division by the global weight, finite check, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlm.core.masked import Metric
from jaxlm.core.mesh import BATCH, Rules, constrain, tree_shardings
from jaxlm.core.rng import derive
from jaxlm.core.tree import combine, select
from jaxlm.train.state import TrainState

# (params, batch, key) -> (sum of the loss over the batch, metrics); metrics["loss"] is a `Mean`, and its weight is what
# divides the sum.
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Metric]]]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Trainable = Callable[[str], bool]  # path of a parameter to whether it is learnt


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: Mesh,
    rules: Rules,
    accumulate: int = 1,
    seed: int = 0,
    trainable: Trainable | None = None,
    tokens: Callable[[Any], jax.Array] | None = None,
) -> Step:
    """A jitted `state, batch -> state, metrics`; the state is donated.

    The gradient is the sum over all micro-batches divided once by the summed weight of `metrics["loss"]`, so a
    batch gives the same update in 1 or in 4 micro-batches and on 1 or 8 devices. A step whose loss or gradient is
    not finite changes nothing but `step`; `metrics["skipped"]` is 1 then.

    Args:
      accumulate: micro-batches per step; must divide the rows of each device.
      trainable: what is learnt; the rest gets no gradient. None: all. `tx` is then `part_optimizer(tx, trainable)`.
      tokens: of a batch, for the speed. None: the weight of the loss.
    """
    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        moving, still = state.params, None
        part_loss = loss
        if trainable is not None:
            moving = select(state.params, trainable)
            still = select(state.params, lambda path: not trainable(path))
            part_loss = lambda moving, batch, key: loss(combine(moving, still), batch, key)
        grads, found = _accumulate(part_loss, moving, batch, derive(seed, "train", state.step), accumulate)
        weight = jnp.maximum(found["loss"].weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        metrics = {name: metric.value() for name, metric in found.items()}
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        def update(state: TrainState) -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, moving)
            params = optax.apply_updates(moving, updates)
            return TrainState(state.step, params if still is None else combine(params, still), opt_state)

        # A branch, not a select of every leaf: one pass less over parameters and moments.
        new = jax.lax.cond(finite, update, lambda state: state, state)
        metrics |= {
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(update_count(state.opt_state)), jnp.float32),
            "tokens": found["loss"].weight if tokens is None else tokens(batch),
            "skipped": 1 - finite.astype(jnp.float32),
        }
        state = new._replace(step=state.step + 1)
        # The same table names the output's shardings, so that the state keeps its layout from step to step.
        return jax.lax.with_sharding_constraint(state, tree_shardings(state, rules, mesh)), metrics

    return jax.jit(step, donate_argnums=0)


def part_optimizer(tx: optax.GradientTransformation, trainable: Trainable | None) -> optax.GradientTransformation:
    """`tx` whose state covers only the part of the parameters that is learnt; for `make_step(trainable=...)`.

    ValueError from its `init` if nothing is learnt.
    """
    if trainable is None:
        return tx

    def init(params: Any) -> Any:
        part = select(params, trainable)
        if not part:
            raise ValueError("every parameter is frozen, so there is nothing to learn")
        return tx.init(part)

    return optax.GradientTransformation(init, tx.update)


def update_count(opt_state: Any) -> jax.Array:
    """Updates applied so far, as the schedule counts them; skipped steps are not updates.

    Of several counts the schedule's comes last; that of Adam goes on when a stage begins anew.
    """
    return optax.tree.get_all_with_path(opt_state, "count")[-1][1]


def _accumulate(
    loss: Loss, params: Any, batch: Any, key: jax.Array, num_micro: int
) -> tuple[Any, dict[str, Metric]]:
    """Sum of gradients over `num_micro` slices of the batch, and the metrics of all."""
    gradient = jax.grad(loss, has_aux=True)
    if num_micro == 1:
        return gradient(params, batch, key)

    def split(leaf: jax.Array) -> jax.Array:
        # Micro-batch i takes rows i, i + A, i + 2A, ...: each device then cuts the rows that it holds already.
        rows = leaf.reshape(leaf.shape[0] // num_micro, num_micro, *leaf.shape[1:])
        return constrain(jnp.swapaxes(rows, 0, 1), P(None, *BATCH[: leaf.ndim]))

    def body(total: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, dict[str, Metric]]:
        part, index = inputs
        grads, metrics = gradient(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, grads), metrics

    micro = jax.tree.map(split, batch)
    total, metrics = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), (micro, jnp.arange(num_micro)))
    return total, {name: metric.over_parts() for name, metric in metrics.items()}


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """ValueError unless a global batch splits evenly over the batch axes of the mesh and the micro-batches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch size {batch_size} does not divide into {accumulate} micro-batches on {devices} devices; "
            f"use a multiple of {devices * max(accumulate, 1)}"
        )

