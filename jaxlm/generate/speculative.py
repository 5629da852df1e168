"""Speculative decoding: where the guesses of a step come from, how many are verified, what is learnt from it.

`Guessing` says what is static; databases and the parameters of a draft model are `Sources`, arguments of the program;
what a run learns lies in the state.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.generate.draft import Draft, DraftConfig, acceptance_rates, draft_depth, init_counts, observe, propose
from jaxlm.generate.draft_sources import Databases, init_matrix, init_pool, insert, last_tokens, observe_topk
from jaxlm.generate.sampling import choose
from jaxlm.generate.state import DecodeState
from jaxlm.generate.verify import Verdict, verify
from jaxlm.model.cache import Cache, CacheDtype, init_cache
from jaxlm.model.decoder import Model

MEMORY = 0.98  # per step, of the counts of right guesses: a source that was given up is tried again after some steps
POOL_SIZE = 512
SUCCESSORS = 8  # of a token, for Token Recycling


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """How guesses are made and verified; the costs are `costs.step_costs` of this device."""

    draft: DraftConfig = field(default_factory=DraftConfig)
    model: Model | None = None       # a small model that writes chains of `draft.depth` tokens in place of the sources
    window: int = 0                  # columns of a Lookahead window (7 in the papers); feeds the source `pool`
    widths: tuple[int, ...] = ()     # guesses that a step may verify, rising; empty: always all
    costs: tuple[float, ...] = ()    # time of a step of each width

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.costs) or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must rise and have a cost each, got {self.widths} and {self.costs}")
        if self.widths and self.widths[0] < 0:
            raise ValueError(f"widths start at 0, got {self.widths[0]}")
        if self.widths and self.widths[-1] > self.draft.num_nodes:
            raise ValueError(f"widths may go up to draft.num_nodes {self.draft.num_nodes}, got {self.widths[-1]}")
        if any(cost <= 0 for cost in self.costs):
            raise ValueError(f"costs must be positive, got {self.costs}")
        if self.window and (self.widths or "pool" not in self.draft.order):
            raise ValueError("a Lookahead window feeds the source `pool` (name it in draft.order), and its step has "
                             "one width (leave widths empty)")
        if not self.window and "pool" in self.draft.order:
            raise ValueError("the source `pool` is filled by a Lookahead window: set window, or leave `pool` out")
        if self.window == 1 or self.window < 0:
            raise ValueError(f"window must be 0 or at least 2 columns, got {self.window}")
        if self.model is not None and self.window:
            raise ValueError("a draft model and a Lookahead window exclude each other")
        if self.model is not None and self.widths:
            raise ValueError("a draft model writes one chain: leave widths and costs empty")

    def num_sources(self) -> int:
        """Columns of `DecodeState.accepted`."""
        return 1 if self.model is not None else len(self.draft.order)

    def source_names(self) -> tuple[str, ...]:
        """What those columns are."""
        return ("draft_model",) if self.model is not None else self.draft.order


class Sources(NamedTuple):
    """What guesses are read from and no step changes; None for what is not in use."""

    databases: Databases = Databases()
    params: Any = None       # of the draft model


class Drafting(NamedTuple):
    """Per row."""

    pool: Any = None         # of n-grams from the window
    window: Any = None       # [B, M, W] int32, rows of guessed tokens; the first column of the first row is unused
    age: Any = None          # [B] int32, steps of the window
    cache: Cache | None = None  # of the draft model


class Learned(NamedTuple):
    """Shared by all rows."""

    counts: jax.Array        # see `draft.observe`
    successors: Any = None   # [V, SUCCESSORS] int32, Token Recycling


def start_guessing(
    guessing: Guessing, state: DecodeState, model: Model, sources: Sources, cache_dtype: CacheDtype = "float32",
) -> DecodeState:
    """The state of new rows with what guessing needs; called once the first prompt is known."""
    batch, slots = state.tokens.shape
    draft, pool, window, age, cache = guessing.draft, None, None, None, None
    if guessing.window:
        columns = draft.depth * guessing.window
        # Any tokens do for a start: those of the prompt, in a fixed disorder.
        place = (jnp.arange(columns)[None] * 7 + 3) % jnp.maximum(state.length, 1)[:, None]
        window = jnp.take_along_axis(state.tokens, place, axis=1).reshape(batch, draft.depth, guessing.window)
        pool, age = init_pool(batch, POOL_SIZE, draft.depth), jnp.zeros(batch, jnp.int32)
    if guessing.model is not None:
        cache = init_cache(guessing.model.config, batch, slots, cache_dtype)
        known = state.tokens[:, :guessing.model.config.max_positions]  # slots may be more than positions
        cache = guessing.model.apply(sources.params, known, cache=cache, logits=False).cache
        cache = cache._replace(length=jnp.maximum(state.length - 1, 0))
    learned = None
    if guessing.model is None:
        recycled = init_matrix(model.config.vocab_size, SUCCESSORS) if "recycling" in draft.order else None
        databases = _databases(sources, Drafting(pool), Learned(None, recycled))
        learned = Learned(init_counts(draft, databases), recycled)
    return state._replace(drafting=Drafting(pool, window, age, cache), learned=learned)


def _databases(sources: Sources, drafting: Drafting, learned: Learned) -> Databases:
    return sources.databases._replace(pool=drafting.pool, recycling=learned.successors)


def guessing_step(
    model: Model, params: Any, state: DecodeState, sources: Sources, guessing: Guessing, num_tokens: int | None = None,
) -> DecodeState:
    """One forward pass, and at least one more token for every row that is not done."""
    step = _source_step if guessing.model is None else _draft_model_step
    return step(model, params, state, sources, guessing, num_tokens)


def _source_step(model, params, state, sources, guessing, num_tokens) -> DecodeState:
    databases = _databases(sources, state.drafting, state.learned)
    max_depth = draft_depth(guessing.draft, databases)
    if guessing.widths:
        draft = propose(guessing.draft, databases, state.tokens, state.length,
                        acceptance_rates(state.learned.counts))
        chosen = _best_width(guessing, draft, state.done)
        branches = [_at_width(model, params, draft, width, max_depth if width else 0, num_tokens)
                    for width in guessing.widths]
        return jax.lax.switch(chosen, branches, state)
    draft = propose(guessing.draft, databases, state.tokens, state.length)
    if guessing.window:
        return _window_step(model, params, state, draft, max_depth, num_tokens)
    return _at_width(model, params, draft, guessing.draft.num_nodes, max_depth, num_tokens)(state)


def _best_width(guessing: Guessing, draft: Draft, done: jax.Array) -> jax.Array:
    """The index of the width with the most tokens to expect per time: sum of (1 + values of its nodes) / cost."""
    live = jnp.where(done, 0.0, 1.0)
    tokens = jnp.cumsum(jnp.pad(draft.values, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    expected = jnp.einsum("B,BR->R", live, tokens)[jnp.asarray(guessing.widths)]
    return jnp.argmax(expected / jnp.asarray(guessing.costs))


def _at_width(model, params, draft: Draft, width: int, max_depth: int, num_tokens):
    part = Draft(*(x[:, :width] for x in draft))

    def step(state: DecodeState) -> DecodeState:
        live, root = ~state.done[:, None], last_tokens(state.tokens, state.length)[:, None]
        state, verdict = verify(model, params, state, part, max_depth, num_tokens)
        return _learn(state, part, verdict, live, root)

    return step


def _learn(state: DecodeState, draft: Draft, verdict: Verdict, live: jax.Array, root: jax.Array) -> DecodeState:
    """What a step found out about its guesses; `live` and `root` [B, 1] are of before the step."""
    learned, width = state.learned, draft.tokens.shape[1]
    learned = learned._replace(counts=learned.counts * MEMORY)
    if width:
        number = jnp.arange(1, width + 1)
        accepted = jnp.any(verdict.path[:, :, None] == number[None, None], axis=1)
        verified = jnp.broadcast_to(live & (draft.sources >= 0), accepted.shape)
        learned = learned._replace(counts=observe(learned.counts, draft, verified, accepted & live))
    if learned.successors is not None:
        nodes = jnp.concatenate((root, draft.tokens), axis=1)
        valid = live & jnp.pad(draft.sources >= 0, ((0, 0), (1, 0)), constant_values=True)
        top = jax.lax.top_k(verdict.logits, SUCCESSORS)[1]
        learned = learned._replace(successors=observe_topk(learned.successors, nodes, valid, top))
    return state._replace(learned=learned)


def _window_step(model, params, state: DecodeState, draft: Draft, max_depth: int, num_tokens) -> DecodeState:
    """A step that verifies guesses and moves the Lookahead window (Fu et al. 2024, arXiv:2402.02057) by one column.

    The window has M rows of W guessed tokens; its column i, below the last known token or a guess i places later, is
    a Jacobi trajectory. What the model decides after the last row becomes the new last row, and each column with it
    an n-gram for the pool. In a tree of W=3, M=2 (root R; a row's first token is not used, R stands there):

        R - a1 - a2        parents of a1, a2: R, a1
        |    |    |        of b0, b1, b2: R, a1, a2
        b0   b1   b2       n-grams R b0 new0, a1 b1 new1, a2 b2 new2
    """
    drafting, live = state.drafting, ~state.done[:, None]
    root = last_tokens(state.tokens, state.length)[:, None]
    rows, columns = drafting.window.shape[1:]
    extra = rows * columns - 1
    batch = state.done.shape[0]
    number = jnp.arange(rows * columns).reshape(rows, columns)  # 0 is the root, in place of the unused token
    parents = jnp.concatenate((jnp.arange(columns - 1), number[:-1].reshape(-1)))
    depths = (number // columns + number % columns).reshape(-1)[1:]
    whole = lambda x: jnp.broadcast_to(x[None], (batch, extra)).astype(jnp.int32)
    moved = jnp.where(draft.parents > 0, draft.parents + extra, 0)
    both = Draft(
        jnp.concatenate((drafting.window.reshape(batch, -1)[:, 1:], draft.tokens), axis=1),
        jnp.concatenate((whole(parents), moved), axis=1), jnp.concatenate((whole(depths), draft.depths), axis=1),
        jnp.concatenate((whole(jnp.full(extra, -2)), draft.sources), axis=1),
        jnp.concatenate((jnp.zeros((batch, extra)), draft.values), axis=1))
    state, verdict = verify(model, params, state, both, max_depth, num_tokens)
    new = jnp.argmax(verdict.logits[:, extra + 1 - columns: extra + 1, :num_tokens], axis=-1).astype(jnp.int32)
    keys = drafting.window[:, 0].at[:, 0].set(root[:, 0])
    below = jnp.concatenate((drafting.window[:, 1:], new[:, None]), axis=1)  # each row moves up, the first leaves
    # A column holds what the model made of it only after as many steps as there are rows.
    valid = jnp.broadcast_to(live & (drafting.age[:, None] >= rows - 1), keys.shape)
    # One column to the left; the first token of the new first row is not used.
    window = jnp.concatenate((jnp.pad(below[:, :1, 1:], ((0, 0), (0, 0), (1, 0))), below[:, 1:]), axis=1)
    drafting = drafting._replace(pool=insert(drafting.pool, keys, below.transpose(0, 2, 1), valid), window=window,
                                 age=drafting.age + 1)
    path = jnp.where(verdict.path > 0, verdict.path - extra, 0)
    logits = jnp.concatenate((verdict.logits[:, :1], verdict.logits[:, extra + 1:]), axis=1)
    return _learn(state._replace(drafting=drafting), draft, Verdict(logits, path), live, root)


def _draft_model_step(model, params, state: DecodeState, sources, guessing, num_tokens) -> DecodeState:
    """A chain of tokens that the draft model decides under the settings and the noise of the row, then one check.

    With the same noise the two models decide the same token whenever their distributions are close (see `sampling`).
    """
    small, depth, cache = guessing.model, guessing.draft.depth, state.drafting.cache
    batch = state.done.shape[0]
    settings = state.settings._replace(repetition=None, frequency=None, presence=None)  # a guess need not know them
    if settings.allowed is not None:  # the two vocabularies may be padded differently
        size = small.config.vocab_size
        known = settings.allowed[:, :size]
        settings = settings._replace(allowed=jnp.pad(known, ((0, 0), (0, size - known.shape[1]))))
    # What became text since the last step, at most depth + 1 tokens; what follows them is overwritten.
    place = cache.length[:, None] + jnp.arange(depth + 1)[None]
    out = small.apply(sources.params, jnp.take_along_axis(state.tokens, place, axis=1, mode="clip"), cache=cache)
    at = (state.length - 1 - cache.length)[:, None, None]
    logits, cache = jnp.take_along_axis(out.logits, at, axis=1), out.cache._replace(length=state.length)

    def decide(logits: jax.Array, step: int) -> jax.Array:
        return choose(logits, settings, depths_BT=jnp.zeros((batch, 1), jnp.int32), index_B=state.length + step,
                      max_depth=0, num_tokens=num_tokens).tokens

    chain = [decide(logits, 0)]
    for step in range(1, depth):
        out = small.apply(sources.params, chain[-1], cache=cache)
        cache = out.cache
        chain.append(decide(out.logits, step))
    whole = lambda x: jnp.broadcast_to(x[None], (batch, depth)).astype(jnp.int32)
    draft = Draft(jnp.concatenate(chain, axis=1), whole(jnp.arange(depth)), whole(jnp.arange(1, depth + 1)),
                  whole(jnp.zeros(depth)), jnp.ones((batch, depth)))
    known = state.length
    state, _ = verify(model, params, state, draft, depth, num_tokens)
    # Guesses that were right are fed again next time: the cache keeps what was text before this step.
    return state._replace(drafting=state.drafting._replace(cache=cache._replace(length=known)))
