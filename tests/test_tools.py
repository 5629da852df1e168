"""Tools: schemas from functions, arguments, faults of tools, results as text, arithmetic, search."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest

from jaxlm.rl.arithmetic import ARITHMETIC, CALCULATOR, calculator
from jaxlm.rl.search_tools import Passage, dense_search_tool, keyword_search_tool
from jaxlm.rl.tool_worker import bounded, render
from jaxlm.rl.tools import Runner, Tool, ToolLimits, tool_of
from tests.faulty_tool import fault

LIMITS = ToolLimits(max_chars=300, seconds=1.0, memory=128 * 2**20)


@pytest.fixture(scope="module")
def runner():
    with Runner([tool_of(fault), *ARITHMETIC, CALCULATOR], LIMITS) as made:
        yield made


@pytest.mark.parametrize(("kind", "error", "text"), [
    ("raise", "raised", "error: KeyError: 'no such thing'"),
    ("exit", "raised", "error: SystemExit: enough"),
    ("hang", "timeout", "error: the tool did not finish within 1 seconds"),
    ("in C", "timeout", "error: the tool did not finish within 1 seconds"),
    ("megabytes", None, "x" * 273 + "\n[cut: 20000000 characters]"),
    ("long error", "raised", "error: xxx"),
    ("memory", "raised", "error: MemoryError: "),
    ("bytes", "result", "error: the tool returned 20 bytes, which are no text"),
    ("bytes inside", "result", "error: the tool returned 1 bytes, which are no text"),
    ("object", "result", "error: the tool returned a object, which is no JSON value"),
    ("cycle", "result", "error: the tool returned a value that is nested too deeply"),
    ("digits", "result", "error: the tool returned an integer of more than 4300 digits"),
    ("recursion", "raised", "error: RecursionError: maximum recursion depth exceeded"),
    ("dead", "crashed", "error: the tool's process ended"),
    ("segfault", "crashed", "error: the tool's process ended"),
    ("output", None, "printed"),
])
def test_faults_become_bounded_text(runner, capfd, kind, error, text):
    result = runner.run("fault", {"kind": kind})
    assert (result.error, result.ok) == (error, error is None)
    assert result.text.startswith(text) and len(result.text) <= LIMITS.max_chars
    assert result.seconds < LIMITS.seconds + 2
    assert capfd.readouterr() == ("", "")
    # The next call finds a worker again.
    assert runner.run("fault", {"kind": "output"}).text == "printed"


def test_children_of_a_tool_end_with_it(runner):
    assert runner.run("fault", {"kind": "children"}).error == "timeout"
    deadline = time.monotonic() + 10  # a child that was killed is gone when its turn on the processor comes
    while (lines := _commands()) and any(line.startswith(b"sleep\x0098765") for line in lines):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lines


def _commands():
    """The command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    return lines


def test_workers_serve_threads_and_are_kept(runner):
    first, second = (runner.run("fault", {"kind": "process"}).text for _ in range(2))
    assert first == second != str(os.getpid())
    start, results = time.monotonic(), []
    threads = [threading.Thread(target=lambda: results.append(runner.run("fault", {"kind": "hang"})))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.error for one in results] == ["timeout"] * 3
    assert all(one.seconds < 1.5 * LIMITS.seconds + 3 for one in results)
    assert time.monotonic() - start < 3 * LIMITS.seconds + 3


def test_no_process_outlives_its_parent():
    """kill -9 of the program while a tool hangs."""
    program = ("from jaxlm.rl.tools import *; from tests.faulty_tool import fault; import threading, time\n"
               "runner = Runner([tool_of(fault)], ToolLimits(seconds=0.5))\n"
               "runner.run('fault', {'kind': 'output'})  # whose output goes nowhere\n"
               "print(runner.run('fault', {'kind': 'process'}).text, flush=True)\n"
               "threading.Thread(target=runner.run, args=('fault', {'kind': 'in C'})).start()\n"
               "time.sleep(0.3); print('calling', flush=True); time.sleep(100)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert parent.stdout.readline() == "calling\n"
        os.kill(worker, 0)
        parent.kill()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        raise AssertionError("the worker was still there")


def test_tools_that_no_worker_could_run():
    with pytest.raises(ValueError, match=r"tool local cannot be sent to a worker process .* or make it trusted"):
        def local(x: int) -> int:
            """Nothing."""
            return x
        Runner([tool_of(local)])
    assert Runner([tool_of(local, trusted=True)]).run("local", {"x": 3}).text == "3"
    program = ("from jaxlm.rl.tools import *\ndef f(x: int):\n    'Main.'\ntry:\n    Runner([tool_of(f)])\n"
               "except ValueError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a worker process cannot load the tools (AttributeError: ")
    with pytest.raises(ValueError, match="two tools are called 'add'"):
        Runner([ARITHMETIC[0], ARITHMETIC[0]])


def test_arguments_are_not_shared_with_the_tool():
    def drop(numbers: list[float]) -> int:
        """Empties a list."""
        numbers.clear()
        return 0

    arguments = {"numbers": [1.0]}
    assert Runner([tool_of(drop, trusted=True)]).run("drop", arguments).text == "0"
    assert arguments == {"numbers": [1.0]}


def everything(text: str, number: float, count: int, flag: bool, words: list[str], table: dict[str, int],
               mode: Literal["a", "b"], anything: Any, either: int | str = 3,
               maybe: Optional[list[float]] = None,  # noqa: UP045
               *, last: str = "x") -> str:
    """Takes one of everything.

    It has more to say.

    Args:
        text: a text that needs
            two lines
        mode (str): one of two

    Returns:
        nothing of use
    """
    return f"{text}{number}{count}{flag}{words}{table}{mode}{anything}{either}{maybe}{last}"


def test_schema_of_a_function():
    tool = tool_of(everything)
    assert tool.name == "everything" and tool.call is everything and not tool.trusted
    assert tool.description == "Takes one of everything.\n\nIt has more to say."
    number = {"type": "number"}
    assert tool.parameters == {"type": "object", "additionalProperties": False, "properties": {
        "text": {"type": "string", "description": "a text that needs two lines"}, "number": number,
        "count": {"type": "integer"}, "flag": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object", "additionalProperties": {"type": "integer"}},
        "mode": {"enum": ["a", "b"], "description": "one of two"}, "anything": {},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": 3},
        "maybe": {"anyOf": [{"type": "array", "items": number}, {"type": "null"}]},
        "last": {"type": "string", "default": "x"}},
        "required": ["text", "number", "count", "flag", "words", "table", "mode", "anything"]}
    assert json.loads(json.dumps(tool.schema())) == tool.schema()


def test_schema_is_that_of_transformers():
    utils = pytest.importorskip("transformers.utils")

    def weather(city: str, days: int, exact: bool, scale: list[float]) -> str:
        """
        Tells the weather.

        Args:
            city: a city
            days: how far
            exact: as it says
            scale: a scale
        """

    ours, theirs = tool_of(weather).schema(), utils.get_json_schema(weather)
    theirs["function"].pop("return", None)
    assert ours["function"]["parameters"].pop("additionalProperties") is False
    assert ours == theirs


def _refused():
    def bare(x):
        """Says."""

    def silent(x: int):
        pass

    def variable(*numbers: int):
        """Says."""

    def positional(x: int, /):
        """Says."""

    def odd(x: complex):
        """Says."""

    def keyed(x: dict[int, str]):
        """Says."""

    def wrong(value: int):
        """Says.

        Args:
            values: which
        """

    def unknown(x: "Nothing"):  # noqa: F821
        """Says."""

    async def later(x: int):
        """Says."""

    return [(bare, "tool bare: the parameter 'x' has no type hint"), (silent, "tool silent has no docstring"),
            (variable, "'numbers' cannot be given by name"), (positional, "'x' cannot be given by name"),
            (odd, "'x' has the type <class 'complex'>; use str, int"), (keyed, "'x' has the type dict"),
            (wrong, r"describes 'values', which is no parameter \(did you mean 'value'\?\)"),
            (unknown, "tool unknown: its signature cannot be read: name 'Nothing'"), (later, "later is a coroutine"),
            (lambda: 0, "tool <lambda> has no docstring")]


@pytest.mark.parametrize(("function", "error"), _refused())
def test_functions_that_are_no_tools(function, error):
    with pytest.raises(ValueError, match=error):
        tool_of(function)


def test_bad_tools_and_limits():
    for name, parameters, error in (("a b", {"type": "object"}, "a tool's name has letters"),
                                    ("f", {"type": "dict"}, "no JSON schema"),
                                    ("f", {"type": "object", "properties": {"x": {"anyOf": [{"$ref": "http://x.y"}]}}},
                                     r"tool f: \$ref is not supported"),
                                    ("f", {"type": "array"}, "must have the type object")):
        with pytest.raises(ValueError, match=error):
            Tool(name, "", parameters, print)
    for field, value in (("max_chars", 10), ("seconds", 0), ("seconds", math.nan), ("memory", 5)):
        with pytest.raises(ValueError, match=f"{field} must be at least"):
            ToolLimits(**{field: value})


@pytest.mark.parametrize(("arguments", "text"), [
    ({"a": 1}, "error: 'b' is a required property. add takes a, b"),
    ({"a": 1, "b": 2, "c": 3}, "error: Additional properties are not allowed ('c' was unexpected). add takes a, b"),
    ({"a": "1", "b": 2}, "error: a: '1' is not of type 'number'. add takes a, b"),
    ({"a": True, "b": None}, "error: a: True is not of type 'number'; b: None is not of type 'number'. add"),
    ({"a": 1, "b": 2.5}, "3.5"),
    ({"a": 1, "b": 2}, "3"),
    ({"a": "x" * 1000, "b": 2}, "error: a: 'xxx"),
    ({}, "error: 'a' is a required property; 'b' is a required property. add takes a, b"),
])
def test_arguments_are_checked(runner, arguments, text):
    result = runner.run("add", arguments)
    assert result.text.startswith(text) and len(result.text) <= LIMITS.max_chars
    assert result.error == ("arguments" if text.startswith("error") else None)


def test_integers_are_integers(runner):
    for value in (True, 2.0, "2"):
        result = runner.run("round_number", {"x": 2.345, "ndigits": value})
        assert result.text.startswith(f"error: ndigits: {value!r} is not of type 'integer'. round_number takes x, [nd")
    assert runner.run("round_number", {"x": 2.345, "ndigits": 2}).text == "2.35"
    assert runner.run("sum_numbers", {"numbers": [1, "x"]}).text.startswith("error: numbers[1]: 'x' is not of type")


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.0, "0.0"), (False, "false"), (None, "null"), ("", '""'), ([], "[]"), ({}, "{}"),
    ("two\nlines \"as they are\" 한", "two\nlines \"as they are\" 한"), (["한", 1.5, None], '["한", 1.5, null]'),
    (math.nan, "nan"), (-math.inf, "-inf"), ({"x": [math.nan]}, '{"x": ["nan"]}'), (1e22, "1e+22"),
    (0.1 + 0.2, str(.1 + .2)),
    ((1, 2), "[1, 2]"), ({3, 1, 2}, "[1, 2, 3]"), (np.float32(0.5), "0.5"), (np.arange(3), "[0, 1, 2]"),
    ({1: 2}, '{"1": 2}'),
])
def test_results_as_text(value, text):
    assert render(value) == text


def test_text_is_bounded():
    assert bounded("x" * 100, 100) == "x" * 100
    for size in (101, 1000, 10**6):
        cut = bounded("x" * size, 100)
        assert len(cut) == 100 and cut.endswith(f"\n[cut: {size} characters]")
    bounded("\ud800 half", 100).encode("utf-8")


def test_mentor_has_twelve_functions():
    assert [tool.name for tool in ARITHMETIC] == [
        "add", "subtract", "multiply", "divide", "sum_numbers", "floor", "ceil", "round_number", "power", "sqrt",
        "abs_value", "modulo"]
    assert all(tool.trusted for tool in (*ARITHMETIC, CALCULATOR))


def test_arithmetic_is_that_of_python():
    rng, call = random.Random(0), {tool.name: tool.call for tool in ARITHMETIC}
    for _ in range(200):
        a, b = (rng.choice([rng.randint(-9, 9), round(rng.uniform(-9, 9), 2)]) or 1 for _ in range(2))
        assert (call["add"](a, b), call["subtract"](a, b), call["multiply"](a, b)) == (a + b, a - b, a * b)
        assert (call["divide"](a, b), call["modulo"](a, b)) == (a / b, a % b)
        assert call["power"](abs(a), b) == abs(a) ** b and call["abs_value"](a) == abs(a)
        assert (call["floor"](a), call["ceil"](a)) == (math.floor(a), math.ceil(a))
        assert call["sqrt"](abs(a)) == math.sqrt(abs(a)) and call["round_number"](a, 1) == round(a, 1)
        assert call["sum_numbers"]([a, b, 3]) == pytest.approx(a + b + 3, rel=1e-12, abs=1e-12)
    assert call["sum_numbers"]([0.1] * 10) == 1.0 and call["sum_numbers"]([]) == 0
    assert type(call["sum_numbers"]([1, 2])) is int and call["power"](2, -1) == 0.5 and call["power"](3, -10**9) == 0


@pytest.mark.parametrize(("name", "arguments", "error"), [
    ("divide", {"a": 1, "b": 0}, "division by zero"), ("modulo", {"a": 1.5, "b": 0.0}, "division by zero"),
    ("power", {"base": 0, "exponent": -1}, "division by zero"), ("sqrt", {"x": -1}, "no real square root"),
    ("power", {"base": -8, "exponent": 0.5}, "not a real number"),
    ("power", {"base": 9, "exponent": 9**9}, "too large"), ("power", {"base": 9, "exponent": 10**400}, "too large"),
    ("power", {"base": 10**900, "exponent": 10**900}, "too large"),
    ("power", {"base": 2.5, "exponent": 1e9}, "too large"),
    ("multiply", {"a": 10**900, "b": 10**900}, "too large"), ("divide", {"a": 10**900, "b": 3}, "too large"),
    ("multiply", {"a": 1e200, "b": 1e200}, "too large"),
    ("round_number", {"x": 5, "ndigits": -10**9}, "ndigits must be"),
    ("sum_numbers", {"numbers": [1e308, 1e308]}, "too large"), ("floor", {"x": math.inf}, "too large"),
])
def test_arithmetic_refuses_in_words(runner, name, arguments, error):
    start = time.monotonic()
    result = runner.run(name, arguments)
    assert (result.ok, result.error) == (False, "raised") and error in result.text
    assert time.monotonic() - start < 1


def test_calculator_is_that_of_python():
    rng = random.Random(0)

    def expression(depth):
        if depth == 0:
            return rng.choice([str(rng.randint(0, 99)), f"{rng.uniform(0, 9):.2f}", "2.5e1"])
        left, right = expression(depth - 1), expression(depth - rng.randint(1, depth))
        form = rng.choice(["{} + {}", "{}-{}", "({}) * ({})", "({}) / ({})", "({})//({})", "-({}) % ({})", "+{}-{}"])
        return form.format(left, right)

    compared = 0
    for _ in range(300):
        text = expression(3)
        with contextlib.suppress(ZeroDivisionError):
            expected = eval(text)
            assert calculator(text) == expected, text
            compared += 1
    assert compared > 200
    assert calculator("1,250,000 * 2") == 2_500_000 and calculator(" 2 ** 3 ** 2 ") == 512 and calculator("-2**2") == -4
    assert type(calculator("7 // 2")) is int


@pytest.mark.parametrize(("expression", "error"), [
    ("__import__('os').system('id')", "'_' is not allowed"), ("().__class__", "'_' is not allowed"),
    ("abs(1)", "'a' is not"),
    ("2^3", r"'\^' is not allowed in an expression; powers are written \*\*"), ("9**9**9", "too large"),
    ("1/0", "division by"),
    ("1e999", "too large"), ("(-8)**0.5", "not a real"), ("", "cannot be read"), ("1+", "cannot be read"),
    ("2 3", "cannot be"),
    ("(1)(2)", "may hold numbers"), ("()", "may hold numbers"), ("1.e", "cannot be read"), ("e", "may hold numbers"),
    ("12,34", "',' is not allowed"), ("(" * 400 + "1" + ")" * 400, "cannot be read"), ("-" * 999 + "1", "too deeply"),
    ("1" + "+1" * 400, "nested too deeply"), ("1" * 1001, "longer than 1000"), ("9" * 990 + "**2", "too large"),
    ("0777", "cannot be read"), ("1*" * 400 + "(" * 100, "cannot be read"),
])
def test_calculator_refuses_in_words(expression, error):
    with pytest.raises(ValueError, match=error):
        calculator(expression)


PASSAGES = [Passage("Seoul", "The capital of Korea lies on the Han river."),
            Passage("Busan", "A port in the south of Korea."),
            Passage("Paris", "The capital of France. " + "x" * 1000), Passage("서울", "한국의 수도")]


def bm25(query, documents, k1=1.5, b=0.75):
    """Okapi's formula, Lucene's variant, word by word."""
    length = sum(map(len, documents)) / len(documents)
    return [sum(math.log(1 + (len(documents) - n + 0.5) / (n + 0.5)) * doc.count(word)
                / (doc.count(word) + k1 * (1 - b + b * len(doc) / length))
                for word in query if (n := sum(word in other for other in documents))) for doc in documents]


def test_keyword_search():
    tool = keyword_search_tool(PASSAGES, passage_chars=50)
    runner = Runner([tool])
    words = [f"{one.title} {one.text}".lower().replace(".", "").split() for one in PASSAGES]
    scores = bm25(["capital", "korea"], words)
    order = sorted((i for i in range(4) if scores[i] > 0), key=lambda i: -scores[i])
    text = runner.run("keyword_search", {"query": "CAPITAL, Korea?"}).text
    assert [line[4:] for line in text.split("\n") if line.startswith("[")] == [PASSAGES[i].title for i in order]
    assert text.startswith("[1] Seoul\nThe capital of Korea lies on the Han river.\n\n[2] ")
    assert runner.run("keyword_search", {"query": "france"}).text == f"[1] Paris\n{PASSAGES[2].text[:50]}..."
    assert runner.run("keyword_search", {"query": "수도 korea", "top_n": 1}).text.startswith("[1] 서울")
    for query in ("nowhere", "?!"):
        assert runner.run("keyword_search", {"query": query}).text == "no passage was found"
    for arguments in ({"query": ""}, {"query": "x" * 1001}, {"query": "x", "top_n": 0}, {"query": "x", "top_n": 21}):
        assert runner.run("keyword_search", arguments).error == "raised"
    assert Runner([keyword_search_tool(PASSAGES[:1])]).run("keyword_search",
                                                           {"query": "seoul"}).text.startswith("[1] Seoul")


def test_dense_search():
    vectors = np.random.default_rng(0).normal(size=(4, 8))
    query = np.random.default_rng(1).normal(size=8)
    tool = dense_search_tool(PASSAGES, vectors, lambda texts: np.stack([query] * len(texts)))
    text = Runner([tool], ToolLimits(max_chars=5000)).run("dense_search", {"query": "x", "top_n": 3}).text
    best = sorted(range(4), key=lambda i: -float(vectors[i] @ query))[:3]
    assert [line[4:] for line in text.split("\n") if line.startswith("[")] == [PASSAGES[i].title for i in best]
    equal = dense_search_tool(PASSAGES, np.ones((4, 2)), lambda texts: np.ones((1, 2)))
    assert Runner([equal]).run("dense_search", {"query": "x", "top_n": 1}).text.startswith("[1] Seoul")
    for wrong in (np.ones((3, 2)), np.ones(4), np.full((4, 2), np.nan)):
        with pytest.raises(ValueError, match=r"embeddings must be finite and of shape \[4, D\]"):
            dense_search_tool(PASSAGES, wrong, lambda texts: np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least one passage"):
        keyword_search_tool([])
