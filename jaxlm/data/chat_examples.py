"""Conversations to training examples: ids, a mask of what the assistant wrote, whole in packed rows.

    conversations -> chat template, tokenizer -> ids and mask (`Chats`) -> `chat_batches`

All of a source is encoded when it is opened, so what is dropped is known before any device work.
"""

import functools
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.chat import chat_ids, find_symbols
from jaxlm.data.chat_template import KORMO, ChatTemplate
from jaxlm.data.conversations import TooLong, TrainOn
from jaxlm.data.examples import Example
from jaxlm.data.pipeline import Batches, PipelineConfig, stream_batches
from jaxlm.data.rows import SourceConfig
from jaxlm.data.sources import Source, check_bad, spread
from jaxlm.data.thinking import (
    REASONING,
    THINK_TAGS,
    VARIABLE,
    is_shown,
    last_turns,
    reasons,
    shows_reasoning,
    without_reasoning,
)
from jaxlm.data.tokenizer import JSON_FILE, JsonTokenizer, SentencePieceTokenizer, Symbol, Tokenizer
from jaxlm.data.tokenizer_training import train_sentencepiece

# What templates write around turns, calls and results; `train_chat_tokenizer` makes special tokens of those in use.
CHAT_SYMBOLS = ("<|im_start|>", "<|BOT|>", *THINK_TAGS, "<tool_call>", "</tool_call>", "<tool_response>",
                "</tool_response>", "<tools>", "</tools>")
ENDS_OF_TURNS = ("<|im_end|>", "<|EOT|>")

logger = logging.getLogger(__name__)


class Chat(NamedTuple):
    """A conversation as ids."""

    ids: np.ndarray   # [T] int32
    loss: np.ndarray  # [T] uint8, 1 where the token counts as a target


def last_turn(loss: np.ndarray) -> slice:
    """The last run of ones, empty if there is none: 3:5 of `1 1 0 1 1 0`."""
    found = loss.nonzero()[0]
    if not len(found):
        return slice(len(loss), len(loss))
    end = int(found[-1]) + 1
    return slice(end - int(np.argmin(np.append(loss[:end][::-1], 0))), end)


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become ids; what the template writes, and nothing before or after it."""

    template: ChatTemplate
    tokenizer: Tokenizer
    train_on: TrainOn = "all"
    excluded: tuple[int, ...] = ()  # ids that are never a target
    reasoning: bool = True          # False: `reasoning_content` is left out

    def prompt(self, conversation: Mapping[str, Any]) -> list[int] | None:
        """What a model reads before the last turn of the assistant; None if there is none, or it is the first one."""
        if not self.reasoning:
            conversation = without_reasoning(conversation)
        messages = conversation["messages"]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not last:
            return None
        return self.opening(messages[:last], messages[last:last + 1], conversation.get("tools"))

    def opening(self, messages: Sequence[Any], answer: Sequence[Any], tools: Sequence[Any] | None) -> list[int]:
        """Messages, and the beginning of the turn that follows, as a prompt.

        It asks for reasoning if a message of the answer has some, where the template can ask (`enable_thinking`).
        """
        asked = {VARIABLE: self.reasoning and any((one.get(REASONING) or "").strip() for one in answer)}
        template = replace(self.template, variables={**asked, **self.template.variables})
        return chat_ids(template, self.tokenizer, messages, add_generation_prompt=True, tools=tools).ids

    def text(self, ids: Sequence[int]) -> str:
        """What a turn answers, without reasoning before it, the special token that ends it and outer spaces."""
        ids = [int(i) for i in ids]
        special = {symbol.id for symbol in self.tokenizer.symbols.values()}
        ids = ids[:-1] if ids and ids[-1] in special else ids
        stop = self.tokenizer.symbols.get(THINK_TAGS[1])
        if stop and stop.id in ids:
            ids = ids[ids.index(stop.id) + 1:]
        return self.tokenizer.decode(ids).strip()

    def encode(self, conversation: Mapping[str, Any]) -> Chat:
        """The ids of a conversation and which count; ValueError says what the template does not take.

        With ChatML, `u` the user, `a` the assistant, 1 and 2 the special tokens around a turn:

            ids     1 u Hi 2 \\n 1 a Yes 2 \\n 1 u Bye 2 \\n 1 a So long 2 \\n
            all     0 0 0  0 0   0 0 1  1 0   0 0 0   0 0   0 0 1 1    1 0
            last    0 0 0  0 0   0 0 0  0 0   0 0 0   0 0   0 0 1 1    1 0

        Reasoning that the template shows in no turn is a ValueError: it would be lost.
        """
        if not self.reasoning:
            conversation = without_reasoning(conversation)
        elif reasons(conversation) and not shows_reasoning(self.template, conversation):
            raise ValueError("the chat template shows no reasoning, so reasoning_content would be lost: take a "
                             "template that shows it, such as kormo, or leave it out (recipes.sft --data.thinking "
                             "drop)")
        ids, mask = chat_ids(self.template, self.tokenizer, conversation["messages"], add_generation_prompt=False,
                             tools=conversation.get("tools"))
        ids, loss = np.array(ids, np.int32), np.array(mask, np.uint8)
        if self.train_on == "last":
            loss[:last_turn(loss).start] = 0
        if self.excluded:
            loss[np.isin(ids, self.excluded)] = 0
        return Chat(ids, loss)


class Chats(Sequence):
    """Encoded conversations of one source, at least one, in one buffer; for `pipeline.stream_batches`.

    `rows`: the row of the source that each was (default: 0, 1, ...).
    """

    def __init__(self, name: str, config: SourceConfig, chats: Iterable[Chat], rows: Sequence[int] | None = None
                 ) -> None:
        self.name, self.config = name, config
        ids, loss = zip(*chats, strict=True)
        self._ends = np.cumsum([0, *map(len, ids)])
        self._ids, self._loss = np.concatenate(ids), np.concatenate(loss)
        self.rows = np.array(range(len(self)) if rows is None else rows)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Chat:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, asked for {i}")
        i = int(i) % len(self)
        return Chat(*(part[self._ends[i]:self._ends[i + 1]] for part in (self._ids, self._loss)))

    def fingerprint(self) -> int:
        """CRC-32 of the lengths and of 64 spread conversations' ids and masks: of rows, tokenizer and template."""
        value = zlib.crc32(self._ends.astype("<i8").tobytes())
        for i in spread(len(self), 64):
            value = functools.reduce(lambda value, part: zlib.crc32(part.tobytes(), value), self[i], value)
        return value

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_targets(self) -> int:
        return int(self._loss.sum())


def encode_source(source: Source, form: ChatFormat, *, seq_len: int, too_long: TooLong = "drop", max_bad_rows: int = 0,
                  thinking_share: float = 1.0, seed: int = 0) -> Chats:
    """All conversations of a source as ids, with what was dropped in the log.

    Dropped are those longer than `seq_len + 1` tokens (or cut there), those without a target, and those that the
    template does not take: more than `max_bad_rows` bad ones are a ValueError that names the first, as is nothing left.
    Of those with reasoning a `thinking_share`, drawn by `seed`, shows it; the others are as if they had none.
    """
    dropped, bad, kept, rows = dict.fromkeys(("too long", "without target"), 0), [], [], []
    cut = thinking = shown = 0
    for row, document in ((i, source[i]) for i in range(len(source))):
        if document is None:
            continue
        try:
            conversation = json.loads(document.text)
            thought = form.reasoning and reasons(conversation)
            show = thought and is_shown(thinking_share, seed=seed, name=source.name, row=row)
            chat = form.encode(without_reasoning(conversation) if thought and not show else conversation)
        except ValueError as error:
            bad.append(f"{document.source}: {error}")
            continue
        if len(chat.ids) > seq_len + 1:
            if too_long == "drop":
                dropped["too long"] += 1
                continue
            cut, chat = cut + 1, Chat(*(part[:seq_len + 1] for part in chat))
        if not chat.loss[1:].any():  # the first token is no target
            dropped["without target"] += 1
            continue
        kept.append(chat)
        rows.append(row)
        if thought and reasons(last_turns(conversation)):
            thinking, shown = thinking + 1, shown + show
    num_bad = check_bad(source, bad, max_bad_rows, "conversations")
    said = ", ".join(f"{count} {reason}" for reason, count in {"bad": num_bad, **dropped}.items())
    if not kept:
        raise ValueError(f"{source.config.path}: no conversation left of {len(source)}: dropped {said} "
                         f"(pipeline.seq_len is {seq_len})")
    chats = Chats(source.name, source.config, kept, rows)
    logger.info("%s: %d conversations, %d tokens, %d of them targets, weight %g, cut: %d, dropped: %s%s%s",
                source.config.path, len(chats), chats.num_tokens, chats.num_targets, source.config.weight, cut, said,
                f"; {thinking} with reasoning in the last turn, {shown} show it" if thinking else "",
                f"; first bad: {(source.bad_rows + bad)[0]}" if num_bad else "")
    return chats


def chat_example(index: int, chat: Chat) -> Example:
    """What packing takes, see `examples`."""
    return {"tokens": chat.ids, "loss": chat.loss, "draw": np.full(len(chat.ids), index, np.int32)}


def chat_batches(
    sources: Sequence[Chats], config: PipelineConfig, *, seed: int = 0, loader: int = 0, loaders: int = 1,
    steps: int | None = None,
) -> Batches:
    """The training stream of encoded conversations, whole in packed rows; see `pipeline.stream_batches`.

    ValueError for a packing that cuts conversations.
    """
    if config.packing == "concat":
        raise ValueError("pipeline.packing concat would cut conversations; use first_fit")
    return stream_batches(sources, chat_example, config, seed=seed, loader=loader, loaders=loaders, steps=steps)


def train_chat_tokenizer(
    conversations: Iterable[Mapping[str, Any]], template: ChatTemplate, vocab_size: int, *, symbols: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """A tokenizer of the texts that a template makes of conversations, in which the end of a turn ends a text.

    Those of `CHAT_SYMBOLS` that the template's source names are special tokens, which no message can spell; `symbols`
    are whole tokens wherever they stand. ValueError as `train_sentencepiece`, and for a template that writes none of
    `ENDS_OF_TURNS`.
    """
    end = next((name for name in ENDS_OF_TURNS if name in template.source), None)
    if end is None:
        raise ValueError(f"the chat template does not write {' or '.join(ENDS_OF_TURNS)}, one of which ends a turn "
                         "here; a tokenizer of its own comes with --tokenizer.path")
    control = [name for name in CHAT_SYMBOLS if name in template.source and name not in symbols]
    names = {name: Symbol(0) for name in (*control, end)}

    def texts() -> Iterator[str]:
        for one in conversations:
            text = template.render(one["messages"], tools=one.get("tools"), add_generation_prompt=False)
            # The parts between special tokens: their names are no text to learn pieces of.
            found = find_symbols(names, text)
            starts, ends = [0, *(end for _, end, _ in found)], [*(start for start, _, _ in found), len(text)]
            yield from (text[start:end] for start, end in zip(starts, ends, strict=True))

    return train_sentencepiece(texts(), vocab_size=vocab_size, user_symbols=symbols, control_symbols=control,
                               eos=end)


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """The special token that the template puts behind what the assistant says; None if none shows."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, mask = chat_ids(template, tokenizer, said, add_generation_prompt=False)
    except ValueError:
        return None
    spoken = [i for i, own in zip(ids, mask, strict=True) if own]
    return next((name for name, symbol in tokenizer.symbols.items() if symbol.id in spoken[-1:]), None)


def ending_turns(template: ChatTemplate, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer whose eos is what ends a turn, as a model's becomes that learns the template: KORMo's `<|EOT|>`.

    Only the names of a `tokenizer.json` can change; another tokenizer stays, as does one whose turns end otherwise.
    """
    end = turn_end(template, tokenizer)
    if end is None or not isinstance(tokenizer, JsonTokenizer) or tokenizer.symbols[end].id == tokenizer.eos_id:
        return tokenizer
    names = {symbol.id: name for name, symbol in tokenizer.symbols.items()}
    return JsonTokenizer(tokenizer.files()[JSON_FILE], bos=names[tokenizer.bos_id], eos=end,
                         pad=names[tokenizer.pad_id])


def begins_with_bos(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether the template itself writes BOS before a conversation."""
    ids = chat_ids(template, tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True).ids
    return ids[0] == tokenizer.bos_id


def with_bos(template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """The template, which writes BOS first, as pretraining does; one that does so already stays."""
    if begins_with_bos(template, tokenizer):
        return template
    return replace(template, source="{{ bos_token }}" + template.source)


def check_symbols(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """ValueError if a tag such as `<|im_start|>` that a template writes around turns is no token of the tokenizer.

    Without it the turns would be spelled out in letters, which users can spell as well. The template `kormo` needs the
    tags around reasoning, too, which other files may call plain tokens; templates of others may mean letters by them.
    """
    named = re.findall(r"<\|[A-Za-z_]+\|>", template.source)
    missing = [name for name in dict.fromkeys(named) if name not in tokenizer.symbols]
    if KORMO in template.source:
        missing += [tag for tag in THINK_TAGS if tag not in tokenizer.symbols and len(tokenizer.encode(tag)) > 1]
    if missing:
        raise ValueError(f"the tokenizer lacks special tokens that the chat template writes: {', '.join(missing)}; it "
                         f"has {', '.join(tokenizer.symbols)}")
