"""What a decoding step costs on this device, by the number of guesses that it verifies.

Speculation lives on the shape of this curve: where a step is bound by reading the weights, more tokens cost little.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.draft import Draft
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.state import DecodeState, init_state
from jaxlm.generate.verify import verify
from jaxlm.model.cache import CacheDtype
from jaxlm.model.decoder import Model

STEPS = 4  # of one measurement


def step_costs(
    model: Model, params: Any, widths: Sequence[int], *, batch: int = 1, slots: int = 512, rounds: int = 5,
    cache_dtype: CacheDtype = "float32",
) -> tuple[float, ...]:
    """Seconds of a greedy step that verifies so many guesses a row, the smallest of `rounds` measurements each.

    The widths take turns, so that a device that slows down slows all of them. The curve is made rising: a wider
    step that was measured faster gets the cost of the narrower one, which it can stand in for.
    """
    settings = make_settings([SamplingConfig()] * batch, model.config.vocab_size)
    length = slots // 2
    if not widths or min(widths) < 0 or length + STEPS * (max(widths) + 1) > slots:
        raise ValueError(f"widths {tuple(widths)} must be at least 0 and {STEPS} steps of them fit {slots // 2} slots")
    state = init_state(model, settings, limit=jnp.full(batch, slots), stop_ids=jnp.full((batch, 1), -1), slots=slots,
                       cache_dtype=cache_dtype)
    cache = state.cache._replace(length=jnp.full(batch, length - 1))
    state = state._replace(length=jnp.full(batch, length), cache=cache)
    programs = {width: _steps.lower(model, params, state, _guesses(model, batch, width)).compile() for width in widths}
    seconds = {width: [] for width in widths}
    for _ in range(rounds + 1):
        for width, program in programs.items():
            guesses = _guesses(model, batch, width)
            began = time.perf_counter()
            jax.block_until_ready(program(params, state, guesses))
            seconds[width].append((time.perf_counter() - began) / STEPS)
    best = np.array([min(seconds[width][1:]) for width in sorted(widths)])  # the first round warms up
    rising = dict(zip(sorted(widths), np.maximum.accumulate(best).tolist(), strict=True))
    return tuple(rising[width] for width in widths)


@partial(jax.jit, static_argnames="model")
def _steps(model: Model, params: Any, state: DecodeState, draft: Draft) -> DecodeState:
    depth = 1 if draft.tokens.shape[1] else 0
    return jax.lax.fori_loop(0, STEPS, lambda _, state: verify(model, params, state, draft, depth)[0], state)


def _guesses(model: Model, batch: int, width: int) -> Draft:
    """A fan of different tokens below the root."""
    tokens = np.broadcast_to(np.arange(width, dtype=np.int32) % model.config.vocab_size, (batch, width))
    zeros = np.zeros((batch, width), np.int32)
    return Draft(tokens, zeros, zeros + 1, zeros, np.ones((batch, width), np.float32))
