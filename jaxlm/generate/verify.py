"""The step of decoding: it feeds the last known token, and perhaps a tree of guesses after it.

There is one rule for plain and speculative decoding, greedy and sampled. The model decides a token at the last known
one and at every guess; a guess is right if it is what was decided at its parent. Right guesses become text without
a forward pass of their own. What is decided never depends on the guesses, so they change the speed and not the text
(up to rounding: a step of another width may add the same numbers in another order).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.generate.draft import Draft, ancestors
from jaxlm.generate.draft_sources import last_tokens
from jaxlm.generate.sampling import Choice, Seen, choose, count_tokens, needs_history
from jaxlm.generate.state import DecodeState, put
from jaxlm.model.cache import keep_path
from jaxlm.model.decoder import Model


class Verdict(NamedTuple):
    """What a step found out, [B, ...]. Node 0 is the root, the last token known before the step."""

    logits: jax.Array    # [B, R + 1, V] float32, after every node
    path: jax.Array      # [B, D] int32, numbers of the right guesses from the root on; 0 behind them


def plain_step(model: Model, params: Any, state: DecodeState, num_tokens: int | None = None) -> DecodeState:
    """One more token for every row that is not done."""
    return verify(model, params, state, no_guesses(state.tokens.shape[0]), 0, num_tokens)[0]


def no_guesses(batch: int) -> Draft:
    """A draft without nodes."""
    empty = jnp.zeros((batch, 0), jnp.int32)
    return Draft(empty, empty, empty, empty, jnp.zeros((batch, 0), jnp.float32))


def verify(
    model: Model, params: Any, state: DecodeState, draft: Draft, max_depth: int, num_tokens: int | None = None,
) -> tuple[DecodeState, Verdict]:
    """One forward pass over the root and the guesses, and what follows from it for the rows.

    Args:
      draft: nodes with a negative source are computed, and never accepted. The state needs R + 1 free slots a row.
      max_depth: D, of the nodes that can be accepted.
      num_tokens: ids from here on belong to no token (padded vocabulary) and are never chosen.
    """
    root = last_tokens(state.tokens, state.length)[:, None]
    # An id outside the vocabulary is never right; fed as it is, its NaN would reach other nodes through the cache.
    nodes = jnp.concatenate((root, jnp.clip(draft.tokens, 0, model.config.vocab_size - 1)), axis=1)
    depths = jnp.pad(jnp.minimum(draft.depths, max_depth), ((0, 0), (1, 0)))
    sees = ancestors(draft) if draft.tokens.shape[1] else None
    out = model.apply(params, nodes, cache=state.cache, tree=sees)
    seen = _history(state, nodes, sees, model.config.vocab_size) if needs_history(state.settings) else None
    choice = choose(out.logits, state.settings, depths_BT=depths, index_B=state.length,
                    max_depth=max_depth, seen=seen, num_tokens=num_tokens)
    path = _follow(draft, choice.tokens, max_depth)
    state, count = _extend(state, choice, path)
    cache = keep_path(out.cache, state.cache.length, path) if max_depth else out.cache
    state = state._replace(cache=cache._replace(length=state.length - 1), accepted=_credit(state, draft, path, count))
    return state, Verdict(out.logits, path)


def _history(state: DecodeState, nodes: jax.Array, sees: jax.Array | None, vocab_size: int) -> Seen:
    batch, width = nodes.shape
    if sees is None:
        below, valid = jnp.zeros((batch, 1, 0), jnp.int32), jnp.zeros((batch, 1, 0), bool)
    else:
        below = jnp.broadcast_to(nodes[:, None, 1:], (batch, width, width - 1))
        valid = sees[:, :, 1:]
    return count_tokens(state.tokens, state.start, state.length, below, valid, vocab_size)


def _follow(draft: Draft, decided: jax.Array, max_depth: int) -> jax.Array:
    """The path of right guesses, [B, max_depth] node numbers, 0 behind its end.

    decided 7 4 9 (root, nodes 1 and 2), guesses 3 7 with parents 0 0: node 2 is right, and 9 was decided after it.
    """
    batch = decided.shape[0]
    at, path = jnp.zeros((batch, 1), jnp.int32), []
    alive = jnp.ones((batch, 1), bool)
    for _ in range(max_depth):
        token = jnp.take_along_axis(decided, at, axis=1)
        right = (draft.parents == at) & (draft.tokens == token) & (draft.sources >= 0) & alive
        alive = jnp.any(right, axis=1, keepdims=True)
        at = jnp.where(alive, jnp.argmax(right, axis=1, keepdims=True).astype(jnp.int32) + 1, 0)
        path.append(at)
    return jnp.concatenate(path, axis=1) if path else jnp.zeros((batch, 0), jnp.int32)


def _extend(state: DecodeState, choice: Choice, path: jax.Array) -> tuple[DecodeState, jax.Array]:
    """The decided tokens of the root and of the path become text, up to the first stop id or the limit."""
    batch, width = path.shape[0], path.shape[1] + 1
    places = jnp.concatenate((jnp.zeros((batch, 1), jnp.int32), path), axis=1)
    new = Choice(*(jnp.take_along_axis(x, places, axis=1) for x in choice))
    number = jnp.arange(width)[None]
    stops = jnp.any(new.tokens[:, :, None] == state.stop_ids[:, None, :], axis=2)
    stopped = jnp.cumsum(stops, axis=1) - stops > 0  # a stop id before this token
    fits = state.length[:, None] + number < state.limit[:, None]
    text = ((number == 0) | (places > 0)) & ~stopped & fits & ~state.done[:, None]
    count = jnp.sum(text, axis=1, dtype=jnp.int32)
    place = jnp.where(text, state.length[:, None] + number, state.tokens.shape[1])
    length = state.length + count
    state = state._replace(
        tokens=put(state.tokens, place, new.tokens), logprobs=put(state.logprobs, place, new.logprobs),
        kept=put(state.kept, place, new.kept), length=length, steps=state.steps + ~state.done,
        done=state.done | jnp.any(text & stops, axis=1) | (length >= state.limit))
    return state, count


def _credit(state: DecodeState, draft: Draft, path: jax.Array, count: jax.Array) -> jax.Array:
    """Right guesses that became text, added by source."""
    if not path.shape[1] or not draft.tokens.shape[1]:
        return state.accepted
    used = (path > 0) & (jnp.arange(path.shape[1])[None] < count[:, None])
    source = jnp.take_along_axis(draft.sources, jnp.maximum(path - 1, 0), axis=1)
    hot = jax.nn.one_hot(source, state.accepted.shape[1], dtype=jnp.int32)
    return state.accepted + jnp.sum(hot * used[:, :, None], axis=1)
