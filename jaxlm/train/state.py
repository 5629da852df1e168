"""The training state: three fields, nothing hidden."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.core.mesh import Rules, tree_shardings


class TrainState(NamedTuple):
    """Everything that a step reads and writes. Random keys are derived from the step (`core.rng`), not stored."""

    step: jax.Array  # scalar int32, batches consumed so far
    params: Any      # float32 parameter tree
    opt_state: Any   # optax state


def abstract_state(
    init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """Shapes, types and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(lambda key: _new_state(init, tx, key), jax.random.key(0))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, tree_shardings(shapes, rules, mesh))


def init_state(
    init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, key: jax.Array, mesh: Mesh, rules: Rules
) -> TrainState:
    """A new state, each leaf created in place under its sharding; the numbers do not depend on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, tx, mesh, rules))
    with jax.set_mesh(mesh):
        return jax.jit(lambda key: _new_state(init, tx, key), out_shardings=shardings)(key)


def state_of(params: Any, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules) -> TrainState:
    """A new state around given parameters, which lie where `core.mesh.place_leaf` put them."""
    new = lambda params: TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    shardings = tree_shardings(jax.eval_shape(new, params), rules, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(new, out_shardings=shardings, donate_argnums=0)(params)


def next_stage(params: Any, opt_state: Any, mesh: Mesh, rules: Rules) -> TrainState:
    """The state of a new run that goes on from another one's parameters and optimizer state, which are donated.

    Adam's moments and their count stay, so bias correction does not begin again; the step and the count that the
    learning rate reads are 0, so the schedule is the new run's.
    """
    def restarted(part: Any) -> Any:
        schedule = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=jnp.zeros_like(part.count)) if schedule else part

    def new(params: Any, opt_state: Any) -> TrainState:
        opt_state = jax.tree.map(restarted, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

    shardings = tree_shardings(jax.eval_shape(new, params, opt_state), rules, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(new, out_shardings=shardings, donate_argnums=(0, 1))(params, opt_state)


def _new_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
