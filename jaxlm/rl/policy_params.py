"""The parameters of a policy on a mesh: a model, and what an RL run puts beside it (adapters, a value head)."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.core.mesh import place_leaf, tree_shardings
from jaxlm.core.rng import derive
from jaxlm.core.tree import select
from jaxlm.model import lora
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import LORA_RULES, PARAM_RULES
from jaxlm.rl.update import VALUE, VALUE_RULE, model_part
from jaxlm.train.pretrained import Pretrained, load_weights
from jaxlm.train.state import TrainState, abstract_state
from jaxlm.train.step import Trainable

RULES = (VALUE_RULE, *PARAM_RULES, *LORA_RULES)  # in this order: head/kernel is also the end of the value head's path


class Additions(NamedTuple):
    """What a policy has beside its model. With adapters only these, and a value head, are learnt."""

    adapters: LoraConfig = LoraConfig()
    value_head: bool = False
    seed: int = 0

    def to(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters with additions that change nothing yet: adapters as `lora.init` makes them, a head of 0."""
        params = lora.init(derive(self.seed, "lora"), params, self.adapters)
        width = params["embed"]["embedding"].shape[1]
        return params | ({VALUE: {"kernel": jnp.zeros((width, 1))}} if self.value_head else {})

    def trainable(self) -> Trainable | None:
        """For `train.step.make_step`; None: everything."""
        if not self.adapters.rank:
            return None
        return lambda path: lora.is_adapter(path) or path.startswith(f"{VALUE}/")


def load_policy(source: str | Path, opened: Pretrained, mesh: Mesh, additions: Additions) -> Any:
    """The weights of a model that `open_pretrained` opened, with additions."""
    put = lambda path, leaf: place_leaf(path, np.asarray(leaf), mesh=mesh, rules=RULES)
    params = load_weights(source, opened, put=put).params
    shardings = tree_shardings(jax.eval_shape(additions.to, params), RULES, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(additions.to, out_shardings=shardings, donate_argnums=0)(params)


def abstract_policy(
    config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, additions: Additions,
) -> TrainState:
    """Shapes and shardings of the state of training. ValueError if the mesh does not divide a parameter."""
    return abstract_state(lambda key: additions.to(build(config).init(key)), tx, mesh, RULES)


def base_params(params: dict[str, Any]) -> dict[str, Any]:
    """The model that adapters stand beside, as it was before they learnt anything: the same arrays, no copy."""
    return select(model_part(params), lambda path: path.rpartition("/")[2] not in lora.ADAPTER_PARTS)


@partial(jax.jit, static_argnums=1)
def merged_params(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameters of a plain model that computes the same up to rounding; see `lora.merge`."""
    plain = lora.merge(model_part(params))
    return jax.lax.with_sharding_constraint(plain, tree_shardings(plain, RULES, mesh))
