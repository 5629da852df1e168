"""From attempts to rewards: what judges read, what rewards see, what the log says, and the page for people."""

import dataclasses
import html

import numpy as np
import pytest

from jaxlm.reward.compose import compose
from jaxlm.reward.presets import PRESETS
from jaxlm.reward.trajectory import NO_CALL, UNKNOWN_TOOL, Trajectory
from jaxlm.rl.arithmetic import ARITHMETIC
from jaxlm.rl.env import EnvState
from jaxlm.rl.episode import Episode
from jaxlm.rl.pages import write_page
from jaxlm.rl.score import numbers, prediction, score, tool_similarity
from jaxlm.rl.task import Task

NAMES = [tool.name for tool in ARITHMETIC]
TEACHER = ({"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]},
           {"role": "tool", "content": "5"}, {"role": "assistant", "content": "\\boxed{5}"})
TASK = Task(id="t", question="2 + 3?", tools=("add", "divide"), answers=(5,), judge="numeric", domain="sums",
            teacher=TEACHER)
CALLS = Task(id="c", question="call add", tools=("add",), answers=([{"add": {"a": [2], "b": [3]}}],), judge="calls",
             domain="calls")
MENTOR = compose(PRESETS["mentor"], Trajectory._fields)


def attempt(*turns, calls=(), ended=True, reason="answered", task=0, group=0, **counts):
    state = EnvState("t", ("add", "divide"), turns=len(turns), calls=tuple(calls), reason=reason, **counts)
    return Episode(group=group, sample=0, task=task, ids=(1, 2, 3, 4, 5), sampled=(False, False, True, True, False),
                   logprobs=(0.0,) * 5, kept=(1.0,) * 5, turns=turns, observations=(("5",),) * (len(turns) - 1),
                   ended=ended, env=state)


GOOD = attempt("<tool_call>x</tool_call>", "so \\boxed{5}", calls=[("add", {"b": 3.0, "a": 2})])


@pytest.mark.parametrize(("episode", "reward"), [
    (GOOD, 1.1),
    (dataclasses.replace(GOOD, turns=("", "\\boxed{6}")), 0.16),
    (attempt("\\boxed{5.0}"), 0.8),
    (attempt("\\boxed{5}", calls=[("add", {}), ("cube", {})]), 1.0),       # the set of known tools is the teacher's
    (attempt("\\boxed{5}", calls=[("multiply", {})]), 0.7),                # a tool that the task does not offer
    (attempt("\\boxed{6}", calls=[("divide", {})]), 0.1),
    (attempt("5"), 0.1), (attempt("\\boxed{}"), 0.1), (attempt("\\boxed{5} \\boxed{5"), 0.1),
    (attempt("\\boxed{5}", ended=False, reason="length"), 0.0),
    (attempt("", "", "\\boxed{5}", ended=False, reason="turns"), 0.0),
])
def test_mentor_s_values(episode, reward):
    assert score([episode], [TASK], NAMES, MENTOR, 10).reward.reward == pytest.approx([reward])


def test_only_the_last_turn_answers():
    assert prediction(attempt("\\boxed{1}", "no box"), TASK) is None
    assert prediction(attempt("\\boxed{1}", "\\boxed{2} \\boxed{3}"), TASK) == "3"


def test_tasks_that_ask_for_calls_are_judged_by_them():
    right = attempt("x", calls=[("add", {"a": 2, "b": 3})], reason="turns", ended=False, task=1)
    wrong = dataclasses.replace(right, env=right.env._replace(calls=(("add", {"a": 2, "b": 4}),)))
    none = attempt("no call", task=1)
    found = score([right, wrong, none], [TASK, CALLS], NAMES, MENTOR, 10)
    assert found.trajectory.correct.tolist() == [1, 0, 0]
    assert found.trajectory.answered.tolist() == [True, True, False]
    assert found.trajectory.ended.tolist() == [True, True, True]  # one turn is all that such a task has


def test_to_call_nothing_may_be_right():
    none = dataclasses.replace(CALLS, answers=([],))
    silent, call = attempt("I cannot."), attempt("x", calls=[("add", {"a": 2, "b": 3})], reason="turns", ended=False)
    garbled = dataclasses.replace(silent, env=silent.env._replace(unparsable=1))
    found = score([silent, call, garbled], [none], NAMES, MENTOR, 10).trajectory
    assert found.correct.tolist() == [1, 0, 0] and found.answered.tolist() == [True, True, False]


def test_what_rewards_see():
    unknown = attempt("<tool_call>", "x", calls=[("add", {"a": 1}), ("multiply", {"a": 1})], failed=1, invalid=1,
                      unparsable=2)
    trajectory = score([GOOD, unknown], [TASK], NAMES, MENTOR, 10).trajectory
    assert trajectory.tool_ids[0, 0] == NAMES.index("add") and trajectory.tool_ids[1, 1] == UNKNOWN_TOOL
    assert np.all(trajectory.tool_ids[:, 2:] == NO_CALL)
    assert trajectory.call_keys[0, 0] == trajectory.teacher_call_keys[0, 0] != trajectory.call_keys[1, 0]
    assert trajectory.well_formed.tolist() == [True, False]
    assert (trajectory.num_calls.tolist(), trajectory.num_unparsable.tolist()) == ([1, 4], [0, 2])
    assert trajectory.tokens.shape == (2, 8) and trajectory.sampled.sum(axis=1).tolist() == [2, 2]


def test_numbers_of_a_batch_by_hand():
    other = attempt("\\boxed{6}", calls=[("divide", {}), ("cube", {})], invalid=1)
    values = numbers(score([GOOD, other], [TASK], NAMES, MENTOR, 10), len(NAMES))
    assert values["correct"] == 0.5 and values["reward"] == pytest.approx((1.1 + 0.0) / 2)
    assert values["invalid_calls"] == pytest.approx(1 / 3) and values["calls"] == 1.5
    assert values["terms/correctness"] == 0.5 and values["missing/correctness"] == 0 and values["gates/ended"] == 1
    assert values["tokens/sampled"] == 4 and values["length_max"] == 2


def test_similarity_of_tools_is_one_when_equal_and_zero_when_apart():
    same = score([GOOD], [TASK], NAMES, MENTOR, 10).trajectory
    apart = score([attempt("x", calls=[("divide", {})])], [TASK], NAMES, MENTOR, 10).trajectory
    assert tool_similarity(same, 12) == pytest.approx(1, abs=1e-4)
    assert tool_similarity(apart, 12) == pytest.approx(0, abs=1e-3)
    # Half of the calls are the teacher's: JSD of (1/2, 1/2) and (1, 0) is 0.3113 bits.
    half = score([GOOD, attempt("x", calls=[("divide", {})])], [TASK], NAMES, MENTOR, 10).trajectory
    assert tool_similarity(half, 12) == pytest.approx(1 - 0.3113, abs=1e-3)


def test_a_page_shows_everything_and_escapes_it(tmp_path):
    evil = "<script>alert('x')</script>"
    episodes = [GOOD, dataclasses.replace(GOOD, turns=(f"{evil}<tool_call>{evil}", evil), observations=((evil,),))]
    scored = score(episodes, [TASK], NAMES, MENTOR, 10)
    path = tmp_path / "pages" / "000010.html"
    write_page(path, scored, episodes, [dataclasses.replace(TASK, question=evil)])
    page = path.read_text()
    assert "<script>" not in page and page.count(html.escape(evil)) == 5
    assert "Iteration 10" in page and "reward 1.100" in page and "match_exact_set" in page and "passed" in page
    assert [one.name for one in path.parent.iterdir()] == ["000010.html"]
