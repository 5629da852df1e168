"""PPO with a value head: advantages of tokens (GAE) and the loss of the values."""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """Of the `gae` advantage."""

    gamma: float = 1.0             # discount per counted token
    gae_lambda: float = 0.95       # 1: returns minus values, 0: one-step differences
    clip: float | None = 0.2       # how far a value may move from the old one; None: no limit
    coefficient: float = 0.5       # weight of the value loss

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(f"value.gamma and gae_lambda must be in [0, 1], got {self.gamma} and {self.gae_lambda}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"value.clip must be above 0, or None for no limit; got {self.clip}")
        if not self.coefficient > 0:
            raise ValueError(f"value.coefficient must be above 0, got {self.coefficient}")


class TokenAdvantage(NamedTuple):
    """Targets of one update, [B, T] float32 each; 0 where the mask is."""

    advantage: jax.Array
    returns: jax.Array  # advantage + value, what the value head learns


class ValueLoss(NamedTuple):
    """[B, T] float32 each; 0 where the mask is."""

    loss: jax.Array
    clipped: jax.Array  # 1 where the limit decides


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, segments: jax.Array, config: ValueConfig
) -> TokenAdvantage:
    """A_t = d_t + gamma lambda A_t', d_t = r_t + gamma V_t' - V_t, where t' is the next counted token of the sequence.

    Tool output between t and t' is no step of the policy: nothing is discounted there and nothing starts again. What
    arrays hold at masked tokens is not read, so a reward must lie on a counted token (`kl.token_rewards` puts it
    there). After the last counted token V and A are 0.

        segments    1  1  1  2        gamma = lambda = 1
        mask        1  0  1  1
        rewards     0  ?  1  3
        values     .2  ? .5  1
        advantage  .8  0 .5  2

    Schulman et al. 2016, arXiv:1506.02438, equation 16. All arguments [B, T].
    """
    chex.assert_rank([rewards, values, mask, segments], 2)
    chex.assert_equal_shape([rewards, values, mask, segments])
    mask = mask != 0
    rewards, values = (jnp.where(mask, x.astype(jnp.float32), 0) for x in (rewards, values))

    def back(later: tuple, now: tuple) -> tuple[tuple, jax.Array]:
        reward, value, counted, segment = now
        same = later[2] == segment
        after, next_value = (jnp.where(same, x, 0) for x in later[:2])
        advantage = reward + config.gamma * next_value - value + config.gamma * config.gae_lambda * after
        carry = (jnp.where(counted, advantage, after), jnp.where(counted, value, next_value), segment)
        return carry, jnp.where(counted, advantage, 0)

    start = (jnp.zeros_like(values[:, 0]), jnp.zeros_like(values[:, 0]), jnp.zeros_like(segments[:, 0]))
    arrays = jax.tree.map(jnp.transpose, (rewards, values, mask, segments))
    advantage = jax.lax.scan(back, start, arrays, reverse=True)[1].T
    return TokenAdvantage(advantage, advantage + values)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float | None
) -> ValueLoss:
    """max((V - R)^2, (V_c - R)^2) / 2 with V_c = V_old + clamp(V - V_old, -clip, clip); any equal shape."""
    chex.assert_equal_shape([values, old_values, returns, mask])
    arrays = (values, old_values, returns)
    values, old_values, returns = (jnp.where(mask != 0, x.astype(jnp.float32), 0) for x in arrays)
    plain = 0.5 * (values - returns) ** 2
    if clip is None:
        return ValueLoss(plain, jnp.zeros_like(plain))
    limited = 0.5 * (old_values + jnp.clip(values - old_values, -clip, clip) - returns) ** 2
    return ValueLoss(jnp.maximum(plain, limited), (limited > plain).astype(jnp.float32))
