"""Python in the sandbox: what it computes, and that nothing gets out of it or past its limits."""

import importlib.util
import resource
import time

import pytest

from jaxlm.rl.sandbox import SandboxConfig, python_tool
from jaxlm.rl.tools import Runner, ToolLimits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is None, reason="needs pydantic-monty")
LIMITS = ToolLimits(max_chars=400, seconds=5.0)
CONFIG = SandboxConfig(seconds=0.4, memory=32 * 2**20)


@pytest.fixture(scope="module")
def python():
    with Runner([python_tool(CONFIG)], LIMITS) as runner:
        yield lambda code: runner.run("python", {"code": code})


@pytest.mark.parametrize(("code", "text"), [
    ("1 + 1", "2"), ("print('a')\nprint('b')", "a\nb"), ("print('a')\n'b'", "a\n'b'"), ("x = 3", "(no output)"),
    ("0", "0"), ("False", "False"), ("''", "''"), ("import math\nround(math.sqrt(2), 3)", "1.414"),
    ("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n[fib(n) for n in range(8)]",
     "[0, 1, 1, 2, 3, 5, 8, 13]"), ("float('nan')", "nan"), ("b'\\xff\\x00'", "b'\\xff\\x00'"),
    ("print('한글')", "한글"), ("import re\nre.findall('[0-9]+', 'a1b22')", "['1', '22']"),
    ("eval('1 + 1')", "2"),  # evaluated by the same interpreter
])
def test_results(python, code, text):
    result = python(code)
    assert (result.text, result.ok) == (text, True)


@pytest.mark.parametrize(("code", "error"), [
    ("x = 1\ny = x / 0", "error: line 2: ZeroDivisionError: division by zero"),
    ("print('seen')\nundefined", "error: line 2: NameError: name 'undefined' is not defined\nIt had printed:\nseen\n"),
    ("def f(:", "error: "), ("1\0+1", "error: "), ("raise ValueError('mine')", "error: line 1: ValueError: mine"),
])
def test_errors_name_the_line(python, code, error):
    result = python(code)
    assert result.text.startswith(error) and result.error == "raised"


def test_runs_are_fresh_and_repeat(python):
    python("x = 5\nimport math\nmath.pi = 3")
    assert "NameError" in python("x").text
    assert python("import math\nmath.pi").text == "3.141592653589793"
    code = "import random, time, datetime\n(random.random(), time.time(), str(datetime.datetime.now()), hash('a'))"
    assert python(code).ok and python(code).text == python(code).text
    start = time.monotonic()
    assert python("import time\ntime.sleep(100)").text == "(no output)" and time.monotonic() - start < 5


@pytest.mark.parametrize("code", [
    "import subprocess", "import socket", "import ctypes", "import shutil", "import importlib", "import builtins",
    "import os\nos.system('touch {path}')", "import os\nos.popen('touch {path}')", "import os\nos.fork()",
    "import os\nos.listdir('/')", "import os\nos.environ['HOME']", "import os\nos.kill(1, 9)",
    "open('/etc/passwd').read()", "open('{path}', 'w').write('x')",
    "from pathlib import Path\nPath('/etc/passwd').read_text()",
    "from pathlib import Path\nPath('{path}').write_text('x')",
    "import sys\nsys.modules", "import sys\nsys.exit(0)", "().__class__.__mro__[1].__subclasses__()",
    "type(()).__bases__[0].__subclasses__()", "(lambda: 0).__globals__", "(lambda: 0).__code__", "print.__self__",
    "__builtins__", "__import__('os').system('touch {path}')", "eval(\"__import__('os').system('touch {path}')\")",
    "exec(\"import subprocess\")", "'{0.__class__}'.format(1)", "compile('1', '', 'eval')", "globals()['__loader__']",
    "input()", "breakpoint()", "exit()", "import urllib.request", "import http.client", "import pickle", "import _io",
    "async def f():\n    import socket\nimport asyncio\nasyncio.run(f())", "help()",
])
def test_nothing_gets_out(python, tmp_path, code):
    path = tmp_path / "escaped"
    result = python(code.replace("{path}", str(path)))
    assert not result.ok and result.text.startswith("error: ") and not path.exists()
    assert "root:" not in result.text and result.seconds < 2


@pytest.mark.parametrize(("code", "error"), [
    ("while True: pass", "TimeoutError: the code ran longer than 0.4 seconds"),
    ("sum(range(10**12))", "TimeoutError"), ("import math\nmath.comb(10**9, 10**6)", ""),
    ("x = 10**100000\nfor i in range(100): x = x * x", ""), ("9**9**9", "MemoryError"), ("'a' * 10**12", "MemoryError"),
    ("x = [0] * 10\nwhile True: x = x + x", "MemoryError"), ("f'{1:>10000000000}'", "MemoryError"),
    ("x = {}\ni = 0\nwhile True:\n    x[i] = str(i) * 100\n    i += 1", "MemoryError"),
    ("while True: print('a' * 10000)",
     "MemoryError: the code used more than 33554432 bytes of memory, or printed more than"),
    ("while True: print()", ""), ("print('a' * 20_000_000)", "MemoryError"),
    ("def f(n): return f(n + 1)\nf(0)", "RecursionError"), ("(" * 100000 + ")" * 100000, "SyntaxError"),
    ("[]" + "[0]" * 100000, "SyntaxError"), ("-" * 100000 + "1", ""),
    ("x = []\nfor i in range(10**6): x = [x]\nprint(x)", ""),
    ("class A:\n    def __repr__(self): return repr(self)\nprint(A())", ""),
    ("import re\nre.match('(a*)*(a*)*(a*)*b\\\\1', 'a' * 60)", ""), ("import json\njson.loads('[' * 100000)", ""),
    ("str(10**5000)", "ValueError: Exceeds the limit"), ("sorted(range(10**9))", "MemoryError"),
])
def test_limits(python, code, error):
    result = python(code)
    assert not result.ok and error in result.text and len(result.text) <= LIMITS.max_chars
    assert result.seconds < CONFIG.seconds + 1.5
    assert python("1 + 1").text == "2"


def test_long_values_are_cut(python):
    result = python("'a' * 3_000_000")
    assert result.ok and len(result.text) == LIMITS.max_chars and result.text.endswith("[cut: 3000002 characters]")


def test_this_process_stays_small(python):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for code in ("'a' * 10_000_000", "[0] * 1_000_000", "print('a' * 10_000_000)"):
        python(code)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_bad_limits():
    for field in ("seconds", "memory", "recursion", "max_output"):
        with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
            SandboxConfig(**{field: 0})
