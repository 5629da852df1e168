"""Preference rows to ids: a prompt, and what follows it in each completion, with a mask of what the assistant wrote.

All of a source is encoded when it is opened, so what is dropped is known before any device work.
"""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_examples import Chat, ChatFormat
from jaxlm.data.conversations import TooLong
from jaxlm.data.sources import Source, check_bad

logger = logging.getLogger(__name__)


class PreferenceExample(NamedTuple):
    """A row as ids; each completion ends with its last target.

    With ChatML, "2+2?" answered by "4" or "five", 1 and 2 the special tokens around a turn:

        prompt        1 user \\n 2 + 2 ? 2 \\n 1 assistant \\n
        first         4 2            loss 1 1
        second        fi ve 2        loss 1 1 1
    """

    prompt: np.ndarray      # [P] int32, at least one
    first: Chat             # the chosen completion, or the judged one
    second: Chat | None     # the rejected one; None: the first was judged alone
    desirable: bool = True  # how it was judged


class PreferenceSet(NamedTuple):
    """The examples of one source."""

    name: str
    examples: list[PreferenceExample]
    dropped: dict[str, int]  # rows left out, by reason

    def fingerprint(self) -> int:
        """CRC-32 of all ids and masks: of rows, tokenizer and template."""
        value = 0
        for one in self.examples:
            for part in (one.prompt, *one.first, *(one.second or ())):
                value = zlib.crc32(part.tobytes(), zlib.crc32(str(len(part)).encode(), value))
            value = zlib.crc32(bytes([one.desirable]), value)
        return value


def encode_preferences(
    source: Source, form: ChatFormat, *, seq_len: int, paired: bool, too_long: TooLong = "drop", max_bad_rows: int = 0,
) -> PreferenceSet:
    """All rows of a source as ids, with what was dropped in the log.

    Dropped are pairs whose completions are the same, empty completions, and rows longer than `seq_len + 1` tokens; with
    `too_long="cut"` the beginning of the prompt is cut off instead, the same for both, unless a completion alone is
    too long. Rows that the template does not take are bad, also those of which it writes the prompt in another way
    when a completion follows it: more than `max_bad_rows` are a ValueError that names the first, as is nothing left.

    Args:
      paired: examples are pairs, and a row judged alone is a ValueError; else a pair becomes two judged rows.
    """
    dropped, bad, kept, cut = Counter(), [], [], 0
    for document in (source[i] for i in range(len(source))):
        if document is None:
            continue
        row = json.loads(document.text)
        if paired and "label" in row:
            raise ValueError(f"{document.source}: is judged alone (completion, label), which only a method for such "
                             "rows learns from: kto; others need chosen and rejected")
        if reason := _useless(row):
            dropped[reason] += 1
            continue
        try:
            found = _encode(row, form, paired)
        except ValueError as error:
            bad.append(f"{document.source}: {error}")
            continue
        dropped["same"] += not found
        for one in found:
            fitted = _fit(one, seq_len, too_long)
            cut += fitted is not None and len(fitted.prompt) < len(one.prompt)
            if fitted is None:
                dropped["too long"] += 1
            else:
                kept.append(fitted)
    num_bad = check_bad(source, bad, max_bad_rows)
    dropped["bad"] = num_bad
    dropped = {reason: count for reason, count in dropped.items() if count or reason == "bad"}
    said = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise ValueError(f"{source.config.path}: no row left of {len(source)}: dropped {said} (batch.seq_len is "
                         f"{seq_len})")
    logger.info("%s: %d rows, cut: %d, dropped: %s%s", source.config.path, len(kept), cut, said,
                f"; first bad: {(source.bad_rows + bad)[0]}" if num_bad else "")
    return PreferenceSet(source.name, kept, dropped)


def _useless(row: Mapping[str, Any]) -> str | None:
    """Why nothing can be learnt from a row."""
    sides = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    blank = lambda message: not ((message.get("content") or "").strip() or message.get("tool_calls"))
    if any(all(map(blank, side)) for side in sides):
        return "empty"
    return "same" if len(sides) == 2 and sides[0] == sides[1] else None


def _encode(row: Mapping[str, Any], form: ChatFormat, paired: bool) -> list[PreferenceExample]:
    """The examples of a row, none if both completions are written alike; ValueError says what the template refuses."""
    messages, tools = row["messages"], row.get("tools")
    said = {name: row[name] for name in ("chosen", "rejected", "completion") if name in row}
    prompt = form.opening(messages, [message for side in said.values() for message in side], tools)
    sides = [_completion(prompt, messages, side, name, form, tools) for name, side in said.items()]
    prompt = np.array(prompt, np.int32)
    if len(sides) == 1:
        return [PreferenceExample(prompt, sides[0], None, row["label"])]
    if np.array_equal(sides[0].ids, sides[1].ids):
        return []
    if paired:
        return [PreferenceExample(prompt, *sides)]
    return [PreferenceExample(prompt, side, None, desirable) for side, desirable in zip(sides, (True, False),
                                                                                       strict=True)]


def _completion(prompt: Sequence[int], messages: Sequence[Any], said: Sequence[Any], name: str, form: ChatFormat,
                tools: Sequence[Any] | None) -> Chat:
    """What follows the prompt, up to the last target."""
    ids, mask = chat_ids(form.template, form.tokenizer, [*messages, *said], add_generation_prompt=False, tools=tools)
    if ids[:len(prompt)] != list(prompt):
        same = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(ids))
        raise ValueError(f"{name}: with this completion after it the prompt has other tokens, from token {same} of "
                         f"{len(prompt)} on; the template must write a prompt as it begins the conversation")
    ids, loss = np.array(ids[len(prompt):], np.int32), np.array(mask[len(prompt):], np.uint8)
    if not loss.any():
        raise ValueError(f"{name}: the chat template shows nothing that the assistant wrote")
    end = int(loss.nonzero()[0][-1]) + 1
    return Chat(ids[:end], loss[:end])


def _fit(one: PreferenceExample, seq_len: int, too_long: TooLong) -> PreferenceExample | None:
    """The example within `seq_len + 1` tokens, None if that cannot be."""
    room = seq_len + 1 - max(len(one.first.ids), len(one.second.ids) if one.second else 0)
    if len(one.prompt) <= room:
        return one
    return one._replace(prompt=one.prompt[-room:]) if too_long == "cut" and room > 0 else None
