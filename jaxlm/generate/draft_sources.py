"""Sources of guessed tokens for speculative decoding: look-ups in token databases, as pure functions of arrays.

Every source answers for a batch of rows at once and proposes `Candidates`, best first. A row is its history `tokens
[B, S]` of which the first `length` [B] are known; what lies beyond is never read. Shapes are fixed and nothing leaves
the device, so the look-ups run inside the decoding loop. Guesses change the speed of decoding, never its text.

Axes here: `N` candidates, `M` guessed tokens a candidate, `P` places of a pool, `K` successors a token.
"""

import heapq
import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

NONE = -1  # where there is no token: past a candidate's end, between documents, a successor not seen yet
SourceName = Literal["context", "pool", "model", "corpus", "prompt", "recycling"]


class Candidates(NamedTuple):
    """Chains of guessed tokens that may follow the last known token, best first."""

    tokens: jax.Array   # [B, N, M] int32, NONE past the end of a chain
    lengths: jax.Array  # [B, N] int32; 0: no candidate


class Pool(NamedTuple):
    """A ring of the newest n-grams of each row, for instance those harvested from a look-ahead window."""

    keys: jax.Array    # [B, P] int32, first token of an n-gram; NONE: empty
    values: jax.Array  # [B, P, M] int32, the tokens after it
    clock: jax.Array   # [B] int32, n-grams inserted so far; the next one goes to place `clock % P`


class ModelTable(NamedTuple):
    """Frequent continuations of each token, the most frequent first; built by `databases.build_model_table`."""

    tokens: jax.Array   # [V, N, M] int32, NONE where there is none
    lengths: jax.Array  # [V, N] uint8


class Corpus(NamedTuple):
    """Tokenised documents and their sorted suffixes; built by `databases.build_corpus`."""

    tokens: jax.Array    # [T] int32, a NONE after every document
    suffixes: jax.Array  # [number of real tokens] int32, positions in `tokens` in the order of what follows there
    starts: jax.Array    # [V + 1] int32, suffixes[starts[v]:starts[v + 1]] begin with token v


class Databases(NamedTuple):
    """What the sources read, besides the text itself; None for what is not in use. A pytree, an argument of the jit."""

    pool: Pool | None = None
    model: ModelTable | None = None
    corpus: Corpus | None = None
    recycling: jax.Array | None = None  # [V, K] int32, see `recycle`


def last_tokens(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """`tokens[b, length[b] - 1]` [B]; NONE for an empty row."""
    return _token_at(tokens, length - 1)


def context(tokens: jax.Array, length: jax.Array, n: int, m: int) -> Candidates:
    """What followed earlier occurrences of the last token in the row itself, the newest first, each only once.

    Equal to Hierarchy Drafting's context database (arXiv 2502.05609: a dictionary from one token to the `n` newest
    distinct continuations of `m` tokens) holding every (m+1)-gram of the row. Places left over go to occurrences
    with fewer than `m` tokens behind them, the longest first, unless they begin one of the others.

        row 1 2 3 1 4 5 1, m = 2:    (4 5), (2 3)
        row 7 7 7,         m = 2:    (7 7) from the first 7; the second gives only (7), which begins it
    """
    chex.assert_rank([tokens, length], [2, 1])
    size = tokens.shape[1]
    place = jnp.arange(size)[None, :]
    text = _known(tokens, length)
    found = (text == last_tokens(tokens, length)[:, None]) & (place < length[:, None] - 1)
    shifted = jnp.pad(text, ((0, 0), (0, m)), constant_values=NONE)
    following = jnp.stack([shifted[:, j + 1:j + 1 + size] for j in range(m)], axis=1)
    score = jnp.where(place + m < length[:, None], size + 1 + place, size - place)
    return _best_distinct(jnp.where(found, score, 0), following, n)


def pool(state: Pool, last: jax.Array, n: int) -> Candidates:
    """The `n` newest distinct values of the key `last` [B] in the ring."""
    size = state.keys.shape[1]
    age = jnp.mod(state.clock[:, None] - 1 - jnp.arange(size)[None, :], size)
    found = (state.keys == last[:, None]) & (last[:, None] != NONE)
    return _best_distinct(jnp.where(found, size - age, 0), jnp.swapaxes(state.values, 1, 2), n)


def init_pool(batch: int, size: int, m: int) -> Pool:
    """An empty ring of `size` n-grams a row."""
    return Pool(jnp.full((batch, size), NONE, jnp.int32), jnp.full((batch, size, m), NONE, jnp.int32),
                jnp.zeros(batch, jnp.int32))


def insert(state: Pool, keys: jax.Array, values: jax.Array, valid: jax.Array) -> Pool:
    """Adds the valid ones of `keys` [B, W], `values` [B, W, M] in order, over the oldest; W at most the ring's size."""
    size = state.keys.shape[1]
    if keys.shape[1] > size:
        raise ValueError(f"a pool of {size} places cannot take {keys.shape[1]} n-grams at once")
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    place = jnp.where(valid, jnp.mod(state.clock[:, None] + count - 1, size), size)
    row = jnp.arange(keys.shape[0])[:, None]
    return Pool(state.keys.at[row, place].set(keys, mode="drop"), state.values.at[row, place].set(values, mode="drop"),
                state.clock + count[:, -1])


def model_table(table: ModelTable, last: jax.Array) -> Candidates:
    """The row of the table for `last` [B]: one gather."""
    row = jnp.maximum(last, 0)
    return _candidates(jnp.where(last[:, None, None] == NONE, NONE, table.tokens[row]))


def corpus(
    corpus: Corpus, tokens: jax.Array, length: jax.Array, n: int, m: int,
    suffix_lengths: tuple[int, ...] = (2, 1), matches: int = 64,
) -> Candidates:
    """What followed the last tokens of the row in a corpus: the database of REST, and the third one of HD.

    Finds the suffixes of the corpus that begin with the last l tokens, for each l of `suffix_lengths` (longest first,
    at most 32). Two of them are read: the longest that occurs, and to fill up, the longest shorter one that occurs at
    least `n` times (if none does, the shortest). Of each, `matches` occurrences spread evenly over the sorted range
    are looked at. Neighbours there continue alike, so this is a fair sample: a continuation with a share of
    1 / matches is never missed (REST reads the first 5,000 of the range: those whose next token has a low id).

    The `n` chains are those that cover the most occurrences, counted at every depth: each next chain is the one
    whose new trie nodes have the largest sum of counts, first over the longer suffix, then over the shorter. Greedy
    is optimal on a tree, and the sum is the expected number of accepted tokens if the corpus is like the text:

        3x (1 2), 2x (1 4), 4x (5 6) in a corpus:    (1 2) for 5 + 3, then (5 6) for 4 + 4, then (1 4) for 2

    A chain ends where its document ends.
    """
    chex.assert_rank([tokens, length, corpus.tokens], [2, 1, 1])
    first, count = _ranges(corpus, tokens, length, suffix_lengths)
    lengths = jnp.asarray(suffix_lengths)
    index = jnp.arange(len(suffix_lengths))[None, :]
    longest = jnp.argmax(count > 0, axis=1)[:, None]
    enough = (index > longest) & (count >= n)
    filler = jnp.where(jnp.any(enough, axis=1), jnp.argmax(enough, axis=1), len(suffix_lengths) - 1)[:, None]
    used = jnp.concatenate([longest, filler], axis=1)                                             # [B, 2]
    first, count = (jnp.take_along_axis(array, used, axis=1)[:, :, None] for array in (first, count))
    sample = jnp.arange(matches)[None, None, :]
    # sample * count // matches, without overflow
    spread = sample * (count // matches) + sample * (count % matches) // matches
    sampled = sample < jnp.minimum(count, matches)
    slot = first + jnp.where(count > matches, spread, sample)
    after = _at(corpus.suffixes, slot) + lengths[used][:, :, None]                                # [B, 2, matches]
    found = _at(corpus.tokens, after[..., None] + jnp.arange(m)[None, None, None, :])
    ended = jax.lax.cummax((found == NONE).astype(jnp.int32), axis=3) > 0
    return _cover(jnp.where(ended | ~sampled[..., None], NONE, found), n)


def prompt_lookup(
    tokens: jax.Array, length: jax.Array, m: int = 10, max_ngram: int = 3, newest: bool = False,
) -> Candidates:
    """Prompt Lookup Decoding: one candidate, up to `m` tokens after an earlier occurrence of the last tokens.

    The longest match of the last `max_ngram`, ..., 1 tokens decides; among equals the earliest (`newest`: the
    latest).
    """
    size = tokens.shape[1]
    place = jnp.arange(size)[None, :]
    text, agree, run = _known(tokens, length), jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for k in range(max_ngram):
        wanted = _token_at(tokens, length - 1 - k)[:, None]
        earlier = jnp.pad(text, ((0, 0), (k, 0)), constant_values=NONE)[:, :size]
        agree &= earlier == wanted  # where wanted is NONE, no place before the last token has agreed so far
        run += agree
    usable = (run > 0) & (place < length[:, None] - 1)
    score = jnp.max(jnp.where(usable, run * size + (place if newest else size - 1 - place), 0), axis=1)
    chosen = jnp.mod(score, size) if newest else size - 1 - jnp.mod(score, size)
    read = chosen[:, None] + 1 + jnp.arange(m)[None, :]
    found = jnp.take_along_axis(text, jnp.minimum(read, size - 1), axis=1)
    return _candidates(jnp.where((read < size) & (score > 0)[:, None], found, NONE)[:, None, :])


def _share(rank: int) -> float:
    return 0.6 / (rank + 1) ** 1.2


def recycling_paths(num_nodes: int, depth: int, k: int) -> tuple[tuple[int, ...], ...]:
    """The `num_nodes` most promising nodes of a tree of successors, each as its path of ranks, best first.

    A node's value is the product of 0.6 / (r + 1)^1.2 over the ranks r of its path, a rule of thumb: with 80 nodes it
    gives 8, 21, 25, 19, 6, 1 nodes a level, where the paper's tree has 8, 21, 25, 15, 8, 3. Among equals the lower
    ranks come first; a parent stands before its children.
    """
    heap, paths = [(-1.0, ())], []
    while heap and len(paths) <= num_nodes:
        value, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < depth:
            for rank in range(k):
                heapq.heappush(heap, (value * _share(rank), (*path, rank)))
    return tuple(paths[1:])


RECYCLING_TREE = recycling_paths(80, 6, 8)


def recycle(matrix: jax.Array, last: jax.Array, template: tuple[tuple[int, ...], ...] = RECYCLING_TREE) -> Candidates:
    """Token Recycling (arXiv 2408.08696): a fixed tree of ranks, expanded through each token's last seen successors.

    Args:
      matrix: [V, K], the most likely successors of each token when it was last seen, best first; NONE: unknown. One
        for all rows.
      template: the tree as paths of child ranks, with every prefix of a path.

    Returns the paths to the leaves, ordered so that every next one adds the most value (`recycling_paths`). A path
    ends at an unknown successor.

        matrix[3] = 5 6, matrix[5] = 7 8, template (0) (1) (0 0) (0 1), last 3:    (5 7), (6), (5 8)
    """
    leaves = _leaves(template)
    levels = [sorted(path for path in template if len(path) == d + 1) for d in range(max(map(len, template)))]
    level, above = last[:, None], {(): 0}
    columns, places = [jnp.full_like(level, NONE)], {}
    for paths in levels:
        parent = level[:, np.array([above[path[:-1]] for path in paths])]
        rank = np.array([path[-1] for path in paths])[None, :]
        level = jnp.where(parent == NONE, NONE, matrix[jnp.maximum(parent, 0), rank])
        above = {path: i for i, path in enumerate(paths)}
        first = 1 + len(places)
        places |= {path: first + i for path, i in above.items()}
        columns.append(level)
    chains = [[places[path[:d + 1]] if d < len(path) else 0 for d in range(len(levels))]
              for path in leaves]
    return _candidates(jnp.concatenate(columns, axis=1)[:, np.array(chains)])


def observe_topk(matrix: jax.Array, tokens: jax.Array, valid: jax.Array, topk: jax.Array) -> jax.Array:
    """The matrix [V, K] after the model was asked what follows `tokens` [B, T] and said `topk` [B, T, K].

    Where a token stands more than once among the valid ones, the last one (of the last row) counts.
    """
    size = matrix.shape[0]
    tokens, order = jnp.where(valid, tokens, size).reshape(-1), jnp.arange(tokens.size, dtype=jnp.int32)
    newest = jnp.full(size, NONE, jnp.int32).at[tokens].max(order, mode="drop")
    wins = newest[jnp.minimum(tokens, size - 1)] == order
    return matrix.at[jnp.where(wins, tokens, size)].set(topk.reshape(-1, topk.shape[-1]), mode="drop")


def init_matrix(vocab_size: int, k: int = 8) -> jax.Array:
    """[V, K] of unknown successors."""
    return jnp.full((vocab_size, k), NONE, jnp.int32)


def _leaves(template: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    value = {path: math.prod(map(_share, path)) for path in template}
    if any(path[:-1] not in value for path in template if len(path) > 1):
        raise ValueError("a template must hold every prefix of its paths")
    inner, chosen = {path[:-1] for path in template}, []
    leaves, left = sorted(path for path in template if path not in inner), dict(value)
    while leaves:
        best = max(leaves, key=lambda leaf: sum(left[leaf[:d + 1]] for d in range(len(leaf))))
        left.update((best[:d + 1], 0.0) for d in range(len(best)))
        leaves.remove(best)
        chosen.append(best)
    return chosen


def _known(tokens: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(tokens.shape[1])[None, :] < length[:, None], tokens, NONE)


def _token_at(tokens: jax.Array, place: jax.Array) -> jax.Array:
    found = jnp.take_along_axis(tokens, jnp.maximum(place, 0)[:, None], axis=1)[:, 0]
    return jnp.where(place >= 0, found, NONE)


def _at(array: jax.Array, place: jax.Array) -> jax.Array:
    """`array[place]`, NONE outside."""
    if array.size == 0:
        return jnp.full_like(place, NONE)
    return jnp.where((place >= 0) & (place < array.size), array[jnp.clip(place, 0, array.size - 1)], NONE)


def _candidates(tokens: jax.Array) -> Candidates:
    return Candidates(tokens, jnp.sum(tokens != NONE, axis=2, dtype=jnp.int32))


def _best_distinct(score: jax.Array, values: jax.Array, n: int) -> Candidates:
    """The `n` values [B, M, P] of the highest score [B, P] (distinct; 0: absent) that begin no value chosen before."""

    def one(score: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        best = jnp.max(score, axis=1, keepdims=True)
        value = jnp.max(jnp.where(((score == best) & (best > 0))[:, None, :], values, NONE), axis=2)
        begins = jnp.all((values == value[:, :, None]) | (values == NONE), axis=1)
        return jnp.where(begins, 0, score), value

    _, chosen = jax.lax.scan(one, score, None, length=n)
    return _candidates(jnp.swapaxes(chosen, 0, 1))


def _ranges(
    corpus: Corpus, tokens: jax.Array, length: jax.Array, suffix_lengths: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """First place in `corpus.suffixes` and count, [B, L] each, of the suffixes that begin with the last l tokens."""
    longest = suffix_lengths[0]
    start = length[:, None] - jnp.asarray(suffix_lengths)[None, :]
    inside = np.arange(longest)[None, :] < np.asarray(suffix_lengths)[:, None]                    # [L, longest]
    read = jnp.clip(start[:, :, None] + jnp.arange(longest)[None, None, :], 0, tokens.shape[1] - 1)
    row = jnp.arange(tokens.shape[0])[:, None, None]
    # A suffix longer than the row is all NONE, and no suffix of the corpus begins so.
    query = jnp.where(inside[None] & (start >= 0)[:, :, None], tokens[row, read], NONE)           # [B, L, longest]
    head = jnp.maximum(query[:, :, 0], 0)
    # Two searches: the first suffix that is not below the query, the first that is above.
    low = jnp.repeat(corpus.starts[head][..., None], 2, axis=2)
    high = jnp.repeat(corpus.starts[head + 1][..., None], 2, axis=2)
    above = jnp.asarray([False, True])[None, None, :]
    offsets = jnp.arange(longest)[None, None, None, :]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        text = _at(corpus.tokens, _at(corpus.suffixes, middle)[..., None] + offsets)
        differs = (text != query[:, :, None, :]) & inside[None, :, None, :]
        # The first differing token decides: +1 or -1, 0 if none does.
        sign = jnp.where(differs, jnp.sign(text - query[:, :, None, :]), 0)
        order = jnp.sum(jnp.where(jnp.cumsum(differs, axis=3) == 1, sign, 0), axis=3)
        left = (order < 0) | (above & (order == 0))
        open_ = low < high
        return jnp.where(open_ & left, middle + 1, low), jnp.where(open_ & ~left, middle, high)

    low, _ = jax.lax.fori_loop(0, corpus.suffixes.size.bit_length(), halve, (low, high))
    return low[..., 0], low[..., 1] - low[..., 0]


def _cover(samples: jax.Array, n: int) -> Candidates:
    """The `n` chains of `samples` [B, 2, K, M] that greedily cover the most trie nodes, weighted by their counts."""
    batch, parts, size, depth = samples.shape
    same, counts = jnp.ones((batch, parts, size, size), bool), []
    for d in range(depth):
        token = samples[..., d]
        same &= (token[..., :, None] == token[..., None, :]) & (token != NONE)[..., None]
        counts.append(jnp.sum(same, axis=3, dtype=jnp.int32))
    # A node of the longer suffix outweighs all of the shorter.
    weight = np.array([size * depth + 1, 1])[None, :, None, None]
    gain = (jnp.stack(counts, axis=3) * weight).reshape(batch, parts * size, depth)
    chains = samples.reshape(batch, parts * size, depth)

    def one(gain: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        total = jnp.sum(gain, axis=2)
        best = jnp.argmax(total, axis=1)[:, None]
        chain = jnp.where(jnp.take_along_axis(total, best, axis=1) > 0,
                          jnp.take_along_axis(chains, best[..., None], axis=1)[:, 0], NONE)
        agrees = jnp.cumsum(chains != chain[:, None, :], axis=2) == 0
        return jnp.where(agrees, 0, gain), chain

    _, chosen = jax.lax.scan(one, gain, None, length=n)
    return _candidates(jnp.swapaxes(chosen, 0, 1))


# name: (Databases, tokens [B, S], length [B], draft.DraftConfig) -> Candidates; a test holds it against `SourceName`.
SOURCES = {
    "context": lambda db, tokens, length, c: context(tokens, length, c.num_candidates, c.depth),
    "pool": lambda db, tokens, length, c: pool(db.pool, last_tokens(tokens, length), c.num_candidates),
    "model": lambda db, tokens, length, c: model_table(db.model, last_tokens(tokens, length)),
    "corpus": lambda db, tokens, length, c: corpus(db.corpus, tokens, length, c.num_candidates, c.depth,
                                                   c.suffix_lengths, c.matches),
    "prompt": lambda db, tokens, length, c: prompt_lookup(tokens, length, c.depth, c.max_ngram, c.newest),
    "recycling": lambda db, tokens, length, c: recycle(db.recycling, last_tokens(tokens, length)),
}
