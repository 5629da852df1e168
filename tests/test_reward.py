"""Reward terms against plain Python on lists, published value tables, and one set of properties for every term."""

import dataclasses
import inspect
import itertools
import json
import logging
import zlib
from collections import Counter
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.config import from_json, to_json
from jaxlm.reward.compose import GATES, OPTIONS, GateConfig, GateName, RewardConfig, TermConfig, compose, needs
from jaxlm.reward.presets import PRESETS
from jaxlm.reward.terms import TERMS, Missing, TermName
from jaxlm.reward.tool_match import similarity
from jaxlm.reward.trajectory import NO_CALL, UNKNOWN_TOOL, Trajectory, encode_calls, present, summary

TOOLS = ("add", "sqrt", "floor")
OPTIONS_OF = {"overlong": {"buffer": 3}, "tool_similarity": {"num_tools": 3}, "group_tool_similarity": {"num_tools": 3}}
T = 12


def calls_of(names):
    return [(name, {}) for name in names]


def trajectory(ours, theirs, **fields):
    """Rows of calls of the policy and of the teacher; everything else as a good row has it, unless given."""
    num_rows = len(ours)
    a, b = (encode_calls(rows, [TOOLS] * num_rows) for rows in (ours, theirs))
    full = lambda value, dtype: np.full(num_rows, value, dtype)
    values = {
        "tokens": np.zeros((num_rows, T), np.int32), "sampled": np.ones((num_rows, T), np.int32),
        "group": full(0, np.int32),
        "tool_ids": a.tool_ids, "call_keys": a.call_keys, "params": a.params, "values": a.values,
        "teacher_tool_ids": b.tool_ids, "teacher_call_keys": b.call_keys, "teacher_params": b.params,
        "teacher_values": b.values,
        "num_turns": full(2, np.int32), "num_calls": np.array([len(row) for row in ours], np.int32),
        "num_unparsable": full(0, np.int32), "num_failed": full(0, np.int32),
        "ended": full(True, bool), "answered": full(True, bool), "well_formed": full(True, bool),
        "correct": full(1, np.float32), "max_length": full(T, np.int32),
    }
    return Trajectory(**{name: jnp.asarray(value) for name, value in (values | fields).items()})


def random_calls(rng, most, unknown=0.2):
    def call():
        name = "cube" if rng.random() < unknown else TOOLS[rng.integers(len(TOOLS))]
        return name, {key: int(rng.integers(2)) for key in "abc" if rng.random() < 0.5}
    return [call() for _ in range(rng.integers(most + 1))]


NUM_ROWS = 240


@pytest.fixture(scope="module")
def lists():
    """Calls of the policy and of the teacher, many of them equal, in some order."""
    rng = np.random.default_rng(0)
    theirs = [random_calls(rng, 3, unknown=0.05 * (i % 7 == 0)) for i in range(NUM_ROWS)]
    ours = []
    for i, row in enumerate(theirs):
        if i % 3 == 0:
            ours.append(random_calls(rng, 4))
        else:
            ours.append([row[j] for j in rng.permutation(len(row))] if i % 3 == 1 else row + random_calls(rng, 1))
    return ours, theirs


@pytest.fixture(scope="module")
def rollouts(lists):
    rng = np.random.default_rng(1)
    coin = lambda: rng.random(NUM_ROWS) < 0.7
    return trajectory(
        # No group lies in both halves.
        *lists, group=(rng.integers(0, 20, NUM_ROWS) + 20 * (np.arange(NUM_ROWS) >= NUM_ROWS // 2)).astype(np.int32),
        tokens=rng.integers(0, 9, (NUM_ROWS, T)).astype(np.int32),
        sampled=(rng.random((NUM_ROWS, T)) < 0.6).astype(np.int32),
        num_unparsable=(rng.random(NUM_ROWS) < 0.2).astype(np.int32), ended=coin(), answered=coin(),
        well_formed=coin(), correct=np.where(rng.random(NUM_ROWS) < 0.1, np.nan, coin()).astype(np.float32))


def all_terms(t):
    return {name: term.function(t, **OPTIONS_OF.get(name, {})) for name, term in TERMS.items()}


def run(name, t, **options):
    """One term, compiled: op by op takes longer."""
    return jax.jit(lambda t: TERMS[name].function(t, **options))(t)


@pytest.fixture(scope="module")
def jitted():
    return jax.jit(all_terms)


@pytest.fixture(scope="module")
def values(jitted, rollouts):
    return jitted(rollouts)


# Every term.

def test_names_and_options_are_those_of_the_code():
    assert get_args(TermName) == tuple(TERMS)
    assert get_args(GateName) == tuple(GATES)
    assert {term.missing for term in TERMS.values()} <= {*get_args(Missing)}
    options = {name for term in TERMS.values() for name in [*inspect.signature(term.function).parameters][1:]}
    assert options == {*OPTIONS} < {field.name for field in dataclasses.fields(TermConfig)}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_gives_one_float_a_row_and_is_missing_only_with_a_reason(name, values, rollouts):
    assert values[name].shape == (NUM_ROWS,) and values[name].dtype == jnp.float32
    allowed = np.zeros(NUM_ROWS, bool)
    if "correct" in TERMS[name].needs:
        allowed |= np.isnan(rollouts.correct)
    if name.startswith("match") or name.endswith("similarity"):
        allowed |= np.all(rollouts.teacher_tool_ids == NO_CALL, axis=1)
    np.testing.assert_array_equal(~np.isfinite(values[name]), allowed)
    assert np.nanstd(values[name]) > 0, "a constant proves nothing"


def test_eager_values_equal_jitted_ones(values, rollouts):
    for name in ("match_ordered", "toolrl_match", "length_group"):
        eager = TERMS[name].function(rollouts, **OPTIONS_OF.get(name, {}))
        np.testing.assert_allclose(eager, values[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_may_be_permuted(jitted, values, rollouts):
    order = np.random.default_rng(2).permutation(NUM_ROWS)
    permuted = jitted(jax.tree.map(lambda x: x[order], rollouts))
    for name, value in permuted.items():
        np.testing.assert_allclose(value, values[name][order], rtol=1e-6, atol=1e-6, err_msg=name)


def test_terms_can_be_mapped_over_an_axis(values, rollouts):
    halves = jax.tree.map(lambda x: x.reshape(2, NUM_ROWS // 2, *x.shape[1:]), rollouts)
    for name, value in jax.jit(jax.vmap(all_terms))(halves).items():
        np.testing.assert_allclose(value.reshape(NUM_ROWS), values[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_unused_slots_and_what_the_policy_did_not_write_change_nothing(jitted, values, rollouts):
    def pad(name, *more):
        return jnp.pad(getattr(rollouts, name), ((0, 0), *more), constant_values=-1)
    wider = rollouts._replace(
        tokens=jnp.pad(rollouts.tokens[:, ::-1] + 1, ((0, 0), (5, 3))),
        sampled=jnp.pad(rollouts.sampled, ((0, 0), (5, 3))),
        **{name: pad(name, (0, 2)) for name in ("tool_ids", "call_keys", "teacher_tool_ids", "teacher_call_keys")},
        **{name: pad(name, (0, 2), (0, 3)) for name in ("params", "values", "teacher_params", "teacher_values")})
    for name, value in jitted(wider).items():
        np.testing.assert_allclose(value, values[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_reads_what_it_declares_and_nothing_else(name):
    t = trajectory([calls_of(["add"])], [calls_of(["add"])])
    term, options = TERMS[name], OPTIONS_OF.get(name, {})
    bare = Trajectory(*t[:3], **{field: getattr(t, field) for field in term.needs})
    jax.eval_shape(lambda t: term.function(t, **options), bare)
    for field in term.needs:
        with pytest.raises((AttributeError, TypeError, ValueError, AssertionError)):
            jax.eval_shape(lambda t: term.function(t, **options), bare._replace(**{field: None}))


# Tool match against plain Python on lists.

def known(row):
    return [call for call in row if call[0] in TOOLS]


def reference_match(mode, ours, theirs):
    student, teacher = {name for name, _ in known(ours)}, {name for name, _ in theirs}
    if not theirs:
        return np.nan
    if mode == "exact_set":
        return float(student == teacher)
    if mode == "any_overlap":
        return float(bool(student & teacher))
    if mode == "set_f1":
        if not student & teacher:
            return 0.0
        precision, recall = len(student & teacher) / len(student), len(student & teacher) / len(teacher)
        return 2 * precision * recall / (precision + recall)
    if mode == "ordered":
        return float([name for name, _ in known(ours)] == [name for name, _ in theirs])
    return float(known(ours) == theirs)


@pytest.mark.parametrize("mode", ["exact_set", "any_overlap", "set_f1", "ordered", "ordered_with_arguments"])
def test_tool_match_is_that_of_lists(mode, lists, values):
    want = [reference_match(mode, *rows) for rows in zip(*lists, strict=True)]
    np.testing.assert_allclose(values[f"match_{mode}"], want, rtol=1e-6)


def jaccard(a, b):
    a, b = Counter(a), Counter(b)
    return (a & b).total() / (a | b).total() if a or b else 1.0


def reference_toolrl(ours, theirs, unparsable):
    if not theirs:
        return 0.0
    if unparsable:
        return -3.0
    score, most, free = jaccard([n for n, _ in ours], [n for n, _ in theirs]), 1.0, list(range(len(ours)))
    for name, arguments in theirs:
        most += 1 + len(arguments)
        matches = [(jaccard(ours[i][1].keys(), arguments.keys())
                    + sum(ours[i][1].get(key) == value for key, value in arguments.items()), -i)
                   for i in free if ours[i][0] == name]
        best, index = max(matches, default=(0, 0))
        if best > 0:
            free.remove(-index)
            score += best
    return 6 * score / most - 3


def test_toolrl_is_that_of_lists(lists, values, rollouts):
    unparsable = np.asarray(rollouts.num_unparsable)
    want = [reference_toolrl(*rows, bad) for *rows, bad in zip(*lists, unparsable, strict=True)]
    np.testing.assert_allclose(values["toolrl_match"], want, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.round(want, 4))) > 20


def test_toolrl_values_by_hand():
    rows = [
        ([("add", {"a": 1, "b": 2})], [("add", {"a": 1, "b": 2})], 3),
        ([("add", {"b": 2.0, "a": 1})], [("add", {"a": 1, "b": 2})], 3),
        ([], [("add", {"a": 1})], -3),
        ([("sqrt", {"a": 1})], [("add", {"a": 1})], -3),
        ([("add", {"a": 1})], [], 0),
        ([("add", {"a": 1, "c": 2})], [("add", {"a": 1, "b": 2})], 0.5),    # s = 1 + 1/3 + 1 of 4
        ([("add", {"a": True})], [("add", {"a": 1})], 1),                   # s = 1 + 1 + 0 of 3
        ([("add", {}), ("add", {})], [("add", {})], 1.5),                   # s = 1/2 + 1 of 2
        # The first of the teacher's calls takes the better of two; the second gets what is left: s = 1 + 2 + 1 of 5.
        ([("add", {"a": 2}), ("add", {"a": 1})], [("add", {"a": 1}), ("add", {"a": 3})], 1.8),
        # Greedy in the teacher's order: {a: 1, b: 1} takes {a: 1, b: 2} (1 + 1), so that {a: 1, b: 2}, which would have
        # met it exactly, gets nothing: s = 1/2 + 2 of 7.
        ([("add", {"a": 1, "b": 2})], [("add", {"a": 1, "b": 1}), ("add", {"a": 1, "b": 2})], 6 * 2.5 / 7 - 3),
        # A call that scores nothing is not taken.
        ([("add", {"x": 1})], [("add", {"a": 1}), ("add", {"x": 1})], 6 * 2.5 / 5 - 3),
    ]
    ours, theirs, want = zip(*rows, strict=True)
    t = trajectory(ours, theirs)
    np.testing.assert_allclose(run("toolrl_match", t), want, rtol=1e-5, atol=1e-6)
    unparsable = run("toolrl_match", t._replace(num_unparsable=jnp.ones(len(rows), jnp.int32)))
    np.testing.assert_array_equal(unparsable, [-3 if gold else 0 for gold in theirs])


def test_sets_ignore_order_and_counts_and_sequences_do_not():
    ours = [calls_of(names.split()) for names in ("add sqrt", "sqrt add", "add sqrt add", "add", "add cube sqrt")]
    t = trajectory(ours, [calls_of(["add", "sqrt"])] * 5)
    np.testing.assert_array_equal(run("match_exact_set", t), [1, 1, 1, 0, 1])
    np.testing.assert_array_equal(run("match_ordered", t), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(run("valid_tools", t), [1, 1, 1, 1, 0])
    more = t._replace(num_unparsable=jnp.array([0, 1, 0, 0, 0]))
    np.testing.assert_array_equal(run("valid_calls", more), [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(run("valid_tools", more), [1, 1, 1, 1, 0])


def jsd(p, q):
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    kl = lambda a, b: sum(x * np.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0)
    return (kl(p, m) + kl(q, m)) / 2


def test_similarity_is_one_minus_the_divergence():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, (2, 30, 4)).astype(np.float32)
    a[:, 0] += 1
    b[:, 1] += 1
    a[0], b[0] = (3, 0, 2, 0), (0, 1, 0, 4)
    compiled = jax.jit(similarity)
    want = [1 - jsd(x.astype(float), y.astype(float)) for x, y in zip(a, b, strict=True)]
    assert want[0] == 0
    np.testing.assert_allclose(compiled(a, b), want, atol=1e-4)
    np.testing.assert_allclose(compiled(a, b), compiled(b, a), rtol=1e-6)
    np.testing.assert_allclose(compiled(a, 2 * a), np.ones(30), atol=1e-6)


def test_similarity_of_rows_and_of_groups():
    ours = [calls_of(names.split()) for names in ("add", "sqrt", "", "cube", "add", "add cube")]
    theirs = [calls_of(names.split()) for names in ("add sqrt", "add sqrt", "add", "add", "", "add add")]
    t = trajectory(ours, theirs, group=np.array([7, 7, 3, 5, 2, 1], np.int32))
    half = 1 - jsd(np.array([1.0, 0]), np.array([1.0, 1]))
    row, group = (run(name, t, num_tools=3) for name in ("tool_similarity", "group_tool_similarity"))
    np.testing.assert_allclose(row, [half, half, 0, 0, np.nan, half], atol=1e-4)
    np.testing.assert_allclose(group, [1, 1, 0, 0, np.nan, half], atol=1e-4)


# Lengths.

def with_lengths(lengths, **fields):
    rows = len(lengths)
    sampled = np.arange(T)[None] < np.array(lengths)[:, None]
    return trajectory([[]] * rows, [[]] * rows, sampled=sampled.astype(np.int32), **fields)


def test_overlong_counts_tokens_is_continuous_and_never_below_minus_one():
    t = with_lengths(range(T + 1), max_length=np.int32(10))
    want = [0, 0, 0, 0, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    np.testing.assert_allclose(run("overlong", t, buffer=4), want)
    # Tools may say as much as they like.
    said = t._replace(tokens=jnp.ones((T + 1, 50), jnp.int32), sampled=jnp.pad(t.sampled, ((0, 0), (0, 50 - T))))
    np.testing.assert_allclose(run("overlong", said, buffer=4), want)
    fine = with_lengths([5] * 200, max_length=np.linspace(4, 12, 200).astype(np.float32))
    value = np.asarray(run("overlong", fine, buffer=4))
    assert np.abs(np.diff(value)).max() < 0.011 and value.min() == -1 and value.max() == 0


def test_cosine_length():
    t = with_lengths([0, 6, 12, 0, 6, 12], max_length=np.int32(12), correct=np.array([1, 1, 1, 0, 0, 0], np.float32))
    cosine = lambda t, **options: run("length_cosine", t, **options)
    np.testing.assert_allclose(cosine(t), [1, 0.75, 0.5, -1, -0.75, -0.5], atol=1e-6)
    np.testing.assert_allclose(cosine(t, correct_range=(2, 1), wrong_range=(-10, 0)), [2, 1.5, 1, -10, -5, 0],
                               atol=1e-6)
    beyond = t._replace(max_length=jnp.int32(6))
    np.testing.assert_allclose(cosine(beyond), [1, 0.5, 0.5, -1, -0.5, -0.5], atol=1e-6)


def test_length_within_the_group():
    t = with_lengths([2, 4, 6, 4, 4, 9], group=np.array([0, 0, 0, 1, 1, 2], np.int32),
                     correct=np.array([0, 1, 1, 1, 0, np.nan], np.float32))
    np.testing.assert_allclose(run("length_group", t), [0, 0, -0.5, 0, 0, np.nan], atol=1e-6)
    np.testing.assert_allclose(run("length_group", t._replace(correct=jnp.ones(6))),
                               [0.5, 0, -0.5, 0, 0, 0], atol=1e-6)


# Published values.

MATCHES = {
    # The teacher calls sqrt(x=4), then add(a=1): the right set, out of order, other arguments, one of two, none.
    "same": [("sqrt", {"x": 4}), ("add", {"a": 1})],
    "order": [("add", {"a": 1}), ("sqrt", {"x": 4}), ("add", {"a": 1})],
    "arguments": [("sqrt", {"x": 5}), ("add", {"a": 1})],
    "part": [("sqrt", {"x": 4}), ("floor", {"x": 4})],
    "none": [("floor", {"x": 4})],
}
SCORES = {  # of the tool match, in the order above
    "mentor": [1, 1, 1, 0, 0], "mentor_overlap": [1, 1, 1, 1, 0], "mentor_f1": [1, 1, 1, 0.5, 0],
    "mentor_no_match": [0] * 5, "mentor_ordered": [1, 0, 1, 0, 0], "mentor_ordered_arguments": [1, 0, 0, 0, 0],
}


def mentor_rows():
    """All of match x correct x valid, then the gates: not ended, no answer, no teacher."""
    rows = list(itertools.product(MATCHES, (1, 0), (True, False)))
    ours = [MATCHES[match] + ([] if valid else [("cube", {})]) for match, _, valid in rows] + [MATCHES["same"]] * 4
    theirs = [MATCHES["same"]] * (len(rows) + 3) + [[]]
    flag = lambda *wrong: np.isin(np.arange(len(ours)), [len(rows) + i for i in wrong], invert=True)
    correct = np.array([correct for _, correct, _ in rows] + [1, 1, 1, 1], np.float32)
    return rows, trajectory(ours, theirs, correct=correct, ended=flag(0, 1), answered=flag(1, 2))


@pytest.mark.parametrize("preset", SCORES)
def test_mentor_and_its_variants(preset):
    rows, t = mentor_rows()
    valid_weight = 0.0 if preset == "mentor_overlap" else 0.1
    want = []
    for match, correct, valid in rows:
        score = dict(zip(MATCHES, SCORES[preset], strict=True))[match]
        want.append((0.7 + 0.3 * score if correct else 0.06 * score) + valid_weight * valid)
    gates = [0, 0, 0.1, 0.8 if preset == "mentor_no_match" else 0.1]
    got = compose(PRESETS[preset], present(t))(t)
    np.testing.assert_allclose(got.reward, want + gates, atol=1e-6)
    assert all(int(count) == 0 for count in got.missing.values())


def test_the_table_of_the_specification():
    rows, t = mentor_rows()
    reward = compose(PRESETS["mentor"], present(t))(t).reward
    got = dict(zip(rows, np.asarray(reward), strict=False))
    table = [("same", 1, True, 1.10), ("same", 1, False, 1.00), ("none", 1, True, 0.80), ("none", 1, False, 0.70),
             ("same", 0, True, 0.16), ("none", 0, True, 0.10), ("same", 0, False, 0.06), ("none", 0, False, 0.00)]
    for *row, want in table:
        assert got[tuple(row)] == pytest.approx(want, abs=1e-6), row
    # Neither ended nor answered is decided by the first gate.
    np.testing.assert_allclose(reward[-4:], [0.0, 0.0, 0.1, 0.1])


def test_sparse():
    rows, t = mentor_rows()
    got = compose(PRESETS["sparse"], present(t))(t).reward
    want = [1.0 if correct else 0.1 for _, correct, _ in rows] + [0, 0, 0.1, 1]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_toolrl_preset_adds_the_format():
    t = trajectory([MATCHES["same"]] * 2, [MATCHES["same"]] * 2, well_formed=np.array([True, False]))
    np.testing.assert_allclose(compose(PRESETS["toolrl"], present(t))(t).reward, [4, 3], atol=1e-6)


def test_calls_of_no_tool_earn_validity_and_failed_ones_count_as_used():
    t = trajectory([[], MATCHES["same"]], [MATCHES["same"]] * 2, num_failed=np.array([0, 2], np.int32))
    np.testing.assert_allclose(compose(PRESETS["mentor"], present(t))(t).reward, [0.8, 1.1], atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_finite_rewards_of_permuted_rows_and_a_round_trip(preset, rollouts):
    config = PRESETS[preset]
    assert from_json(RewardConfig, json.loads(json.dumps(to_json(config)))) == config
    t = rollouts._replace(correct=jnp.nan_to_num(rollouts.correct))
    function = compose(config, present(t))
    got, order = function(t), np.random.default_rng(4).permutation(NUM_ROWS)
    assert np.isfinite(got.reward).all() and got.reward.dtype == jnp.float32
    assert set(got.terms) == {term.name for term in config.terms} == set(got.missing)
    permuted = function(jax.tree.map(lambda x: x[order], t))
    np.testing.assert_array_equal(permuted.reward, got.reward[order])


# Composition.

def simple(*terms, **kwargs):
    return RewardConfig(terms=tuple(TermConfig(**term) for term in terms), **kwargs)


def test_missing_terms_drop_or_skip_a_row_and_are_counted():
    # Not judged; no teacher; neither; all there; not judged, but a gate decides.
    taught, judged = np.array([1, 0, 0, 1, 1], bool), np.array([0, 1, 0, 1, 0], bool)
    t = trajectory([calls_of(["add"])] * 5, [calls_of(["add"] * n) for n in taught.astype(int)],
                   correct=np.where(judged, 1, np.nan).astype(np.float32), ended=np.array([1, 1, 1, 1, 0], bool))
    ended = (GateConfig(name="ended", reward=-5.0),)
    c, m = {"name": "correctness"}, {"name": "match_exact_set", "weight": 2.0}
    run = lambda *terms: compose(simple(*terms, gates=ended), present(t))(t)
    got = run(c, m)
    np.testing.assert_array_equal(got.reward, [np.nan, 1, np.nan, 3, -5])
    assert {name: int(count) for name, count in got.missing.items()} == {"correctness": 2, "match_exact_set": 2}
    np.testing.assert_array_equal(got.terms["correctness"], [np.nan, 1, np.nan, 1, np.nan])
    np.testing.assert_array_equal(got.gates["ended"], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(run(c | {"missing": "skip"}, m | {"missing": "drop"}).reward,
                                  [2, np.nan, np.nan, 3, -5])
    np.testing.assert_array_equal(run(c | {"missing": "skip"}, m).reward, [2, 1, 0, 3, -5])
    # A damped weight is not known where the answer is not.
    damped = m | {"when_wrong": 0.5}
    np.testing.assert_array_equal(run(c | {"missing": "skip"}, damped).reward, [0, 1, 0, 3, -5])
    # For the log only: counted, without effect.
    log_only = run(c | {"weight": 0.0}, {"name": "valid_tools"})
    np.testing.assert_array_equal(log_only.reward, [1, 1, 1, 1, -5])
    assert int(log_only.missing["correctness"]) == 2


def test_partly_right_answers_are_damped_partly_and_rewards_are_clipped():
    t = trajectory([calls_of(["add"])] * 3, [calls_of(["add"])] * 3, correct=np.array([0, 0.5, 1], np.float32))
    config = simple({"name": "correctness"}, {"name": "match_exact_set", "when_wrong": 0.2})
    np.testing.assert_allclose(compose(config, present(t))(t).reward, [0.2, 1.1, 2])
    clipped = dataclasses.replace(config, clip=(0.5, 1.5), base=0.1)
    np.testing.assert_allclose(compose(clipped, present(t))(t).reward, [0.5, 1.2, 1.5])


def test_a_reward_refuses_trajectories_without_what_it_reads():
    config = PRESETS["mentor"]
    assert set(needs(config)) == {"ended", "answered", "teacher_tool_ids", "tool_ids", "correct"}
    t = trajectory([[]], [[]])
    for field, who in needs(config).items():
        with pytest.raises(ValueError, match=f"{who} needs '{field}'"):
            compose(config, present(t) - {field})
        with pytest.raises(ValueError, match=f"{who} needs '{field}'"):
            compose(config, present(t))(t._replace(**{field: None}))
    with pytest.raises(ValueError, match=r"no field 'corect' .did you mean 'correct'"):
        compose(config, ["corect"])
    with pytest.raises(AssertionError):
        compose(config, present(t))(t._replace(correct=jnp.ones(2)))


@pytest.mark.parametrize("make, message", [
    (lambda: TermConfig(name="corectness"), "unknown reward term 'corectness' .did you mean 'correctness'"),
    (lambda: TermConfig(name="overlong"), "overlong needs the option 'buffer'"),
    (lambda: TermConfig(name="overlong", buffer=0), "buffer must be at least 1, got 0"),
    (lambda: TermConfig(name="format", buffer=3), "format has no option 'buffer'"),
    (lambda: TermConfig(name="format", weight=float("nan")), "weight must be finite"),
    (lambda: TermConfig(name="format", weight=0.0, when_wrong=0.5), "no effect on a weight of 0"),
    (lambda: TermConfig(name="length_cosine", wrong_range=(0.0, float("inf"))), "wrong_range must be finite"),
    (lambda: GateConfig(name="end", reward=0.0), "unknown reward gate 'end' .did you mean 'ended'"),
    (lambda: GateConfig(name="ended", reward=float("inf")), "must be finite"),
    (lambda: simple({"name": "format"}, {"name": "format"}), "term format stands there twice"),
    (lambda: simple({"name": "format"}, gates=(GateConfig(name="ended", reward=0.0),) * 2), "gate ended stands"),
    (simple, "at least one term"),
    (lambda: simple({"name": "format", "weight": 0.0}), "at least one term"),
    (lambda: simple({"name": "format"}, clip=(1.0, 0.0)), "clip must be"),
    (lambda: simple({"name": "format"}, base=float("nan")), "base must be finite"),
])
def test_wrong_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Arrays of calls.

def test_calls_become_arrays():
    calls = encode_calls([[("sqrt", {"x": 4.0}), ("cube", {"x": 2, "y": "é"})], []], [TOOLS, TOOLS])
    np.testing.assert_array_equal(calls.tool_ids, [[1, UNKNOWN_TOOL], [NO_CALL, NO_CALL]])
    crc = lambda text: zlib.crc32(text.encode()) & 0x7FFFFFFF
    assert calls.call_keys[0, 0] == crc('["sqrt",{"x":4}]')
    assert calls.params[0].tolist() == [[crc('"x"'), -1], [crc('"x"'), crc('"y"')]]
    assert calls.values[0].tolist() == [[crc("4"), -1], [crc("2"), crc('"\\u00e9"')]]
    assert (calls.params[1] == -1).all() and not calls.num_cut.any()
    for field in calls:
        assert field.dtype == np.int32


def test_shapes_are_powers_of_two_or_as_asked():
    shape = lambda rows, **kwargs: encode_calls(rows, [TOOLS] * len(rows), **kwargs).params.shape
    assert shape([]) == (0, 1, 1) and shape([[]]) == (1, 1, 1)
    assert shape([[("add", {"a": 1, "b": 2, "c": 3})] * 5, []]) == (2, 8, 4)
    assert shape([[("add", {})]], max_calls=3, max_params=5) == (1, 3, 5)


def test_hashes_are_of_values_not_of_their_writing():
    keys = lambda *arguments: [int(encode_calls([[("add", one)]], [TOOLS]).call_keys[0, 0]) for one in arguments]
    same = keys({"a": 1, "b": [2.0, {"c": None, "d": -0.0}]}, {"b": [2, {"d": 0, "c": None}], "a": 1.0})
    assert same[0] == same[1] >= 0
    different = keys({"a": 1}, {"a": True}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": 1.5}, {}, {"a": None})
    assert len({*different}) == len(different)


def test_rows_that_do_not_fit_are_said_and_match_nothing(caplog):
    ours = [calls_of(["add"]) * 3, calls_of(["add"]) * 2, [("add", {"a": 1, "b": 2})]]
    with caplog.at_level(logging.WARNING):
        calls = encode_calls(ours, [TOOLS] * 3, max_calls=2, max_params=1)
    assert "2 of 3 rows have more calls than 2 or calls with more parameters than 1; 2 did not fit" in caplog.text
    np.testing.assert_array_equal(calls.num_cut, [1, 0, 1])
    np.testing.assert_array_equal(calls.tool_ids, [[UNKNOWN_TOOL] * 2, [0, 0], [0, NO_CALL]])
    t = trajectory([calls_of(["add"]) * 2] * 3, [calls_of(["add"]) * 2] * 3, tool_ids=calls.tool_ids)
    for name in ("match_exact_set", "match_any_overlap", "match_ordered", "valid_tools"):
        assert float(run(name, t)[0]) == 0, name


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="1 rows of calls, but lists of tools for 2"):
        encode_calls([[]], [TOOLS, TOOLS])
    with pytest.raises(ValueError, match="row 0: the tools must be a list that names each once"):
        encode_calls([[]], ["add"])
    with pytest.raises(ValueError, match="row 0: the tools must be a list that names each once"):
        encode_calls([[]], [("add", "add")])
    with pytest.raises(ValueError, match="max_params must be at least 1, got 0"):
        encode_calls([[]], [TOOLS], max_params=0)
    with pytest.raises(ValueError, match="row 1: a call holds what JSON does not have"):
        encode_calls([[], [("add", {"a": {1}})]], [TOOLS] * 2)


def test_hostile_arguments():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    calls = encode_calls([[("add", {"a": deep}), ("add", {"\ud800": "\udfff", "n": float("inf")})]], [TOOLS])
    assert (calls.call_keys >= 0).all()
    while deep:  # or freeing it would recurse
        deep = deep[0]


def test_summary():
    t = trajectory([calls_of(["add", "cube"]), []], [[], []], num_calls=np.array([4, 0], np.int32),
                   num_unparsable=np.array([1, 0], np.int32), num_failed=np.array([1, 0], np.int32),
                   ended=np.array([True, False]))
    got = {name: float(mean.value()) for name, mean in jax.jit(summary)(t).items()}
    assert got == {"length": T, "turns": 2, "calls": 2, "ended": 0.5, "answered": 1, "well_formed": 1,
                   "failed_calls": 0.25, "invalid_calls": 0.5}
    assert set(summary(Trajectory(*t[:3]))) == {"length"}
