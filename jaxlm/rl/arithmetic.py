"""The twelve arithmetic functions of MENTOR (arXiv 2510.18383; specification 1.4), and a calculator.

They are pure and their results bounded, so they need no process of their own. ValueError is what the model reads.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

from jaxlm.rl.tools import Tool, tool_of

MAX_DIGITS = 1000  # of an integer result
MAX_EXPRESSION, MAX_DEPTH = 1000, 200
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def add(a: float, b: float) -> float:
    """Adds two numbers: a + b."""
    return _number(operator.add, a, b)


def subtract(a: float, b: float) -> float:
    """Subtracts the second number from the first: a - b."""
    return _number(operator.sub, a, b)


def multiply(a: float, b: float) -> float:
    """Multiplies two numbers: a * b."""
    return _number(operator.mul, a, b)


def divide(a: float, b: float) -> float:
    """Divides the first number by the second: a / b."""
    return _number(operator.truediv, a, b)


def sum_numbers(numbers: list[float]) -> float:
    """Adds up a list of numbers."""
    # fsum, because sum rounds differently from one Python to the next.
    return _number(sum if all(isinstance(one, int) for one in numbers) else math.fsum, numbers)


def floor(x: float) -> int:
    """Rounds down to the nearest integer."""
    return _number(math.floor, x)


def ceil(x: float) -> int:
    """Rounds up to the nearest integer."""
    return _number(math.ceil, x)


def round_number(x: float, ndigits: int = 0) -> float:
    """Rounds a number, halves to even.

    Args:
        ndigits: digits after the decimal point
    """
    if abs(ndigits) > MAX_DIGITS:
        raise ValueError(f"ndigits must be between -{MAX_DIGITS} and {MAX_DIGITS}")
    return _number(round, x, ndigits)


def power(base: float, exponent: float) -> float:
    """Raises the base to the exponent: base ** exponent."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        # Known before it is computed: 9 ** 9 ** 9 would take hours.
        if exponent > 4 * MAX_DIGITS or exponent * math.log10(abs(base)) > MAX_DIGITS:
            raise ValueError("too large a number")
        if exponent < -2 * MAX_DIGITS:
            return 0.0
    return _number(operator.pow, base, exponent)


def sqrt(x: float) -> float:
    """The square root of a number that is not negative."""
    if x < 0:
        raise ValueError("a negative number has no real square root")
    return _number(math.sqrt, x)


def abs_value(x: float) -> float:
    """The absolute value of a number."""
    return _number(abs, x)


def modulo(a: float, b: float) -> float:
    """The remainder of a divided by b, with the sign of b: a % b."""
    return _number(operator.mod, a, b)


def calculator(expression: str) -> float:
    """Evaluates an arithmetic expression with + - * / // % ** and parentheses, such as (1,250 - 3) * 2 ** 4."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION} characters")
    text = _THOUSANDS.sub("", expression).strip()
    # Only these characters reach the parser: no names, no calls, no texts.
    if wrong := re.search(r"[^0-9eE.+\-*/%()\s]", text):
        raise ValueError(f"{wrong.group()!r} is not allowed in an expression{_HINTS.get(wrong.group(), '')}")
    try:
        return _evaluate(ast.parse(text, mode="eval").body, 0)
    except (SyntaxError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
        raise ValueError(f"the expression cannot be read: {reason}") from None


def floor_divide(a: float, b: float) -> float:
    """Divides and rounds down: a // b."""
    return _number(operator.floordiv, a, b)


def _evaluate(node: ast.expr, depth: int) -> float:
    if depth > MAX_DEPTH:
        raise ValueError("the expression is nested too deeply")
    match node:
        case ast.Constant(int() | float() as value):
            return _number(operator.pos, value)
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            value = _evaluate(operand, depth + 1)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_evaluate(left, depth + 1), _evaluate(right, depth + 1))
    raise ValueError("the expression may hold numbers, + - * / // % ** and parentheses only")


def _number(operation: Callable[..., float], *arguments: object) -> float:
    """The result; ValueError for one that is no real number, not finite, or an integer of too many digits."""
    try:
        value = operation(*arguments)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("too large a number") from None
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if not math.isfinite(value) if isinstance(value, float) else abs(value) >= _LARGEST:
        raise ValueError("too large a number")
    return value


_LARGEST = 10**MAX_DIGITS
_HINTS = {"^": "; powers are written **", "x": "; products are written *", "×": "; products are written *",
          "÷": "; quotients are written /", "=": "; write the left side only"}
_OPERATORS = {ast.Add: add, ast.Sub: subtract, ast.Mult: multiply, ast.Div: divide, ast.FloorDiv: floor_divide,
              ast.Mod: modulo, ast.Pow: power}
# In the order of MENTOR's released code.
ARITHMETIC: tuple[Tool, ...] = tuple(
    tool_of(function, trusted=True) for function in (
        add, subtract, multiply, divide, sum_numbers, floor, ceil, round_number, power, sqrt, abs_value, modulo))
CALCULATOR = tool_of(calculator, trusted=True)
