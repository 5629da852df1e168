"""The evaluation of a chat model while it trains: loss on the assistant's tokens, and exact greedy answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.core.masked import Mean
from jaxlm.core.mesh import put_whole
from jaxlm.data.chat_examples import ChatFormat, chat_example, encode_source, last_turn
from jaxlm.data.pipeline import whole_batches
from jaxlm.data.sources import Source
from jaxlm.eval.held_out import Evaluation
from jaxlm.generate.decode import complete, pad
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.model.decoder import Model


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """What the model answers at every evaluation."""

    count: int = 32    # conversations of each held-out source whose last turn is written greedily; 0: none
    tokens: int = 48   # at most of an answer
    show: int = 3      # answers of each source that are printed

    def __post_init__(self) -> None:
        if min(self.count, self.show) < 0 or self.tokens < 1:
            raise ValueError("answers.count and show must not be negative, answers.tokens must be positive")


class Asked(NamedTuple):
    """A turn to write."""

    prompt: list[int]
    question: str  # the message before it
    answer: str


def make_chat_evaluation(
    nll: Callable[[Any, Any], Mean], model: Model, form: ChatFormat, sources: Sequence[Source], *,
    answers: AnswerConfig, batch_size: int, seq_len: int, max_bad_rows: int, mesh: Mesh,
) -> Evaluation:
    """`params, step -> ({"eval/loss_SOURCE": nats a target, "eval/exact_SOURCE": share}, a report with answers)`.

    An answer is exact if its text is that of the conversation, calls of tools included. Everything is encoded here.

    Args:
      nll: jitted `params, batch -> Mean(sum of nats, targets)`.
    """
    chats = {source.name: encode_source(source, form, seq_len=seq_len, max_bad_rows=max_bad_rows) for source in sources}
    batches = {name: whole_batches(part, chat_example, batch_size=batch_size, seq_len=seq_len)
               for name, part in chats.items()}
    most = min(seq_len, model.config.max_positions - answers.tokens)
    asked = {source.name: _asked(source, form, answers.count, most) for source in sources}
    stop = _end_of_turn(form, next(iter(chats.values()))[0])
    write = _writer(model, form, [one for part in asked.values() for one in part], stop, answers.tokens, mesh)

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values, lines = {}, []
        written = iter(write(params))
        for name, part in batches.items():
            total = jax.device_get([nll(params, put_whole(batch, mesh)) for batch in part])
            values[f"eval/loss_{name}"] = float(sum(one.total for one in total) / sum(one.weight for one in total))
            texts = [next(written) for _ in asked[name]]
            if texts:
                values[f"eval/exact_{name}"] = float(np.mean([
                    text == one.answer for text, one in zip(texts, asked[name], strict=True)]))
            lines += [f"  {one.question} | {text}".replace("\n", " ⏎ ") + ("" if text == one.answer else "  ✗")
                      for text, one in list(zip(texts, asked[name], strict=True))[:answers.show]]
        numbers = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items())
        return values, "\n".join([f"held out at step {step}: {numbers}", *lines])

    return evaluate


def _asked(source: Source, form: ChatFormat, count: int, most: int) -> list[Asked]:
    """The last turns of the first conversations that have one and a prompt of at most `most` tokens."""
    found = []
    for document in (source[i] for i in range(len(source))):
        if len(found) == count:
            break
        conversation: Mapping[str, Any] = json.loads(document.text) if document else {"messages": []}
        try:
            prompt = form.prompt(conversation)
            if prompt and len(prompt) <= most:
                last = max(i for i, one in enumerate(conversation["messages"]) if one["role"] == "assistant")
                chat = form.encode({**conversation, "messages": conversation["messages"][:last + 1]})
                question = conversation["messages"][last - 1].get("content") or ""
                found.append(Asked(prompt, question, form.text(chat.ids[last_turn(chat.loss)])))
        except ValueError:  # `encode_source` has counted it
            continue
    return found


def _end_of_turn(form: ChatFormat, chat: Any) -> int:
    """The special token that ends what the assistant writes, else the end of text."""
    last = int(chat.ids[last_turn(chat.loss)][-1])
    special = {symbol.id for symbol in form.tokenizer.symbols.values()}
    return last if last in special else form.tokenizer.eos_id


def _writer(model: Model, form: ChatFormat, asked: Sequence[Asked], stop: int, max_new_tokens: int, mesh: Mesh
            ) -> Callable[[Any], list[str]]:
    """`params -> the greedy texts of all turns`."""
    if not asked:
        return lambda params: []
    # The prompts, again until they fill the devices; decoding splits rows over every axis but `tensor`.
    fill = mesh.size // mesh.shape["tensor"]
    prompts = [asked[i % len(asked)].prompt for i in range(-(-len(asked) // fill) * fill)]
    tokens, mask = pad(prompts)
    greedy = make_settings([SamplingConfig()] * len(prompts), model.config.vocab_size)

    def write(params: Any) -> list[str]:
        out = complete(model, params, tokens, mask, greedy, max_new_tokens=max_new_tokens, eos_id=stop,
                       num_tokens=form.tokenizer.vocab_size)
        return [form.text(row[:row.index(stop)] if stop in row else row)
                for row in jax.device_get(out).tolist()[:len(asked)]]

    return write
