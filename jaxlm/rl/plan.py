"""An update of an RL run for devices that need not be here; see `train.plan`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm.core.mesh import BATCH, MeshConfig
from jaxlm.model.config import flops_per_token
from jaxlm.objective.algorithm import PolicyTokens
from jaxlm.objective.correction import CorrectionConfig
from jaxlm.rl.pack import Rows
from jaxlm.rl.policy_params import RULES, abstract_policy
from jaxlm.rl.settings import Settings, check_settings, num_rows, row_length
from jaxlm.rl.update import LearnBatch, make_policy_loss
from jaxlm.train.chips import Topology
from jaxlm.train.plan import Plan, Work, plan_report
from jaxlm.train.state import TrainState
from jaxlm.train.step import Step, make_step


def update_program(
    settings: Settings, tx: optax.GradientTransformation, lr: float, mesh: Mesh, accumulate: int,
) -> tuple[Step, tuple[TrainState, LearnBatch]]:
    """An update and the shapes of its arguments: as many full rows as attempts.

    `tx`: over what `settings.additions.trainable` names.
    """
    rows = num_rows(settings.batch)
    if rows % accumulate:
        raise ValueError(f"the {rows} rows of an update do not divide into {accumulate} micro-batches")
    settings = settings._replace(batch=replace(settings.batch, micro_rows=rows // accumulate))
    check_settings(settings, mesh)
    objective, additions = settings.objective, settings.additions
    shape, sharding = (rows, row_length(settings.rollout, settings.batch)), NamedSharding(mesh, BATCH)
    leaf = partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
    ids, number = leaf(dtype=jnp.int32), leaf(dtype=jnp.float32)
    given = lambda wanted: number if wanted else None
    tokens = PolicyTokens(number, number, number, ids, weight=given(objective.correction != CorrectionConfig()),
                          ref_logp=given(objective.kl.coefficient), teacher_logp=given(objective.teacher.coefficient))
    loss = make_policy_loss(settings.make_policy(), objective)
    step = make_step(loss, tx, optax.constant_schedule(lr), mesh=mesh, rules=RULES, accumulate=accumulate,
                     trainable=additions.trainable())
    return step, (abstract_policy(settings.model, tx, mesh, additions),
                  LearnBatch(Rows(ids, ids, number, ids, ids, number, number, ids), tokens,
                             given(additions.value_head), given(additions.value_head)))


def plan_update(settings: Settings, tx: optax.GradientTransformation, lr: float, topology: Topology, mesh: MeshConfig,
                report: Callable[[str], None]) -> Plan:
    """Compiles an update for chips that are not here and reports what it costs; see `train.plan.plan_report`."""
    rows, length = num_rows(settings.batch), row_length(settings.rollout, settings.batch)
    work = Work(tokens=rows * length, model_flops=rows * length * flops_per_token(settings.model, length))
    micro_rows = min(rows, settings.batch.micro_rows)
    if rows % micro_rows:
        raise ValueError(f"--plan takes full rows: batch.micro_rows {micro_rows} does not divide the {rows} rows "
                         "of an update")
    report(f"One update of {rows} rows of {length} tokens: every attempt fills a row of its own.")
    return plan_report(partial(update_program, settings, tx, lr), topology, mesh, rows // micro_rows, work, report)
