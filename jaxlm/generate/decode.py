"""The decoding loop on the device, plain or speculative, and a whole text in one program."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import constrain
from jaxlm.generate.settings import Settings
from jaxlm.generate.speculative import Guessing, Sources, guessing_step
from jaxlm.generate.state import DecodeState, align, init_state, prefill, room
from jaxlm.generate.verify import plain_step
from jaxlm.model.decoder import Model


def decode(
    model: Model, params: Any, state: DecodeState, sources: Sources, *, guessing: Guessing | None, max_steps: jax.Array,
    max_done: jax.Array, num_tokens: int | None = None,
) -> DecodeState:
    """Steps until `max_steps`, until `max_done` rows are done (B: all), or until a row lacks slots for a step.

    Args:
      guessing, sources: None and `Sources()` for plain decoding; else the state comes from `start_guessing`.
      num_tokens: ids from here on belong to no token (padded vocabulary) and are never chosen.
    """
    width = step_width(guessing)

    def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = carry
        return (step < max_steps) & (jnp.sum(state.done) < max_done) & room(state, width)

    def one(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = carry
        if guessing is None:
            return step + 1, plain_step(model, params, state, num_tokens)
        return step + 1, guessing_step(model, params, state, sources, guessing, num_tokens)

    return jax.lax.while_loop(go_on, one, (jnp.zeros((), jnp.int32), state))[1]


def step_width(guessing: Guessing | None) -> int:
    """The tokens that the widest step feeds per row."""
    if guessing is None:
        return 1
    if guessing.model is not None:
        return 1 + guessing.draft.depth
    nodes = guessing.widths[-1] if guessing.widths else guessing.draft.num_nodes
    return 1 + nodes + (guessing.window * guessing.draft.depth - 1 if guessing.window else 0)


def pad(prompts: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as `tokens [B, P]` and `mask [B, P]` (1 for a token), int32; P is `width` or the longest prompt.

    `pad([[5, 6], [7]])` is `([[5, 6], [7, 0]], [[1, 1], [1, 0]])`. Raises ValueError for an empty prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    tokens = np.zeros((len(prompts), width or max(map(len, prompts))), np.int32)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)], mask[row, :len(prompt)] = prompt, 1
    return tokens, mask


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_id", "num_tokens"))
def complete(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array, settings: Settings, *, max_new_tokens: int,
    eos_id: int, num_tokens: int | None = None,
) -> jax.Array:
    """Texts of one batch in one program: for programs on a mesh, and prompts that are all there at once.

    Args:
      tokens, mask: [B, P], prompts with padding on any side; the mask is 1 at a token.
      settings: of B rows, see `make_settings`.

    Returns:
      [B, max_new_tokens] int32, whole on every device; after a row's `eos_id` only `eos_id` follows.
    """
    (batch, width), (tokens, lengths) = tokens.shape, align(tokens, mask)
    state = init_state(model, settings, limit=lengths + max_new_tokens, stop_ids=jnp.full((batch, 1), eos_id),
                       slots=width + max_new_tokens, cache_dtype=model.compute.dtype)
    state = prefill(model, params, state, tokens, lengths)
    state = decode(model, params, state, Sources(), guessing=None, max_steps=max_new_tokens, max_done=batch,
                   num_tokens=num_tokens)
    place = state.start[:, None] + jnp.arange(max_new_tokens)[None]
    text = jnp.take_along_axis(state.tokens, place, axis=1, mode="clip")
    return constrain(jnp.where(place < state.length[:, None], text, eos_id), P())
