"""Speculative decoding writes the text of plain decoding: every source, every order, greedy and sampled."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.generate.databases import build_corpus, build_model_table
from jaxlm.generate.decode import pad, step_width
from jaxlm.generate.draft import DraftConfig, acceptance_rates, propose
from jaxlm.generate.draft_sources import Databases
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.speculative import Guessing, Sources, _best_width, start_guessing
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from tests.test_decode import (
    CONFIG,
    MODEL,
    NEW,
    QUICK,
    V,
    begin,
    feed,
    full_logits,
    go,
    params_of,
    run,
    start,
    texts,
)

ROWS, SLOTS = 104, 64
SMALL = DraftConfig(num_candidates=3, depth=3, num_nodes=8, matches=8)
ORDERS = [order for n in (1, 2, 3) for order in itertools.permutations(("context", "model", "corpus"), n)]
DRAFT_MODEL = build(replace(CONFIG, d_model=8, num_layers=1))

suggest = jax.jit(propose, static_argnames="config", compiler_options=QUICK)
guess = jax.jit(start_guessing, static_argnames=("guessing", "model", "cache_dtype"), compiler_options=QUICK)


def with_order(*order, **fields):
    return Guessing(draft=replace(SMALL, order=order), **fields)


def make_prompts(seed=0, rows=ROWS):
    """Prompts that repeat themselves, of 5 to 12 tokens."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(rows):
        phrase = rng.integers(0, V, rng.integers(3, 6)).tolist()
        prompts.append((phrase * 4)[:rng.integers(5, 13)])
    return prompts


PROMPTS = make_prompts()


def speculate(guessing, sources, state, *, steps=NEW, params=None, model=MODEL):
    """A prefilled state written to its end with guesses."""
    zeros = np.zeros((state.tokens.shape[0], guessing.num_sources()), np.int32)
    state = guess(guessing, state._replace(accepted=zeros), model, sources)
    return continued(guessing, sources, state, steps=steps, params=params, model=model)


def continued(guessing, sources, state, *, steps=NEW, params=None, model=MODEL):
    return go(model, params or params_of(), state, sources, guessing=guessing, max_steps=steps,
              max_done=state.tokens.shape[0])


@functools.cache
def plain():
    return run(start(PROMPTS, slots=SLOTS))


def databases_of(corpus):
    """Databases of 30 texts of 20 tokens: always of the same shapes."""
    assert len(corpus) == 30 and all(len(text) == 20 for text in corpus)
    built = Databases(model=build_model_table(corpus, V, n=3, m=3), corpus=build_corpus(corpus, V))
    return Sources(jax.tree.map(jnp.asarray, built))


@functools.cache
def sources():
    """Databases of the model's own texts, of noise, of one token at the end of the vocabulary, and broken ones."""
    rng = np.random.default_rng(7)
    found = {"own": databases_of(texts(plain())[:30]), "random": databases_of(rng.integers(0, V, (30, 20)).tolist()),
             "border": databases_of([[V - 1] * 20] * 15 + [[0, V - 1] * 10] * 15)}
    # Not what `build_*` makes or `load_database` lets in: an index out of order, lengths that lie, empty places, ids
    # outside the vocabulary.
    broken = found["random"].databases
    shuffled = rng.permutation(np.asarray(broken.corpus.suffixes))
    holes = np.where(rng.random(broken.model.tokens.shape) < 0.3, -1, np.asarray(broken.model.tokens))
    holes = np.where(rng.random(holes.shape) < 0.2, rng.choice([V, V + 7, 2**31 - 1, -5], holes.shape), holes)
    found["broken"] = Sources(Databases(
        model=broken.model._replace(tokens=jnp.asarray(holes, jnp.int32), lengths=broken.model.lengths[::-1]),
        corpus=broken.corpus._replace(suffixes=jnp.asarray(shuffled, jnp.int32))))
    return found


def check(state, expected):
    """The texts and log-probabilities of plain decoding, for fewer forward passes if a guess was right."""
    assert texts(state) == texts(expected)
    for name in ("start", "length", "done"):
        np.testing.assert_array_equal(getattr(state, name), getattr(expected, name))
    written = np.asarray(state.length - state.start)
    place = np.arange(state.tokens.shape[1])[None]
    text = (place >= np.asarray(state.start)[:, None]) & (place < np.asarray(state.length)[:, None])
    np.testing.assert_allclose(  # a logit rounds with its size, and is divided by the temperature
        np.asarray(state.logprobs)[text], np.asarray(expected.logprobs)[text], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(np.asarray(state.kept)[text], np.asarray(expected.kept)[text], atol=1e-5)
    np.testing.assert_array_equal(state.cache.length, state.length - 1)
    # A step writes its right guesses and one more token; only the last step of a row may end on a right guess.
    surplus = np.asarray(state.accepted.sum(axis=1) + state.steps) - written
    assert ((surplus == 0) | ((surplus == 1) & np.asarray(state.done))).all()
    return surplus


def saved(state):
    """The share of tokens that needed no forward pass of their own."""
    return 1 - float(state.steps.sum() / (state.length - state.start).sum())


# --- greedy


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_small_cache_rounds_guesses_as_it_rounds_text(dtype):
    """What a token sees is rounded alike whether it was fed alone, in a tree, or with the prompt."""
    prefilled = start(PROMPTS, slots=SLOTS, cache_dtype=dtype)
    expected = run(prefilled)
    found = speculate(with_order("context"), Sources(), prefilled)
    assert texts(found) == texts(expected) and saved(found) > 0
    pieces = start([prompt[:4] for prompt in PROMPTS], new=NEW, slots=SLOTS, cache_dtype=dtype)
    rest, mask = pad([prompt[4:] for prompt in PROMPTS])
    pieces = feed(MODEL, params_of(), pieces._replace(limit=prefilled.limit), rest, mask.sum(axis=1))
    assert texts(run(pieces)) == texts(expected)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_of_sources_writes_the_greedy_text(order):
    """104 prompts, with databases of the model's own texts and with one of the others in turn."""
    guessing = with_order(*order)
    prefilled = start(PROMPTS, slots=SLOTS)
    shares, others = {}, sorted(set(sources()) - {"own"})
    for kind in ("own", others[ORDERS.index(order) % 3]):
        state = speculate(guessing, sources()[kind], prefilled)
        check(state, plain())
        shares[kind] = saved(state)
    print("-".join(order), {kind: f"{share:.0%}" for kind, share in shares.items()})
    assert shares["own"] > 0.15


OTHERS = {
    "prompt": with_order("prompt"),
    "prompt newest": Guessing(draft=replace(SMALL, order=("prompt",), newest=True, depth=6)),
    "recycling": with_order("recycling"),
    "all": with_order("recycling", "prompt", "corpus", "context", "model"),
    "window": with_order("pool", window=3),
    "window and hierarchy": with_order("pool", "context", "model", "corpus", window=4),
    "adaptive": with_order("context", "corpus", widths=(0, 3, 8), costs=(1.0, 1.1, 1.2)),
    "never": with_order("context", widths=(0,), costs=(1.0,)),
    "one": Guessing(draft=DraftConfig(order=("context",), num_candidates=1, depth=1, num_nodes=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_source_writes_the_greedy_text(name):
    guessing = OTHERS[name]
    state = speculate(guessing, sources()["own"], start(PROMPTS, slots=SLOTS))
    check(state, plain())
    print(f"{name}: {saved(state):.0%} saved, accepted {np.asarray(state.accepted).sum(axis=0)}")
    assert saved(state) == 0 if name == "never" else saved(state) > 0.1


def test_a_draft_model_writes_the_greedy_text():
    guessing = Guessing(draft=SMALL, model=DRAFT_MODEL)
    state = speculate(guessing, Sources(params=params_of(1, DRAFT_MODEL)), start(PROMPTS, slots=SLOTS))
    check(state, plain())
    assert 0 < saved(state) < 0.3
    assert guessing.source_names() == ("draft_model",) and guessing.num_sources() == 1


def test_a_model_that_drafts_for_itself_is_always_right():
    state = speculate(Guessing(draft=SMALL, model=MODEL), Sources(params=params_of()), start(PROMPTS, slots=SLOTS))
    surplus = check(state, plain())
    assert NEW % (SMALL.depth + 1) == 0 and (surplus == 0).all()
    assert (state.steps == NEW // (SMALL.depth + 1)).all()
    assert (state.accepted[:, 0] == NEW - NEW // (SMALL.depth + 1)).all()


ENDING = {"hierarchy": (with_order("context", "model", "corpus"), None), "window": (OTHERS["window"], None),
          "itself": (Guessing(draft=SMALL, model=MODEL), params_of())}


@pytest.mark.parametrize("name", ENDING)
def test_texts_end_inside_accepted_guesses(name):
    guessing, params = ENDING[name]
    rng = np.random.default_rng(8)
    stops = np.array([[rng.choice(text[4:])] for text in texts(plain())])  # met somewhere on the way
    limits = rng.integers(1, NEW + 1, ROWS)
    prefilled = start(PROMPTS, slots=SLOTS, new=limits, stops=stops)
    expected = run(prefilled)
    for text, whole, limit, (stop,) in zip(texts(expected), texts(plain()), limits, stops, strict=True):
        cut = min(limit, whole.index(stop) + 1)
        assert text == whole[:cut]
    state = speculate(guessing, sources()["own"]._replace(params=params), prefilled)
    surplus = check(state, expected)
    by_stop = np.array([text[-1] for text in texts(state)]) == stops[:, 0]
    assert (surplus[by_stop] == 1).sum() > 3 and (surplus[~by_stop] == 1).sum() > 3, "both kinds of cuts must occur"


def test_the_cache_after_rejections_is_that_of_the_text():
    for name, state in {
        "hierarchy": speculate(with_order("context", "model", "corpus"), sources()["random"],
                               start(PROMPTS, slots=SLOTS), steps=11),
        "window": speculate(OTHERS["window"], Sources(), start(PROMPTS, slots=SLOTS), steps=11),
    }.items():
        assert not state.done.all() and 0 < saved(state) < 0.9, name
        assert len(set(np.asarray(state.length - state.start).tolist())) > 3, name
        np.testing.assert_array_equal(state.cache.length, state.length - 1)
        known = [row[:n] for row, n in zip(np.asarray(state.tokens).tolist(), np.asarray(state.length), strict=True)]
        fresh = start([*known[:-1], known[-1] + [0] * (40 - len(known[-1]))], slots=SLOTS)
        within = np.arange(SLOTS) < np.asarray(state.cache.length)[:, None]
        for one, other in ((state.cache.k, fresh.cache.k), (state.cache.v, fresh.cache.v)):
            one, other = (np.asarray(x)[:, within.nonzero()[0], :, within.nonzero()[1]] for x in (one, other))
            assert np.abs(one - other).max() < 1e-5 * np.abs(other).max(), name


@pytest.mark.parametrize("name", ["prompt", "window", "hierarchy"])
def test_a_row_is_guessed_for_as_it_would_be_among_others(name):
    """Text, steps and what each source got right do not depend on the neighbours."""
    guessing = OTHERS.get(name, with_order("context", "model", "corpus"))
    others = make_prompts(seed=9)
    mixed = [prompt if b % 2 else others[b] for b, prompt in enumerate(PROMPTS)]
    one, two = (speculate(guessing, sources()["own"], start(prompts, slots=SLOTS)) for prompts in (PROMPTS, mixed))
    for field in ("length", "steps", "accepted"):
        np.testing.assert_array_equal(getattr(one, field)[1::2], getattr(two, field)[1::2])
    assert texts(one)[1::2] == texts(two)[1::2]
    assert texts(one)[::2] != texts(two)[::2]


def test_the_loop_with_guesses_may_be_left_and_lacks_slots_in_time():
    guessing = OTHERS["prompt"]
    state = speculate(guessing, Sources(), start(PROMPTS, slots=SLOTS), steps=4)
    assert (state.steps == 4).all()
    check(continued(guessing, Sources(), state), plain())
    state = speculate(guessing, Sources(), start(PROMPTS, slots=24))
    width = step_width(guessing)
    assert not state.done.all() and 24 - width < int(state.length.max()) <= 24


# --- sampling

SAMPLED = [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 4}, {"temperature": 1.4, "top_p": 0.8}, {},
           {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
           {"temperature": 0.5, "frequency_penalty": 0.4, "presence_penalty": 0.3}, {"repetition_penalty": 1.2},
           {"temperature": 0.4, "logit_bias": ((3, 1.5),), "top_p": 0.9, "top_k": 9}]


@pytest.mark.parametrize("name", ["hierarchy", "window and hierarchy", "adaptive", "itself", "other model"])
def test_a_sampled_text_is_that_of_plain_sampling_with_its_seed(name):
    models = {"itself": (MODEL, params_of()), "other model": (DRAFT_MODEL, params_of(1, DRAFT_MODEL))}
    model, params = models.get(name, (None, None))
    guessing = OTHERS.get(name) or (Guessing(draft=SMALL, model=model) if model else with_order(
        "context", "model", "corpus"))
    configs = [SamplingConfig(**fields, **({"seed": i} if "temperature" in fields else {}))
               for i, fields in zip(range(ROWS), itertools.cycle(SAMPLED), strict=False)]
    prefilled = start(PROMPTS, configs, slots=SLOTS)
    expected = run(prefilled)
    assert len({tuple(text) for text in texts(expected)}) > ROWS * 0.9
    state = speculate(guessing, sources()["own"]._replace(params=params), prefilled)
    check(state, expected)
    print(f"{name}: {saved(state):.0%} saved")
    assert saved(state) > (0.5 if name == "itself" else 0.02)


# The whole loop against an exact enumeration of what a small model may write.

LETTERS, LENGTH, DRAWS, SURE = 5, 3, 4096, 1e-4
TOY = build(ModelConfig(vocab_size=LETTERS, d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16,
                        max_positions=32))
TOY_PARAMS = params_of(3, TOY, 0.3)
TOY_PROMPT = [1, 4, 1]
LAWS = {"temperature 1": {}, "top-k 3": {"top_k": 3}, "top-p 0.8": {"top_p": 0.8}}
WORDS = list(itertools.product(range(LETTERS), repeat=LENGTH))


def law_of(top_k=None, top_p=None):
    """P(word) for all 125 words, in float64 from full forward passes."""
    rows = jnp.asarray([[*TOY_PROMPT, *word[:-1]] for word in WORDS], jnp.int32)
    logits = np.asarray(full_logits(TOY, TOY_PARAMS, rows), np.float64)[:, len(TOY_PROMPT) - 1:]
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    down = -np.sort(-probs, axis=-1)
    if top_k:
        probs = np.where(probs >= down[..., top_k - 1:top_k], probs, 0)
    if top_p:
        last = np.sum(np.cumsum(down, axis=-1) < top_p, axis=-1, keepdims=True)
        probs = np.where(probs >= np.take_along_axis(down, last, axis=-1), probs, 0)
    probs /= probs.sum(axis=-1, keepdims=True)
    return np.prod([probs[np.arange(len(WORDS)), i, [word[i] for word in WORDS]] for i in range(LENGTH)], axis=0)


def p_value(words, law):
    """Of a chi-square test; words of small expectation are one cell. An impossible word: 0."""
    number = words @ LETTERS ** np.arange(LENGTH)[::-1]
    counts, expected = np.bincount(number, minlength=len(WORDS)), law * len(words)
    if (counts > 0)[law == 0].any():
        return 0.0
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 5:  # joins the smallest cell
        at = np.argmin(expected[:-1])
        counts[at], expected[at] = counts[at] + counts[-1], expected[at] + expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def toy_draft(kind):
    """A model table whose guesses are the likeliest continuations, the least likely ones, or noise; [V, 2, 2]."""
    rows = jnp.asarray([[*TOY_PROMPT[:-1], token] for token in range(LETTERS)], jnp.int32)
    ranked = np.argsort(-np.asarray(full_logits(TOY, TOY_PARAMS, rows))[:, -1], axis=-1)
    ranked = {"good": ranked, "bad": ranked[:, ::-1]}.get(kind)
    if ranked is None:
        ranked = np.argsort(np.random.default_rng(2).random((LETTERS, LETTERS)), axis=-1)
    table = np.stack([np.stack([ranked[:, i], ranked[ranked[:, i], 0]], axis=1) for i in range(2)], axis=1)
    built = build_model_table([[0, 1, 2]], LETTERS, n=2, m=2)
    return Sources(Databases(model=built._replace(tokens=jnp.asarray(table, jnp.int32),
                                                  lengths=jnp.full((LETTERS, 2), 2, jnp.uint8))))


TOY_GUESSING = Guessing(draft=DraftConfig(order=("model", "context"), num_candidates=3, depth=2, num_nodes=5))


@functools.cache
def toy_words(law, kind):
    """4096 sampled words with guesses; plain ones where `kind` is None."""
    # All laws have the fields of all, so that they share programs.
    neutral = {"top_k": LETTERS, "top_p": 1.0}
    fields = neutral | LAWS[law]
    configs = [SamplingConfig(temperature=1.0, seed=seed, **fields) for seed in range(DRAWS)]
    like = [SamplingConfig(temperature=1.0, **{**neutral, **one}) for one in LAWS.values()]
    state = toy_start(configs, like)
    if kind is None:
        return np.array(texts(run(state, steps=LENGTH, params=TOY_PARAMS, model=TOY))), None
    state = speculate(TOY_GUESSING, toy_draft(kind), state, steps=LENGTH, params=TOY_PARAMS, model=TOY)
    return np.array(texts(state)), state


def toy_start(configs, like):
    tokens = np.tile(np.array(TOY_PROMPT, np.int32), (DRAWS, 1))
    lengths = np.full(DRAWS, len(TOY_PROMPT), np.int32)
    return begin(TOY, TOY_PARAMS, tokens, lengths, make_settings(configs, LETTERS, like), lengths + LENGTH,
                 np.full((DRAWS, 1), -1, np.int32), slots=16)


@pytest.mark.parametrize("law", LAWS)
def test_samples_have_the_exact_distribution(law):
    exact = law_of(**LAWS[law])
    assert abs(exact.sum() - 1) < 1e-9 and (exact * DRAWS >= 5).sum() > 12
    shares = {}
    for kind in (None, "good", "bad", "noise"):
        words, state = toy_words(law, kind)
        shares[kind] = p_value(words, exact), saved(state) if state else 0.0
        np.testing.assert_array_equal(words, toy_words(law, None)[0])
    print(law, shares)
    assert all(p > SURE for p, _ in shares.values())
    assert shares["good"][1] > 0.2 and shares["bad"][1] < shares["good"][1]


def test_the_chi_square_test_sees_wrong_rules():
    """What wrong acceptance rules would write, made from right samples: each must be caught."""
    words, exact, rng = toy_words("temperature 1", None)[0], law_of(), np.random.default_rng(6)
    guess = int(toy_draft("good").databases.model.tokens[TOY_PROMPT[-1], 0, 0])
    always = words.copy()
    always[:, 0] = guess
    # 3 in 20 wrong guesses slip through.
    lenient = np.where((rng.random(DRAWS) < 0.15)[:, None] & (np.arange(LENGTH) == 0), guess, words)
    # After a rejection the residual still holds the rejected token, as if it had never been refused.
    rejected = words[:, 0] == guess
    twice = words.copy()
    twice[rejected, 0] = words[rng.permutation(DRAWS)[:rejected.sum()], 0]
    law_of_bad = law_of(top_k=3)
    for name, wrong in {"always": always, "lenient": lenient, "twice": twice}.items():
        assert p_value(wrong, exact) < SURE, name
    assert p_value(words, law_of_bad) == 0.0, "an impossible word"
    assert p_value(words, exact) > SURE


# --- adaptive width


def test_the_best_width_has_the_most_tokens_per_time():
    guessing = with_order("context", widths=(0, 2, 8), costs=(1.0, 1.5, 2.0))
    prefilled = start(PROMPTS[:3], slots=SLOTS)
    draft = suggest(guessing.draft, Databases(), prefilled.tokens, prefilled.length)

    def best(*values, done=(False, False, False), costs=guessing.costs):
        rows = jnp.asarray([list(row) + [0.0] * (8 - len(row)) for row in values], jnp.float32)
        return int(_best_width(replace(guessing, costs=costs), draft._replace(values=rows), jnp.asarray(done)))

    assert best((), (), ()) == 0
    assert best([1.0] * 8, [1.0] * 8, [1.0] * 8) == 2
    assert best([0.9, 0.8], [0.9, 0.8], [0.9, 0.8]) == 1
    assert best([0.2], [0.2], [0.2]) == 0
    assert best([0.9, 0.8], (), (), done=(False, True, True)) == 1, "rows that are done do not count"
    assert best([0.9, 0.3], (), ()) == 0
    assert best([0.2], [0.2], [0.2], costs=(1.0, 1.1, 1.2)) == 1


def test_the_width_falls_to_nothing_and_recovers():
    """Guesses that are always wrong are given up; once they are right, they come back, without a word from outside."""
    guessing = with_order("model", widths=(0, 3, 8), costs=(1.0, 1.3, 1.6))
    prompts, long = PROMPTS[:2], 200
    prefilled = start(prompts, new=long, slots=256)
    expected = run(prefilled, steps=long)
    rows = texts(expected)
    right = Sources(Databases(model=jax.tree.map(jnp.asarray, build_model_table(rows, V, n=3, m=3))))
    unused = sorted(set(range(V)) - {token for row in rows for token in row})[0]
    table = right.databases.model
    wrong = Sources(Databases(model=table._replace(
        tokens=jnp.full_like(table.tokens, unused), lengths=jnp.full_like(table.lengths, 3))))

    def width(state, sources):
        databases = sources.databases
        draft = suggest(guessing.draft, databases, state.tokens, state.length, acceptance_rates(state.learned.counts))
        return guessing.widths[int(_best_width(guessing, draft, state.done))]

    state = guess(guessing, prefilled._replace(accepted=np.zeros((2, 1), np.int32)), MODEL, wrong)
    assert width(state, wrong) > 0, "the first guesses are tried"
    state = continued(guessing, wrong, state, steps=30)
    assert width(state, wrong) == 0 and (state.accepted == 0).all() and (state.steps == 30).all()
    counts = np.asarray(state.learned.counts)
    state = continued(guessing, wrong, state, steps=1)
    assert (np.asarray(state.learned.counts) <= counts).all(), "without guesses the counts fade"
    widths = []
    while not bool(state.done.any()):
        state = continued(guessing, right, state, steps=1)
        widths.append(width(state, right))
    again = next(i for i, one in enumerate(widths) if one)
    print(f"given up, tried again after {again} steps, then {np.mean(np.array(widths[again:]) > 0):.0%} of steps")
    assert again < 60 and np.mean(np.array(widths[-10:]) > 0) > 0.7 and (state.accepted > 20).any()
    assert [row[:len(text)] for row, text in zip(rows, texts(state), strict=True)] == texts(state)


# --- errors


@pytest.mark.parametrize("fields, message", [
    ({"widths": (3, 2), "costs": (1.0, 1.0)}, r"widths must rise and have a cost each, got \(3, 2\)"),
    ({"widths": (2, 2), "costs": (1.0, 1.0)}, "widths must rise"),
    ({"widths": (0, 2), "costs": (1.0,)}, r"a cost each, got \(0, 2\) and \(1.0,\)"),
    ({"costs": (1.0,)}, "a cost each"),
    ({"widths": (0, 9), "costs": (1.0, 1.0)}, "widths may go up to draft.num_nodes 8, got 9"),
    ({"widths": (-1, 4), "costs": (1.0, 1.0)}, "widths start at 0, got -1"),
    ({"widths": (0, 2), "costs": (1.0, 0.0)}, "costs must be positive"),
    ({"window": 3}, "feeds the source `pool`"),
    ({"draft": replace(SMALL, order=("pool",)), "window": 3, "widths": (0,), "costs": (1.0,)}, "leave widths empty"),
    ({"draft": replace(SMALL, order=("pool",))}, "set window, or leave `pool` out"),
    ({"draft": replace(SMALL, order=("pool",)), "window": 1}, "window must be 0 or at least 2 columns, got 1"),
    ({"draft": replace(SMALL, order=("pool",)), "window": -2}, "window must be 0 or at least 2 columns, got -2"),
    ({"draft": replace(SMALL, order=("pool",)), "window": 3, "model": MODEL}, "exclude each other"),
    ({"model": MODEL, "widths": (0, 2), "costs": (1.0, 1.0)}, "a draft model writes one chain: leave widths and costs"),
])
def test_settings_that_conflict(fields, message):
    with pytest.raises(ValueError, match=message):
        Guessing(**{"draft": SMALL, **fields})


def test_a_source_without_its_database_is_named():
    with pytest.raises(ValueError, match="order names 'corpus', but no such database was given"):
        speculate(with_order("context", "corpus"), Sources(), start([[1, 2]], slots=SLOTS))
