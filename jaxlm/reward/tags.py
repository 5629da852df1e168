"""Whether the tags of a text are as they should be: what `Trajectory.well_formed` is made of. On the host."""

import re
from collections.abc import Sequence
from typing import Literal

TAGS = ("think", "tool_call")
Section = Literal["think", "tool_call", "response"]


def balanced(text: str, tags: Sequence[str] = TAGS, *, opened: str | None = None) -> bool:
    """Whether every tag is closed before another one opens, and nothing is closed that was not open.

    `<think>a</think><tool_call>b</tool_call>` is; `<tool_call>b`, `</think>`, and a call inside of thinking are not.

    Args:
      text: one turn.
      opened: the tag that the prompt left open, as `<think>` often is.
    """
    names = "|".join(map(re.escape, tags))
    for match in re.finditer(f"<(/?)({names})>", text):
        close, name = match.groups()
        if opened != (name if close else None):
            return False
        opened = None if close else name
    return opened is None


def toolrl_format(text: str, sections: Sequence[Section]) -> bool:
    r"""ToolRL's R_format: the sections and nothing else, a newline between them (arXiv 2504.13958, section 3.3).

    `<think>a</think>\n<tool_call>\nb\n</tool_call>` for ("think", "tool_call"). Calls stand on lines of their own.

    Args:
      sections: "think", then "tool_call" if the reference has calls, then "response" if it has one.
    """
    if any(text.count(tag) != 1 for name in sections if name != "think" for tag in (f"<{name}>", f"</{name}>")):
        return False
    inner = lambda name: "\n.*?\n" if name == "tool_call" else ".*?"
    pattern = "\n".join(f"<{name}>{inner(name)}</{name}>" for name in sections)
    return re.fullmatch(pattern, text.strip(), re.DOTALL) is not None
