"""Tool calls in the text of a model, and the turn that brings back what the tools said.

The call syntax is that of Hermes and Qwen; parsing follows MENTOR (arXiv 2510.18383; specification 2.2):

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.data.chat import chat_ids, encode_symbols, find_symbols
from jaxlm.data.chat_template import ChatTemplate, Messages
from jaxlm.data.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALL_CHARS, MAX_DEPTH = 20_000, 64
THINK = "<think>"
ObservationFormat = Literal["template", "hermes", "mentor"]


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]
    text: str  # as it stood between the tags


class ParseError(NamedTuple):
    message: str
    text: str


class Calls(NamedTuple):
    calls: tuple[Call | ParseError, ...]
    balanced: bool  # False: the tags do not pair, so nothing counts as a call


class Observation(NamedTuple):
    """What a call brought back. Its texts may hold anything; none of it becomes a special token."""

    name: str  # of the tool; empty where there is none
    call: str  # the text of the call
    text: str  # the result


class Segment(NamedTuple):
    """A part of a text: a template's, which may name special tokens, or literal, which may not."""

    text: str
    literal: bool = False


def parse_calls(text: str) -> Calls:
    """The calls of a turn, in order.

    The i-th opening tag must stand before the i-th closing tag, and there must be as many; a call reaches from an
    opening tag to the next closing one. With o and c for the tags and X, Y for calls:

        o X c and o Y c     X, Y
        no tags             none, balanced
        o X c o             none, not balanced; so are "o X" and "c X o"
        o o X c c           one, whose text "o X" is a ParseError
    """
    opens, closes = ([match.start() for match in re.finditer(tag, text)] for tag in (OPEN, CLOSE))
    if len(opens) != len(closes) or any(a > b for a, b in zip(opens, closes, strict=True)):
        return Calls((), False)
    return Calls(tuple(_parse(part.strip()) for part in re.findall(f"{OPEN}(.*?){CLOSE}", text, re.DOTALL)), True)


def read_call(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a decoded call; the arguments may be the text of a JSON object. ValueError says why not."""
    if not isinstance(value, Mapping):
        raise ValueError('a call is an object with "name" and "arguments"')
    for key in ("name", "arguments"):
        if key not in value:
            raise ValueError(f'the call has no "{key}"')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError('"name" must be a text that is not empty')
    if isinstance(arguments, str):
        arguments = _decode(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError('"arguments" must be an object')
    return name, dict(arguments)


def encode_segments(tokenizer: Tokenizer, segments: Sequence[Segment]) -> list[int]:
    """The ids of the joined texts; special tokens spelled out in literal segments stay text."""
    text, spans = "", []
    for segment in segments:
        if segment.literal:
            spans.append((len(text), len(text) + len(segment.text)))
        text += segment.text
    return encode_symbols(tokenizer, text, find_symbols(tokenizer.symbols, text, spans))[0]


def hermes_turn(observations: Sequence[Observation]) -> list[Segment]:
    """What follows an assistant's `<|im_end|>`: a user's turn with one `<tool_response>` each, and the next header."""
    parts = [Segment("\n<|im_start|>user")]
    for one in observations:
        parts += [Segment("\n<tool_response>\n"), Segment(one.text, True), Segment("\n</tool_response>")]
    return [*parts, Segment("<|im_end|>\n<|im_start|>assistant\n")]


def mentor_turn(observations: Sequence[Observation]) -> list[Segment]:
    """As `hermes_turn`, as MENTOR's released code writes it (specification 2.3): each result behind its call."""
    parts = [Segment("\n<|im_start|>user\n")]
    for one in observations:
        parts += [Segment("<tool_response>"), Segment(f"{one.call}\n{one.text}", True),
                  Segment("\n</tool_response>\n")]
    return [*parts, Segment("<|im_end|>\n<|im_start|>assistant\n")]


class Bridge:
    """The ids between the end of a turn that called tools and the begin of the next one.

    They are appended to the sampled ids, which are never encoded again: those may differ from what a tokenizer makes
    of their text. "template" takes from the model's own template what it writes behind the turn (as TRL does);
    "hermes" and "mentor" write ChatML. `think`: the next turn is made to start with `<think>`.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, form: ObservationFormat = "template", *,
                 think: bool = False) -> None:
        """ValueError if the template has no place for what a tool says."""
        self._template, self._tokenizer, self._form = template, tokenizer, form
        self._think = encode_segments(tokenizer, [Segment(THINK)]) if think else []
        if form == "template":
            self.end_of_turn, self._num_ends = _find_end(template, tokenizer, _PROBE)
            if self.end_of_turn is None:
                raise ValueError("the chat template does not end a turn of the assistant with a special token")
            shown = tokenizer.decode(self.ids([Observation("probe", "", f"result {i}") for i in range(2)]))
            if not all(f"result {i}" in shown for i in range(2)) or "probe_argument" in shown:
                raise ValueError("the chat template does not show what a tool says")
        else:
            if missing := [name for name in ("<|im_start|>", "<|im_end|>") if name not in tokenizer.symbols]:
                raise ValueError(f"observations in the form {form!r} need the special token {' and '.join(missing)}, "
                                 "which the tokenizer lacks")
            self.end_of_turn = tokenizer.symbols["<|im_end|>"].id

    def ids(self, observations: Sequence[Observation]) -> list[int]:
        """What follows the id `end_of_turn`, up to where the model goes on."""
        if self._form != "template":
            # The first id stands for the end of the turn, so that what follows is encoded as text inside.
            segments = [Segment("<|im_end|>"), *OBSERVATIONS[self._form](observations)]
            return encode_segments(self._tokenizer, segments)[1:] + self._think
        tools = [{"role": "tool", "name": one.name or "unknown", "tool_call_id": _CALL_ID, "content": one.text}
                 for one in observations]
        ids = chat_ids(self._template, self._tokenizer, [*_PROBE, *tools], add_generation_prompt=True).ids
        ends = [n for n, i in enumerate(ids) if i == self.end_of_turn]
        return ids[ends[self._num_ends - 1] + 1:] + self._think


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token with which a template ends an answer of the assistant, if it does so."""
    messages = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
    return _find_end(template, tokenizer, messages)[0]


# One call suffices for any number of results; templates that show a single call refuse more. Mistral's wants such ids.
_CALL_ID = "call00001"
_PROBE = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": {"probe_argument": "1"}}}]},
)


def _find_end(template: ChatTemplate, tokenizer: Tokenizer, messages: Messages) -> tuple[int | None, int]:
    """The special token at the end of a conversation that the assistant ends, if any, and how often it stands there."""
    names = {symbol.id: name for name, symbol in tokenizer.symbols.items()}
    variables = {f"{kind}_token": names.get(getattr(tokenizer, f"{kind}_id"), "") for kind in ("bos", "eos", "pad")}
    text = template.render(messages, add_generation_prompt=False, **(variables | template.variables))
    found = find_symbols(tokenizer.symbols, text)
    if not found or text[found[-1][1]:].strip():
        return None, 0
    last = found[-1][2].id
    return last, sum(symbol.id == last for _, _, symbol in found)


def _parse(text: str) -> Call | ParseError:
    try:
        name, arguments = read_call(_decode(text))
    except ValueError as error:
        return ParseError(str(error), text)
    return Call(name, arguments, text)


def _decode(text: str) -> Any:
    """JSON as the standard has it. ValueError also for duplicate keys, NaN, too much nesting, half characters."""
    if len(text) > MAX_CALL_CHARS:
        raise ValueError(f"the call is longer than {MAX_CALL_CHARS} characters")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_finite, parse_float=_finite)
        _check(value, 0)
    except RecursionError:
        raise ValueError(f"the call is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the call is not JSON: {error}") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name!r:.80} stands there twice")
        values[name] = value
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON, or too large")
    return value


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("the call holds half of a surrogate pair")
    if isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(one, depth + 1)


OBSERVATIONS = {"hermes": hermes_turn, "mentor": mentor_turn}
