"""Look-ups, merging and trees equal plain Python versions of the specified data structures, row by row."""

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate import draft_sources
from jaxlm.generate.databases import build_corpus, build_model_table
from jaxlm.generate.draft import (
    NEEDS,
    Draft,
    DraftConfig,
    acceptance_rates,
    ancestors,
    collect,
    draft_depth,
    init_counts,
    observe,
    propose,
    propose_hierarchy,
    tree,
)
from jaxlm.generate.draft_sources import NONE, SOURCES, Candidates, Databases, SourceName

WIDTH = 24


def rows(seed, batch=24, alphabet=3, width=WIDTH):
    """Random histories of every length, and the same with other garbage behind them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, alphabet, (batch, width)).astype(np.int32)
    length = np.concatenate([np.arange(min(batch, 5)), rng.integers(0, width + 1, batch - min(batch, 5))])
    garbage = np.where(np.arange(width) < length[:, None], tokens, rng.integers(-9, 99, tokens.shape))
    known = [row[:size].tolist() for row, size in zip(tokens, length, strict=True)]
    return known, jnp.asarray(tokens), jnp.asarray(garbage, jnp.int32), jnp.asarray(length, jnp.int32)


def chains(candidates):
    """Candidates as lists of lists; the order counts, empty ones do not. Checks the padding."""
    tokens, lengths = map(np.asarray, candidates)
    assert ((tokens == NONE) == (np.arange(tokens.shape[2]) >= lengths[..., None])).all()
    return [[row[:size].tolist() for row, size in zip(*pair, strict=True) if size]
            for pair in zip(tokens, lengths, strict=True)]


def pack(lists, n, m):
    """The inverse of `chains`."""
    tokens, lengths = np.full((len(lists), n, m), NONE, np.int32), np.zeros((len(lists), n), np.int32)
    for b, row in enumerate(lists):
        for i, chain in enumerate(row):
            tokens[b, i, :len(chain)], lengths[b, i] = chain, len(chain)
    return Candidates(jnp.asarray(tokens), jnp.asarray(lengths))


def begins(a, b):
    return list(b[:len(a)]) == list(a)


def slow_context(row, n, m):
    database = {}
    for i in range(len(row) - m):
        values = database.setdefault(row[i], [])
        value = row[i + 1:i + 1 + m]
        if value in values:
            values.remove(value)
        values.append(value)
        del values[:-n]
    found = database.get(row[-1], [])[::-1] if row else []
    for i in range(max(len(row) - m, 0), len(row) - 1):
        if row[i] == row[-1] and len(found) < n and not any(begins(row[i + 1:], other) for other in found):
            found.append(row[i + 1:])
    return found


def slow_prompt(row, m, max_ngram, newest):
    for size in range(max_ngram, 0, -1):
        starts = range(len(row) - size)
        for i in reversed(starts) if newest else starts:
            rest = row[i + size:i + size + m]
            if row[i:i + size] == row[len(row) - size:] and rest:
                return [rest]
    return []


def slow_corpus(text, row, n, m, suffix_lengths, matches):
    hits = [sorted((i for i in range(len(text)) if 0 < size <= len(row) and text[i:i + size] == row[-size:]),
                   key=lambda i: (text[i:i + 32], i)) for size in suffix_lengths]
    longest = next((i for i, hit in enumerate(hits) if hit), None)
    if longest is None:
        return []
    filler = next((i for i in range(longest + 1, len(hits)) if len(hits[i]) >= n), len(hits) - 1)
    gains, samples = [], []
    for part in dict.fromkeys([longest, filler]):
        places = hits[part]
        if len(places) > matches:
            places = [places[i * len(places) // matches] for i in range(matches)]
        found = [text[i + suffix_lengths[part]:][:m] for i in places]
        found = [tuple(itertools.takewhile(lambda token: token != NONE, chain)) for chain in found]
        counts = {}
        for chain in found:
            for d in range(len(chain)):
                counts[chain[:d + 1]] = counts.get(chain[:d + 1], 0) + 1
        samples += [(len(gains), chain) for chain in found]
        gains.append(counts)
    chosen, covered = [], set()

    def gain(sample):
        part, chain = sample
        total = sum(gains[part][chain[:d + 1]] for d in range(len(chain)) if chain[:d + 1] not in covered)
        return (total > 0 and part == 0, total)

    for _ in range(n):
        best = max(samples, key=gain)
        if not gain(best)[1]:
            break
        chosen.append(list(best[1]))
        covered |= {best[1][:d + 1] for d in range(len(best[1]))}
    return chosen


def slow_collect(found, n):
    """`found`: (chain, source) in order."""
    found = [(chain, source) for chain, source in found if chain]
    kept = []
    for i, (chain, source) in enumerate(found):
        others = [other for j, (other, _) in enumerate(found) if j < i or len(other) > len(chain)]
        if not any(begins(chain, other) for other in others):
            place = next(j for j, (other, _) in enumerate(found) if begins(other, chain))
            kept.append((place, i, chain, source))
    return [(chain, source) for _, _, chain, source in sorted(kept)[:n]]


@pytest.mark.parametrize("n, m", [(3, 2), (7, 4), (2, 30)])
def test_context_is_the_dictionary_of_the_specification(n, m):
    known, tokens, garbage, length = rows(n)
    look_up = jax.jit(lambda tokens, length: draft_sources.context(tokens, length, n, m))
    assert chains(look_up(tokens, length)) == [slow_context(row, n, m) for row in known]
    assert chains(look_up(garbage, length)) == chains(look_up(tokens, length))


def test_context_examples():
    look_up = lambda *row: chains(draft_sources.context(jnp.asarray([row]), jnp.asarray([len(row)]), 3, 2))[0]
    assert look_up(1, 2, 3, 1, 4, 5, 1) == [[4, 5], [2, 3]]
    assert look_up(7, 7, 7) == [[7, 7]]


def test_pool_is_a_ring_of_the_newest():
    rng, size, m, n, batch = np.random.default_rng(0), 8, 2, 3, 4
    state, plain = draft_sources.init_pool(batch, size, m), [[] for _ in range(batch)]
    insert, look_up = jax.jit(draft_sources.insert), jax.jit(draft_sources.pool, static_argnums=2)
    for _ in range(12):
        keys, values = rng.integers(0, 2, (batch, 5)), rng.integers(0, 3, (batch, 5, m))
        valid = rng.random((batch, 5)) < 0.6
        state = insert(state, *(jnp.asarray(array, jnp.int32) for array in (keys, values)), jnp.asarray(valid))
        last = rng.integers(-1, 2, batch)
        for b in range(batch):
            plain[b] += [(keys[b, i], values[b, i].tolist()) for i in range(5) if valid[b, i]]
            del plain[b][:-size]
        expected = [[], [], [], []]
        for b in range(batch):
            for key, value in reversed(plain[b]):
                if key == last[b] and value not in expected[b] and len(expected[b]) < n:
                    expected[b].append(value)
        assert chains(look_up(state, jnp.asarray(last, jnp.int32), n)) == expected
    with pytest.raises(ValueError, match="a pool of 8 places cannot take 9"):
        draft_sources.insert(state, jnp.zeros((4, 9), jnp.int32), jnp.zeros((4, 9, 2), jnp.int32), jnp.ones((4, 9)))


@pytest.mark.parametrize("newest", [False, True])
def test_prompt_lookup_is_the_naive_scan(newest):
    known, tokens, garbage, length = rows(5, batch=40)
    look_up = jax.jit(lambda *a: draft_sources.prompt_lookup(*a, m=4, max_ngram=3, newest=newest))
    assert chains(look_up(tokens, length)) == [slow_prompt(row, 4, 3, newest) for row in known]
    assert chains(look_up(garbage, length)) == chains(look_up(tokens, length))


@pytest.mark.parametrize("suffix_lengths, matches, n, m",
                         [((2, 1), 64, 7, 4), ((2, 1), 5, 3, 2), ((5, 4, 3, 2), 6, 4, 6)])
def test_corpus_is_the_naive_search(suffix_lengths, matches, n, m):
    rng = np.random.default_rng(matches)
    texts = [rng.integers(0, 3, size).tolist() for size in rng.integers(0, 14, 18)]
    text = [token for ids in texts for token in [*ids, NONE]]
    database = jax.tree.map(jnp.asarray, build_corpus(texts, 4))  # token 3 never occurs
    known, tokens, garbage, length = rows(matches, batch=40, alphabet=4)
    look_up = jax.jit(lambda *a: draft_sources.corpus(*a, n, m, suffix_lengths, matches))
    found = chains(look_up(database, tokens, length))
    assert found == [slow_corpus(text, row, n, m, suffix_lengths, matches) for row in known]
    assert chains(look_up(database, garbage, length)) == found
    # No guess runs over the end of a document.
    written = {tuple(ids[i:j]) for ids in texts for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)}
    assert all(tuple(chain) in written for row in found for chain in row)


def test_corpus_example_and_empty_corpus():
    texts = [[0, 1, 2]] * 3 + [[0, 1, 4]] * 2 + [[0, 5, 6]] * 4
    look_up = lambda texts: chains(draft_sources.corpus(
        jax.tree.map(jnp.asarray, build_corpus(texts, 8)), jnp.asarray([[0]]), jnp.asarray([1]), 3, 2, (1,)))[0]
    assert look_up(texts) == [[1, 2], [5, 6], [1, 4]]
    assert look_up([]) == look_up([[], [3]]) == []


def test_model_table_and_recycling_look_ups():
    table = jax.tree.map(jnp.asarray, build_model_table([[1, 2, 3, 1, 2, 3], [1, 2, 3], [1, 4, 4]], 6, n=2, m=2))
    last = jnp.asarray([1, 5, NONE, 2], jnp.int32)
    assert chains(draft_sources.model_table(table, last)) == [[[2, 3], [4, 4]], [], [], [[3, 1]]]
    matrix = draft_sources.init_matrix(10, 2).at[jnp.asarray([3, 5])].set(jnp.asarray([[5, 6], [7, 8]]))
    template = ((0,), (1,), (0, 0), (0, 1))
    found = draft_sources.recycle(matrix, jnp.asarray([3, 5, 0, NONE]), template)
    assert chains(found) == [[[5, 7], [6], [5, 8]], [[7], [8], [7]], [], []]
    with pytest.raises(ValueError, match="every prefix"):
        draft_sources.recycle(matrix, last, ((0,), (1, 0)))


def test_recycling_tree():
    paths = draft_sources.RECYCLING_TREE
    assert len(set(paths)) == 80
    assert [sum(len(path) == d for path in paths) for d in range(1, 7)] == [8, 21, 25, 19, 6, 1]
    for i, path in enumerate(paths):
        assert path[:-1] in ((), *paths[:i])
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths[:i]
    rng = np.random.default_rng(0)
    matrix = rng.integers(NONE, 50, (50, 8)).astype(np.int32)
    found = chains(jax.jit(draft_sources.recycle)(jnp.asarray(matrix), jnp.arange(50, dtype=jnp.int32)))
    for last, row in enumerate(found):
        expected = set()
        for path in paths:
            chain = [last]
            for rank in path:
                chain.append(int(matrix[chain[-1], rank]) if chain[-1] != NONE else NONE)
            expected.add(tuple(itertools.takewhile(lambda token: token != NONE, chain[1:])))
        assert {tuple(chain[:d]) for chain in row for d in range(len(chain) + 1)} == expected | {()}


def test_observe_topk_keeps_the_last():
    rng = np.random.default_rng(0)
    observe_topk, matrix, plain = jax.jit(draft_sources.observe_topk), draft_sources.init_matrix(5, 2), {}
    for _ in range(6):
        tokens, valid, topk = rng.integers(0, 5, (2, 4)), rng.random((2, 4)) < 0.4, rng.integers(0, 5, (2, 4, 2))
        for b, t in np.argwhere(valid):
            plain[tokens[b, t]] = topk[b, t].tolist()
        tokens[~valid] = 99  # what is not valid is not read
        matrix = observe_topk(matrix, jnp.asarray(tokens, jnp.int32), jnp.asarray(valid), jnp.asarray(topk, jnp.int32))
        assert matrix.tolist() == [plain.get(token, [NONE, NONE]) for token in range(5)]


def random_parts(seed, batch=30, sizes=(4, 3, 5), m=3):
    rng = np.random.default_rng(seed)
    return [[[rng.integers(0, 2, rng.integers(0, m + 1)).tolist() for _ in range(size)] for _ in range(batch)]
            for size in sizes]


@pytest.mark.parametrize("n", [1, 4, 20])
def test_collect_drops_duplicates_and_beginnings(n):
    parts = random_parts(n)
    found, sources = jax.jit(collect, static_argnums=1)(
        [pack(part, len(part[0]), 3 + i) for i, part in enumerate(parts)], n)
    expected = [slow_collect([(chain, s) for s in range(3) for chain in parts[s][b]], n) for b in range(30)]
    assert found.tokens.shape == (30, n, 5)
    assert chains(found) == [[chain for chain, _ in row] for row in expected]
    assert [[s for s in row if s >= 0] for row in sources.tolist()] == [[s for _, s in row] for row in expected]


def test_collect_example():
    found, sources = collect([pack([[[1, 2], [3]]], 2, 2), pack([[[4], [1, 2, 5], [1, 2]]], 3, 3)], 4)
    assert chains(found) == [[[1, 2, 5], [3], [4]]] and sources.tolist() == [[1, 0, 1, -1]]


def slow_tree(row, sources, rates):
    """Nodes as (value, depth, path, source), best first."""
    nodes, children, m = {}, {}, rates.shape[1]
    for i, (chain, source) in enumerate(zip(row, sources, strict=False)):
        for d in range(len(chain)):
            path, above = tuple(chain[:d + 1]), tuple(chain[:d])
            if path not in nodes:
                rank = len(children.setdefault(above, []))
                children[above].append(path)
                share = np.float32(rates[source, d]) / np.float32(rank + 1)
                nodes[path] = (nodes[above][0] * share if above else share, d + 1, path, source, i * m + d)
    return sorted(nodes.values(), key=lambda node: (-node[0], node[1], node[4]))


@pytest.mark.parametrize("num_nodes", [1, 6, 40])
def test_tree_is_the_naive_trie(num_nodes):
    rng, n, m = np.random.default_rng(num_nodes), 6, 4
    lists = [[rng.integers(0, 3, rng.integers(1, m + 1)).tolist() for _ in range(rng.integers(0, n + 1))]
             for _ in range(30)]
    sources = rng.integers(0, 3, (30, n)).astype(np.int32)
    rates = rng.choice([0.0, 0.25, 0.5, 1.0], (3, m)).astype(np.float32)  # ties and certainties on purpose
    draft = jax.jit(tree, static_argnums=2)(pack(lists, n, m), jnp.asarray(sources), num_nodes, jnp.asarray(rates))
    plain = jax.jit(tree, static_argnums=2)(pack(lists, n, m), jnp.asarray(sources), num_nodes)
    for b, row in enumerate(lists):
        check_tree(jax.tree.map(lambda array, b=b: np.asarray(array[b]), draft), slow_tree(row, sources[b], rates))
        in_order = slow_tree(row, sources[b], np.ones((3, m), np.float32))
        check_tree(jax.tree.map(lambda array, b=b: np.asarray(array[b]), plain),
                   [(None, *node[1:]) for node in sorted(in_order, key=lambda node: node[4])])


def check_tree(draft, expected):
    """One row against the naive nodes: the same ones, the same order, every prefix of the array a tree."""
    size = len(draft.tokens)
    paths = [()]
    for i in range(size):
        if i >= len(expected):
            assert [array[i] for array in draft] == [0, 0, 0, -1, 0]
            continue
        value, depth, path, source, _ = expected[i]
        assert draft.parents[i] <= i  # the parent stands before: any first w nodes are a tree
        paths.append((*paths[draft.parents[i]], int(draft.tokens[i])))
        assert paths[-1] == path and draft.depths[i] == depth == len(path) and draft.sources[i] == source
        assert value is None or draft.values[i] == value
    assert (np.diff(draft.values) <= 0).all()


def example():
    candidates, sources = pack([[[5, 6, 7], [5, 8], [9, 6]]], 3, 3), jnp.asarray([[0, 0, 1]])
    return candidates, sources, jnp.asarray([[0.8, 0.5, 0.5], [0.4, 0.4, 0.4]])


def test_tree_example():
    candidates, sources, values = example()
    plain = tree(candidates, sources, 7)
    assert plain.tokens.tolist() == [[5, 6, 7, 8, 9, 6, 0]] and plain.parents.tolist() == [[0, 1, 2, 1, 0, 5, 0]]
    assert plain.depths.tolist() == [[1, 2, 3, 2, 1, 2, 0]] and plain.sources.tolist() == [[0, 0, 0, 0, 1, 1, -1]]
    valued = tree(candidates, sources, 7, values)
    assert valued.tokens.tolist() == [[5, 6, 9, 8, 7, 6, 0]] and valued.parents.tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    np.testing.assert_allclose(valued.values, [[0.8, 0.4, 0.2, 0.2, 0.2, 0.08, 0]], rtol=1e-6)
    assert tree(candidates, sources, 2, values).tokens.tolist() == [[5, 6]]


def test_ancestors():
    make = lambda parents: Draft(*[jnp.asarray(parents, jnp.int32)] * 5)
    assert ancestors(make([[0, 1, 1]])).astype(int).tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]
    rng = np.random.default_rng(0)
    parents = np.array([[rng.integers(0, i + 1) for i in range(33)] for _ in range(6)] + [range(33), [0] * 33])
    for row, sees in zip(parents, np.asarray(jax.jit(ancestors)(make(parents))), strict=True):
        for i in range(34):
            path = {i}
            while i:
                i = row[i - 1]
                path.add(i)
            assert set(np.flatnonzero(sees[max(path)])) == path


def test_rates_are_measured_as_the_tree_uses_them():
    candidates, sources, values = example()
    draft = tree(candidates, sources, 7, values)  # 5 6 9 8 7 6
    verified = jnp.asarray([[True] * 5 + [False] * 2])
    accepted = jnp.asarray([[True, False, False, True, False, False, False]])
    counts = observe(jnp.zeros((2, 2, 3)), draft, verified, accepted)
    assert counts[0].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert counts[1].tolist() == [[1, 1.5, 0], [0.5, 0, 0]]  # 7 below the rejected 6 was not tested
    np.testing.assert_allclose(acceptance_rates(counts), [[3 / 5, 3 / 5.5, 0.5], [2 / 4.5, 0.5, 0.5]], rtol=1e-6)


@functools.cache
def databases(batch=1):
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, 12, 20).tolist() for _ in range(40)]
    pool = draft_sources.init_pool(batch, 16, 3)
    keys, values = rng.integers(0, 12, (1, 16)), rng.integers(0, 12, (1, 16, 3))
    pool = draft_sources.insert(pool, jnp.asarray(keys.repeat(batch, 0), jnp.int32),
                                jnp.asarray(values.repeat(batch, 0), jnp.int32), jnp.ones((batch, 16), bool))
    table = build_model_table(texts[:10], 13, n=3, m=3)
    matrix = jnp.asarray(rng.integers(0, 13, (13, 8)), jnp.int32)
    return texts, Databases(pool, *jax.tree.map(jnp.asarray, (table, build_corpus(texts, 13))), matrix)


CONFIG = DraftConfig(order=("context", "model", "corpus"), num_candidates=4, depth=3, num_nodes=9)


def test_hierarchy_is_the_algorithm_of_the_specification():
    texts, stored = databases()
    text = [token for ids in texts for token in [*ids, NONE]]
    known, tokens, garbage, length = rows(3, batch=40, alphabet=13)
    found, sources = jax.jit(propose_hierarchy, static_argnums=0)(CONFIG, stored, tokens, length)
    table = chains(draft_sources.model_table(stored.model, draft_sources.last_tokens(tokens, length)))
    expected = []
    for b, row in enumerate(known):
        kept = slow_collect([(chain, 0) for chain in slow_context(row, 4, 3)], 4)
        for source, more in ((1, table[b]), (2, slow_corpus(text, row, 4, 3, (2, 1), 64))):
            if len(kept) < 4:
                kept = slow_collect(kept + [(chain, source) for chain in more], 4)
        expected.append(kept)
    assert chains(found) == [[chain for chain, _ in row] for row in expected]
    assert [[s for s in row if s >= 0] for row in sources.tolist()] == [[s for _, s in row] for row in expected]
    assert {s for row in expected for _, s in row} == {0, 1, 2}
    drafts = [jax.jit(propose, static_argnums=0)(CONFIG, stored, row, length) for row in (tokens, garbage)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *drafts)))


@pytest.mark.parametrize("order", [("context", "model", "corpus"), ("pool", "corpus", "prompt", "recycling")])
def test_rows_are_independent(order):
    config = DraftConfig(order=order, num_candidates=6, depth=3, num_nodes=12)
    _, tokens, _, length = rows(4, batch=12, alphabet=13)
    run = jax.jit(propose, static_argnums=0)
    depth = draft_depth(config, databases()[1])
    assert init_counts(config, databases()[1]).shape == (2, len(order), depth)
    rates = jnp.linspace(0.9, 0.1, len(order) * depth).reshape(len(order), depth)
    together = run(config, databases(12)[1], tokens, length, rates)
    for b in range(12):
        alone = run(config, databases()[1], tokens[b:b + 1], length[b:b + 1], rates)
        for name in Draft._fields:
            np.testing.assert_array_equal(getattr(together, name)[b], getattr(alone, name)[0])


def test_a_full_row_does_not_hear_what_others_ask():
    corpus = jax.tree.map(jnp.asarray, build_corpus([[5, 5, 6, 7]], 13))
    config = DraftConfig(order=("context", "corpus"), num_candidates=1, depth=3)
    full, poor = [5, 5], [1, 5]  # the first has (5) from its own text, which begins the corpus's (5 6 7)
    ask = lambda *rows: chains(propose_hierarchy(
        config, Databases(corpus=corpus), jnp.asarray(rows), jnp.full(len(rows), 2))[0])
    assert ask(full) == [[[5]]] and ask(full, poor) == [[[5]], [[5, 6, 7]]]


def test_the_far_source_is_not_read_when_no_row_lacks(monkeypatch):
    reads, real = [], SOURCES["corpus"]

    def counted(databases, tokens, length, config):
        found = real(databases, tokens, length, config)
        jax.debug.callback(lambda _: reads.append(1), found.lengths)
        return found

    monkeypatch.setitem(SOURCES, "corpus", counted)
    rich = [0, 1, 2, 3, 0, 2, 3, 4, 0, 3, 4, 5, 0, 4, 5, 6, 0]  # four continuations of 0
    poor = [1] * 16 + [12]  # in no database
    run = jax.jit(lambda tokens: propose(CONFIG, databases()[1], tokens, jnp.full(2, 17)))
    for batch, expected in (([rich, rich], 0), ([rich, poor], 1), ([poor, poor], 1)):
        jax.block_until_ready(run(jnp.asarray(batch, jnp.int32)))
        jax.effects_barrier()
        assert len(reads) == expected
        reads.clear()


def test_names_and_settings():
    assert tuple(SOURCES) == typing.get_args(SourceName) and set(NEEDS) == set(Databases._fields)
    for wrong, message in (({"order": ("contxt",)}, "did you mean 'context'"), ({"order": ()}, "at least one"),
                           ({"order": ("model", "model")}, "none twice"), ({"depth": 0}, "depth must be positive"),
                           ({"suffix_lengths": (1, 2)}, "must fall"), ({"suffix_lengths": (33,)}, "at most 32")):
        with pytest.raises(ValueError, match=message):
            DraftConfig(**wrong)
    with pytest.raises(ValueError, match="names 'model', but no such database"):
        propose(CONFIG, Databases(), jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32))


@pytest.mark.parametrize("name", typing.get_args(SourceName))
def test_every_source_keeps_the_contract(name):
    """Right shapes, nothing for an empty row, known ids only, and no attention to what lies beyond the length."""
    _, tokens, garbage, length = rows(6, batch=12, alphabet=13)
    run = jax.jit(lambda *a: SOURCES[name](*a, CONFIG))
    found = run(databases(12)[1], tokens, length)
    assert found.tokens.dtype == found.lengths.dtype == jnp.int32
    listed = chains(found)
    assert listed[0] == [] and any(listed) and int(found.tokens.max()) < 13
    assert chains(run(databases(12)[1], garbage, length)) == listed
