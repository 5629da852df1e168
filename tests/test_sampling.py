"""Sampling: parity with the processors of transformers, exact distributions, and the coupling of a draft tree."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from scipy import stats

from jaxlm.core.config import from_json, to_json
from jaxlm.generate.sampling import Choice, adjusted, choose, count_tokens, needs_history, truncated
from jaxlm.generate.settings import SamplingConfig, Settings, check_ids, make_settings
from tests.reference import torch, transformers

V = 13
ENOUGH = 1e-3   # a fixed seed below this p-value would be a wrong distribution


decide = jax.jit(choose, static_argnames=("max_depth", "num_tokens"))


def requests(count, **fields):
    return [SamplingConfig(seed=seed, **fields) for seed in range(count)]


def run(logits, settings, *, index=0, depths=None, max_depth=0, seen=None, num_tokens=None) -> Choice:
    """`choose` under jit; rows of [B, V] are trees of one node."""
    logits = jnp.asarray(logits, jnp.float32)
    logits = logits if logits.ndim == 3 else logits[:, None]
    depths = jnp.zeros(logits.shape[:2], jnp.int32) if depths is None else jnp.asarray(depths, jnp.int32)
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), logits.shape[:1])
    return decide(logits, settings, depths_BT=depths, index_B=index, max_depth=max_depth, seen=seen,
                  num_tokens=num_tokens)


def random_logits(*shape, seed=0, ties=False):
    logits = 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.round(logits) if ties else logits


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# --- parity with transformers


FIELDS = [
    {"temperature": 0.7}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 99}, {"temperature": 1.3, "min_p": 0.15},
    {"temperature": 0.8, "top_k": 6, "min_p": 0.1, "repetition_penalty": 1.4},
    {"temperature": 0.8, "top_p": 0.3}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.85, "min_p": 0.12, "repetition_penalty": 0.8},
]


# Without ties where top-p drops something: transformers drops some of those at the edge, by their place in its sort.
@pytest.mark.parametrize("fields, ties", [(fields, False) for fields in FIELDS] + [
    (fields, True) for fields in FIELDS if fields.get("top_p", 1) == 1], ids=str)
def test_scores_equal_transformers(fields, ties):
    rows = 32
    logits = random_logits(rows, V, ties=ties)
    history = np.random.default_rng(1).integers(0, V, (rows, 5))
    processors = transformers.LogitsProcessorList()
    for name, processor in {"repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
                            "temperature": transformers.TemperatureLogitsWarper, "top_k": transformers.TopKLogitsWarper,
                            "top_p": transformers.TopPLogitsWarper, "min_p": transformers.MinPLogitsWarper}.items():
        if name in fields:
            processors.append(processor(fields[name]))
    expected = processors(torch.tensor(history), torch.tensor(logits)).numpy()

    settings = make_settings(requests(rows, **fields), V)
    seen = None
    if needs_history(settings):
        seen = chain(history, start=np.full(rows, 3))
    scores = adjusted(jnp.asarray(logits)[:, None], settings, seen) / settings.temperature[:, None, None]
    scores = truncated(scores, settings)[:, 0]
    np.testing.assert_array_equal(np.isinf(scores), np.isinf(expected))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    got = run(logits, settings, seen=seen)
    assert np.isfinite(np.take_along_axis(expected, np.asarray(got.tokens), -1)).all()


def test_top_p_keeps_all_that_tie_with_the_last_one():
    settings = make_settings(requests(1, temperature=1.0, top_p=0.5), 4)
    logits = jnp.log(jnp.asarray([[[0.4, 0.2, 0.2, 0.2]]]))
    np.testing.assert_array_equal(np.isfinite(truncated(logits, settings)), [[[True] * 4]])
    zeros = jnp.asarray([[[0.0, -0.0, -1.0, -2.0]]])
    settings = make_settings(requests(1, temperature=1.0, top_k=1), 4)
    np.testing.assert_array_equal(np.isfinite(truncated(zeros, settings)), [[[True, True, False, False]]])


def test_top_p_of_one_drops_nothing_however_its_sum_rounds():
    configs = [SamplingConfig(temperature=1.0, top_p=top_p) for top_p in [0.9] + [1.0] * 15]
    logits = 4 * random_logits(16, 1, 5003)
    kept = np.isfinite(jax.jit(truncated)(jnp.asarray(logits), make_settings(configs, 5003)))
    assert not kept[0].all() and kept[1:].all()


# --- penalties


def chain(history, start, path=None, path_valid=None):
    """`count_tokens` of whole rows, by default without a tree."""
    history = np.asarray(history)
    batch, width = history.shape
    path = np.zeros((batch, 1, 0), np.int32) if path is None else np.asarray(path)
    path_valid = np.ones(path.shape, bool) if path_valid is None else np.asarray(path_valid)
    length = jnp.full(batch, width)
    return count_tokens(jnp.asarray(history), jnp.asarray(start), length, jnp.asarray(path), jnp.asarray(path_valid), V)


def test_penalties_and_bias_equal_a_loop():
    rows, width = 16, 9
    rng = np.random.default_rng(3)
    logits = random_logits(rows, V)
    history = rng.integers(0, V, (rows, width))
    start, length = rng.integers(1, 5, rows), rng.integers(5, width + 1, rows)
    fields = [{"frequency_penalty": 0.7}, {"presence_penalty": -0.4}, {"repetition_penalty": 1.7}, {},
              {"frequency_penalty": -0.3, "presence_penalty": 1.1, "repetition_penalty": 0.6},
              {"logit_bias": ((3, 4.0), (0, -1.5))}, {"logit_bias": ((12, -2.0),), "presence_penalty": 0.5}]
    configs = [SamplingConfig(**fields[row % len(fields)]) for row in range(rows)]
    none = np.zeros((rows, 1, 0), np.int32)
    seen = count_tokens(*map(jnp.asarray, (history, start, length, none, none)), V)
    got = adjusted(jnp.asarray(logits)[:, None], make_settings(configs, V), seen)[:, 0]

    expected = logits.astype(np.float64)
    for row, config in enumerate(configs):
        for token, value in config.logit_bias:
            expected[row, token] += value
        known, text = history[row, :length[row]], history[row, start[row]:length[row]]
        for token in range(V):
            r = config.repetition_penalty or 1
            if token in known:
                expected[row, token] *= 1 / r if expected[row, token] > 0 else r
            count = list(text).count(token)
            expected[row, token] -= (config.frequency_penalty or 0) * count
            expected[row, token] -= (config.presence_penalty or 0) * (count > 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_worked_example_of_count_tokens():
    seen = count_tokens(jnp.asarray([[5, 6, 6, 0]]), jnp.asarray([2]), jnp.asarray([3]), jnp.asarray([[[0], [6]]]),
                        jnp.asarray([[[0], [1]]]), 8)
    np.testing.assert_array_equal(np.argwhere(seen.in_prompt_or_text[0]), [[0, 5], [0, 6], [1, 5], [1, 6]])
    np.testing.assert_array_equal(seen.count_in_text[0, :, 6], [1, 2])
    assert seen.count_in_text.sum() == 3


def test_a_node_is_penalised_as_the_chain_that_leads_to_it():
    history = np.array([[4, 2, 7, 2], [1, 1, 9, 3]])
    start = np.array([1, 3])
    path = np.array([[[0, 0], [2, 0], [2, 2], [2, 5]], [[0, 0], [3, 0], [3, 1], [8, 0]]])
    depths = np.array([[0, 1, 2, 2], [0, 1, 2, 1]])
    config = {"repetition_penalty": 1.5, "frequency_penalty": 0.6, "presence_penalty": 0.3, "temperature": 0.9}
    settings = make_settings(requests(2, **config), V)
    logits = random_logits(2, 4, V)
    tree = run(logits, settings, depths=depths, max_depth=2, index=5,
               seen=chain(history, start, path, np.arange(2)[None, None] < depths[..., None]))
    for row, node in np.ndindex(2, 4):
        depth = depths[row, node]
        text = np.concatenate([history[row], path[row, node, :depth]])[None]
        plain = run(logits[row:row + 1, node], make_settings(requests(2, **config)[row:row + 1], V), index=5 + depth,
                    seen=chain(text, start[row:row + 1]))
        assert plain.tokens[0, 0] == tree.tokens[row, node]
        np.testing.assert_allclose(plain.logprobs[0, 0], tree.logprobs[row, node], rtol=1e-6)


# --- distribution


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.2},
                                    {"temperature": 1.8, "top_k": 5, "top_p": 0.8, "min_p": 0.1}],
                         ids=lambda fields: "-".join(fields) or "plain")
def test_choices_have_the_stated_distribution(fields):
    fields = {"temperature": 1.0} | fields
    rows = 20_000
    logits = np.array([1.0, -0.5, 0.3, 2.0, -3.0, 1.4, 0.9], np.float32)
    expected = softmax(logits / fields["temperature"])
    whole = expected.copy()
    order = np.argsort(-logits)
    for rank, token in enumerate(order):   # each rule by its definition
        above = expected[order[:rank]].sum() / expected[order[:fields.get("top_k", 7)]].sum()
        if (rank >= fields.get("top_k", 7) or above >= fields.get("top_p", 1.1)
                or expected[token] < fields.get("min_p", 0) * expected.max()):
            whole[token] = 0
    got = run(np.tile(logits, (rows, 1)), make_settings(requests(rows, **fields), 7), index=3)
    counts = np.bincount(np.asarray(got.tokens[:, 0]), minlength=7)
    kept = whole.sum()
    assert not counts[whole == 0].any()
    assert stats.chisquare(counts[whole > 0], rows * whole[whole > 0] / kept).pvalue > ENOUGH
    np.testing.assert_allclose(got.kept, kept, rtol=1e-5)
    np.testing.assert_allclose(got.logprobs, np.log(expected)[np.asarray(got.tokens)], rtol=1e-5)


def test_places_of_one_row_are_independent():
    rows, logits = 5000, np.log([0.5, 0.3, 0.2])
    settings = make_settings([SamplingConfig(temperature=1.0, seed=row % 4) for row in range(rows)], 3)
    first, second = run(np.tile(logits, (rows, 2, 1)), settings, depths=np.tile([0, 1], (rows, 1)), max_depth=1,
                        index=2 * (np.arange(rows) // 4)).tokens.T
    counts = np.bincount(3 * first + second, minlength=9)
    assert stats.chisquare(counts, rows * np.outer(np.exp(logits), np.exp(logits)).ravel()).pvalue > ENOUGH


def test_greedy_and_sampling_rows_share_a_batch():
    logits = random_logits(3, V, ties=True)
    mixed = [SamplingConfig(), SamplingConfig(temperature=0.9, top_k=3, seed=5), SamplingConfig()]
    got = run(logits, make_settings(mixed, V), index=4)
    alone = run(logits[1:2], make_settings(mixed[1:2], V), index=4)
    np.testing.assert_array_equal(got.tokens[::2, 0], logits.argmax(-1)[::2])   # numpy too takes the lowest of ties
    assert got.tokens[1, 0] == alone.tokens[0, 0]
    np.testing.assert_array_equal(got.kept[::2, 0], 1)
    np.testing.assert_allclose(got.logprobs[::2, 0], np.log(softmax(logits).max(-1))[::2], rtol=1e-5)


def test_only_what_some_row_uses_is_compiled():
    shapes = {"logits_BTV": jnp.zeros((1, 1, V)), "depths_BT": jnp.zeros((1, 1), int), "index_B": jnp.zeros(1, int)}
    program = lambda **fields: str(jax.make_jaxpr(partial(choose, max_depth=0))(
        settings=make_settings([SamplingConfig(**fields)], V), **shapes))
    assert make_settings([SamplingConfig(top_p=1.0, temperature=1.0)], V).top_p is None
    for fields, random, loops in [({}, False, 0), ({"temperature": 1.0}, True, 1),
                                  ({"temperature": 1.0, "min_p": 0.1}, True, 1),
                                  ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, True, 3)]:
        text = program(**fields)
        assert ("random" in text) == random
        assert text.count("scan[") + text.count("while[") == loops


# --- coupling


def test_a_choice_depends_on_logits_seed_and_index_only():
    rows, nodes, max_depth = 3, 5, 3
    rng = np.random.default_rng(2)
    logits = random_logits(rows, nodes, V)
    depths = np.concatenate([np.zeros((rows, 1), int), rng.integers(1, max_depth + 1, (rows, nodes - 1))], axis=1)
    index = np.array([0, 7, 1000])
    configs = [SamplingConfig(temperature=0.8, seed=11), SamplingConfig(temperature=1.2, top_k=4, seed=11),
               SamplingConfig(temperature=2.0, top_p=0.9, seed=2**32 - 1)]
    tree = run(logits, make_settings(configs, V), depths=depths, max_depth=max_depth, index=index)
    order = [2, 0, 1]
    moved = run(logits[order], make_settings([configs[i] for i in order], V), depths=depths[order],
                max_depth=max_depth + 2, index=index[order])
    np.testing.assert_array_equal(moved.tokens, tree.tokens[np.array(order)])
    for row, node in np.ndindex(rows, nodes):
        plain = run(logits[row:row + 1, node], make_settings([configs[row]], V),
                    index=index[row] + depths[row, node])
        assert plain.tokens[0, 0] == tree.tokens[row, node]
        np.testing.assert_allclose(plain.logprobs[0, 0], tree.logprobs[row, node], rtol=1e-6)


PATHS = [(1, 2), (1, 3), (4, 0)]                         # candidates of two tokens, in order
TREE = [(), (1,), (4,), (1, 2), (1, 3), (4, 0)]          # their nodes; the root is the last known token
TABLE = random_logits(6, 6, seed=5)                      # the model: logits by the last token
ROOT, TEMPERATURE, TOP_K = 5, 1.4, 5


def warped(last):
    logits = TABLE[last] / TEMPERATURE
    return softmax(np.where(logits >= np.sort(logits)[-TOP_K], logits, -np.inf))


def coupled(count):
    """What each of `count` seeds emits: down the tree as long as the chosen token is a child, then one token more."""
    last = [node[-1] if node else ROOT for node in TREE]
    settings = make_settings(requests(count, temperature=TEMPERATURE, top_k=TOP_K), 6)
    depths = np.tile([len(node) for node in TREE], (count, 1))
    tokens = np.asarray(run(np.tile(TABLE[last], (count, 1, 1)), settings, depths=depths, max_depth=2, index=9).tokens)
    for row in tokens:
        text = ()
        while text in TREE:
            text += (int(row[TREE.index(text)]),)
        yield text


def rejection(rng):
    """Sequential rejection with drafts that are point masses (specification of hierarchy drafting, section 5)."""
    alive, out, p = PATHS, (), warped(ROOT)
    for j in range(2):
        for candidate in alive:
            x = candidate[j]
            if rng.random() < p[x]:
                out, alive, p = (*out, x), [other for other in alive if other[j] == x], warped(x)
                break
            p = np.where(np.arange(6) == x, 0, p)
            p = p / p.sum()
        else:
            return (*out, int(rng.choice(6, p=p)))
    return (*out, int(rng.choice(6, p=p)))


def test_the_coupled_rule_accepts_as_sequential_rejection_does():
    count = 20_000
    exact = {}
    for text in itertools.chain(*(itertools.product(range(6), repeat=n) for n in (1, 2, 3))):
        if text[:-1] in TREE and text not in TREE:
            exact[text] = np.prod([warped(last)[token] for last, token in zip((ROOT, *text), text, strict=False)])
    exact = {text: p for text, p in exact.items() if p > 0}
    assert sum(exact.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    kinds = []
    for emitted in (list(coupled(count)), [rejection(rng) for _ in range(count)]):
        counts = np.array([emitted.count(text) for text in exact])
        assert counts.sum() == count   # nothing outside the support
        assert stats.chisquare(counts, count * np.array(list(exact.values()))).pvalue > ENOUGH
        kinds.append(counts)
    assert len({len(text) for text in exact}) == 3
    assert stats.chi2_contingency(np.array(kinds)).pvalue > ENOUGH


# --- masks


def test_padding_and_disallowed_ids_are_never_chosen():
    rows = 400
    logits = np.where(np.arange(V) >= 9, 50.0, 0.0) + random_logits(rows, V)
    configs = [SamplingConfig(temperature=5.0, seed=i, top_k=12, allowed_tokens=(0, 4, 7) if i % 2 else None)
               for i in range(rows - 1)] + [SamplingConfig(allowed_tokens=(2,), logit_bias=((2, -30.0),))]
    got = run(logits, make_settings(configs, V), num_tokens=9)
    tokens = np.asarray(got.tokens[:, 0])
    assert set(tokens[:-1:2]) == set(range(9))
    assert set(tokens[1:-1:2]) == {0, 4, 7}
    assert (tokens[-1], float(got.logprobs[-1, 0])) == (2, 0)
    assert np.isfinite(got.logprobs).all() and (got.kept > 0).all() and (got.kept <= 1).all()


# --- configuration


def test_rows_made_of_one_queue_compile_once():
    queue = [SamplingConfig(), SamplingConfig(temperature=0.5, seed=3), SamplingConfig(temperature=1.0, min_p=0.1),
             SamplingConfig(logit_bias=((1, 2.0), (2, 1.0))), SamplingConfig(allowed_tokens=(3, 4)),
             SamplingConfig(presence_penalty=1.0)]
    traces = []

    @jax.jit
    def counted(logits, settings, seen):
        traces.append(1)
        zeros = jnp.zeros(logits.shape[:2], int)
        return choose(logits, settings, depths_BT=zeros, index_B=zeros[:, 0], max_depth=0, seen=seen)

    logits = random_logits(1, V)
    seen = chain([[3, 1, 1]], start=[1])
    alone = [run(logits, make_settings([config], V), seen=seen) for config in queue]
    both = jax.tree.map(lambda x: jnp.tile(x, (2, 1, 1)), (jnp.asarray(logits)[:, None], seen))
    for pair in itertools.product(range(len(queue)), repeat=2):
        settings = make_settings([queue[i] for i in pair], V, like=queue)
        assert settings.top_k is None and settings.repetition is None
        got = counted(both[0], settings, both[1])
        for row, i in enumerate(pair):   # what other rows use changes nothing
            assert got.tokens[row, 0] == alone[i].tokens[0, 0]
            np.testing.assert_allclose(got.logprobs[row, 0], alone[i].logprobs[0, 0], rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("fields, message", [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"temperature": -1.0}, "temperature must be 0 .greedy. or a number from 1e-5 up, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
    ({"temperature": float("inf")}, "temperature must be 0 .* got inf"),
    ({"temperature": 1e-30}, "temperature must be 0 .* got 1e-30"),
    ({"top_k": 5}, "top_k has no effect on greedy decoding: set a temperature above 0, or drop top_k"),
    ({"top_p": 0.5}, "top_p has no effect on greedy decoding"),
    ({"min_p": 0.5}, "min_p has no effect on greedy decoding"),
    ({"seed": 1}, "seed has no effect on greedy decoding"),
    ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1 and below 2\\*\\*31, got 0"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"temperature": 1.0, "top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ({"temperature": 1.0, "top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
    ({"temperature": 1.0, "min_p": 1.0}, "min_p must be at least 0 and below 1, got 1.0"),
    ({"temperature": 1.0, "min_p": -0.1}, "min_p must be at least 0 and below 1, got -0.1"),
    ({"temperature": 1.0, "seed": -1}, "seed must be at least 0 and below 2\\*\\*32, got -1"),
    ({"temperature": 1.0, "seed": 2**32}, "seed must be at least 0 and below 2\\*\\*32"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0.0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number above 0, got nan"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite, got inf"),
    ({"presence_penalty": float("nan")}, "presence_penalty must be finite, got nan"),
    ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias names id 1 more than once"),
    ({"logit_bias": ((1, float("nan")),)}, "logit_bias of id 1 must be finite"),
    ({"logit_bias": ((-1, 2.0),)}, "logit_bias: token ids start at 0, got id -1"),
    ({"logit_bias": ((5, 2.0),), "allowed_tokens": (1, 2)}, "logit_bias names id 5, which allowed_tokens rules out"),
    ({"stop_ids": (2, 7, 9), "allowed_tokens": (1, 2)}, "stop_ids names ids 7, 9, which allowed_tokens rules out"),
    ({"stop_ids": (-2,)}, "stop_ids: token ids start at 0, got id -2"),
    ({"stop_ids": (3, 3)}, "stop_ids names id 3 more than once"),
    ({"allowed_tokens": ()}, "allowed_tokens is empty, so no token could be chosen"),
    ({"allowed_tokens": (-1,)}, "allowed_tokens: token ids start at 0, got id -1"),
    ({"stop_strings": ("a", "")}, "stop strings are a list of strings that are not empty"),
    ({"stop_strings": "END"}, "stop strings are a list of strings that are not empty, not 'END'"),
])
def test_a_request_without_sense_is_one_clear_sentence(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingConfig(**fields)


@pytest.mark.parametrize("fields, message", [
    ({"stop_ids": (12, 13)}, "stop_ids names id 13, but the vocabulary ends at 12"),
    ({"logit_bias": ((99, 1.0),)}, "logit_bias names id 99, but the vocabulary ends at 12"),
    ({"allowed_tokens": tuple(range(10, 20))},
     "allowed_tokens names ids 13, 14, 15, 16, 17 and 2 more, but the vocabulary ends at 12"),
])
def test_ids_beyond_the_vocabulary_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_ids(SamplingConfig(**fields), V)
    check_ids(SamplingConfig(**fields), 100)


def test_a_request_is_flags_and_json():
    config = SamplingConfig(temperature=0.5, top_k=3, logit_bias=((1, 2.0), (4, -1.0)), allowed_tokens=(1, 4),
                            stop_strings=("\n", "끝"), seed=9)
    assert from_json(SamplingConfig, to_json(config)) == config
    flags = "--temperature 0.5 --top-k 3 --logit-bias 1 2.0 4 -1.0 --allowed-tokens 1 4 --seed 9"
    assert tyro.cli(SamplingConfig, args=[*flags.split(), "--stop-strings", "\n", "끝"]) == config


def test_the_fields_of_settings_are_numpy_arrays_of_rows():
    everything = SamplingConfig(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, seed=1, repetition_penalty=2.0,
                                frequency_penalty=1.0, presence_penalty=1.0, logit_bias=((0, 1.0),),
                                allowed_tokens=(0,))
    neutral = make_settings([SamplingConfig()], V, like=[everything])
    used = make_settings([everything], V)
    for name, one, other in zip(Settings._fields, neutral, used, strict=True):
        assert isinstance(one, np.ndarray) and one.shape == other.shape and one.dtype == other.dtype, name
    assert all(field is None for field in make_settings([SamplingConfig()], V))
