"""Chat rows, `{"messages": [...], "tools": [...]?}` as OpenAI and Hugging Face write them: where they come from, and
what is wrong with one, with its line. `jaxlm.data.chat_examples` makes training examples of them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.core.config import nearest
from jaxlm.data.rows import BadRow, Document, RowReader, SourceConfig, decode_json, missing_field
from jaxlm.data.sample_chats import SampleChats
from jaxlm.data.sources import Source, open_rows, parse_source

ROLES = ("system", "user", "assistant", "tool")
TrainOn = Literal["all", "last"]
TooLong = Literal["drop", "cut"]


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """Sources of chat rows, `path?option=value&...` each, and what of them is learnt.

    The options are those of documents; `text_field` names the field that holds the messages (default `messages`).
    """

    path: tuple[str, ...] = ("sample:ko?documents=4000", "sample:en?documents=4000")
    held_out: tuple[str, ...] = (  # loss and exact answers are measured on each of these, by name
        "sample:both?documents=64&split=held_out&name=unseen_facts", "sample:both?documents=64&seed=1&name=seen_facts")
    max_bad_rows: int = 0                # rows of one source that may be unreadable
    train_on: TrainOn = "all"            # turns of the assistant that are targets: all, or the last of a conversation
    too_long: TooLong = "drop"           # conversations beyond pipeline.seq_len: dropped and counted, or cut at the end
    never_predict: tuple[str, ...] = ()  # symbols that are input but no target; KORMo: <think>

    def __post_init__(self) -> None:
        if not self.path or not self.held_out:
            raise ValueError("data.path and data.held_out need at least one source each")


def open_corpora(config: ConversationsConfig) -> tuple[list[Source], list[Source]]:
    """The sources to train on and those held out; ValueError as `open_conversations`, and for a held-out weight."""
    paths, held_out = ([parse_source(spec) for spec in specs] for specs in (config.path, config.held_out))
    for path in held_out:
        if path.weight != 1:
            raise ValueError(f"data.held_out {path.path}: weight has an effect on training sources only")
    return tuple([open_conversations(path, max_bad_rows=config.max_bad_rows) for path in part]
                 for part in (paths, held_out))


def open_conversations(config: SourceConfig | Iterable[Mapping[str, Any]], *, max_bad_rows: int = 0) -> Source:
    """Opens what a configuration names, or rows in memory: documents whose text is a conversation as JSON.

    `sample:ko|en|both` are embedded questions and answers. ValueError as `open_source`, in one sentence.
    """
    return open_rows(config, reader=ConversationReader, sample=SampleChats, what="conversations",
                     max_bad_rows=max_bad_rows, text_field="messages")


class ConversationReader(RowReader):
    """Rows to documents: a conversation as JSON, and in `source` where it stood, as path:line."""

    _has_tools = False

    def fields(self) -> list[str]:
        """As for documents, and the tools where there are any."""
        return list(dict.fromkeys([*super().fields(), *(["tools"] if self._has_tools else [])]))

    def require_fields(self, present: Iterable[str], path: str) -> None:
        """As for documents; tools may be missing."""
        present = list(present)
        self._has_tools = False
        super().require_fields(present, path)
        self._has_tools = "tools" in present

    def _document(self, row: Mapping[str, Any], path: str, line: int) -> Document | None:
        name = self.config.text_field if self.config.text_field != "text" else "messages"
        if name not in row:
            raise BadRow(missing_field(name, row))
        # A parquet column has one type for all rows, so what a row lacks is there as null.
        plain = _without_none if path.endswith(".parquet") else lambda value: value
        conversation = read_conversation(plain(row[name]), plain(row.get("tools")))
        return conversation and Document(json.dumps(conversation, ensure_ascii=False), None, f"{path}:{line}")


def read_conversation(messages: Any, tools: Any = None) -> dict[str, Any] | None:
    """`{"messages": [...], "tools": [...]}` as templates take it, None without messages; BadRow says what is wrong.

    Messages and tools may also be the text of such JSON (in TSV and parquet files), and so may the arguments of a call,
    as OpenAI writes them: they become the object.
    """
    messages, tools = (decode_json(part.encode("utf-8", "surrogatepass")) if isinstance(part, str) else part
                       for part in (messages, tools))
    if not isinstance(messages, list | tuple):
        raise BadRow(f"messages are a list, not {type(messages).__name__}")
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRow("tools are a list of objects")
    read = [_message(number, message) for number, message in enumerate(messages)]
    if not read:
        return None
    conversation = {"messages": read} | ({"tools": list(tools)} if tools else {})
    try:
        json.dumps(conversation, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("holds a lone surrogate, which is no character") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"holds what JSON cannot say ({error})") from None
    return conversation


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"message {number} is not an object but {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"message {number}: the role is {role!r}{nearest(str(role), ROLES)}; roles: {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise BadRow(f"message {number}: tool_calls of the role {role}; only the assistant calls tools")
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow(f"message {number}: the content is not a string but {type(content).__name__}")
    kept = {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
    return kept | ({"tool_calls": [_call(number, call) for call in calls]} if calls else {})


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"message {number}: a call is an object with a name and arguments, or with such a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments.encode("utf-8", "surrogatepass"))
        except BadRow as error:
            raise BadRow(f"message {number}: the arguments of {function['name']} are {error}") from None
    if not isinstance(arguments, Mapping):
        raise BadRow(f"message {number}: the arguments of {function['name']} are no object")
    function = {**function, "arguments": dict(arguments)}
    return {**call, "function": function} if "function" in call else function


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
