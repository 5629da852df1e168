"""Greedy decoding with a static key-value cache, one compiled program for prompt and continuation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import constrain
from jaxlm.model.cache import init_cache
from jaxlm.model.decoder import Model


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as `tokens [B, P]` and `segments [B, P]` (1 for a token, 0 for padding), int32.

    `left_pad([[5, 6], [7]], 0)` is `([[5, 6], [0, 7]], [[1, 1], [0, 1]])`.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    width = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    segments = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt):] = prompt
        segments[row, width - len(prompt):] = 1
    return tokens, segments


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_id", "num_tokens"))
def greedy_decode(
    model: Model, params: Any, tokens: jax.Array, segments: jax.Array, *, max_new_tokens: int, eos_id: int,
    num_tokens: int | None = None,
) -> jax.Array:
    """The most likely continuation of each row, token by token.

    Args:
      tokens, segments: [B, P] int32, left-padded (`left_pad`).
      num_tokens: ids from here on belong to no token (padded vocabulary) and are never chosen.

    Returns:
      [B, max_new_tokens] int32, whole on every device; after a row's `eos_id` only `eos_id` follows.
    """
    batch, width = tokens.shape
    cache = init_cache(model.config, batch, width + max_new_tokens, jnp.dtype(model.compute.dtype))
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    out = model.apply(params, tokens, positions=positions, segments=segments, cache=cache)
    best = lambda logits: jnp.argmax(logits[:, -1, :num_tokens], axis=-1).astype(jnp.int32)
    written = jnp.full((batch, max_new_tokens), eos_id, jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def one(carry: tuple) -> tuple:
        step, token, done, position, cache, written = carry
        written = written.at[:, step].set(jnp.where(done, eos_id, token))
        done = done | (token == eos_id)
        out = model.apply(params, token[:, None], positions=position[:, None],
                          segments=jnp.ones((batch, 1), jnp.int32), cache=cache)
        return step + 1, best(out.logits), done, position + 1, out.cache, written

    start = (0, best(out.logits), jnp.zeros(batch, bool), positions[:, -1] + 1, out.cache, written)
    return constrain(jax.lax.while_loop(unfinished, one, start)[-1], P())
