"""Guesses of several sources merged into one tree, which a model verifies in a single forward pass.

`propose` is what a decoding loop calls once a step: look-ups from near to far (Hierarchy Drafting, arXiv 2502.05609),
duplicates dropped, shared prefixes merged, the most promising nodes kept. Pure, of fixed shapes, and each row of the
batch gets what it would get alone.

Axes here: `N` candidates, `M` guessed tokens a candidate, `R` nodes of the tree.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.config import nearest
from jaxlm.generate.draft_sources import NONE, RECYCLING_TREE, SOURCES, Candidates, Databases, SourceName

NEEDS = ("pool", "model", "corpus", "recycling")  # sources that read the field of `Databases` of their name
FAR = ("corpus",)  # so slow that it is worth a branch to leave it out when every row has enough


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Where guesses come from, and how many are verified."""

    order: tuple[SourceName, ...] = ("context", "model", "corpus")  # nearest first; later ones fill up
    num_candidates: int = 7   # chains a step; more than about 40 for the whole recycling tree
    depth: int = 4            # tokens a chain; a model table, a pool and the recycling tree bring their own
    num_nodes: int = 28       # nodes of the merged tree
    suffix_lengths: tuple[int, ...] = (2, 1)  # corpus: tokens that are looked up, longest first
    matches: int = 64         # corpus: occurrences that are looked at
    max_ngram: int = 3        # prompt: longest match
    newest: bool = False      # prompt: the latest occurrence in place of the earliest

    def __post_init__(self) -> None:
        names = typing.get_args(SourceName)
        for name in self.order:
            if name not in names:
                raise ValueError(f"order names an unknown source '{name}'{nearest(name, names)}; "
                                 f"sources: {', '.join(names)}")
        if not self.order or len(set(self.order)) < len(self.order):
            raise ValueError(f"order must name at least one source and none twice, got {self.order}")
        for name in ("num_candidates", "depth", "num_nodes", "matches", "max_ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        falls = all(a > b for a, b in zip(self.suffix_lengths, self.suffix_lengths[1:], strict=False))
        if not self.suffix_lengths or not falls or not 1 <= self.suffix_lengths[-1] <= self.suffix_lengths[0] <= 32:
            raise ValueError(f"suffix_lengths must fall from at most 32 to at least 1, got {self.suffix_lengths}")


class Draft(NamedTuple):
    """A tree of guesses, R nodes a row, the most promising first: for any w the first w nodes are a tree themselves.

    Nodes that are not there come last and have token 0, parent 0, depth 0, source -1 and value 0.
    """

    tokens: jax.Array   # [B, R] int32
    parents: jax.Array  # [B, R] int32; 0: the root, which is the last known token; i + 1: node i, which stands before
    depths: jax.Array   # [B, R] int32, 1 for children of the root
    sources: jax.Array  # [B, R] int32, the source that proposed the node first; -1: no node here
    values: jax.Array   # [B, R] float32, never rising along the array; with rates: estimated P(accepted)


def propose(
    config: DraftConfig, databases: Databases, tokens: jax.Array, length: jax.Array, rates: jax.Array | None = None,
) -> Draft:
    """The tree of guesses after `tokens` [B, S], of which `length` [B] are known.

    Args:
      rates: [len(config.order), M], see `tree` and `acceptance_rates`. Sources are numbered as in `config.order`.
    """
    candidates, sources = propose_hierarchy(config, databases, tokens, length)
    return tree(candidates, sources, config.num_nodes, rates)


def propose_hierarchy(
    config: DraftConfig, databases: Databases, tokens: jax.Array, length: jax.Array,
) -> tuple[Candidates, jax.Array]:
    """Candidates of the sources in `config.order`; a source is heard only by rows that still lack some.

    The sources in `FAR` are not even read when no row lacks any. Returns candidates [B, num_candidates, M] and their
    sources [B, num_candidates].
    """
    chex.assert_rank([tokens, length], [2, 1])
    for name in config.order:
        if name in NEEDS and getattr(databases, name) is None:
            raise ValueError(f"order names '{name}', but no such database was given")
    depth, n = draft_depth(config, databases), config.num_candidates

    def add(name: str, found: tuple[Candidates, jax.Array] | None) -> tuple[Candidates, jax.Array]:
        more = SOURCES[name](databases, tokens, length, config)
        source = jnp.full_like(more.lengths, config.order.index(name))
        if found is None:
            return _merge([more], [source], n, depth)
        lacking = jnp.any(found[0].lengths == 0, axis=1)
        more = Candidates(more.tokens, jnp.where(lacking[:, None], more.lengths, 0))
        return _merge([found[0], more], [found[1], source], n, depth)

    found = add(config.order[0], None)
    for name in config.order[1:]:
        if name in FAR:
            lacking = jnp.any(found[0].lengths == 0)
            found = jax.lax.cond(lacking, partial(add, name), lambda found: found, found)
        else:
            found = add(name, found)
    return found


def draft_depth(config: DraftConfig, databases: Databases) -> int:
    """M of what `propose_hierarchy` returns: the longest chain that any source in `config.order` can propose."""
    own = {"pool": lambda: databases.pool.values.shape[2], "model": lambda: databases.model.tokens.shape[2],
           "recycling": lambda: max(map(len, RECYCLING_TREE))}
    return max(own[name]() if name in own else config.depth for name in config.order)


def collect(parts: Sequence[Candidates], n: int) -> tuple[Candidates, jax.Array]:
    """The first `n` distinct candidates of several sources, and the index [B, n] of each one's source (-1: none).

    A candidate equal to an earlier one is dropped. So is one that begins another, and the longer takes its place:

        (1 2) (3) of source 0, (4) (1 2 5) (1 2) of source 1:    (1 2 5) (3) (4) of sources 1 0 1
    """
    return _merge(parts, [jnp.full_like(part.lengths, i) for i, part in enumerate(parts)], n,
                  max(part.tokens.shape[2] for part in parts))


def tree(candidates: Candidates, sources: jax.Array, num_nodes: int, values: jax.Array | None = None) -> Draft:
    """Candidates merged into a tree at their common beginnings, of which the `num_nodes` most promising nodes stay.

    Args:
      candidates, sources: [B, N, M] and [B, N], as from `collect`.
      values: [number of sources, M], P(a source's best guess at depth d + 1 is right, given that its parent is), in
        0..1 (`acceptance_rates`). A node's value is the product along its path of `values / (rank + 1)`, rank being
        the number of older siblings. Without it nodes come chain by chain and `Draft.values` only shows the order.

    Candidates (5 6 7) and (5 8) of source 0, (9 6) of source 1:

        no values:              tokens 5 6 7 8 9 6, parents 0 1 2 1 0 5, depths 1 2 3 2 1 2, sources 0 0 0 0 1 1
        .8 .5 .5 / .4 .4 .4:    tokens 5 6 9 8 7 6, parents 0 1 0 1 2 3, values .8 .4 .2 .2 .2 .08
    """
    tokens, lengths = candidates
    batch, num, depth = tokens.shape
    chain, level = jnp.arange(num)[None, :, None], jnp.arange(depth)[None, None, :]
    exists = level < lengths[:, :, None]
    # same[b, i, j, d]: candidates i and j agree in their first d + 1 tokens.
    agree = (tokens[:, :, None] == tokens[:, None]) & exists[:, :, None] & exists[:, None]
    same = jnp.cumsum(~agree, axis=3) == 0
    owner = jnp.argmax(same, axis=2)                                            # [B, N, M], the first that agrees
    first = exists & (owner == chain)
    parent = jnp.pad(owner, ((0, 0), (0, 0), (1, 0)))[:, :, :-1] + (level - 1) * num  # as d * N + i, below 0: root
    if values is None:
        score = 1.0 / (1 + chain * depth + level)
    else:
        chex.assert_shape(values, (None, depth))
        siblings = jnp.pad(same, ((0, 0),) * 3 + ((1, 0),), constant_values=True)[..., :-1]
        older = (jnp.arange(num)[None, :] < jnp.arange(num)[:, None])[None, :, :, None]
        rank = jnp.sum(siblings & first[:, None] & older, axis=2)
        factor = jnp.clip(values[jnp.maximum(sources, 0)], 0, 1) / (rank + 1)
        factor = jnp.take_along_axis(factor, owner, axis=1)
        score = [factor[:, :, 0]]
        for d in range(1, depth):  # no cumprod: factors of at most 1 from left to right never round up along a path
            score.append(score[-1] * factor[:, :, d])
        score = jnp.stack(score, axis=2)
    # Depth before chain: among equal values top_k takes the parent first.
    flat = lambda array: jnp.swapaxes(array, 1, 2).reshape(batch, depth * num)
    score = flat(jnp.where(first, score, -1.0).astype(jnp.float32))
    best, order = jax.lax.top_k(score, min(num_nodes, depth * num))
    take = lambda array: jnp.take_along_axis(flat(array), order, axis=1)
    above = take(jnp.broadcast_to(parent, first.shape))
    found = (above[:, :, None] == order[:, None, :]) & (above >= 0)[:, :, None]
    place = jnp.sum(jnp.where(found, jnp.arange(1, order.shape[1] + 1)[None, None, :], 0), axis=2)
    present, spare = best >= 0, ((0, 0), (0, num_nodes - order.shape[1]))
    node = lambda array, none: jnp.pad(jnp.where(present, array, none), spare, constant_values=none)
    source = jnp.take_along_axis(sources, order % num, axis=1)
    return Draft(node(take(tokens), 0), node(place, 0), node(order // num + 1, 0), node(source, -1), node(best, 0.0))


def ancestors(draft: Draft) -> jax.Array:
    """[B, R + 1, R + 1] bool: row i may see column j, its ancestor or itself; 0 is the root, i + 1 is node i.

        parents 0 1 1:    1 0 0 0 / 1 1 0 0 / 1 1 1 0 / 1 1 0 1

    Nodes that are not there see the root and themselves.
    """
    size = draft.parents.shape[1] + 1
    above = jax.nn.one_hot(jnp.pad(draft.parents, ((0, 0), (1, 0))), size, dtype=jnp.float32)
    sees = jnp.minimum(above + jnp.eye(size)[None], 1)
    for _ in range((size - 1).bit_length()):  # each squaring doubles the generations seen
        sees = jnp.minimum(jnp.einsum("bij,bjk->bik", sees, sees), 1)
    return sees > 0


def observe(counts: jax.Array, draft: Draft, verified: jax.Array, accepted: jax.Array) -> jax.Array:
    """Adds what became of a draft to `counts` [2, number of sources, M], accepted and expected nodes.

    Args:
      verified, accepted: [B, R] bool, nodes that the model saw, and those that became text.

    A verified node whose parent is text (the root is) adds 1 / (rank + 1) to the expected ones, so that accepted /
    expected estimates the rate of rank 0 under the discount that `tree` uses.
    """
    index = jnp.arange(draft.parents.shape[1])
    grown = jnp.pad(accepted, ((0, 0), (1, 0)), constant_values=True)
    tested = verified & (draft.sources >= 0) & jnp.take_along_axis(grown, draft.parents, axis=1)
    siblings = (draft.parents[:, :, None] == draft.parents[:, None, :]) & (draft.sources >= 0)[:, None, :]
    rank = jnp.sum(siblings & (index[None, :] < index[:, None])[None], axis=2)
    weight = jnp.stack([(tested & accepted).astype(jnp.float32), tested / (rank + 1.0)])          # [2, B, R]
    source = jax.nn.one_hot(draft.sources, counts.shape[1], dtype=jnp.float32)
    depth = jax.nn.one_hot(draft.depths - 1, counts.shape[2], dtype=jnp.float32)
    return counts + jnp.einsum("cbr,brs,brd->csd", weight, source, depth)


def init_counts(config: DraftConfig, databases: Databases) -> jax.Array:
    """No observations yet."""
    return jnp.zeros((2, len(config.order), draft_depth(config, databases)), jnp.float32)


def acceptance_rates(counts: jax.Array, prior: float = 0.5, strength: float = 4.0) -> jax.Array:
    """The `values` of `tree` from the counts of `observe`, as if `strength` nodes of rate `prior` had come before."""
    return jnp.clip((counts[0] + prior * strength) / (counts[1] + strength), 0, 1)


def _merge(
    parts: Sequence[Candidates], sources: Sequence[jax.Array], n: int, depth: int,
) -> tuple[Candidates, jax.Array]:
    widen = lambda tokens: jnp.pad(tokens, ((0, 0), (0, 0), (0, depth - tokens.shape[2])), constant_values=NONE)
    tokens = jnp.concatenate([widen(part.tokens) for part in parts], axis=1)
    lengths = jnp.concatenate([part.lengths for part in parts], axis=1)
    tokens = jnp.pad(tokens, ((0, 0), (0, max(n - tokens.shape[1], 0)), (0, 0)), constant_values=NONE)
    lengths = jnp.pad(lengths, ((0, 0), (0, tokens.shape[1] - lengths.shape[1])))
    size = tokens.shape[1]
    source = jnp.concatenate(sources, axis=1)
    source = jnp.pad(source, ((0, 0), (0, size - source.shape[1])), constant_values=-1)
    past = (jnp.arange(depth)[None, None, :] >= lengths[:, :, None])[:, :, None]
    mine, other = lengths[:, :, None], lengths[:, None, :]
    # begins[b, i, j]: candidate i is the beginning of j, or equal.
    begins = jnp.all((tokens[:, :, None] == tokens[:, None]) | past, axis=3) & (mine > 0) & (mine <= other)
    index = jnp.arange(size)
    earlier = (index[None, :] < index[:, None])[None]
    dropped = (lengths == 0) | jnp.any(begins & ((other > mine) | earlier), axis=2)
    place = jnp.min(jnp.where(begins, index[None, :, None], size), axis=1)
    key = jnp.where(dropped, size * size + index[None, :], place * size + index[None, :])
    _, chosen = jax.lax.top_k(-key, n)
    present = ~jnp.take_along_axis(dropped, chosen, axis=1)
    kept = jnp.take_along_axis(lengths, chosen, axis=1)
    inside = present[:, :, None] & (jnp.arange(depth)[None, None, :] < kept[:, :, None])
    found = jnp.where(inside, jnp.take_along_axis(tokens, chosen[:, :, None], axis=1), NONE)
    return (Candidates(found, jnp.where(present, kept, 0)),
            jnp.where(present, jnp.take_along_axis(source, chosen, axis=1), -1))
