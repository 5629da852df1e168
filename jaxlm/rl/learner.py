"""The parts of `fit_rl` put together: who writes, who judges, and what an update is made of."""

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.core.mesh import MeshConfig, Rules, make_mesh, put_whole
from jaxlm.generate.engine import Engine
from jaxlm.generate.requests import Report
from jaxlm.model.lora import has_adapters
from jaxlm.objective.advantage import group_stats
from jaxlm.objective.algorithm import PolicyConfig
from jaxlm.reward.compose import Reward
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl.env import Dialogue, ToolEnv
from jaxlm.rl.episode import Episode, groups_of
from jaxlm.rl.pack import Rows, pack_rows, pad_rows
from jaxlm.rl.pages import write_page
from jaxlm.rl.policy_params import base_params, merged_params
from jaxlm.rl.rollout import Attempt, RolloutConfig, gather, rollout, sampler_params, share_of_process
from jaxlm.rl.score import Scored, numbers, score
from jaxlm.rl.task import Task
from jaxlm.rl.update import (
    LearnBatch,
    Policy,
    group_advantages,
    learn_batch,
    make_policy_loss,
    model_part,
    penalised_rewards,
    sampler_metrics,
    score_rows,
)
from jaxlm.train.state import TrainState
from jaxlm.train.step import Metrics, Step, Trainable, make_step

log = logging.getLogger(__name__)

_SAMPLER_METRICS = jax.jit(sampler_metrics)
_GROUP_STATS = jax.jit(group_stats, static_argnums=2)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many attempts an iteration has, and how they are learnt from."""

    prompts: int = 32              # prompts of an iteration
    samples: int = 8               # attempts at each
    minibatches: int = 1           # updates of an iteration, each of as many prompts
    epochs: int = 1                # times that all attempts are learnt from
    micro_rows: int = 8            # packed rows whose gradients are computed at once
    seq_len: int | None = None     # tokens of a packed row; None: those of the longest attempt that may be
    loss_chunks: int = 1           # parts of a row whose logits exist at once
    dynamic: bool = False          # draw prompts until as many as asked have attempts of different rewards (DAPO)
    max_draws: int = 4             # dynamic: times that prompts are drawn in an iteration

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "minibatches", "epochs", "micro_rows", "loss_chunks", "max_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} must be at least 1, got {getattr(self, name)}")
        if self.prompts % self.minibatches:
            raise ValueError(f"batch.prompts {self.prompts} do not divide into {self.minibatches} minibatches")


class Scene(NamedTuple):
    """What attempts are made in: the tasks with their prompts, the tools, and the reward."""

    tasks: Sequence[Task]
    prompts: dict[int, tuple[int, ...]]  # by number of the task; tasks without one are left out
    env: ToolEnv
    dialogue: Dialogue
    reward: Callable[[Trajectory], Reward]
    weights: tuple[float, ...]           # of its terms


class Ready(NamedTuple):
    """What the updates of an iteration learn from."""

    scored: Scored
    batches: list[LearnBatch]  # empty: no attempt was better than another


class PolicyLearner:
    """`loop.Learner` for any `PolicyConfig`. Nothing in it changes but the compiled programs and counts for the log."""

    def __init__(
        self, policy: Policy, engine: Engine, scene: Scene, objective: PolicyConfig, *, rollouts: RolloutConfig,
        batch: BatchConfig, tx: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh, rules: Rules,
        seed: int, reference: Any = None, teacher: tuple[Policy, Any] | None = None,
        trainable: Trainable | None = None,
    ) -> None:
        """What an iteration is made of.

        Args:
          engine: without parameters.
          reference: the parameters that a KL keeps to; with adapters None: the model beside which they stand.
          teacher: a policy of the same vocabulary, and its parameters.
          trainable: what is learnt, see `make_step`; None: everything.
        """
        assert reference is not None or trainable or not objective.kl.coefficient, "a KL needs a reference"
        self.policy, self.engine, self.scene, self.objective = policy, engine, scene, objective
        self.rollouts, self.batch, self.mesh, self.seed = rollouts, batch, mesh, seed
        self.reference, self.teacher = reference, teacher
        self.seq_len = batch.seq_len or rollouts.max_prompt + rollouts.max_response
        self.report = Report()
        self._make_step = partial(make_step, make_policy_loss(policy, objective), tx, schedule, mesh=mesh, rules=rules,
                                  seed=seed, trainable=trainable)
        self._steps: dict[int, Step] = {}
        self._score_rows = jax.jit(score_rows, static_argnums=(0, 3))
        self._learn = jax.jit(partial(learn_batch, objective))
        self._penalise = jax.jit(partial(penalised_rewards, objective))
        self._advantages = jax.jit(partial(group_advantages, objective), static_argnums=4)

    # --- rollout

    def rollout(self, params: Any, iteration: int, drawn: int) -> tuple[list[Episode], int]:
        """See `loop.Learner`. With `dynamic`, groups whose rewards are equal are replaced by other prompts' groups."""
        sampler = self.sampler(params)
        if not self.batch.dynamic:
            return self._attempts(sampler, drawn, self.batch.prompts), drawn + self.batch.prompts
        kept: list[list[Episode]] = []
        for _ in range(self.batch.max_draws):
            missing = self.batch.prompts - len(kept)
            episodes = self._attempts(sampler, drawn, missing)
            groups = [[episodes[i] for i in members] for members in groups_of(episodes)]
            drawn += missing
            kept += [group for group in groups if not self._equal(group)]
            if len(kept) == self.batch.prompts:
                break
        else:
            log.warning("iteration %d: only %d of %d groups have attempts of different rewards after %d draws",
                        iteration, len(kept), self.batch.prompts, self.batch.max_draws)
        kept = kept or groups[:1]  # there is something to log at least
        return [replace(one, group=number) for number, group in enumerate(kept) for one in group], drawn

    def _attempts(self, sampler: Any, drawn: int, prompts: int) -> list[Episode]:
        usable, attempts = list(self.scene.prompts), []
        for group in range(prompts):
            epoch, place = divmod(drawn + group, len(usable))
            task = usable[_order(self.seed, epoch, len(usable))[place]]
            attempts += [Attempt(task, group, sample, _seed(self.seed, drawn + group, sample), self.scene.prompts[task])
                         for sample in range(self.batch.samples)]
        return self.run(sampler, attempts, self.rollouts, self.scene.tasks)

    def sampler(self, params: Any) -> Any:
        """What `run` takes: the parameters of a plain model, adapters merged, where this process decodes."""
        plain = merged_params(params, self.mesh) if has_adapters(params) else model_part(params)
        return sampler_params(plain, self.mesh)

    def run(self, sampler: Any, attempts: Sequence[Attempt], config: RolloutConfig, tasks: Sequence[Task]
            ) -> list[Episode]:
        """Attempts of all processes, made with the parameters that `sampler` gave."""
        engine = replace(self.engine, params=sampler)
        alone = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        with jax.set_mesh(self.mesh if jax.process_count() == 1 else alone):
            found = rollout(engine, self.scene.env, self.scene.dialogue, tasks, share_of_process(attempts), config,
                            report=self.report)
        return gather(found)

    def _equal(self, group: Sequence[Episode]) -> bool:
        rewards = self._scored(group).reward.reward
        return bool(_GROUP_STATS(jnp.asarray(rewards), jnp.zeros(len(rewards), jnp.int32), 1).equal[0])

    # --- score

    def score(self, params: Any, episodes: Sequence[Episode]) -> tuple[Ready, dict[str, float]]:
        """See `loop.Learner`."""
        scored = self._scored(episodes)
        values = numbers(scored, len(self.scene.env.tools))
        num_groups = episodes[-1].group + 1
        packed = self._parts(episodes, num_groups)
        values |= {"rows": sum(len(rows.tokens) for rows in packed),
                   "rows/filled": float(np.mean([np.mean(rows.segments > 0) for rows in packed]))}
        parts = [put_whole(rows, self.mesh) for rows in packed]
        old = [self._score_rows(self.policy, params, rows, self.batch.micro_rows) for rows in parts]
        reference = self.reference
        if reference is None and self.objective.kl.coefficient:
            reference = base_params(params)
        ref = [self._other(self.policy, reference, rows) for rows in parts]
        teacher = [self._other(*(self.teacher or (None, None)), rows) for rows in parts]
        # Each stage is waited for: with several CPU devices a small program that waits for its inputs holds threads
        # that the collectives of the program before it need, and both stand still.
        old, ref, teacher = jax.block_until_ready((old, ref, teacher))
        rewards = jnp.asarray(scored.reward.reward)
        for rows, (logp, _), ref_logp in zip(parts, old, ref, strict=True):
            rewards = jax.block_until_ready(self._penalise(rows, rewards, logp, ref_logp))
        terms = jnp.stack([jnp.asarray(term) for term in scored.reward.terms.values()], axis=1)
        groups = jnp.array([one.group for one in episodes], jnp.int32)
        advantage = self._advantages(rewards, jnp.array(self.scene.weights), terms, groups, num_groups)
        stats = _GROUP_STATS(rewards, groups, num_groups)
        values |= {"groups/equal": float(stats.equal.mean()), "groups/std": float(stats.std.mean()),
                   "groups/count": num_groups}
        value = None if advantage is None else advantage.value
        batches = [self._learn(rows, rewards, value, logp, ref_logp, teacher_logp, values_)
                   for rows, (logp, values_), ref_logp, teacher_logp in zip(parts, old, ref, teacher, strict=True)]
        batches = jax.block_until_ready(batches)
        rows, batch = (jax.tree.map(lambda *x: jnp.concatenate(x), *whole) for whole in (parts, batches))
        values |= {name: float(x) for name, x in _SAMPLER_METRICS(rows, batch).items()}
        # Equal rewards teach nothing by themselves; a teacher's scores of tokens may.
        taught = self.teacher is not None and self.objective.teacher.place == "loss"
        learnable = taught or any(bool(jnp.any(batch.tokens.advantage * batch.tokens.mask)) for batch in batches)
        return Ready(scored, batches if learnable else []), values

    def _scored(self, episodes: Sequence[Episode]) -> Scored:
        return score(episodes, self.scene.tasks, list(self.scene.env.tools), self.scene.reward,
                     self.rollouts.max_response)

    def _parts(self, episodes: Sequence[Episode], num_groups: int) -> list[Rows]:
        """The rows of each minibatch, as many in each."""
        share = -(-num_groups // min(self.batch.minibatches, num_groups))
        bounds = [next((i for i, one in enumerate(episodes) if one.group >= first), len(episodes))
                  for first in range(0, num_groups + share, share)]
        parts = [pack_rows(episodes[a:b], self.seq_len, self.batch.micro_rows, first=a)
                 for a, b in pairwise(bounds) if b > a]
        most = max(len(part.tokens) for part in parts)
        return [pad_rows(part, most) for part in parts]

    def _other(self, policy: Policy | None, params: Any, rows: Rows) -> jax.Array | None:
        if params is None:
            return None
        return self._score_rows(policy, params, rows, self.batch.micro_rows)[0]

    # --- update

    def updates(self, ready: Ready, iteration: int) -> Sequence[Callable[[TrainState], tuple[TrainState, Metrics]]]:
        """See `loop.Learner`. The order of minibatches is that of the prompts, in every epoch.

        The first update changes the policy that sampled: its ratios are 1 in the program, not up to rounding.
        """
        def update(batch: LearnBatch, state: TrainState) -> tuple[TrainState, Metrics]:
            accumulate = len(batch.rows.tokens) // self.batch.micro_rows
            if accumulate not in self._steps:
                self._steps[accumulate] = self._make_step(accumulate=accumulate)
            return self._steps[accumulate](state, batch)

        batches = ready.batches * self.batch.epochs
        if batches:
            batches[0] = batches[0]._replace(tokens=batches[0].tokens._replace(old_logp=None))
        return [partial(update, batch) for batch in batches]

    def page(self, path: Path, ready: Ready, episodes: Sequence[Episode]) -> None:
        """See `loop.Learner`."""
        write_page(path, ready.scored, episodes, self.scene.tasks)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _seed(seed: int, prompt: int, sample: int) -> int:
    """Of one attempt: 32 bits that do not depend on the order in which attempts are made."""
    return zlib.crc32(f"{seed} {prompt} {sample}".encode())
