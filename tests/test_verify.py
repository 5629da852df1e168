"""Judges on the host: tables of what is equal, and input that tries to take long or to crash."""

import importlib.util
import json
import threading
import time
from typing import get_args

import numpy as np
import pytest

from jaxlm.reward import math_answer
from jaxlm.reward.call_match import match_calls, read_calls
from jaxlm.reward.math_answer import extract_boxed, symbolic_equal
from jaxlm.reward.tags import balanced, toolrl_format
from jaxlm.reward.verify import JUDGES, JudgeName, judge_rows

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra rl")


def judge(name, prediction, *answers):
    return JUDGES[name](prediction, answers)


# Boxes.

@pytest.mark.parametrize("text, want", [
    (r"so \boxed{3}.", "3"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}} and {", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{a\\}", r"a\\"),
    (r"\boxed {3}", "3"),
    (r"$\boxed 3$ is it", "3"),
    (r"\boxed  x + 1 ", "x + 1"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{ 3 }", "3"),
    (r"\boxed{3", None),
    (r"\boxed{1} \boxed{2", None),
    (r"\boxed{}", None),
    (r"\boxed{1} \boxed{ }", None),
    (r"\boxed3", None),
    (r"\boxed", None),
    (r"\boxed $", None),
    (r"\fbox{3}", None),
    ("3", None),
    ("", None),
])
def test_last_box(text, want):
    assert extract_boxed(text) == want


def test_framed_boxes_count_in_references_only():
    assert extract_boxed(r"\fbox{3}", fbox=True) == "3"
    assert extract_boxed(r"\boxed{4} \fbox{3}", fbox=True) == "4"


# Judges.

EQUAL = {
    "numeric": [("5", 5), ("5.0", 5), ("1,234.5", "1234.5"), ("-$3", "-3"), ("$-3.00", -3), ("12 apples", "12"),
                ("5 km/h", 5), ("12 m^2", 12), ("50%", "50"), (r"50\%", 50), ("1/4", 0.25), ("3e-4", 0.0003),
                ("0.3333333", "1/3"), ("\N{MINUS SIGN}5", -5), ("$12$", "12"), ("3,000원", 3000), (r"1{,}234", 1234),
                (r"5 \text{ cm}", 5), (r"30^\circ", 30), ("12.", 12), (".5", 0.5), ("1e3", 1000), ("0.0", 0)],
    "exact": [("Paris", "paris"), (" New   York. ", "new york"), ("“x”", "“x”"), ('"yes"', "Yes"), ("Ａ", "a"),
              ("5", 5), ("서울", "서울")],
    "set": [("1, 2", [2, 1]), ("{1, 2}", "2 and 1"), ("[2.0; 1]", "1,2"), (r"\{1,2\}", "1\n2"), ("B, a", ["A", "b"]),
            ("(1,2),(3,4)", "(3,4),(1,2)"), ("1,1,2", "1,2,1"), ("3", [3]), ("$1, 2$", "2, 1")],
    "calls": [],
    "math": [("12", "12"), (r"\boxed{12}", 12), ("12.0", "12"), (r"\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"),
             (r"\{1,2,3\}", r"\{3,2,1\}"), (r"\frac{\sqrt{2}}{2}", r"\fbox{\frac{1}{\sqrt2}}"), ("1/3", "0.333333"),
             ("(1, 2)", "(1,2)")],
}
DIFFERENT = {
    "numeric": [("5", 6), ("12 3", 12), ("5-6", 5), ("1,23", 123), ("", 5), ("five", 5), ("10000001", "10000000"),
                ("1e9999", 5), ("1/0", 0), ("nan", 5), ("5 or 6", 5), ("9" * 1000, 9), ("-5", 5), ("true", 1)],
    "exact": [("Paris, France", "Paris"), ("", "x"), ("1.5", "15")],
    "set": [("1, 1, 2", "1, 2, 2"), ("1", [1, 2]), ("1,2,3", [1, 2]), ("", [1]), ("(1,2)", ["(1,2)", "(3,4)"])],
    "calls": [],
    "math": [("13", "12"), ("", "12"), (r"\boxed{13}", "12"), ("5 or 6", "6"), ("(2,1)", "(1,2)"), ("0.33", "1/3"),
             ("x+1", "x+2")],
}


def test_names_are_those_of_the_code():
    assert get_args(JudgeName) == tuple(JUDGES) and set(EQUAL) == set(DIFFERENT) == set(JUDGES)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=needs_math_verify if name == "math" else ()) for name in JUDGES if name != "calls"])
def test_judges(name):
    for prediction, answer in EQUAL[name]:
        assert judge(name, prediction, answer) is True, (prediction, answer)
        # One of several suffices, and their order does not matter.
        assert judge(name, prediction, "7654321", answer) and judge(name, prediction, answer, "7654321")
    for prediction, answer in DIFFERENT[name]:
        assert judge(name, prediction, answer) is False, (prediction, answer)


@pytest.mark.parametrize("name, answers", [
    *((name, ()) for name in JUDGES), ("numeric", ("no number", "")), ("exact", (" ",)), ("math", ("",)),
    ("math", (r" ",)), ("set", ("",)),
])
def test_without_an_answer_nothing_can_be_judged(name, answers):
    assert JUDGES[name]("5", answers) is None


def test_several_judges_in_one_batch():
    got = judge_rows(["numeric", "exact", "numeric", "exact", "calls"], ["5", None, "x", "b", "[]"],
                     [[5], ["a"], ["none"], ["a", "B"], [5]])
    np.testing.assert_array_equal(got.correct, np.array([1, 0, np.nan, 1, 0], np.float32))
    assert got.correct.dtype == np.float32
    assert got.errors[:4] == (None,) * 4 and got.errors[4].startswith("TypeError")
    # An answer that is not there is wrong even where an empty one would be right.
    assert judge_rows(["calls"], [None], [[[]]]).correct[0] == 0
    with pytest.raises(ValueError, match=r"unknown judge 'numerical' .did you mean 'numeric'"):
        judge_rows(["numerical"], ["5"], [[5]])


# Calls.

AREA = {"area": {"radius": [10], "unit": ["cm", ""]}}
BOOK = {"book.table": {"date": ["April 1, 2024"], "people": [2, "two"], "seats": [["A1", "A2"], ["B1"]],
                       "guest": [{"name": ["Ann"], "age": [30, ""]}], "stage": []}}
GOOD = ("book.table", {"date": "april 1 2024", "people": 2, "seats": ["b1"], "guest": {"name": "ANN"}})


@pytest.mark.parametrize("calls, accepted, want", [
    ([("area", {"radius": 10})], [AREA], True),
    ([("area", {"radius": 10.0, "unit": "CM"})], [AREA], True),
    ([("area", {"radius": 10, "unit": ""})], [AREA], True),
    ([("area", {"radius": 10, "unit": "m"})], [AREA], False),
    ([("area", {"unit": "cm"})], [AREA], False),
    ([("area", {"radius": 10, "color": "red"})], [AREA], False),
    ([("area", {"radius": "10"})], [AREA], False),
    ([("area", {"radius": True})], [{"area": {"radius": [1]}}], False),
    ([("area", {"radius": 1})], [{"area": {"radius": [True]}}], False),
    ([("volume", {"radius": 10})], [AREA], False),
    ([], [AREA], False),
    ([("area", {"radius": 10})] * 2, [AREA], False),
    ([], [], True),
    ([("area", {})], [], False),
    ([GOOD], [BOOK], True),
    ([GOOD, ("area", {"radius": 10})], [AREA, BOOK], True),
    ([(GOOD[0], {**GOOD[1], "seats": ["A2", "A1"]})], [BOOK], False),
    ([(GOOD[0], {**GOOD[1], "guest": {"name": "Ann", "age": 31}})], [BOOK], False),
    ([(GOOD[0], {**GOOD[1], "guest": "Ann"})], [BOOK], False),
    ([(GOOD[0], {**GOOD[1], "stage": 1})], [BOOK], False),
    # The first call fits both, the second only what a greedy choice would have given away.
    ([("f", {"a": 1}), ("f", {"a": 2})], [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}], True),
    ([("f", {"a": 1}), ("f", {"a": 1})], [{"f": {"a": [1, 2]}}, {"f": {"a": [2]}}], False),
    ([("f", {"a": 2}), ("f", {"a": 3}), ("f", {"a": 1})],
     [{"f": {"a": [1, 2]}}, {"f": {"a": [2, 3]}}, {"f": {"a": [2]}}], True),
])
def test_calls_match_accepted_ones_in_any_order(calls, accepted, want):
    assert match_calls(calls, accepted) is want
    assert match_calls(calls[::-1], accepted) is want
    assert match_calls(calls, accepted[::-1]) is want
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert judge("calls", text, accepted) is want
    assert judge("calls", text, [{"other": {}}] * 9, accepted) is want


def test_calls_are_read_from_json():
    assert read_calls('{"name": "f", "arguments": {}}') == [("f", {})]
    assert read_calls("[]") == []
    for text in ("", "5", "null", "[5]", '{"name": "f"}', '{"name": 5, "arguments": {}}',
                 '{"name": "f", "arguments": []}', "{", "[" * 100_000):
        assert read_calls(text) is None
        assert judge("calls", text, [AREA]) is False


@pytest.mark.parametrize("accepted", [[5], ["area"], [{}], [{"a": {}, "b": {}}], [{"a": {"x": 1}}], [{"a": []}]])
def test_accepted_calls_of_another_form_are_refused(accepted):
    with pytest.raises(ValueError, match="an accepted call must be"):
        match_calls([], accepted)


# Tags.

@pytest.mark.parametrize("text, want", [
    ("", True), ("plain", True), ("<think>a</think>b", True),
    ("<think>a</think><tool_call>b</tool_call><tool_call>c</tool_call>", True),
    ("<tool_call>b", False), ("b</tool_call>", False), ("</tool_call><tool_call>", False),
    ("<tool_call><tool_call></tool_call></tool_call>", False), ("<think><tool_call></tool_call></think>", False),
    ("<think><tool_call></think></tool_call>", False), ("<think><tool_call></tool_call>", False),
    ("<think>a</think></think>", False), ("<thinking>", True),
])
def test_balanced_tags(text, want):
    assert balanced(text) is want
    assert balanced("a</think>" + text, opened="think") is want


def test_a_tag_that_the_prompt_opened_must_be_closed():
    assert balanced("a</think>b", opened="think") and not balanced("b", opened="think")
    assert balanced("<answer>b</think>", ("answer",)) is False
    assert balanced("</think>", ("answer",)), "other tags are text"


@pytest.mark.parametrize("text, sections, want", [
    ("<think>a</think>\n<tool_call>\n{}\n</tool_call>", ("think", "tool_call"), True),
    ("<think>a\n\nb</think>\n<tool_call>\n{}\n{}\n</tool_call>\n", ("think", "tool_call"), True),
    ("<think>a</think>\n<tool_call>{}</tool_call>", ("think", "tool_call"), False),
    ("<think>a</think><tool_call>\n{}\n</tool_call>", ("think", "tool_call"), False),
    ("<think>a</think>\n<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>", ("think", "tool_call"), False),
    ("so <think>a</think>\n<response>b</response>", ("think", "response"), False),
    ("<think>a</think>\n<response>b</response>", ("think", "response"), True),
    ("<think>a</think>\n<response>b</response>", ("think", "tool_call"), False),
    ("<think>a</think>\n<tool_call>\n{}\n</tool_call>\n<response>b</response>", ("think", "tool_call", "response"),
     True),
    ("<think>a</think>", ("think",), True), ("<think>a", ("think",), False), ("", ("think",), False),
])
def test_format_of_toolrl(text, sections, want):
    assert toolrl_format(text, sections) is want


# Hostile input.

MEGABYTE = 10**6


@pytest.mark.parametrize("text", [
    "1" * MEGABYTE, "(" * (MEGABYTE // 2) + ")" * (MEGABYTE // 2), "{" * MEGABYTE, "1," * (MEGABYTE // 2),
    " " * MEGABYTE, r"\boxed" * (MEGABYTE // 6), r"\boxed{" * (MEGABYTE // 7), "$" * MEGABYTE,
    "<think>" * (MEGABYTE // 7), "<think></think>\n" * (MEGABYTE // 16), "1/" * (MEGABYTE // 2), "\ufdfa" * 10**5,
    "[" * MEGABYTE, '{"a":' * (MEGABYTE // 5), "a" * 150 + "!", "1" + " " * 190 + "!", "\ud800", "\0",
], ids=lambda text: text[:9])
def test_a_megabyte_takes_no_time(text):
    start = time.monotonic()
    for name in ("numeric", "exact", "set", "calls"):
        got = judge_rows([name], [text], [[[{"f": {"a": [1]}}]] if name == "calls" else ["2", "x"]])
        assert got.correct[0] == 0 and got.errors == (None,), name
    assert extract_boxed(text, fbox=True) is None
    assert isinstance(balanced(text), bool) and toolrl_format(text, ("think", "tool_call")) is False
    assert toolrl_format(text, ("think",)) is False or text.startswith("<think></think>")
    assert time.monotonic() - start < 5


@needs_math_verify
def test_mathematics_that_would_take_for_ever_is_not_equal_and_counted(monkeypatch):
    symbolic_equal("1+1", ["2"])  # starts the worker
    monkeypatch.setattr(math_answer, "SECONDS", 0.5)
    hostile = ["9**9**9**9", "{" * 900, "1" * 1999 + "x", "1+" * MEGABYTE, "\ud800"]
    start = time.monotonic()
    got = judge_rows(["math"] * len(hostile), hostile, [["12"]] * len(hostile))
    # Each may cost its half second and the start of another worker.
    assert time.monotonic() - start < 15
    np.testing.assert_array_equal(got.correct, np.zeros(len(hostile)))
    assert got.errors[0] == "TimeoutError: comparing the answers took longer than 0.5 seconds"
    assert got.errors[3] == f"ValueError: the answer has {2 * MEGABYTE} characters, more than 2000"
    monkeypatch.setattr(math_answer, "SECONDS", 10.0)
    assert judge_rows(["math"], ["1+1"], [["2"]]).correct[0] == 1, "and the next row is judged as ever"


@needs_math_verify
def test_a_worker_that_was_killed_is_replaced():
    symbolic_equal("1+1", ["2"])
    worker = math_answer._IDLE.get_nowait()
    worker.process.kill()
    worker.process.wait()
    math_answer._IDLE.put(worker)
    assert symbolic_equal("1+1", ["2"])
    running = math_answer._IDLE.get_nowait()
    running.process.kill()
    with pytest.raises(RuntimeError, match="the process that compares answers ended with status -9"):
        running.ask({"prediction": "1", "answers": ["1"], "seconds": 1.0})


@needs_math_verify
def test_threads_may_judge():
    verdicts = {}

    def work(i):
        verdicts[i] = judge("math", f"{i}+{i}", str(2 * i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {0: True, 1: True}


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install jaxlm\[rl\]"):
        judge_rows(["numeric", "math"], ["5", "x"], [[5], ["y"]])
