"""What settings of an RL run must share, and how large its updates are."""

from typing import NamedTuple

from jax.sharding import Mesh

from jaxlm.model.attention import resolve_backend
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build
from jaxlm.objective.algorithm import PolicyConfig
from jaxlm.reward.compose import RewardConfig
from jaxlm.rl.learner import BatchConfig
from jaxlm.rl.policy_params import Additions
from jaxlm.rl.rollout import RolloutConfig
from jaxlm.rl.update import Policy


class Settings(NamedTuple):
    """Those that decide what an update computes."""

    model: ModelConfig
    compute: ComputeConfig
    rollout: RolloutConfig
    batch: BatchConfig
    objective: PolicyConfig
    reward: RewardConfig
    additions: Additions

    def make_policy(self, num_tokens: int | None = None) -> Policy:
        """How its tokens get log-probabilities; `num_tokens` of the tokenizer, None: of the embedding."""
        return Policy(build(self.model, self.compute), self.rollout.temperature, self.batch.loss_chunks, num_tokens)


def check_settings(settings: Settings, mesh: Mesh) -> None:
    """ValueError for settings that do not fit together."""
    model, compute, rollout, batch, objective, reward, _ = settings
    longest, length = rollout.max_prompt + rollout.max_response, row_length(rollout, batch)
    if rollout.temperature == 0:
        raise ValueError("rollout.temperature 0 makes all attempts at a prompt equal: nothing could be learnt")
    if batch.samples < 2 and objective.advantage not in ("gae", "reinforce_plus_plus"):
        raise ValueError(f"batch.samples 1 leaves nothing to compare for advantage {objective.advantage}")
    if longest > model.max_positions:
        raise ValueError(f"rollout.max_prompt {rollout.max_prompt} and max_response {rollout.max_response} are more "
                         f"than the model's {model.max_positions} positions")
    if length < longest:
        raise ValueError(f"batch.seq_len {batch.seq_len} cannot hold rollout.max_prompt {rollout.max_prompt} and "
                         f"max_response {rollout.max_response}")
    resolve_backend(
        compute.attention, platform=mesh.devices.flat[0].platform, dtype=compute.dtype,
        head_dim=model.head_dim, q_len=length, segments=True, positions=True,
        window=model.window, query_chunk=compute.query_chunk, context=mesh.shape["context"])
    if objective.advantage == "gdpo":
        kl = objective.kl
        if (reward.gates or reward.base or reward.clip or any(term.when_wrong != 1 for term in reward.terms)
                or (kl.coefficient and kl.place == "reward")):
            raise ValueError("objective.advantage gdpo compares each term by itself: it takes rewards of plain terms, "
                             "without gates, base, clip, when_wrong or a KL in the reward")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch.micro_rows % devices:
        raise ValueError(f"batch.micro_rows {batch.micro_rows} does not divide over the {devices} devices that split "
                         "rows")
    if length % (batch.loss_chunks * mesh.shape["context"]):
        raise ValueError(f"batch.loss_chunks {batch.loss_chunks} times mesh.context {mesh.shape['context']} does not "
                         f"divide a row of {length}")


def num_rows(batch: BatchConfig) -> int:
    """Rows of an update if every attempt fills one."""
    return batch.prompts * batch.samples // batch.minibatches


def row_length(rollout: RolloutConfig, batch: BatchConfig) -> int:
    """Tokens of a packed row."""
    return batch.seq_len or rollout.max_prompt + rollout.max_response
