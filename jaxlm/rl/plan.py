"""An update of an RL run for devices that need not be here; see `train.plan`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm.core.mesh import BATCH
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import build
from jaxlm.objective.algorithm import PolicyConfig, PolicyTokens
from jaxlm.objective.correction import CorrectionConfig
from jaxlm.reward.compose import RewardConfig
from jaxlm.rl.learner import BatchConfig
from jaxlm.rl.pack import Rows
from jaxlm.rl.policy_params import RULES, abstract_policy
from jaxlm.rl.rollout import RolloutConfig
from jaxlm.rl.settings import check_settings, num_rows, row_length
from jaxlm.rl.update import LearnBatch, Policy, make_policy_loss
from jaxlm.train.plan import Work
from jaxlm.train.state import TrainState
from jaxlm.train.step import Step, make_step


def update_program(
    config: ModelConfig, compute: ComputeConfig, rollout: RolloutConfig, batch: BatchConfig, objective: PolicyConfig,
    reward: RewardConfig, tx: optax.GradientTransformation, lr: float, mesh: Mesh, accumulate: int,
) -> tuple[Step, tuple[TrainState, LearnBatch]]:
    """An update and the shapes of its arguments: as many full rows as attempts."""
    batch = replace(batch, micro_rows=num_rows(batch) // accumulate)
    check_settings(config, compute, rollout, batch, objective, reward, mesh)
    shape, sharding = (num_rows(batch), row_length(rollout, batch)), NamedSharding(mesh, BATCH)
    leaf = partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
    ids, number = leaf(dtype=jnp.int32), leaf(dtype=jnp.float32)
    given = lambda wanted: number if wanted else None
    rows = Rows(ids, ids, number, ids, ids, number, number, ids)
    tokens = PolicyTokens(number, number, number, ids, weight=given(objective.correction != CorrectionConfig()),
                          ref_logp=given(objective.kl.coefficient), teacher_logp=given(objective.teacher.coefficient))
    value_head = objective.advantage == "gae"
    loss = make_policy_loss(Policy(build(config, compute), rollout.temperature, batch.loss_chunks), objective)
    step = make_step(loss, tx, optax.constant_schedule(lr), mesh=mesh, rules=RULES, accumulate=accumulate)
    return step, (abstract_policy(config, tx, mesh, value_head),
                  LearnBatch(rows, tokens, given(value_head), given(value_head)))


def update_work(config: ModelConfig, rollout: RolloutConfig, batch: BatchConfig) -> Work:
    """What an update is for."""
    length = row_length(rollout, batch)
    return Work(tokens=num_rows(batch) * length, model_flops=num_rows(batch) * length * flops_per_token(config, length))
