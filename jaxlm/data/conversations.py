"""Chat rows, `{"messages": [...], "tools": [...]?}` as OpenAI and Hugging Face write them: where they come from, and
what is wrong with one, with its line. `jaxlm.data.chat_examples` makes training examples of them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxlm.core.config import nearest
from jaxlm.data.difficulty import parse_balance, read_difficulty
from jaxlm.data.rows import BadRow, Document, RowReader, SourceConfig, decode_json, missing_field
from jaxlm.data.sample_chats import SAMPLE_THINKING, SampleChats, sample_thinking
from jaxlm.data.sources import MIXED, Source, open_rows, parse_source
from jaxlm.data.thinking import REASONING, Thinking

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


@dataclass(frozen=True, kw_only=True)
class TuningDataConfig(ConversationsConfig):
    """Conversations of which some bring reasoning, and which are more or less difficult.

    With `balance` rows are drawn by difficulty: from `equal` shares of the buckets, or by weights, `easy=1 medium=2`.
    Labels are buckets as they are; numbers are cut into quantiles, as many as named (equal: 3), the lowest first.
    """

    thinking: Thinking = "keep"     # reasoning: as rows have it, left out, or shown by a share of those that have it
    thinking_share: float = 0.5     # of rows with reasoning, in hybrid data; the others get an empty block
    difficulty_field: str = "difficulty"  # of rows, read with balance
    balance: tuple[str, ...] = ()   # empty: rows are drawn as they come

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.thinking_share < 1:
            raise ValueError(f"data.thinking_share must be between 0 and 1, got {self.thinking_share}; data.thinking "
                             "keep and drop are all and none")
        default = TuningDataConfig
        if self.thinking != "hybrid" and self.thinking_share != default.thinking_share:
            raise ValueError(f"data.thinking_share has no effect with data.thinking {self.thinking}")
        if not self.balance and self.difficulty_field != default.difficulty_field:
            raise ValueError("data.difficulty_field has no effect without data.balance")
        parse_balance(self.balance)


def open_corpora(config: ConversationsConfig) -> tuple[list[Source], list[Source]]:
    """The sources to train on and those held out; ValueError as `open_conversations`, and for a held-out weight."""
    balanced = isinstance(config, TuningDataConfig) and config.balance
    paths, held_out = ([parse_source(spec, unread=unread) for spec in specs]
                       for specs, unread in ((config.path, ()), (config.held_out, MIXED)))
    fields = (config.difficulty_field if balanced else "", "")  # what is held out is measured, not drawn
    return tuple([open_conversations(path, max_bad_rows=config.max_bad_rows, difficulty_field=field) for path in part]
                 for part, field in zip((paths, held_out), fields, strict=True))


def open_conversations(config: SourceConfig | Iterable[Mapping[str, Any]], *, max_bad_rows: int = 0,
                       difficulty_field: str = "") -> Source:
    """Opens what a configuration names, or rows in memory: documents whose text is a conversation as JSON.

    `sample:ko|en|both` are embedded questions and answers; `sample_thinking:ko|en|both`, perhaps with `/held_out`
    behind it, such with reasoning and a difficulty. With a `difficulty_field` every row has it: a label or a number,
    under "difficulty" beside the messages. ValueError as `open_source`, in one sentence.
    """
    path = config.path if isinstance(config, SourceConfig) else ""
    if difficulty_field and (path.startswith("sample:") or (
            path.startswith(SAMPLE_THINKING) and difficulty_field != "difficulty")):
        raise ValueError(f"source {path!r}: its rows have no field {difficulty_field!r}; the field 'difficulty' is in "
                         f"those of {SAMPLE_THINKING}both")
    if path.startswith(SAMPLE_THINKING):
        if config != SourceConfig(path=path, name=config.name, weight=config.weight):
            raise ValueError(f"source {path!r}: of the options only name and weight have an effect on it")
        return Source(config, sample_thinking(path), ConversationReader(config))
    return open_rows(config, reader=partial(ConversationReader, difficulty_field=difficulty_field), sample=SampleChats,
                     what="conversations", max_bad_rows=max_bad_rows, text_field="messages")


@dataclass
class ConversationReader(RowReader):
    """Rows to documents: a conversation as JSON, and in `source` where it stood, as path:line."""

    difficulty_field: str = ""
    _has_tools = False

    def fields(self) -> list[str]:
        """As for documents, the difficulty that is asked for, and the tools where there are any."""
        more = [*([self.difficulty_field] if self.difficulty_field else []), *(["tools"] if self._has_tools else [])]
        return list(dict.fromkeys([*super().fields(), *more]))

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
        if self.difficulty_field and conversation:
            conversation["difficulty"] = read_difficulty(row, self.difficulty_field)
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
    thought = message.get(REASONING)
    if not isinstance(thought, str | None):
        raise BadRow(f"message {number}: {REASONING} is not a string but {type(thought).__name__}")
    if thought and role != "assistant":
        raise BadRow(f"message {number}: {REASONING} of the role {role}; only the assistant reasons")
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
