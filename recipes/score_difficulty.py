"""Give conversations a difficulty: the mean negative log-likelihood, in nats, of the assistant's words under a model.

    python -m recipes.score_difficulty --source Qwen3-0.6B --data chats.jsonl.gz --output scored.jsonl
    python -m recipes.sft --init Qwen3-0.6B --data.path scored.jsonl --data.held-out held_out.jsonl --data.balance equal

The difficulty is that of the answer for this model, not of the question for a person: long and usual texts score low.
It is a stand-in where rows bring none (KORMo, arXiv 2510.09426, does not say how it measures). Each line of the output
holds the messages, the tools and `difficulty`; other fields are lost, as are rows beyond `seq_len`, which the log
counts. Rows are scored alone, in batches of one length, on one device.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import LMBatch
from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.data.chat_examples import Chat, ChatFormat, encode_source
from jaxlm.data.conversations import TrainOn, open_conversations
from jaxlm.data.packing import to_inputs
from jaxlm.data.sources import MIXED, parse_source
from jaxlm.data.tokenizer import check_vocabulary
from jaxlm.data.tokenizer_training import TokenizerConfig
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import Model, build
from jaxlm.objective.lm import chunked_cross_entropy
from jaxlm.train.pretrained import load_weights, open_pretrained
from jaxlm.train.tuning import open_language

PROG = "recipes.score_difficulty"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is scored, and by whom."""

    source: Path = Path("runs/sft")     # a run folder, a Hugging Face folder or a .gguf file
    data: tuple[str, ...] = ("sample:both?documents=200",)  # chat rows, `path?option=value&...`
    output: Path = Path("scored.jsonl")
    overwrite: bool = False
    template: str = ""                  # as in recipes.sft
    train_on: TrainOn = "all"           # turns that count: all, or the last of a conversation
    max_bad_rows: int = 0
    seq_len: int = 2048                 # longest conversation
    batch_size: int = 8
    loss_chunks: int = 1                # parts of a row whose logits exist at once
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if self.output.suffix != ".jsonl":
            raise ValueError(f"output {self.output} must end in .jsonl")
        if min(self.batch_size, self.seq_len, self.loss_chunks) < 1 or self.seq_len % self.loss_chunks:
            raise ValueError("batch_size, seq_len and loss_chunks must be positive, and loss_chunks a divisor of "
                             "seq_len")
        if self.output in [Path(parse_source(spec).path) for spec in self.data]:
            raise ValueError(f"output {self.output} is a file that is read; name another")


PRESETS = {"default": Config()}


def widths(seq_len: int, chunks: int) -> list[int]:
    """Lengths that rows are padded to, so that few programs are compiled: seq_len and its halves.

    `widths(96, 4)` is [12, 24, 48, 96]: `chunks` divides each.
    """
    found = [seq_len]
    while found[0] % (2 * chunks) == 0 and found[0] > 8:
        found.insert(0, found[0] // 2)
    return found


def padded(chats: Sequence[Chat], config: Config) -> Iterator[tuple[list[int], LMBatch]]:
    """Batches of conversations of about one length, each alone in its row, with their numbers."""
    order = sorted(range(len(chats)), key=lambda i: len(chats[i].ids))
    for start in range(0, len(order), config.batch_size):
        numbers = order[start:start + config.batch_size]
        longest = len(chats[numbers[-1]].ids) - 1
        width = next(width for width in widths(config.seq_len, config.loss_chunks) if width >= longest)
        rows = {name: np.zeros((config.batch_size, width + 1), np.int32) for name in ("tokens", "loss", "segments")}
        for i, number in enumerate(numbers):
            chat = chats[number]
            rows["tokens"][i, :len(chat.ids)], rows["loss"][i, :len(chat.ids)] = chat
            rows["segments"][i, :len(chat.ids)] = 1
        yield numbers, to_inputs(rows)


@partial(jax.jit, static_argnums=(0, 3))
def mean_nll(model: Model, params: Any, batch: LMBatch, loss_chunks: int) -> jax.Array:
    """sum_t m_t nll_t / sum_t m_t of each row, [B] float32 in nats, m the mask of its targets."""
    hidden = model.apply(params, batch.tokens, positions=batch.positions, segments=batch.segments, logits=False).hidden
    nll = chunked_cross_entropy(hidden, model.head(params), batch.targets, loss_chunks).nll
    return jnp.sum(nll * batch.loss_mask, axis=1) / jnp.maximum(jnp.sum(batch.loss_mask, axis=1), 1)


def score(model: Model, params: Any, chats: Sequence[Chat], config: Config) -> np.ndarray:
    """`mean_nll` of each conversation, [len(chats)] float32 in nats."""
    values = np.zeros(len(chats), np.float32)
    for numbers, batch in padded(chats, config):
        values[numbers] = jax.device_get(mean_nll(model, params, batch, config.loss_chunks))[:len(numbers)]
    return values


def run(config: Config) -> None:
    """Checks everything, loads, scores, writes."""
    if config.output.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    opened = open_pretrained(config.source)
    if opened.tokenizer is None:
        raise ValueError(f"--source {config.source} has no tokenizer")
    if config.seq_len > opened.config.max_positions:
        raise ValueError(f"seq_len {config.seq_len} exceeds the model's max_positions {opened.config.max_positions}")
    language = open_language(opened, config.template, TokenizerConfig(), opened.config.vocab_size, ())
    check_vocabulary(language.tokenizer, opened.config.vocab_size)
    form = ChatFormat(language.template, language.tokenizer, config.train_on)
    sources = [open_conversations(parse_source(spec, unread=MIXED), max_bad_rows=config.max_bad_rows)
               for spec in config.data]
    encoded = [encode_source(source, form, seq_len=config.seq_len, max_bad_rows=config.max_bad_rows)
               for source in sources]
    params = jax.tree.map(jnp.asarray, load_weights(config.source, opened).params)
    model = build(opened.config, config.compute)
    with replacing(config.output) as scratch, scratch.open("w", encoding="utf-8") as file:
        for source, chats in zip(sources, encoded, strict=True):
            values = score(model, params, chats, config)
            for row, value in zip(chats.rows, values.tolist(), strict=True):
                line = json.loads(source[int(row)].text) | {"difficulty": value}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            quarters = " ".join(f"{value:.3f}" for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
            log.info("%s: %d conversations, quartiles of their difficulty: %s", source.name, len(chats), quarters)
    log.info("written to %s", config.output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
