r"""GSM8K (arXiv 2110.14168): questions of a school, whose worked answers hold the calls of a calculator.

A row is `{"question": ..., "answer": ...}`; each line of the answer is a step and `#### n` ends it:

    Half of 48 is 48/2 = <<48/2=24>>24.          assistant  Half of 48 is  calculator("48/2")   tool  24.0
    In total 48+24 = <<48+24=72>>72.             assistant  In total       calculator("48+24")  tool  72
    #### 72                                      assistant  The answer is \boxed{72}.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jaxlm.data.json_rows import field, read_rows
from jaxlm.reward.verify import numeric_equal
from jaxlm.rl.arithmetic import ARITHMETIC, CALCULATOR, calculator
from jaxlm.rl.demonstration import assistant, call_turn
from jaxlm.rl.task import Task

TOOLS = {tool.name: tool for tool in (*ARITHMETIC, CALCULATOR)}
_NOTE = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
# The formula that the answer writes before a note: "48 / 2 = $", "0.2 x 50 =".
_FORMULA = re.compile(r"[\d.,$%+\-*/x×÷() ]*=?\s*\$?\s*$")
_BINARY = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}


@dataclass(frozen=True, kw_only=True)
class Gsm8kConfig:
    """Rows of GSM8K. The test split is for evaluation only."""

    path: str
    count: int | None = None      # the first so many tasks
    arithmetic: bool = False      # calls of add, subtract, multiply and divide where a note is one such operation
    min_calls: int = 0            # rows with fewer are left out, and so are
    max_calls: int | None = None  # rows with more

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.min_calls < 0 or (self.max_calls is not None and self.max_calls < self.min_calls):
            raise ValueError("min_calls must be at least 0 and max_calls not below it, got "
                             f"{self.min_calls} and {self.max_calls}")


def gsm8k_tasks(config: Gsm8kConfig) -> list[Task]:
    """The rows as tasks; those without a note have a teacher that calls nothing. ValueError names file and line."""
    tasks = list(islice(_tasks(config), config.count))
    if not tasks:
        raise ValueError(f"{config.path}: holds no row of GSM8K with so many calls")
    return tasks


def gsm8k_task(row: dict[str, Any], name: str, where: str, arithmetic: bool = False) -> Task:
    """One row as a task. ValueError with `where` for a note that is wrong or an answer without `#### n`."""
    question, worked = (field(row, key, str, where).strip() for key in ("question", "answer"))
    steps, mark, answer = worked.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", answer):
        raise ValueError(f"{where}: field 'answer' must end with a line '#### number', got {worked[-40:]!r}")
    messages: list[dict[str, Any]] = []
    for line in steps.splitlines():
        messages += _line(line, where, arithmetic)
    if not question:
        raise ValueError(f"{where}: field 'question' is empty")
    last = assistant(f"The answer is \\boxed{{{answer}}}.")
    tools = (*(tool.name for tool in ARITHMETIC), CALCULATOR.name) if arithmetic else (CALCULATOR.name,)
    return Task(id=name, question=question, tools=tools, answers=(answer,), judge="numeric", domain="gsm8k",
                teacher=(*_joined(messages), last))


def _tasks(config: Gsm8kConfig) -> Iterator[Task]:
    name = Path(config.path).name.partition(".")[0]
    for number, row in read_rows(config.path):
        task = gsm8k_task(row, f"gsm8k-{name}-{number}", f"{config.path}:{number}", config.arithmetic)
        num_calls = len(task.teacher_calls())
        if config.min_calls <= num_calls and (config.max_calls is None or num_calls <= config.max_calls):
            yield task


def _line(line: str, where: str, arithmetic: bool) -> list[dict[str, Any]]:
    """The messages of one step: what is said before each note and its call, then what is said after the last."""
    messages, end = [], 0
    for note in _NOTE.finditer(line):
        expression, result = note.group(1).strip(), note.group(2).strip()
        try:
            value = calculator(expression)
        except ValueError as error:
            raise ValueError(f"{where}: field 'answer': the note {note.group()} cannot be computed: {error}") from None
        if not numeric_equal(result, [value]):
            raise ValueError(f"{where}: field 'answer': the note {note.group()} is wrong: it is {value}")
        said = _FORMULA.sub("", line[end:note.start()]).strip()
        messages += call_turn(said, [_call(expression, arithmetic)], TOOLS)
        # Behind a note its result is written once more.
        end = note.end() + len(re.match(r"[\d.,]*\d|", line[note.end():]).group())
    if "<<" in _NOTE.sub("", line) or ">>" in _NOTE.sub("", line):
        raise ValueError(f"{where}: field 'answer': a note must be <<expression=value>>, got {line!r:.120}")
    rest = line[end:].strip(" .")
    return [*messages, assistant(rest)] if rest else messages


def _call(expression: str, arithmetic: bool) -> tuple[str, dict[str, Any]]:
    """The calculator, or one of the twelve functions for a single operation of two numbers."""
    if arithmetic:
        match ast.parse(expression.replace(",", ""), mode="eval").body:
            case ast.BinOp(ast.Constant(a), sign, ast.Constant(b)) if type(sign) in _BINARY:
                return _BINARY[type(sign)], {"a": a, "b": b}
    return CALCULATOR.name, {"expression": expression}


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is said without a call opens the next turn that has one; after the last it is dropped."""
    joined, said = [], []
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            said.append(message["content"])
        elif message["role"] == "assistant":
            content = ". ".join(one for one in (*said, message["content"]) if one)
            joined.append(message | {"content": content})
            said = []
        else:
            joined.append(message)
    return joined
