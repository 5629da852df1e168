"""The parameters of a policy, with a value head where an objective needs one, on a mesh."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.rl.update import VALUE, VALUE_RULE
from jaxlm.train.pretrained import Pretrained, load_weights
from jaxlm.train.state import TrainState, abstract_state, place_leaf

RULES = (*PARAM_RULES, VALUE_RULE)


def load_policy(source: str | Path, opened: Pretrained, mesh: Mesh, value_head: bool) -> Any:
    """The weights of a model that `open_pretrained` opened; a new value head is 0."""
    put = lambda path, leaf: place_leaf(path, np.asarray(leaf), mesh=mesh, rules=RULES)
    params = load_weights(source, opened, put=put).params
    if value_head:
        params = {**params, VALUE: {"kernel": put(f"{VALUE}/kernel", np.zeros((opened.config.d_model, 1), np.float32))}}
    return params


def abstract_policy(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, value_head: bool) -> TrainState:
    """Shapes and shardings of the state of training. ValueError if the mesh does not divide a parameter."""
    def init(key: jax.Array) -> Any:
        value = {VALUE: {"kernel": jnp.zeros((config.d_model, 1))}} if value_head else {}
        return build(config).init(key) | value

    return abstract_state(init, tx, mesh, RULES)
