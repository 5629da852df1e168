"""Preference rows: a prompt with two completions of which one is preferred, or with one that was judged.

    {"messages": [...], "chosen": [...], "rejected": [...], "tools": [...]?}      messages, as conversations have them
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}                            texts: one message each
    {"prompt": [...], "chosen": [prompt and answer], "rejected": [...]}           the prompt repeated, or not
    {"chosen": [...], "rejected": [...]}                                          the prompt is what both begin with
    {"prompt": ..., "completion": ..., "label": true}                             judged alone, for KTO

All become the first or the last form, with lists of messages. `jaxlm.data.preference_examples` makes ids of them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.data.conversations import TooLong, read_conversation
from jaxlm.data.rows import BadRow, Document, RowReader, SourceConfig, missing_field
from jaxlm.data.sample_preferences import SamplePreferences
from jaxlm.data.sources import MIXED, NO_TEXT, Source, open_rows, parse_source

PROMPT = ("messages", "prompt")
SIDES = {"pair": ("chosen", "rejected"), "judged": ("completion", "label")}
Kind = Literal["pair", "judged"]


@dataclass(frozen=True, kw_only=True)
class PreferenceDataConfig:
    """Sources of preference rows, `path?option=value&...` each. The rows of all are shuffled together."""

    path: tuple[str, ...] = ("sample:ko?documents=4000", "sample:en?documents=4000")
    held_out: tuple[str, ...] = (  # measured on each of these, by name
        "sample:both?documents=256&split=held_out&name=unseen_facts",
        "sample:both?documents=256&seed=1&name=seen_facts")
    max_bad_rows: int = 0       # rows of one source that may be unreadable
    too_long: TooLong = "drop"  # beyond batch.seq_len: dropped and counted, or the prompt is cut at its beginning

    def __post_init__(self) -> None:
        if not self.path or not self.held_out:
            raise ValueError("data.path and data.held_out need at least one source each")


def open_preferences(config: PreferenceDataConfig) -> tuple[list[Source], list[Source]]:
    """The sources to train on and those held out; ValueError as `open_preference_rows`, and for weights."""
    # Preference rows of all sources are shuffled together: no mixture.
    paths, held_out = ([parse_source(spec, unread=MIXED) for spec in specs] for specs in (config.path, config.held_out))
    names = [source.name or source.path for source in held_out]
    if len(set(names)) < len(names):
        raise ValueError(f"two held-out sources have the same name: {', '.join(names)}; give them a name=")
    return tuple([open_preference_rows(path, max_bad_rows=config.max_bad_rows) for path in part]
                 for part in (paths, held_out))


def open_preference_rows(config: SourceConfig | Iterable[Mapping[str, Any]], *, max_bad_rows: int = 0) -> Source:
    """Opens what a configuration names, or rows in memory: documents whose text is a row as JSON.

    `sample:ko|en|both` are embedded pairs. ValueError as `open_source`, in one sentence.
    """
    return open_rows(config, reader=PreferenceReader, sample=SamplePreferences, what="preference rows",
                     max_bad_rows=max_bad_rows, unread=(*NO_TEXT, "text_field"))


class PreferenceReader(RowReader):
    """Rows to documents: a row as JSON, and in `source` where it stood, as path:line."""

    _present: frozenset[str] = frozenset()

    def fields(self) -> list[str]:
        """What a file's header has of those that rows may have, and what filters read."""
        names = [name for name in (*PROMPT, *SIDES["pair"], *SIDES["judged"], "tools") if name in self._present]
        return list(dict.fromkeys([*names, *self._include, *self._exclude]))

    def require_fields(self, present: Iterable[str], path: str) -> None:
        """ValueError for a header that has neither form."""
        present = list(present)
        try:
            kind_of(present)
        except BadRow as error:
            raise ValueError(f"{path}: {error}") from None
        self._present = frozenset(present)
        super().require_fields(present, path)

    def _document(self, row: Mapping[str, Any], path: str, line: int) -> Document:
        if path.endswith(".parquet"):  # a column has one type for all rows: what a row lacks is there as null
            row = _without_none(row)
        return Document(json.dumps(read_preference(row), ensure_ascii=False), None, f"{path}:{line}")


def kind_of(names: Iterable[str]) -> Kind:
    """Which form the fields of a row make; BadRow if neither."""
    names = list(names)
    judged = "completion" in names or "label" in names
    if judged and ("chosen" in names or "rejected" in names):
        raise BadRow("has fields of a pair (chosen, rejected) and of a judged completion (completion, label); one form "
                     "a row")
    kind: Kind = "judged" if judged else "pair"
    for name in SIDES[kind]:
        if name not in names:
            raise BadRow(missing_field(name, names))
    if kind == "judged" and not any(name in names for name in PROMPT):
        raise BadRow(missing_field("prompt", names))
    return kind


def read_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in one of the forms above as the first or the last one; BadRow says what is wrong."""
    kind = kind_of(row)
    names = [name for name in PROMPT if row.get(name) is not None]
    if len(names) > 1:
        raise BadRow("fields 'messages' and 'prompt' mean the same; give one of them")
    tools = row.get("tools")
    sides = SIDES["pair"] if kind == "pair" else ("completion",)
    told = {name: _messages(row[name], "assistant", name, tools) for name in sides}
    if names:
        prompt = _messages(row[names[0]], "user", names[0], tools)
        for name, said in told.items():
            if said[:len(prompt)] == prompt:
                told[name] = said[len(prompt):]
    else:
        first, second = told.values()
        count = _shared(first, second)
        prompt, told = first[:count], {name: said[count:] for name, said in told.items()}
        if not prompt:
            raise BadRow("chosen and rejected begin with no message in common; give the prompt as a field of its own")
    if not any(message.get("content") or message.get("tool_calls") for message in prompt):
        raise BadRow("the prompt is empty")
    for name, said in told.items():
        if not said or said[0]["role"] != "assistant":
            raise BadRow(f"{name} must be what the assistant says after the prompt, or the prompt and that; got "
                         f"{[message['role'] for message in said]}")
    conversation = {**read_conversation(prompt, tools), **told}
    return conversation | ({"label": _label(row["label"])} if kind == "judged" else {})


def _label(value: Any) -> bool:
    """true and false, 1 and 0, also as text (in TSV)."""
    said = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
    if said not in ("true", "false", "1", "0"):
        raise BadRow(f"label must be true or false, got {value!r:.80}")
    return said in ("true", "1")


def _shared(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> int:
    """How many messages two conversations begin with alike, short of the last message of either."""
    count = 0
    while count < min(len(first), len(second)) - 1 and first[count] == second[count]:
        count += 1
    return count


def _messages(value: Any, role: str, name: str, tools: Any) -> list[dict[str, Any]]:
    """A text as one message of a role; a list of messages, or its JSON text, as it is."""
    listed = value
    if isinstance(value, str):
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        if not (isinstance(listed, list) and listed and all(isinstance(x, Mapping) and "role" in x for x in listed)):
            listed = [{"role": role, "content": value}]
    try:
        conversation = read_conversation(listed, tools)
    except BadRow as error:
        raise BadRow(f"field {name!r}: {error}") from None
    return conversation["messages"] if conversation else []


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
