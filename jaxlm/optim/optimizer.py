"""AdamW with a decay mask by parameter name, and global-norm clipping."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import optax

from jaxlm.core.tree import path_name
from jaxlm.optim.schedule import ScheduleConfig, make_schedule

# KORMo, section 4: norms, embeddings and biases do not decay; the output head does. Nor do DoRA's norms of columns.
NO_DECAY = r"(^|/)(embed/embedding|scale|bias|magnitude)$"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the defaults are those of KORMo stage 1."""

    lr: float = 7e-4            # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.033
    decay: Literal["kernels", "all"] = "kernels"  # what decays: kernels and the output head, or every parameter
    clip_norm: float = 1.0      # global norm of the gradient; 0 turns clipping off
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"optim.beta1 and beta2 must be in [0, 1), got {self.beta1} and {self.beta2}")
        if min(self.eps, self.weight_decay, self.clip_norm) < 0:
            raise ValueError("optim.eps, weight_decay and clip_norm must not be negative")


def decay_mask(params: Any) -> Any:
    """True where weight decay applies, by parameter name (`NO_DECAY`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(NO_DECAY, path_name(path)), params)


def make_optimizer(config: OptimConfig, num_updates: int) -> optax.GradientTransformation:
    """clip -> Adam moments -> decoupled weight decay of the leaves that decay -> learning rate.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", as in `torch.optim.AdamW`.
    """
    # Without clipping an identity stands there, so that the state of the chain has one shape.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    schedule = make_schedule(config.schedule, config.lr, num_updates)
    return optax.chain(
        clip,
        optax.adamw(schedule, config.beta1, config.beta2, config.eps,
                    weight_decay=config.weight_decay, mask=decay_mask if config.decay == "kernels" else None),
    )
