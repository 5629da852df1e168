"""Messages to token ids by a chat template, with a mask of what the assistant wrote.

The template's own text may name special tokens; whatever messages and tools spell out stays text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple

from jaxlm.data.chat_template import CLOSE, OPEN, ChatTemplate, Messages
from jaxlm.data.tokenizer import Symbol, Tokenizer

ASSISTANT = "assistant"
_PLAIN_KEYS = {"role", "content", "name"}
_SPACES = re.compile(r"\s*")


class ChatIds(NamedTuple):
    """A conversation as ids."""

    ids: list[int]
    mask: list[bool] | None  # per id: the assistant wrote it; None for a prompt of which that cannot be known


def chat_ids(template: ChatTemplate, tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool,
             tools: Sequence[Any] | None = None) -> ChatIds:
    """The ids of a conversation, and which of them the assistant wrote.

    The mask follows the template's `{% generation %}` tags. Without tags it holds each assistant message's content and
    the special token that follows it, if one does. With ChatML and "Hi <|im_end|>" said by the user:

        text   <|im_start|>user\\nHi <|im_end|><|im_end|>\\n<|im_start|>assistant\\nYes<|im_end|>\\n
        ids    1 user \\n Hi ␣ < | im _ end | > 2 \\n 1 assistant \\n Yes 2 \\n   (1 and 2 are the special tokens)
        mask   0 0    0  0  0 0 0 0  0 0   0 0 0 0  0 0         0  1   1 0

    No bos or eos is added to what the template writes. The roles are the caller's word: a template may build special
    tokens of them. ValueError for what is no list of messages, what the template refuses, tools it does not show, a
    text it alters in ways that cannot be followed, and a mask that cannot be known, with the number of the message.
    """
    messages = _checked(messages)
    names = {symbol.id: name for name, symbol in tokenizer.symbols.items()}
    variables = {f"{kind}_token": names.get(getattr(tokenizer, f"{kind}_id"), "") for kind in ("bos", "eos", "pad")}
    now = datetime.now()  # one moment for every rendering

    def render(messages: Messages, tools: Any, **marks: str) -> str:
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, now=now,
                               **(variables | template.variables | marks))

    text = render(messages, tools)
    if tools and text == render(messages, None):
        raise ValueError("the chat template shows no tools, so they would be lost")
    marks = _fresh_characters([template.source, template.variables, messages, tools, list(names.values())])
    hide, shown = _hider(tokenizer.symbols, marks)
    edges = [(next(marks), next(marks)) for _ in messages]
    opened, closed = next(marks), next(marks)
    marked = [hide(message) | _edged(hide(message), *edge) for message, edge in zip(messages, edges, strict=True)]
    found = _unmark(render(marked, hide(tools), **{OPEN: opened, CLOSE: closed}), shown, [*edges, (opened, closed)])
    if found.text != text:
        wrong = [i for i in range(len(messages))
                 if _unmark(render([*messages[:i], marked[i], *messages[i + 1:]], tools), shown, edges).text != text]
        raise ValueError("the chat template alters what it is given in a way that cannot be followed: "
                         + (f"message {wrong[0]}" if wrong else "the tools or several messages together"))
    contents = [found.spans[edge] for edge in edges]
    literal = found.hidden + [span for spans in contents for span in spans]
    symbols = find_symbols(tokenizer.symbols, text, literal)
    try:
        if re.search(r"{%[-+]?\s*generation\b", template.source):
            spoken = found.spans[opened, closed]
        else:
            spoken = _spoken(messages, contents, symbols, text, lambda changed: render(changed, tools))
    except ValueError:
        if not add_generation_prompt:
            raise
        spoken = None
    ids, places = encode_symbols(tokenizer, text, symbols)
    if spoken is None:
        return ChatIds(ids, None)
    written = bytearray(len(text))
    for start, end in spoken:
        written[start:end] = b"\1" * (end - start)
    return ChatIds(ids, [1 in written[start:end] for start, end in places])


def find_symbols(symbols: Mapping[str, Symbol], text: str, literal: Sequence[tuple[int, int]] = ()
                 ) -> list[tuple[int, int, Symbol]]:
    """Where special tokens stand in a text, the first and longest of those that overlap, outside of `literal` spans.

    With "<a>" and "<a>b" as symbols: `find_symbols(..., "x<a>b<a>")` finds "<a>b" in 1:5 and "<a>" in 5:8; with
    `literal=[(2, 3)]` only the latter.
    """
    if not symbols:
        return []
    pattern = re.compile("|".join(re.escape(name) for name in sorted(symbols, key=len, reverse=True)))
    found, position = [], 0
    for start, end in [*sorted(literal), (len(text), len(text))]:
        found += [(*match.span(), symbols[match.group()]) for match in pattern.finditer(text, position, start)]
        position = max(position, end)
    return found


def encode_symbols(tokenizer: Tokenizer, text: str, symbols: Sequence[tuple[int, int, Symbol]]
                   ) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text in which the symbols found are special tokens, and the characters each id stands for."""
    ids, places, position = [], [], 0
    for start, end, symbol in [*symbols, (len(text), len(text), None)]:
        between = text[position:start]
        if symbol and symbol.takes_left:
            between = between.rstrip()
        if between:
            some, spans = tokenizer.encode_spans(between, inside=position > 0)
            ids += some
            places += [(position + a, position + b) for a, b in spans]
        if symbol:
            ids.append(symbol.id)
            places.append((start, end))
            position = end + (len(text[end:]) - len(text[end:].lstrip()) if symbol.takes_right else 0)
    return ids, places


def _checked(messages: Messages) -> list[dict[str, Any]]:
    """Messages without keys that are None; ValueError with the number of the one that is none."""
    if not messages or isinstance(messages, str | Mapping):
        raise ValueError("a conversation is a list of at least one message")
    kept = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is not a mapping with a role: {message!r:.80}")
        kept.append({key: value for key, value in message.items() if value is not None})
        if not isinstance(message.get("content", None if "tool_calls" in kept[-1] else 0), str | None):
            raise ValueError(f"message {i}: the content of a message is a string, not {message.get('content')!r:.80}")
    return kept


def _fresh_characters(values: Any) -> Iterator[str]:
    """Private characters that appear nowhere in the values."""
    used = set(json.dumps(values, ensure_ascii=False))
    return (chr(i) for i in chain(range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE)) if chr(i) not in used)


def _hider(symbols: Mapping[str, Symbol], marks: Iterator[str]) -> tuple[Callable[[Any], Any], dict[str, str]]:
    """A function that replaces special tokens spelled out in strings by marks, and what each mark stands for."""
    signs, shown = {}, {}

    def hide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {hide(key): hide(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [hide(one) for one in value]
        if not isinstance(value, str):
            return value
        parts, position = [], 0
        for start, end, _ in find_symbols(symbols, value):
            name = value[start:end]
            if name not in signs:
                signs[name] = next(marks)
                shown[signs[name]] = name
            parts += [value[position:start], signs[name]]
            position = end
        return "".join(parts) + value[position:]

    return hide, shown


def _edged(message: Mapping[str, Any], before: str, after: str) -> dict[str, str]:
    """The content with a mark at each end, inside the outer spaces so that a template still trims them."""
    content = message.get("content", "")
    text = content.strip()
    return {"content": content.replace(text, f"{before}{text}{after}", 1)} if text else {}


class _Unmarked(NamedTuple):
    text: str
    hidden: list[tuple[int, int]]  # special tokens spelled out by messages or tools
    spans: dict[tuple[str, str], list[tuple[int, int]]]  # what stood between two edges; empty if an edge was lost


def _unmark(rendered: str, shown: Mapping[str, str], edges: Sequence[tuple[str, str]]) -> _Unmarked:
    """A rendering without its marks, and where they stood."""
    begins, ends = {edge[0]: edge for edge in edges}, {edge[1]: edge for edge in edges}
    parts, position, hidden, begun, broken = [], 0, [], {}, set()
    spans = {edge: [] for edge in edges}
    for part in re.split(f"([{''.join([*shown, *begins, *ends])}])", rendered):
        if part in shown:
            part = shown[part]
            hidden.append((position, position + len(part)))
        elif part in begins:
            broken |= {begins[part]} & begun.keys()
            begun[begins[part]] = position
            part = ""
        elif part in ends:
            edge, part = ends[part], ""
            if edge in begun:
                spans[edge].append((begun.pop(edge), position))
            else:
                broken.add(edge)
        parts.append(part)
        position += len(part)
    return _Unmarked("".join(parts), hidden, spans | {edge: [] for edge in broken | begun.keys()})


def _spoken(messages: Messages, contents: Sequence[Sequence[tuple[int, int]]],
            symbols: Sequence[tuple[int, int, Symbol]], text: str,
            render: Callable[[Messages], str]) -> list[tuple[int, int]]:
    """What the assistant wrote, by a template without tags. ValueError with the message for which it does not show."""
    stops = {start: end for start, end, _ in symbols}
    spans = []
    for i, (message, places) in enumerate(zip(messages, contents, strict=True)):
        if message["role"] != ASSISTANT:
            continue
        plain = {key: value for key, value in message.items() if key in _PLAIN_KEYS}
        if not places or (len(plain) < len(message) and render([*messages[:i], plain, *messages[i + 1:]]) != text):
            raise ValueError(f"message {i}: the chat template does not show what of its text the assistant wrote; "
                             "put {% generation %} ... {% endgeneration %} around that")
        content, kept = message["content"], 0
        if content != content.lstrip():
            bare = message | {"content": content.lstrip()}
            kept = len(text) - len(render([*messages[:i], bare, *messages[i + 1:]]))
        for start, end in places:
            spans.append((start - kept, stops.get(_SPACES.match(text, end).end(), end)))
    return spans
