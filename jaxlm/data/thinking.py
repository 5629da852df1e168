"""Reasoning beside answers, `reasoning_content` of the assistant's messages: whether a template shows it, which rows
show it in hybrid data, and what of a written text it is.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxlm.data.chat_template import ChatTemplate

REASONING = "reasoning_content"
THINK_TAGS = ("<think>", "</think>")
VARIABLE = "enable_thinking"  # of a template: whether a prompt asks for reasoning
Thinking = Literal["keep", "drop", "hybrid"]
Conversation = Mapping[str, Any]


class Thought(NamedTuple):
    """A written text in its parts."""

    reasoning: str | None  # None without a tag that ends it
    answer: str


def split_thought(text: str) -> Thought:
    """The reasoning before the first `</think>`, and the answer: "R\\n</think>\\n\\nA" is R and A, "A" is None and A.

    A text that ends before the tag stands as an answer: reasoning that was cut cannot be told apart.
    """
    before, tag, after = text.partition(THINK_TAGS[1])
    return Thought(before.strip().removeprefix(THINK_TAGS[0]).strip(), after.strip()) if tag else Thought(None, text)


def reasons(conversation: Conversation) -> bool:
    """Whether a turn of the assistant brings reasoning that is more than spaces."""
    return any((message.get(REASONING) or "").strip() for message in conversation["messages"])


def last_turns(conversation: Conversation) -> dict[str, Any]:
    """What follows the last user message, where templates show reasoning."""
    messages = conversation["messages"]
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return {**conversation, "messages": messages[asked + 1:]}


def without_reasoning(conversation: Conversation) -> dict[str, Any]:
    """The conversation as if nothing had been thought."""
    return {**conversation, "messages": [{key: value for key, value in message.items() if key != REASONING}
                                         for message in conversation["messages"]]}


def shows_reasoning(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the template shows the last reasoning of a conversation that ends with it.

    Of what was said before templates may leave it out: a model reads its earlier answers without their reasoning.
    """
    messages = conversation["messages"]
    last = max(i for i, message in enumerate(messages) if (message.get(REASONING) or "").strip())
    cut = {**conversation, "messages": messages[:last + 1]}
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "")
    shown, hidden = (template.render(one["messages"], tools=one.get("tools"), add_generation_prompt=False, **names)
                     for one in (cut, without_reasoning(cut)))
    return shown != hidden


def is_shown(share: float, *, seed: int, name: str, row: int) -> bool:
    """Whether a row of hybrid data shows its reasoning: true for a `share` of rows, by seed, source and row alone."""
    # No CRC: it is linear, so two seeds would draw the same rows or, at a share of one half, the complement.
    drawn = hashlib.sha256(f"thinking {seed} {name} {row}".encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(drawn, "little") < share * 2**64


def thinking_prompts(template: ChatTemplate, on: bool) -> ChatTemplate:
    """The template whose prompts ask for reasoning, or for an answer at once. ValueError if it cannot be told."""
    if not re.search(rf"\b{VARIABLE}\b", template.source):
        raise ValueError(f"the chat template does not read {VARIABLE}, so it cannot be told whether to think")
    return ChatTemplate(template.source, {**template.variables, VARIABLE: on})
