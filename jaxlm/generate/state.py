"""The state of decoding: rows of known tokens with their cache, and what may be done to rows.

A row knows `length` tokens: its prompt, then its text from `start` on. The cache holds all of them but the last, which
is the first that the next step feeds. Row functions are pure and jittable; rows never look at each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.generate.settings import Settings
from jaxlm.model.cache import Cache, CacheDtype, init_cache
from jaxlm.model.decoder import Model


class DecodeState(NamedTuple):
    """B rows of S slots. An empty slot of the batch is a row that is done."""

    cache: Cache            # `cache.length` is `length - 1`, or 0
    tokens: jax.Array       # [B, S] int32; beyond `length` garbage
    logprobs: jax.Array     # [B, S] float32, see `sampling.Choice`; of the text only
    kept: jax.Array         # [B, S] float32
    start: jax.Array        # [B] int32, where the text begins
    length: jax.Array       # [B] int32, tokens known
    limit: jax.Array        # [B] int32, the length at which the row ends
    done: jax.Array         # [B] bool
    stop_ids: jax.Array     # [B, J] int32, -1 is none
    steps: jax.Array        # [B] int32, forward passes spent on the text
    accepted: jax.Array     # [B, number of sources] int32, guesses that became text
    settings: Settings
    drafting: Any = None    # of speculation, leaves [B, ...] and caches
    learned: Any = None     # of speculation, what all rows share


def init_state(
    model: Model, settings: Settings, *, limit: jax.Array, stop_ids: jax.Array, slots: int,
    cache_dtype: CacheDtype = "float32", num_sources: int = 0,
) -> DecodeState:
    """Rows that know nothing yet; `limit` [B] counts prompt and text."""
    batch = limit.shape[0]
    zeros, blank = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, slots), jnp.float32)
    return DecodeState(
        cache=init_cache(model.config, batch, slots, cache_dtype), tokens=jnp.zeros((batch, slots), jnp.int32),
        logprobs=blank, kept=blank, start=zeros, length=zeros, limit=limit, done=jnp.zeros(batch, bool),
        stop_ids=stop_ids, steps=zeros, accepted=jnp.zeros((batch, num_sources), jnp.int32), settings=settings)


def prefill(model: Model, params: Any, state: DecodeState, tokens: jax.Array, lengths: jax.Array) -> DecodeState:
    """Given tokens behind what each row knows: a prompt, the rest of a prompt, or what a tool answered.

    The text begins behind them: `start` moves. Rows that were done are alive again if their limit allows. What
    speculation knows of a row is set up again by `speculative.start_guessing`.

    Args:
      tokens: [B, P] int32, row b has `lengths[b]` >= 1 of them, padding follows.
    """
    slots, width = state.tokens.shape[1], tokens.shape[1]
    place = state.length[:, None] + jnp.arange(width)[None]
    place = jnp.where(jnp.arange(width)[None] < lengths[:, None], place, slots)
    known = put(state.tokens, place, tokens)
    # From the last known token on, which the cache lacks: P tokens reach to the last but one of the new ones.
    feed = jnp.take_along_axis(known, state.cache.length[:, None] + jnp.arange(width)[None], axis=1, mode="clip")
    cache = model.apply(params, feed, cache=state.cache, logits=False).cache
    length = state.length + lengths
    return state._replace(cache=cache._replace(length=length - 1), tokens=known, start=length, length=length,
                          done=length >= state.limit)


def put(array: jax.Array, place: jax.Array, values: jax.Array) -> jax.Array:
    """`array[b, place[b, i]] = values[b, i]`; places from S on are dropped. [B, S], [B, I], [B, I]."""
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(array, place, values.astype(array.dtype))


def room(state: DecodeState, width: int) -> jax.Array:
    """Whether every row that goes on has slots for a step that feeds `width` tokens and may write as many."""
    return jnp.all(state.done | (state.length + width <= state.tokens.shape[1]))


def align(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts with padding on any side as `prefill` takes them: tokens first, and how many, [B, P] and [B].

    `align([[0, 5, 6], [7, 0, 0]], [[0, 1, 1], [1, 0, 0]])` is `([[5, 6, 0], [7, 0, 0]], [2, 1])`.
    """
    order = jnp.argsort(mask == 0, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1).astype(jnp.int32), jnp.sum(mask != 0, axis=1, dtype=jnp.int32)


def take_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """The rows of these numbers; a row taken twice is two samples of one prompt."""
    return _map_rows(lambda axis, x: jnp.take(x, rows, axis=axis), state)


def put_rows(state: DecodeState, rows: jax.Array, new: DecodeState) -> DecodeState:
    """`state` with `new` in place of these rows; numbers from B on are dropped. The slots must be as many."""
    def place(axis: int, old: jax.Array, value: jax.Array) -> jax.Array:
        at = (slice(None), rows) if axis else (rows,)
        return old.at[at].set(value, mode="drop")

    return _map_rows(place, state, new)


def widen(state: DecodeState, slots: int) -> DecodeState:
    """The state with room for more tokens."""
    def longer(x: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, pads)

    def cache(of: Cache) -> Cache:
        return Cache(*(x if x is None or x is of.length else longer(x, 3) for x in of))

    is_cache = lambda x: isinstance(x, Cache)
    drafting = jax.tree.map(lambda x: cache(x) if is_cache(x) else x, state.drafting, is_leaf=is_cache)
    return state._replace(
        cache=cache(state.cache), drafting=drafting, tokens=longer(state.tokens, 1),
        logprobs=longer(state.logprobs, 1), kept=longer(state.kept, 1))


def _map_rows(f: Callable[..., jax.Array], state: DecodeState, *others: DecodeState) -> DecodeState:
    """`f(axis of the rows, leaves)` over every leaf that has rows."""
    def node(x: Any, *more: Any) -> Any:
        if not isinstance(x, Cache):
            return f(0, x, *more)
        parts = {name: [getattr(one, name) for one in (x, *more)] for name in Cache._fields}
        return Cache(**{name: None if part[0] is None else f(0 if name == "length" else 1, *part)
                        for name, part in parts.items()})

    bare = [one._replace(learned=None) for one in (state, *others)]
    return jax.tree.map(node, *bare, is_leaf=lambda x: isinstance(x, Cache))._replace(learned=state.learned)
