"""Prompts as people write them, text or messages; the ids that a model reads; what is asked of the engine."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core.config import from_json, nearest, to_json
from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_examples import turn_end
from jaxlm.data.chat_template import ChatTemplate, chatml
from jaxlm.data.rows import decode_json
from jaxlm.data.thinking import REASONING, THINK_TAGS, Thought, split_thought, thinking_prompts
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.settings import SamplingConfig

TEXT_KEYS = ("prompt", "text", "messages")
SETTINGS = tuple(field.name for field in fields(SamplingConfig))


class Prompt(NamedTuple):
    """One of text and messages, and what a file says besides."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    id: str | int | None = None
    settings: Mapping[str, Any] = {}  # of SamplingConfig, by field
    where: str = "the prompt"         # for messages to people


class Reader(NamedTuple):
    """Turns prompts into ids."""

    tokenizer: Tokenizer
    start: tuple[int, ...] = ()        # before every text
    template: ChatTemplate | None = None  # the model's own
    chat: bool = False                 # a text is what a user says, too
    system: str = ""                   # said before, where the messages do not begin with a system message
    thinking: bool | None = None       # whether prompts of the template ask for reasoning; None: as it does unasked

    def chat_template(self) -> ChatTemplate:
        """The model's own, or ChatML; ValueError if the tokenizer lacks its special tokens, or cannot be told to think.
        """
        template = self.template or chatml(self.tokenizer)
        return template if self.thinking is None else thinking_prompts(template, self.thinking)

    def turn_end(self) -> tuple[int, ...]:
        """The special token that the template puts behind what the assistant says, if it shows and is not eos."""
        end = turn_end(self.chat_template(), self.tokenizer)
        return tuple({self.tokenizer.symbols[end].id} - {self.tokenizer.eos_id}) if end else ()

    def parts(self, text: str) -> Thought:
        """A written text as reasoning and answer; without the tags of thinking in the template all of it is answer."""
        return split_thought(text) if self._thinks() else Thought(None, text)

    def _thinks(self) -> bool:
        return bool(self.template) and all(tag in self.template.source for tag in THINK_TAGS)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt; ValueError that says where it stands if it is empty or the template refuses it."""
        try:
            messages = prompt.messages
            if messages is None and not (prompt.text or "").strip():
                raise ValueError("it is empty")
            if messages is None and self.chat:
                messages = [{"role": "user", "content": prompt.text}]
            if messages is None:
                ids = self.tokenizer.encode(prompt.text)
            else:
                if self.system and not _has_system(messages):
                    messages = [{"role": "system", "content": self.system}, *messages]
                messages = [self._told_apart(message) for message in messages]
                ids = chat_ids(self.chat_template(), self.tokenizer, messages, add_generation_prompt=True).ids
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        count = len(self.start)
        return ids if count and tuple(ids[:count]) == self.start else [*self.start, *ids]

    def _told_apart(self, message: Any) -> Any:
        """A turn of the assistant as it was written, with its reasoning where templates look for that."""
        if not (isinstance(message, Mapping) and message.get("role") == "assistant" and REASONING not in message
                and isinstance(message.get("content"), str)):
            return message
        reasoning, answer = self.parts(message["content"])
        return message if reasoning is None else {**message, "content": answer, REASONING: reasoning}


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file: a string a line, or an object with `prompt` (also `text`) or `messages`, and perhaps
    `id` and fields of SamplingConfig. ValueError with the number of the first line that is none of these.
    """
    found = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            try:
                found.append(_prompt(decode_json(line), f"{path}:{number}"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def read_lines(lines: Iterable[str], where: str) -> list[Prompt]:
    """A prompt a line; lines of nothing but spaces separate. ValueError if there is no other."""
    try:
        found = [Prompt(line.rstrip("\r\n"), where=f"{where}:{number}") for number, line in enumerate(lines, 1)
                 if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not found:
        raise ValueError(f"{where} holds no prompt")
    return found


class Ask(NamedTuple):
    """A text to write."""

    number: int          # of its prompt
    sample: int
    prompt: Prompt
    ids: list[int]
    sampling: SamplingConfig


def make_asks(reader: Reader, prompts: Sequence[Prompt], sampling: SamplingConfig, num_samples: int = 1) -> list[Ask]:
    """Every text to write, the samples of a prompt together.

    Sample s of prompt p has seed `sampling.seed + p * num_samples + s`, so equal prompts get different texts; a seed
    that the prompt itself names counts from there. The assistant's turn ends a text, too. ValueError says where.
    """
    found, ends = [], None
    for number, prompt in enumerate(prompts):
        ids, own = reader.ids(prompt), sampling
        try:
            if prompt.settings:
                own = from_json(SamplingConfig, to_json(own) | dict(prompt.settings))
            if num_samples > 1 and own.temperature == 0:
                raise ValueError(f"{num_samples} samples of a greedy text would be equal: set a temperature")
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        if (reader.chat or prompt.messages is not None) and not own.ignore_eos:
            ends = reader.turn_end() if ends is None else ends
            chosen = [i for i in ends if own.allowed_tokens is None or i in own.allowed_tokens]
            own = replace(own, stop_ids=tuple(dict.fromkeys((*own.stop_ids, *chosen))))
        first = own.seed + (0 if "seed" in prompt.settings else number * num_samples)
        found += [Ask(number, sample, prompt, ids, own if own.temperature == 0 else
                      replace(own, seed=(first + sample) % 2**32)) for sample in range(num_samples)]
    return found


def _prompt(row: Any, where: str) -> Prompt:
    if isinstance(row, str):
        return Prompt(row, where=where)
    if not isinstance(row, dict):
        raise ValueError(f"a prompt is a string or an object, not {json.dumps(row)[:40]}")
    given = [name for name in TEXT_KEYS if name in row]
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(TEXT_KEYS)}" + (f", not {' and '.join(given)}" if given else
                         f"; fields: {', '.join(row) or 'none'}"))
    for name in row:
        if name not in (given[0], "id", *SETTINGS):
            raise ValueError(f"unknown field {name!r}{nearest(name, [*TEXT_KEYS, 'id', *SETTINGS])}")
    value, kind = row[given[0]], list if given[0] == "messages" else str
    if not isinstance(value, kind):
        raise ValueError(f"{given[0]!r} must be a {'list' if kind is list else 'string'}, got {json.dumps(value)[:40]}")
    if not isinstance(row.get("id", ""), str | int):
        raise ValueError(f"'id' must be a string or a whole number, got {json.dumps(row['id'])[:40]}")
    more = {name: row[name] for name in SETTINGS if name in row}
    return Prompt(*((None, value) if kind is list else (value, None)), row.get("id"), more, where)


def _has_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
