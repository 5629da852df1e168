"""The engine writes for many requests what each would get alone."""

import functools
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.generate import scheduler
from jaxlm.generate.decode import decode
from jaxlm.generate.draft import DraftConfig
from jaxlm.generate.engine import Engine, EngineConfig, generate, serve, stream
from jaxlm.generate.methods import METHODS
from jaxlm.generate.requests import Completion, Piece, Report, Turn
from jaxlm.generate.settings import SamplingConfig
from jaxlm.generate.speculative import Guessing, Sources, start_guessing
from jaxlm.generate.state import init_state, prefill, put_rows, take_rows, widen
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from tests.test_decode import CONFIG, MODEL, QUICK, V, params_of, run, start, texts

TRACED = Counter()


def quick(function, static=(), donated=()):
    """A program of the scheduler compiled quickly; `TRACED` counts its compilations."""
    @functools.wraps(function)
    def counted(*arguments, **keywords):
        TRACED[function.__name__] += 1
        return function(*arguments, **keywords)

    return jax.jit(counted, static_argnames=static, donate_argnames=donated, compiler_options=QUICK)


QUICK_PROGRAMS = {
    "_init": quick(init_state, ("model", "slots", "cache_dtype", "num_sources")),
    "_prefill": quick(prefill, ("model",), ("state",)),
    "_guess": quick(start_guessing, ("guessing", "model", "cache_dtype"), ("state",)),
    "_decode": quick(decode, ("model", "guessing", "num_tokens"), ("state",)),
    "_take": quick(take_rows), "_put": quick(put_rows, (), ("state",)), "_widen": quick(widen, ("slots",)),
}


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    for name, program in QUICK_PROGRAMS.items():
        monkeypatch.setattr(scheduler, name, program)


def engine(**fields):
    return Engine(**{"model": MODEL, "params": params_of(), "eos_id": None, "config": EngineConfig(batch_size=4),
                     **fields})


def requests():
    """Eleven prompts of mixed settings and lengths, and what decoding them side by side writes."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, V, n).tolist() for n in (3, 9, 1, 12, 5, 7, 2, 16, 4, 4, 15)]
    fields = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "top_k": 5},
              {"frequency_penalty": 0.5}, {"temperature": 1.2, "top_p": 0.7, "seed": 9}, {"logit_bias": ((4, 2.0),)}]
    lengths = (20, 3, 30, 1, 8, 25, 12, 30, 2, 17, 9)
    settings = [SamplingConfig(max_new_tokens=n, **fields[i % len(fields)]) for i, n in enumerate(lengths)]
    state = run(start(prompts, settings, new=np.array(lengths)), steps=30)
    # Some end at an id that they write.
    stops = {0: texts(state)[0][6], 5: texts(state)[5][11], 7: texts(state)[7][2]}
    settings = [replace(one, stop_ids=(stops[i], V - 1)) if i in stops else one for i, one in enumerate(settings)]
    ids = [[stops[i], V - 1] if i in stops else [-1, -1] for i in range(len(prompts))]
    return prompts, settings, run(start(prompts, settings, new=np.array(lengths), stops=ids), steps=30), stops


PROMPTS, SETTINGS, ALONE, STOPS = [], [], None, {}


@pytest.fixture(autouse=True, scope="module")
def mixed():
    global ALONE
    prompts, settings, ALONE, stops = requests()
    PROMPTS[:], SETTINGS[:] = prompts, settings
    STOPS.update(stops)


def check_alone(found, count=11):
    assert [(one.prompt, one.sample) for one in found] == [(i, 0) for i in range(count)]
    assert [one.tokens for one in found] == texts(ALONE)[:count]
    for one, logprobs, kept in zip(found, texts(ALONE, "logprobs"), texts(ALONE, "kept"), strict=False):
        np.testing.assert_allclose(one.logprobs, logprobs, atol=2e-5)
        np.testing.assert_allclose(one.kept, kept, atol=1e-5)
        ended = one.prompt in STOPS and one.tokens[-1] == STOPS[one.prompt]
        assert one.reason == ("stop_id" if ended else "length")
        assert ended or len(one.tokens) == SETTINGS[one.prompt].max_new_tokens


def test_a_queue_of_mixed_requests_is_written_as_each_alone():
    report = Report()
    found = generate(engine(), PROMPTS, SETTINGS, report=report)
    check_alone(found)
    assert all(one.text is None and one.steps == len(one.tokens) and one.accepted == {} for one in found)
    assert sum(one.reason == "stop_id" for one in found) == 3
    assert report.tokens == report.steps == sum(len(one.tokens) for one in found)
    assert report.prompt_tokens == report.prefilled_tokens == sum(map(len, PROMPTS)) and report.seconds > 0
    assert f"{report.tokens} tokens in" in report.line() and "programs" in report.line()


def test_completions_come_as_they_are_ready_each_once():
    order = [one.prompt for one in serve(engine(), PROMPTS, SETTINGS)]
    assert sorted(order) == list(range(len(PROMPTS))) and order != sorted(order)
    assert order.index(3) < order.index(0), "one token is ready before 7"


def test_nothing_asked_nothing_written():
    report = Report()
    assert generate(engine(), [], SamplingConfig(), report=report) == []
    assert list(serve(engine(), [], [], pieces=False)) == [] and report.tokens == 0 and not report.programs


def test_a_caller_may_leave_half_way():
    events = serve(engine(), PROMPTS, SETTINGS)
    assert next(events).tokens
    other = serve(engine(), PROMPTS, SETTINGS)
    next(other)
    events.close()
    check_alone(sorted([*generate(engine(), PROMPTS, SETTINGS)], key=lambda one: one.prompt))
    assert len(list(other)) == len(PROMPTS) - 1


# --- what prompts share


def test_a_shared_beginning_is_computed_once():
    rng = np.random.default_rng(4)
    beginning = rng.integers(0, V, 40).tolist()
    tails = [[1], [2, 3, 4], [5, 6], [7], [8, 9, 1, 2, 3], []]
    prompts = [beginning + tail for tail in tails]  # the last one is the beginning itself
    settings, report = SamplingConfig(max_new_tokens=10), Report()
    found = generate(engine(), prompts, settings, report=report)
    assert report.prompt_tokens == sum(map(len, prompts))
    assert report.prefilled_tokens == 32 + sum(len(tail) + 8 for tail in tails), "39 are shared, 32 of them once"
    expected = texts(run(start(prompts, new=10)))
    assert [one.tokens for one in found] == expected

    report = Report()
    short = [prompt[10:] for prompt in prompts[1:3]]
    found = generate(engine(), short, settings, report=report)
    assert report.prefilled_tokens == report.prompt_tokens, "30 tokens are not worth a program"
    assert [one.tokens for one in found] == texts(run(start(short, new=10)))


def test_samples_share_their_prompt_and_differ():
    report, settings = Report(), SamplingConfig(max_new_tokens=8, temperature=1.0, seed=5)
    found = generate(engine(), PROMPTS[:1], settings, num_samples=4, report=report)
    assert report.prefilled_tokens == len(PROMPTS[0]) and report.prompt_tokens == 4 * len(PROMPTS[0])
    assert [(one.prompt, one.sample) for one in found] == [(0, i) for i in range(4)]
    assert len({tuple(one.tokens) for one in found}) == 4
    for one in found:
        alone = generate(engine(), PROMPTS[:1], replace(settings, seed=5 + one.sample))
        assert alone[0].tokens == one.tokens and alone[0].sample == 0
    more = generate(engine(), PROMPTS[:2], settings, num_samples=2)
    assert [(one.prompt, one.sample) for one in more] == [(i, j) for i in range(2) for j in range(2)]
    assert [one.tokens for one in more[:2]] == [one.tokens for one in found[:2]]


# --- shapes


def test_rows_grow_and_programs_are_few():
    """Programs are counted as they are traced; those of this model are not those of other tests."""
    model, prompts, long = build(replace(CONFIG, max_positions=500)), [[1, 2, 3], [4, 5], [6]], 140
    expected = texts(run(start(prompts, new=long, slots=192, model=model), steps=long, model=model))
    report, before = Report(), TRACED.total()
    found = generate(engine(model=model), prompts, SamplingConfig(max_new_tokens=long), report=report)
    assert [one.tokens for one in found] == expected
    assert all(len(one.tokens) > 128 for one in found), "longer than the first slots"
    compiled, counted = TRACED.total() - before, len(report.programs)
    assert compiled <= counted <= 10
    # Other prompts of these shapes bring no new program, and the same report tells.
    generate(engine(model=model), [[7, 7], [8, 9, 1], [2, 2, 2, 2]], SamplingConfig(max_new_tokens=long),
             report=report)
    assert TRACED.total() - before == compiled and len(report.programs) == counted
    # New shapes do: guesses, rows that come one by one, a shared beginning.
    writer = engine(model=model, guessing=GUESSINGS["context"], config=EngineConfig(batch_size=2))
    report, before = Report(), TRACED.total()
    generate(writer, [[*range(35), i] for i in range(3)], [SamplingConfig(max_new_tokens=n) for n in (4, 9, 5)],
             report=report)
    assert 10 < TRACED.total() - before <= len(report.programs) <= 25


def test_prompts_may_fill_the_positions_of_the_model():
    """Neither is a power of two, so that padding a prompt to one would be too long for the model."""
    model, prompt = build(replace(CONFIG, max_positions=100)), [*range(40), *range(33)]
    found = generate(engine(model=model), [prompt], SamplingConfig(max_new_tokens=27))
    assert found[0].tokens == texts(run(start([prompt], new=27, slots=128, model=model), steps=27, model=model))[0]
    small = build(replace(CONFIG, max_positions=100, num_layers=1))
    guessing = Guessing(draft=DraftConfig(depth=2), model=small)
    found = generate(engine(model=model, guessing=guessing, sources=Sources(params=params_of(1, small))),
                     [prompt, [*prompt[:50], 3, 3]], SamplingConfig(max_new_tokens=27))
    assert found[0].tokens == texts(run(start([prompt], new=27, slots=128, model=model), steps=27, model=model))[0]


GUESSINGS = {
    "context": Guessing(draft=DraftConfig(order=("context", "prompt"), num_candidates=3, depth=3, num_nodes=8)),
    "window": Guessing(draft=DraftConfig(order=("pool", "context"), num_candidates=3, depth=3, num_nodes=6), window=3),
    "adaptive": Guessing(draft=DraftConfig(order=("context", "recycling"), num_candidates=4, depth=3, num_nodes=8),
                         widths=(0, 3, 8), costs=(1.0, 1.1, 1.3)),
    "draft model": Guessing(draft=DraftConfig(depth=3), model=MODEL),
}


@pytest.mark.parametrize("name", GUESSINGS)
def test_guessing_changes_the_speed_only(name):
    guessing, report = GUESSINGS[name], Report()
    rows, count = (2, 6) if name == "context" else (1, 3)
    writer = engine(guessing=guessing, sources=Sources(params=params_of()), config=EngineConfig(batch_size=rows))
    found = generate(writer, PROMPTS[:count], SETTINGS[:count], report=report)
    check_alone(found, count)
    assert report.steps == sum(one.steps for one in found) < report.tokens * (0.6 if name == "draft model" else 0.95)
    for one in found:
        assert set(one.accepted) == set(guessing.source_names())
        assert 0 <= sum(one.accepted.values()) + one.steps - len(one.tokens) <= 1
    assert report.accepted == {n: sum(one.accepted[n] for one in found) for n in guessing.source_names()}
    assert "guessed right" in report.line()


# --- answers


def answers(turns, lengths):
    """A `respond` that answers every text of prompt p `turns[p]` times; the texts, with what stood before each."""
    known, spoken = [list(prompt) for prompt in PROMPTS], [[] for _ in PROMPTS]

    def respond(one):
        spoken[one.prompt].append((list(known[one.prompt]), one))
        number = len(spoken[one.prompt])
        if number > turns[one.prompt]:
            return None
        ids = [(one.prompt + 3 * number + i) % V for i in range(1 + 9 * (number % 2) + one.prompt)]
        known[one.prompt] += one.tokens + ids
        return Turn(ids, lengths[one.prompt])

    return respond, spoken


@pytest.mark.parametrize("name", [None, "context"])
def test_an_answered_text_goes_on_as_the_whole_conversation_would(name):
    """Rows are answered at different times, some never, some are refilled; a text may end by a stop id."""
    turns, lengths = (2, 0, 1, 3, 1, 2), (6, 3, 9, 1, 8, 12)
    count, guessing = (6, None) if name is None else (4, GUESSINGS[name])
    respond, spoken = answers(turns, lengths)
    report = Report()
    found = list(serve(engine(guessing=guessing), PROMPTS[:count], SETTINGS[:count], respond=respond, budget=110,
                       report=report))
    assert len(found) == count + sum(turns[:count])
    assert report.tokens == sum(len(one.tokens) for one in found)
    asked = [(prompt, number) for prompt in range(count) for number in range(turns[prompt] + 1)]
    alone = generate(
        engine(), [spoken[prompt][number][0] for prompt, number in asked],
        [replace(SETTINGS[prompt], max_new_tokens=lengths[prompt]) if number else SETTINGS[prompt]
         for prompt, number in asked])
    for (prompt, number), expected in zip(asked, alone, strict=True):
        one = spoken[prompt][number][1]
        assert (one.tokens, one.reason) == (expected.tokens, expected.reason)
        np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=2e-5)
        assert guessing or one.steps == len(one.tokens)


def test_an_answer_follows_a_stop_string_and_not_what_was_written_behind_it():
    sampling = SamplingConfig(max_new_tokens=30, temperature=1.0, seed=4)
    model = build(replace(CONFIG, vocab_size=260))
    writer, prompt = engine(model=model, params=params_of(0, model), tokenizer=ByteTokenizer()), list(b"ab")
    first, = generate(writer, [prompt], sampling)
    sampling = replace(sampling, stop_strings=(first.text[4:6],))
    turns = [Turn(list(b"xyz"), 5), None]
    cut, after = serve(writer, [prompt], sampling, respond=lambda one: turns.pop(0), budget=60)
    assert cut.reason == "stop_string" and len(cut.tokens) < len(first.tokens)
    alone, = generate(writer, [prompt + cut.tokens + list(b"xyz")], replace(sampling, max_new_tokens=5))
    assert after.tokens == alone.tokens


def test_an_answer_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="pass the budget of 12 tokens by 3"):
        list(serve(engine(), [[1, 2]], SamplingConfig(max_new_tokens=5), respond=lambda one: Turn([1] * 4, 6),
                   budget=12))


# --- several devices


@pytest.mark.parametrize("count", [1, 7])
def test_two_devices_write_the_same(count):
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        found = generate(engine(), PROMPTS[:count], SETTINGS[:count])
    assert [one.tokens for one in found] == texts(ALONE)[:count]
    assert [one.prompt for one in found] == list(range(count))


def test_two_devices_guess_and_stop_the_same():
    """A stop string ends a row on the host only, while the rows that fill up the batch must not go on."""
    writer = korean()
    settings = SamplingConfig(max_new_tokens=200, stop_strings=("글 한글",))
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        found = generate(writer, [BYTES.encode(" ")], settings)
    assert [(one.text, one.reason) for one in found] == [("한", "stop_string")]


# --- text

BYTES = ByteTokenizer()
LOOP = "한글 "


def korean(**fields):
    """An engine whose greedy text is 한글 한글 한글 ...: every token has one successor, whatever stands before."""
    model = build(ModelConfig(vocab_size=260, d_model=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
                              d_ff=8, max_positions=512))
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(260, 32)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    successor = np.arange(260)
    cycle = BYTES.encode(LOOP)
    successor[cycle] = cycle[1:] + cycle[:1]
    successor[ord("x")], successor[ord("y")] = cycle[1], BYTES.eos_id  # half a character; the end
    head = np.zeros((32, 260), np.float32)
    np.add.at(head.T, successor, embedding)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(model.init, jax.random.key(0)))
    params |= {"embed": {"embedding": jnp.asarray(embedding)}, "head": {"kernel": jnp.asarray(head)},
               "final_norm": {"scale": jnp.ones(32)}}
    return Engine(**{"model": model, "params": params, "eos_id": BYTES.eos_id, "tokenizer": BYTES,
                     "config": EngineConfig(batch_size=4), **fields})


def test_texts_are_decoded_and_cut_at_stop_strings_across_tokens():
    settings = SamplingConfig(max_new_tokens=40)
    prompt = BYTES.encode(" ")
    cases = {(): (LOOP * 5 + "한\ufffd", 40, "length"),
             ("글 한",): ("한", 10, "stop_string"),
             ("없다", " 한글 한"): ("한글", 17, "stop_string"),
             ("한",): ("", 3, "stop_string"),
             ("글",): ("한", 6, "stop_string"),
             ("없다",): None}
    cases["없다",] = cases[()]
    found = generate(korean(), [prompt] * len(cases), [replace(settings, stop_strings=stops) for stops in cases])
    for one, (text, count, reason) in zip(found, cases.values(), strict=True):
        assert (one.text, len(one.tokens), len(one.logprobs), one.reason) == (text, count, count, reason)
        assert BYTES.decode(one.tokens).startswith(one.text)


def test_the_end_of_text_is_no_text_and_may_be_ignored():
    found = generate(korean(), [BYTES.encode("y")] * 3, [
        SamplingConfig(max_new_tokens=4), SamplingConfig(max_new_tokens=4, ignore_eos=True),
        SamplingConfig(max_new_tokens=4, stop_strings=("a",))])
    assert [(one.text, one.reason, one.tokens[:1]) for one in found] == [
        ("", "stop_id", [BYTES.eos_id]), ("", "length", [BYTES.eos_id]), ("", "stop_id", [BYTES.eos_id])]
    assert [len(one.tokens) for one in found] == [1, 4, 1]


@pytest.mark.parametrize("fields", [
    {}, {"stop_strings": ("글 한글 한글",)}, {"temperature": 1.0, "seed": 4, "logit_bias": ((0xED, 2.0), (0x95, 2.0))},
    {"temperature": 2.0, "allowed_tokens": (0xED, 0x95, 0x9C, 0x20, 0xF0)}], ids=str)
def test_pieces_are_the_text_and_no_half_characters(fields):
    for start_text in (" ", "x"):
        settings, prompt = SamplingConfig(max_new_tokens=30, **fields), BYTES.encode(start_text)
        whole = generate(korean(), [prompt], settings)[0]
        events = list(serve(korean(), [prompt], settings, pieces=True))
        pieces, last = [one.text for one in events[:-1]], events[-1]
        assert all(isinstance(one, Piece) for one in events[:-1]) and isinstance(last, Completion)
        assert last._replace(logprobs=[], kept=[]) == whole._replace(logprobs=[], kept=[], steps=last.steps)
        assert "".join(pieces) == last.text == whole.text and all(pieces) and pieces
        assert len(pieces) > 3 or "stop_strings" in fields
        if not fields and start_text == " ":
            assert "\ufffd" not in "".join(pieces[:-1]) and "한" in pieces[0]


def test_streaming_one_prompt():
    assert "".join(stream(korean(), BYTES.encode(" "), SamplingConfig(max_new_tokens=14))) == "한글 한글 "
    assert list(stream(korean(), BYTES.encode("y"), SamplingConfig(max_new_tokens=14))) == []
    guessing = GUESSINGS["context"]
    events = list(serve(korean(guessing=guessing), [BYTES.encode(" 한글 한글 ")] * 2, [
        SamplingConfig(max_new_tokens=28), SamplingConfig(max_new_tokens=28, stop_strings=("글 한글",))], pieces=True))
    by_prompt = ["".join(one.text for one in events if isinstance(one, Piece) and one.prompt == i) for i in range(2)]
    assert by_prompt == ["한글 한글 한글 한글 ", "한"]
    done = [one for one in events if isinstance(one, Completion)]
    assert {one.prompt: one.reason for one in done} == {0: "length", 1: "stop_string"}
    assert all(one.steps < 14 for one in done)


# --- errors

ONE = SamplingConfig(max_new_tokens=4)


@pytest.mark.parametrize("fields, prompts, sampling, keywords, message", [
    ({}, [[1], []], ONE, {}, "prompt 1 is empty: it needs at least one token"),
    ({}, [[1], [2, V]], ONE, {}, "prompt 1 has ids outside the vocabulary of 40"),
    ({}, [[-1]], ONE, {}, "prompt 0 has ids outside"),
    ({"num_tokens": 30}, [[30]], ONE, {}, "outside the vocabulary of 30"),
    ({}, [[1] * 509], ONE, {}, "prompt 0 has 509 tokens: with max_new_tokens 4 that is more than the 512 positions"),
    ({}, [[1]], replace(ONE, stop_ids=(V,)), {}, "stop_ids names id 40, but the vocabulary ends at 39"),
    ({"num_tokens": 30}, [[1]], replace(ONE, logit_bias=((30, 1.0),)), {}, "logit_bias names id 30"),
    ({}, [[1], [2]], [ONE], {}, "2 prompts need as many sampling settings, or one; got 1"),
    ({}, [[1]], ONE, {"num_samples": 2}, "2 samples of a greedy text would be equal: set a temperature"),
    ({}, [[1]], ONE, {"num_samples": 0}, "num_samples must be positive, got 0"),
    ({}, [[1]], ONE, {"pieces": True}, "streaming text needs a tokenizer"),
    ({}, [[1]], replace(ONE, stop_strings=("a",)), {}, "stop_strings needs a tokenizer"),
    ({"tokenizer": BYTES}, [[1]], ONE, {}, "wrong tokenizer: it has 259 tokens, the model 40"),
    ({"eos_id": V}, [[1]], ONE, {}, "eos_id 40 is outside the vocabulary of 40"),
    ({"guessing": METHODS["hierarchy"]}, [[1]], ONE, {}, "guessing reads the database 'model', and sources hold none"),
    ({"guessing": METHODS["rest"]}, [[1]], ONE, {}, "guessing reads the database 'corpus'"),
    ({"guessing": Guessing(model=MODEL)}, [[1]], ONE, {}, "names a draft model, and sources hold no parameters of it"),
])
def test_requests_without_sense_are_one_sentence_before_anything_runs(fields, prompts, sampling, keywords, message):
    with pytest.raises(ValueError, match=message):
        serve(engine(params=None, **fields), prompts, sampling, **keywords)


def test_an_engine_needs_rows():
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        EngineConfig(batch_size=0)
