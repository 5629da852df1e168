"""Decoding with a cache writes what full forward passes say, and rows never notice each other."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.generate.decode import complete, decode, pad
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.speculative import Sources
from jaxlm.generate.state import align, init_state, prefill, put_rows, room, take_rows, widen
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build

V, NEW = 40, 20
CONFIG = ModelConfig(vocab_size=V, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32,
                     max_positions=512)
MODEL = build(CONFIG)
GREEDY = SamplingConfig()


def quick_options():
    """Compiler options that leave out what makes fast code: loops compile in a third of the time."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0).compile()
    except RuntimeError:  # the second one comes and goes with the release
        return {"xla_backend_optimization_level": 0}
    return options


QUICK = quick_options()


@functools.cache
def params_of(seed=0, model=MODEL, spread=0.4):
    """Parameters whose texts differ, and repeat themselves."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(size=x.shape) * spread + (path[-1].key == "scale"), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)))


@functools.partial(jax.jit, static_argnames=("model", "slots", "cache_dtype"), compiler_options=QUICK)
def begin(model, params, tokens, lengths, settings, limit, stop_ids, *, slots, cache_dtype="float32"):
    """Prefilled rows."""
    state = init_state(model, settings, limit=limit, stop_ids=stop_ids, slots=slots, cache_dtype=cache_dtype)
    return prefill(model, params, state, tokens, lengths)


go = jax.jit(decode, static_argnames=("model", "guessing", "num_tokens"), compiler_options=QUICK)
feed = jax.jit(prefill, static_argnames="model", compiler_options=QUICK)


@functools.partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def full_logits(model, params, tokens):
    return model.apply(params, tokens).logits


def start(prompts, settings=None, *, new=NEW, stops=None, slots=64, params=None, model=MODEL, cache_dtype="float32"):
    """The state of these prompts; `settings` are configs, `new` and `stops` for all rows or one each."""
    tokens, mask = pad(prompts)
    tokens = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % 8)), constant_values=9)  # fewer shapes, fewer programs
    lengths = mask.sum(axis=1)
    settings = make_settings(settings or [GREEDY] * len(prompts), model.config.vocab_size)
    stops = np.full((len(prompts), 1), -1, np.int32) if stops is None else np.asarray(stops, np.int32)
    return begin(model, params or params_of(), tokens, lengths, settings, np.asarray(lengths + new, np.int32), stops,
                 slots=slots, cache_dtype=cache_dtype)


def run(state, *, steps=NEW, ended=None, params=None, model=MODEL, num_tokens=None):
    return go(model, params or params_of(), state, Sources(), guessing=None, max_steps=steps,
              max_done=state.tokens.shape[0] if ended is None else ended, num_tokens=num_tokens)


def texts(state, field="tokens"):
    """What each row has written."""
    rows, first, last = (np.asarray(x) for x in (getattr(state, field), state.start, state.length))
    return [row[a:b].tolist() for row, a, b in zip(rows, first, last, strict=True)]


def same(one, other):
    """Every leaf, bit for bit."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


PROMPTS = [[7, 1, 30], [2, 39, 0, 5, 5, 18, 21], [11]]


@functools.cache
def plain():
    """Greedy texts of PROMPTS."""
    return texts(run(start(PROMPTS)))


def test_the_text_is_the_argmax_of_full_forward_passes():
    state = run(start(PROMPTS))
    assert state.done.all() and (state.steps == NEW).all() and [len(text) for text in texts(state)] == [NEW] * 3
    assert len({tuple(text) for text in texts(state)}) == 3
    logits = np.asarray(full_logits(MODEL, params_of(), state.tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for b, text in enumerate(texts(state)):
        first = int(state.start[b])
        assert text == logits[b, first - 1:first - 1 + NEW].argmax(axis=-1).tolist()
        np.testing.assert_allclose(texts(state, "logprobs")[b], logprobs[b, first - 1:first - 1 + NEW].max(axis=-1),
                                   atol=1e-5)
        assert texts(state, "kept")[b] == [1.0] * NEW
    np.testing.assert_array_equal(state.cache.length, state.length - 1)


def test_padding_on_any_side_gives_the_same_text_and_after_eos_comes_eos():
    """One program: `complete` of all paddings of the prompts."""
    prompts, width = PROMPTS, max(map(len, PROMPTS))
    rows, mask = [], []
    for prompt in prompts:
        spare = width - len(prompt)
        for left in (0, spare // 2, spare):
            rows.append([38] * left + prompt + [37] * (spare - left))
            mask.append([0] * left + [1] * len(prompt) + [0] * (spare - left))
    eos = plain()[0][9]
    written = complete(MODEL, params_of(), np.array(rows), np.array(mask), make_settings([GREEDY] * 9, V),
                       max_new_tokens=NEW, eos_id=eos)
    expected = []
    for text in plain():
        count = text.index(eos) + 1 if eos in text else NEW
        expected.append(text[:count] + [eos] * (NEW - count))
    assert written.tolist() == [text for text in expected for _ in range(3)]
    assert written.shape == (9, NEW) and any(eos in text for text in plain())


def test_worked_examples_of_align_and_pad():
    tokens, lengths = align(jnp.asarray([[0, 5, 6], [7, 0, 0]]), jnp.asarray([[0, 1, 1], [1, 0, 0]]))
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0]] and lengths.tolist() == [2, 1]
    tokens, lengths = align(jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[1, 0, 1, 0]]))
    assert tokens[0, :2].tolist() == [1, 3] and lengths.tolist() == [2]
    tokens, mask = pad([[5, 6], [7]])
    assert (tokens.tolist(), mask.tolist()) == ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            pad(prompts)


def test_a_batch_writes_what_its_rows_write_alone():
    for prompt, text in zip(PROMPTS, plain(), strict=True):
        assert texts(run(start([prompt])))[0] == text
    assert texts(run(start([PROMPTS[2], PROMPTS[1], PROMPTS[0]]))) == plain()[::-1]


def test_rows_end_at_their_limit_or_their_first_stop_id():
    first, second, third = plain()
    stops = [[first[8], -1], [first[8], second[3]], [-1, -1]]
    state = run(start(PROMPTS, new=np.array([NEW, NEW, 5]), stops=stops))
    cut = lambda text, ids: text[:min(text.index(i) for i in ids if i in text) + 1]
    assert texts(state) == [cut(first, stops[0]), cut(second, stops[1]), third[:5]]
    assert state.done.all() and state.steps.tolist() == [len(text) for text in texts(state)]
    assert (state.length[2], state.limit[2]) == (1 + 5, 1 + 5)


def test_a_prompt_at_its_limit_is_done_at_once():
    state = start(PROMPTS, new=np.array([0, 4, 0]))
    assert state.done.tolist() == [True, False, True]
    state = run(state)
    assert texts(state) == [[], plain()[1][:4], []] and state.steps.tolist() == [0, 4, 0]


def test_the_loop_may_be_left_and_entered_again():
    whole = run(start(PROMPTS))
    state = start(PROMPTS, new=np.array([3, 9, 20]))
    state = run(state, steps=2)
    assert state.steps.tolist() == [2, 2, 2] and not state.done.any()
    state = run(state, ended=1)
    assert state.done.tolist() == [True, False, False] and state.length.tolist() == [6, 10, 4]
    assert texts(run(state)) == [text[:n] for text, n in zip(plain(), (3, 9, 20), strict=True)]
    same(run(run(start(PROMPTS), steps=7)), whole)


def test_a_row_without_slots_stops_the_loop_and_more_slots_change_nothing():
    state = run(start(PROMPTS, slots=16))
    assert int(state.length.max()) == 16 and not bool(room(state, 1)) and not state.done.all()
    state = run(widen(state, 64))
    assert texts(state) == plain() and state.done.all()
    assert state.cache.k.shape[3] == 64
    same(run(widen(start(PROMPTS, slots=16), 64)).tokens, run(start(PROMPTS)).tokens)


def rows_of(state, rows):
    """Everything that belongs to these rows."""
    cache = state.cache
    per_layer = [x[:, rows] for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
    rest = state._replace(cache=cache.length, learned=None, drafting=None)
    return per_layer, jax.tree.map(lambda x: np.asarray(x)[rows], rest)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_moving_rows_leaves_the_others_bit_identical(cache_dtype):
    sampled = [SamplingConfig(temperature=1.0, seed=i, logit_bias=((i, 1.0),)) for i in range(3)]
    # Row functions do not care where rows come from: random ones hide no zeros.
    shapes = jax.eval_shape(lambda: init_state(
        MODEL, jax.tree.map(jnp.asarray, make_settings(sampled, V)), limit=jnp.zeros(3, jnp.int32),
        stop_ids=jnp.zeros((3, 2), jnp.int32), slots=64, cache_dtype=cache_dtype, num_sources=2))
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.integers(0, 2 if x.dtype == bool else 100, x.shape), x.dtype)
    state, new = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)

    taken = take_rows(state, jnp.asarray([2, 0, 2, 1]))
    same(rows_of(taken, [0, 1, 3]), rows_of(state, [2, 0, 1]))
    same(rows_of(taken, [2]), rows_of(state, [2]))
    both = put_rows(state, jnp.asarray([3, 1, 5]), new)
    same(rows_of(both, [0, 2]), rows_of(state, [0, 2]))
    same(rows_of(both, [1]), rows_of(new, [1]))
    wide = widen(state, 70)
    assert wide.tokens.shape == (3, 70) and wide.cache.k.shape[3] == 70
    cut = lambda x, axis: None if x is None else np.take(x, range(64), axis)
    narrow = wide._replace(
        cache=type(wide.cache)(*(x if x is wide.cache.length else cut(x, 3) for x in wide.cache)),
        **{name: cut(getattr(wide, name), 1) for name in ("tokens", "logprobs", "kept")})
    same(narrow, state)


def test_a_row_put_beside_others_writes_on_as_alone():
    state = run(start(PROMPTS), steps=6)
    other = start([[3, 4], [9, 8, 7], [1]])
    state = run(put_rows(state, jnp.asarray([1, 3, 3]), other))
    assert texts(state) == [plain()[0], texts(run(other))[0], plain()[2]]


def test_a_prompt_may_come_in_pieces():
    whole = start([*PROMPTS[:2], [11, 12, 13, 14]])
    empty = init_state(MODEL, make_settings([GREEDY] * 3, V), limit=whole.limit, stop_ids=whole.stop_ids, slots=64)
    pieces = [([[7], [2, 39, 0, 5], [11, 12]], 4), ([[1, 30], [5, 18, 21], [13, 14]], 4)]
    state = empty
    for prompts, width in pieces:
        tokens, mask = pad(prompts)
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=33)
        state = feed(MODEL, params_of(), state, tokens, mask.sum(axis=1))
    np.testing.assert_array_equal(state.length, whole.length)
    np.testing.assert_array_equal(state.start, whole.start)
    np.testing.assert_array_equal(state.cache.length, whole.cache.length)
    for b, n in enumerate(np.asarray(whole.cache.length)):
        np.testing.assert_allclose(state.cache.k[:, b, :, :n], whole.cache.k[:, b, :, :n], atol=1e-5)
        np.testing.assert_allclose(state.cache.v[:, b, :, :n], whole.cache.v[:, b, :, :n], atol=1e-5)
    assert texts(run(state)) == texts(run(whole))


def test_an_answer_in_between_is_as_a_longer_prompt():
    """Two turns: the rows write, something (a tool) answers, they write on; a row that had ended lives again."""
    state = run(start(PROMPTS, new=np.array([6, 6, 2])), steps=6)
    turn = texts(state)
    answers = [[3], [4, 5, 6, 7], [8, 9]]
    tokens, mask = pad(answers)
    state = state._replace(limit=state.length + mask.sum(axis=1) + NEW)
    state = feed(MODEL, params_of(), state, tokens, mask.sum(axis=1))
    assert not state.done.any() and texts(state) == [[], [], []]
    state = run(state)
    longer = [prompt + text + answer for prompt, text, answer in zip(PROMPTS, turn, answers, strict=True)]
    assert texts(state) == texts(run(start(longer)))
    np.testing.assert_array_equal(state.start, [len(prompt) for prompt in longer])


@pytest.mark.parametrize("dtype, compute", [("bfloat16", "float32"), ("int8", "float32"), ("bfloat16", "bfloat16")])
def test_a_smaller_cache_mostly_writes_the_same(dtype, compute):
    prompts = np.random.default_rng(3).integers(0, V, (32, 5)).tolist()
    model = build(CONFIG, ComputeConfig(dtype=compute))
    exact = np.array(texts(run(start(prompts, new=8))))
    state = run(start(prompts, new=8, cache_dtype=dtype, model=model), model=model)
    assert state.cache.k.dtype == dtype and state.done.all()
    agree = np.array(texts(state)) == exact
    print(f"{dtype}, {compute}: {agree[:, 0].mean():.0%} of first tokens, {agree.all(axis=1).mean():.0%} of texts")
    assert agree[:, 0].mean() > 0.9 and agree.all(axis=1).mean() > 0.7


MIXED = [
    GREEDY, SamplingConfig(temperature=0.7, seed=5), SamplingConfig(logit_bias=((3, 2.5), (4, -1.0))),
    SamplingConfig(repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2),
    SamplingConfig(temperature=1.3, top_k=5, seed=6), SamplingConfig(temperature=1.0, top_p=0.6, min_p=0.05, seed=7),
    SamplingConfig(temperature=1.0, allowed_tokens=(1, 2, 3, 30, 31, 36), seed=8),
    SamplingConfig(temperature=0.9, top_k=7, top_p=0.8, repetition_penalty=1.3, presence_penalty=0.5, seed=9),
]
NUM_TOKENS = 37


def expected_scores(config, logits, known, text):
    """float64 log-probabilities before truncation, and the mask that truncation leaves, of one place."""
    logits = np.array(logits, np.float64)
    for i, value in config.logit_bias:
        logits[i] += value
    for i in set(known) | set(text):
        r = config.repetition_penalty or 1
        logits[i] *= 1 / r if logits[i] > 0 else r
    for i in set(text):
        logits[i] -= (config.frequency_penalty or 0) * text.count(i) + (config.presence_penalty or 0)
    logits[NUM_TOKENS:] = -np.inf
    if config.allowed_tokens:
        logits[[i for i in range(V) if i not in config.allowed_tokens]] = -np.inf
    logits = logits / (config.temperature or 1)
    logprobs = logits - np.logaddexp.reduce(logits)
    order, probs = np.argsort(-logprobs), np.exp(logprobs)
    keep = np.zeros(V, bool)
    keep[order[:config.top_k or V]] = True
    if config.top_p:
        left = probs[order] * keep[order] / probs[keep].sum()
        keep[order[1 + np.searchsorted(np.cumsum(left), config.top_p):]] = False
    keep &= probs >= (config.min_p or 0) * probs.max()
    return logprobs, keep


def test_log_probabilities_are_those_of_full_forward_passes():
    """All settings in one batch; ids of the padded vocabulary are never chosen."""
    # A bias towards the padding: without the limit it would be chosen.
    params = params_of() | {"head": {"kernel": params_of()["head"]["kernel"].at[:, 38].multiply(8.0)}}
    prompts = np.random.default_rng(4).integers(0, NUM_TOKENS, (len(MIXED), 5)).tolist()
    state = run(start(prompts, MIXED, params=params), params=params, num_tokens=NUM_TOKENS)
    logits = np.asarray(full_logits(MODEL, params, state.tokens))
    assert (logits.argmax(axis=-1) == 38).mean() > 0.1
    found = zip(MIXED, prompts, texts(state), texts(state, "logprobs"), texts(state, "kept"), strict=True)
    for b, (config, prompt, text, logprobs, kept) in enumerate(found):
        assert len(text) == NEW and max(text) < NUM_TOKENS
        for i, token in enumerate(text):
            expected, keep = expected_scores(config, logits[b, len(prompt) + i - 1], prompt, text[:i])
            assert keep[token] and abs(expected[token] - logprobs[i]) < 2e-5
            assert abs(np.exp(expected)[keep].sum() - kept[i]) < 1e-5
            if not config.temperature:
                assert token == expected.argmax()
    assert any(k < 0.99 for k in texts(state, "kept")[4]) and texts(state, "kept")[1] == pytest.approx([1.0] * NEW)


def test_a_window_model_decodes_beyond_its_window():
    model = build(replace(CONFIG, window=4))
    state = run(start(PROMPTS, model=model), model=model)
    logits = full_logits(model, params_of(), state.tokens)
    for b, text in enumerate(texts(state)):
        first = int(state.start[b])
        assert text == logits[b, first - 1:first - 1 + NEW].argmax(axis=-1).tolist()
    assert texts(state) != plain()


def test_a_mesh_splits_rows_and_never_gathers_a_cache():
    tokens, mask = pad([[3, 5, 7], [4], [6, 6, 8, 9], [1, 2]] * 2)
    arguments = (tokens, mask, make_settings([GREEDY] * 8, V))
    options = {"max_new_tokens": 6, "eos_id": V - 1}
    expected = np.asarray(complete(MODEL, params_of(), *arguments, **options))
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        whole = jax.device_put(params_of(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        lowered = complete.lower(MODEL, whole, *arguments, **options)
        text = lowered.compile().as_text()
        found = np.asarray(complete(MODEL, whole, *arguments, **options))
    np.testing.assert_array_equal(found, expected)
    layers, heads, width = CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim
    sent = re.findall(r"= f32\[([\d,]+)\][^=]*? all-gather\(", text)
    assert not [shape for shape in sent if re.fullmatch(rf"{layers},8,{heads},\d+,{width}", shape)], sent
