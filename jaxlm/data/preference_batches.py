"""Batches of preference rows in few widths, in an order that a seed and a counter give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core.batch import LMBatch, power_of_two
from jaxlm.data.chat_examples import Chat
from jaxlm.data.preference_examples import PreferenceExample, PreferenceSet


@dataclass(frozen=True, kw_only=True)
class PreferenceBatchConfig:
    """Shape of the batches."""

    batch_size: int = 16   # pairs, or judged completions, of a global batch
    seq_len: int = 512     # T at most, input tokens of prompt and completion
    least_width: int = 64  # T is a power of two from here to seq_len, or seq_len; seq_len: always that

    def __post_init__(self) -> None:
        if min(self.batch_size, self.seq_len, self.least_width) < 1 or self.least_width > self.seq_len:
            raise ValueError("batch.batch_size, seq_len and least_width must be positive and least_width at most "
                             f"seq_len, got {self.batch_size}, {self.seq_len} and {self.least_width}")

    def width(self, tokens: int) -> int:
        """T of a row of so many input tokens."""
        return min(power_of_two(tokens, self.least_width), self.seq_len)

    def widths(self) -> list[int]:
        """Every T that batches may have."""
        found = [self.width(1)]
        while found[-1] < self.seq_len:
            found.append(self.width(found[-1] + 1))
        return found


class PreferenceBatch(NamedTuple):
    """B rows with two sequences each; the targets that count are the completion's.

    One pair in T=6, prompt p q, chosen a e, rejected b c e:

        first.tokens     p q a 0 0 0      second.tokens     p q b c 0 0
        first.targets    q a e 0 0 0      second.targets    q b c e 0 0
        first.loss_mask  0 1 1 0 0 0      second.loss_mask  0 1 1 1 0 0
    """

    first: LMBatch                        # [B, T] chosen, or what was judged
    second: LMBatch                       # [B, S] rejected (S is T); of judged rows the completion of another prompt
    desirable: np.ndarray | None = None   # [B] float32 of judged rows: 1 is good
    anchor: Any = None                    # [B] of judged rows, added on the devices (`objective.preference.Rows`)


class EpochPlan(NamedTuple):
    batches: list[list[int]]  # examples of each, in order
    num_dropped: int          # examples in no batch


def plan_epoch(widths: Sequence[int], batch_size: int, seed: int, epoch: int) -> EpochPlan:
    """Every example at most once, with others of its width where they fill a batch, in random order.

    What is left of all widths is batched together; the last of it, less than a batch, waits for another epoch, whose
    order leaves out others.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(widths)).tolist()
    open_, batches = {}, []
    for index in order:
        rows = open_.setdefault(widths[index], [])
        rows.append(index)
        if len(rows) == batch_size:
            batches.append(open_.pop(widths[index]))
    left = [index for width in sorted(open_) for index in open_[width]]
    whole = len(left) // batch_size * batch_size
    batches += [left[i:i + batch_size] for i in range(0, whole, batch_size)]
    order = np.random.default_rng((seed, epoch, 1)).permutation(len(batches))
    return EpochPlan([batches[i] for i in order], len(left) - whole)


class PreferenceBatches:
    """An endless iterator of this process's part of every batch; its state is the number of batches drawn.

    Every process plans the whole batch and keeps its rows. ValueError for too few examples.
    """

    def __init__(self, sources: Sequence[PreferenceSet], config: PreferenceBatchConfig, *, seed: int = 0,
                 loader: int = 0, loaders: int = 1) -> None:
        self.sources, self._config, self._seed = sources, config, seed
        self._examples = [one for source in sources for one in source.examples]
        if config.batch_size % loaders:
            raise ValueError(f"batch.batch_size {config.batch_size} does not divide among {loaders} data shards")
        if len(self._examples) < config.batch_size:
            raise ValueError(f"{len(self._examples)} rows give no batch of {config.batch_size} (batch.batch_size)")
        self._rows = slice(loader * config.batch_size // loaders, (loader + 1) * config.batch_size // loaders)
        self._widths = [config.width(_tokens(one)) for one in self._examples]
        self._start(0)

    def _start(self, drawn: int) -> None:
        self._drawn, self._epoch, self._first = drawn, 0, 0
        self._plan = plan_epoch(self._widths, self._config.batch_size, self._seed, 0)
        self._places = self._tokens = 0

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        while self._drawn - self._first >= len(self._plan.batches):
            self._first, self._epoch = self._first + len(self._plan.batches), self._epoch + 1
            self._plan = plan_epoch(self._widths, self._config.batch_size, self._seed, self._epoch)
        rows = self._plan.batches[self._drawn - self._first]
        self._drawn += 1
        batch = make_batch(self._examples, rows, self._config)
        for side in (batch.first, batch.second):
            self._places += side.tokens.size
            self._tokens += int(side.segments.sum())
        cut = lambda side: LMBatch(*(leaf[self._rows] for leaf in side))
        return batch._replace(first=cut(batch.first), second=cut(batch.second),
                              desirable=None if batch.desirable is None else batch.desirable[self._rows])

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "sources": [source.fingerprint() for source in self.sources]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a state, and counts from there; ValueError if it is of other data."""
        if state["sources"] != [source.fingerprint() for source in self.sources]:
            raise ValueError(f"{', '.join(source.name for source in self.sources)}: not the data that this run began "
                             "with; a position in it means nothing now")
        self._start(int(state["drawn"]))

    def stats(self) -> dict[str, float]:
        """Share of padding since this process began, or since `set_state`; the epoch, and what it leaves out."""
        return {"data/padding": 1 - self._tokens / max(self._places, 1), "data/epoch": float(self._epoch),
                "data/left_out": float(self._plan.num_dropped)}

    def close(self) -> None:
        """Nothing is open."""


def held_out_batches(examples: Sequence[PreferenceExample], config: PreferenceBatchConfig) -> list[PreferenceBatch]:
    """Every example once, by width; batches that are not full have rows of no token, which count nowhere."""
    order = np.random.default_rng(0).permutation(len(examples)).tolist()  # rows of one prompt often stand together
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(config.width(_tokens(examples[index])), []).append(index)
    return [make_batch(examples, rows[i:i + config.batch_size], config)
            for _, rows in sorted(groups.items()) for i in range(0, len(rows), config.batch_size)]


def make_batch(examples: Sequence[PreferenceExample], rows: Sequence[int], config: PreferenceBatchConfig
               ) -> PreferenceBatch:
    """The examples of these numbers as arrays of `batch_size` rows.

    The second sequence of a row judged alone is its prompt, cut at the beginning if it must be, with the completion of
    the next row of the batch: what KTO's reference point is estimated on.
    """
    chosen = [examples[i] for i in rows]
    prompts = [one.prompt for one in chosen]
    first = [one.first for one in chosen]
    judged = chosen[0].second is None
    if judged:
        others = [*first[1:], first[0] if len(rows) > 1 else examples[(rows[0] + 1) % len(examples)].first]
        fitted = [prompt[-(config.seq_len + 1 - len(other.ids)):]
                  for prompt, other in zip(prompts, others, strict=True)]
        second, width = (fitted, others), None
    else:
        second, width = (prompts, [one.second for one in chosen]), max(config.width(_tokens(one)) for one in chosen)
    desirable = None
    if judged:
        desirable = np.zeros(config.batch_size, np.float32)
        desirable[:len(rows)] = [one.desirable for one in chosen]
    return PreferenceBatch(_side(prompts, first, config, width), _side(*second, config, width), desirable)


def _side(prompts: Sequence[np.ndarray], completions: Sequence[Chat], config: PreferenceBatchConfig,
          width: int | None) -> LMBatch:
    """Prompts with their completions, one a row, padded on the right."""
    lengths = [len(prompt) + len(said.ids) - 1 for prompt, said in zip(prompts, completions, strict=True)]
    width = width or config.width(max(lengths))
    tokens, targets, segments = np.zeros((3, config.batch_size, width), np.int32)
    mask = np.zeros((config.batch_size, width), np.float32)
    for row, (prompt, said, length) in enumerate(zip(prompts, completions, lengths, strict=True)):
        ids = np.concatenate((prompt, said.ids))
        tokens[row, :length], targets[row, :length], segments[row, :length] = ids[:-1], ids[1:], 1
        mask[row, len(prompt) - 1:length] = said.loss
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return LMBatch(tokens, targets, mask, segments, np.ascontiguousarray(positions))


def _tokens(one: PreferenceExample) -> int:
    """Input tokens of the longer sequence."""
    return len(one.prompt) + max(len(one.first.ids), len(one.second.ids) if one.second else 0) - 1
