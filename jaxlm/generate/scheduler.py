"""The loop on the host around `prefill` and `decode`: which request sits in which row, and when rows change.

A row whose text has ended goes on with what `respond` answers, or is refilled from the queue; without a queue the batch
is halved as soon as half of it is done. Prompts are padded to powers of two and rows are widened by doubling: the few
shapes that result are counted in `Report.programs`. What all prompts share at their beginning is prefilled once;
samples of a prompt that are seated together share all of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import power_of_two
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.decode import decode, pad, step_width
from jaxlm.generate.requests import Completion, Piece, Report, Request, Respond, Turn
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.speculative import Guessing, Sources, start_guessing
from jaxlm.generate.state import DecodeState, init_state, prefill, put_rows, take_rows, widen
from jaxlm.generate.text import StopScan, TextState, TextStream
from jaxlm.model.cache import CacheDtype
from jaxlm.model.decoder import Model

MIN_PROMPT, MIN_SLOTS = 16, 128
MIN_SHARED = 32    # tokens that make a common beginning worth a program of its own; its length is a multiple of it
PATIENCE = 8       # one in so many rows may idle before the host answers or refills: each time costs a prefill
CHUNK, PIECES = 32, 4  # steps between two looks from the host where it must look: for stop strings, for streaming

_init = jax.jit(init_state, static_argnames=("model", "slots", "cache_dtype", "num_sources"))
_prefill = jax.jit(prefill, static_argnames="model", donate_argnames="state")
_guess = jax.jit(start_guessing, static_argnames=("guessing", "model", "cache_dtype"), donate_argnames="state")
_decode = jax.jit(decode, static_argnames=("model", "guessing", "num_tokens"), donate_argnames="state")
_take, _put = jax.jit(take_rows), jax.jit(put_rows, donate_argnames="state")
_widen = jax.jit(widen, static_argnames="slots")


@dataclass
class _Row:
    """A request in a row of the batch, with as much of its text as the host has looked at."""

    request: Request
    seen: int = 0
    text: TextState = field(default_factory=TextState)
    scan: StopScan = field(default_factory=StopScan)
    shown: list[str] = field(default_factory=list)


class Scheduler:
    """The batch as the host knows it. Used by `engine.serve`; checks nothing."""

    def __init__(
        self, model: Model, params: Any, requests: Sequence[Request], *, eos_id: int | None,
        tokenizer: Tokenizer | None, pieces: bool, batch_size: int, cache_dtype: CacheDtype,
        guessing: Guessing | None, sources: Sources, num_tokens: int, report: Report, respond: Respond | None = None,
    ) -> None:
        self.model, self.params, self.eos_id, self.tokenizer = model, params, eos_id, tokenizer
        self.pieces, self.cache_dtype, self.guessing, self.sources = pieces, cache_dtype, guessing, sources
        self.num_tokens, self.report, self.respond = num_tokens, report, respond
        self.names = guessing.source_names() if guessing else ()
        report.accepted = dict.fromkeys(self.names, 0) | report.accepted
        self.settings_of_all = [request.sampling for request in requests]
        self.num_stops = max((len(self._stop_ids(one)) for one in self.settings_of_all), default=0)
        self.looks = pieces or any(one.stop_strings for one in self.settings_of_all)
        self.stream = TextStream(tokenizer) if self.looks else None
        self.capacity = max((len(one.ids) + one.budget for one in requests), default=0)
        self.capacity += step_width(guessing)
        self.shared = _shared_beginning([one.ids for one in requests])
        self.beginning: DecodeState | None = None  # a row that knows it
        self.queue = list(requests[::-1])
        # On a mesh the rows of a batch must divide among the devices.
        mesh = jax.sharding.get_abstract_mesh()
        self.quantum = 1 if mesh.empty else mesh.size // mesh.shape.get("tensor", 1)
        self.batch_size = self._round(min(batch_size, len(requests)))

    def run(self) -> Iterator[Completion | Piece]:
        """Until all requests are completed."""
        if not self.queue:
            return
        began = time.perf_counter()
        self.rows: list[_Row | None] = [None] * self.batch_size
        try:
            yield from self._run()
        finally:
            self.report.seconds += time.perf_counter() - began

    def _run(self) -> Iterator[Completion | Piece]:
        self.state = self._open(self._next(self.batch_size), self.batch_size)
        while any(self.rows):
            self._make_room()
            steps = (PIECES if self.pieces else CHUNK) if self.looks else self.capacity
            self.state = self._call(
                "decode", _decode, self.model, self.params, self.state, self.sources, guessing=self.guessing,
                max_steps=np.int32(steps), max_done=np.int32(self._waiting()), num_tokens=self.num_tokens)
            yield from self._look()
            if self.queue:
                self._refill()
            elif any(self.rows):
                self._shrink()

    def _next(self, count: int) -> list[_Row]:
        """Takes requests from the queue and seats them in free rows."""
        taken = [_Row(self.queue.pop()) for _ in range(min(count, len(self.queue)))]
        free = [i for i, row in enumerate(self.rows) if row is None]
        for i, row in zip(free, taken, strict=False):
            self.rows[i] = row
        return taken

    def _open(self, taken: list[_Row], size: int) -> DecodeState:
        """The prefilled state of new rows, repeated up to `size`, as wide as the longest prompt needs."""
        requests = [row.request for row in taken]
        requests += [requests[0]] * (size - len(requests))
        distinct = list(dict.fromkeys(request.ids for request in requests))
        rows = self._round(power_of_two(len(distinct)))
        prompts = distinct + distinct[:1] * (rows - len(distinct))
        rest = [prompt[len(self.shared):] for prompt in prompts]
        width = min(power_of_two(max(map(len, rest)), MIN_PROMPT), self.model.config.max_positions)
        tokens, mask = pad(rest, width)
        state = self._call("widen", _widen, self._begin(rows), slots=len(self.shared) + width)
        state = self._call("prefill", _prefill, self.model, self.params, state, tokens, mask.sum(axis=1))
        self.report.prompt_tokens += sum(len(row.request.ids) for row in taken)
        self.report.prefilled_tokens += sum(map(len, rest[:len(distinct)]))
        state = self._call("take", _take, state, np.array([distinct.index(request.ids) for request in requests]))
        limits = np.array([len(one.ids) + one.sampling.max_new_tokens for one in requests], np.int32)
        state = state._replace(
            limit=limits, stop_ids=self._stops([one.sampling for one in requests]),
            done=(state.length >= limits) | (np.arange(size) >= len(taken)),  # what only fills up writes nothing
            settings=make_settings([one.sampling for one in requests], self.model.config.vocab_size,
                                   self.settings_of_all))
        if self.guessing:
            state = self._call("guess", _guess, self.guessing, state, self.model, self.sources,
                               cache_dtype=self.cache_dtype)
        longest = max(len(one.ids) for one in requests) + step_width(self.guessing)
        return self._call("widen", _widen, state, slots=self._slots(max(longest, state.tokens.shape[1])))

    def _begin(self, rows: int) -> DecodeState:
        """Rows that know what all prompts share."""
        if self.beginning is None:
            count, width = self.quantum, len(self.shared)
            some = [self.settings_of_all[0]] * count
            self.beginning = self._call(
                "init", _init, self.model, make_settings(some, self.model.config.vocab_size),
                limit=np.full(count, 2**30, np.int32), stop_ids=self._stops(some), slots=width,
                cache_dtype=self.cache_dtype, num_sources=len(self.names))
            if width:
                self.beginning = self._call(
                    "prefill", _prefill, self.model, self.params, self.beginning,
                    np.tile(np.array(self.shared, np.int32), (count, 1)), np.full(count, width, np.int32))
                self.report.prefilled_tokens += width
        return self._call("take", _take, self.beginning, np.zeros(rows, np.int32))

    def _look(self) -> Iterator[Completion | Piece]:
        """What the rows have written since the last look; rows whose text has ended become free."""
        state, slots = self.state, self.state.tokens.shape[1]
        done, length, start, steps, accepted = jax.device_get(
            (state.done, state.length, state.start, state.steps, state.accepted))
        assert length.max() <= slots, "a row outgrew its slots"
        ended = [i for i, row in enumerate(self.rows) if row and done[i]]
        if not ended and not self.looks:
            return
        texts = jax.device_get((state.tokens, state.logprobs, state.kept))
        stopped, turns = done.copy(), []
        for i, row in enumerate(self.rows):
            if row is None:
                continue
            ids, logprobs, kept = (x[i, start[i]:length[i]].tolist() for x in texts)
            count, reason = len(ids), None
            if done[i]:
                reason = "stop_id" if ids and ids[-1] in self._stop_ids(row.request.sampling) else "length"
            if self.looks:
                hit, text = self._read(row, ids, reason)
                count, reason = (hit, "stop_string") if hit else (count, reason)
                if self.pieces and text:
                    yield Piece(row.request.prompt, row.request.sample, text)
            if reason:
                stopped[i] = True
                self.report.tokens += count
                self.report.steps += int(steps[i])
                found = {name: int(n) for name, n in zip(self.names, accepted[i], strict=True)}
                for name, n in found.items():
                    self.report.accepted[name] += n
                completion = Completion(
                    row.request.prompt, row.request.sample, ids[:count], logprobs[:count], kept[:count],
                    self._text(row, ids[:count], reason), reason, int(steps[i]), found)
                turn = self.respond(completion) if self.respond else None
                self.rows[i] = _Row(row.request) if turn else None
                if turn:
                    turns.append((i, int(start[i]) + count, turn))
                yield completion
        if (stopped != done).any():
            self.state = self.state._replace(done=jnp.asarray(stopped))
        if turns:
            self._answer(turns)

    def _answer(self, turns: Sequence[tuple[int, int, Turn]]) -> None:
        """Rows go on behind their first `length` tokens with the ids of a turn: (row, length, turn)."""
        size = self._round(power_of_two(len(turns)))
        turns = [*turns, *[(len(self.rows), 1, Turn([0], 0))] * (size - len(turns))]  # those go nowhere
        rows, lengths = (np.array(x, np.int32) for x in list(zip(*turns, strict=True))[:2])
        answers = [turn.ids for *_, turn in turns]
        tokens, mask = pad(answers, power_of_two(max(map(len, answers)), MIN_PROMPT))
        ends = lengths + mask.sum(axis=1)
        limits = ends + np.array([turn.max_new_tokens for *_, turn in turns], np.int32)
        for row, limit in zip(rows, limits, strict=True):
            request = self.rows[row].request if row < len(self.rows) else None
            if request and limit > len(request.ids) + request.budget:
                raise ValueError(f"an answer of prompt {request.prompt} and its max_new_tokens pass the budget of "
                                 f"{request.budget} tokens by {limit - len(request.ids) - request.budget}")
        self.state = self._widened(self._slots(int(lengths.max()) + tokens.shape[1]))
        state = self._call("take", _take, self.state, np.minimum(rows, len(self.rows) - 1))
        state = state._replace(length=lengths, limit=limits, cache=state.cache._replace(length=lengths - 1),
                               steps=np.zeros_like(state.steps), accepted=np.zeros_like(state.accepted))
        state = self._call("prefill", _prefill, self.model, self.params, state, tokens, mask.sum(axis=1))
        if self.guessing:
            state = self._call("guess", _guess, self.guessing, state, self.model, self.sources,
                               cache_dtype=self.cache_dtype)
        self.state = self._call("put", _put, self.state, rows, state)
        answered = sum(len(turn.ids) for row, _, turn in turns if row < len(self.rows))
        self.report.prompt_tokens += answered
        self.report.prefilled_tokens += answered

    def _read(self, row: _Row, ids: list[int], reason: str | None) -> tuple[int, str]:
        """Reads on in a row: tokens up to a stop string (0: none) and the text that may be shown."""
        stops, shown, hit = row.request.sampling.stop_strings, [], 0
        fresh = ids[row.seen:len(ids) - (reason == "stop_id")]
        for number, i in enumerate(fresh, row.seen + 1):
            row.text, piece = self.stream.push(row.text, [i])
            row.scan, text, stopped = row.scan.push(piece, stops)
            shown.append(text)
            if not stopped and stops:
                _, text, stopped = row.scan.push(self.stream.rest(row.text), stops)
                shown += [text] * stopped
            if stopped:
                hit = number
                break
        row.seen = len(ids)
        if reason and not hit:
            shown.append(row.scan.held + self.stream.rest(row.text))
        row.shown += shown
        return hit, "".join(shown)

    def _text(self, row: _Row, ids: list[int], reason: str) -> str | None:
        if self.tokenizer is None:
            return None
        return "".join(row.shown) if self.looks else self.tokenizer.decode(ids[:len(ids) - (reason == "stop_id")])

    def _refill(self) -> None:
        free = [i for i, row in enumerate(self.rows) if row is None]
        if not free:  # the rows came back for room only
            return
        size = self._round(power_of_two(min(len(free), len(self.queue))))
        new = self._open(self._next(len(free)), size)
        self.state = self._widened(new.tokens.shape[1])
        new = self._call("widen", _widen, new, slots=self.state.tokens.shape[1])
        # Rows that only fill up `new` go nowhere.
        rows = np.array((free + [len(self.rows)] * size)[:size])
        seated = np.array([self.rows[i] is not None for i in free] + [False] * size)[:size]
        self.state = self._call("put", _put, self.state, np.where(seated, rows, len(self.rows)), new)

    def _waiting(self) -> int:
        """The number of done rows at which something can be done: a refill, else to halve the batch if it divides."""
        size = len(self.rows)
        if self.queue or self.respond:
            return min(sum(row is None for row in self.rows) + max(1, size // PATIENCE), size)
        return size - size // 2 if self._halves(size) else size

    def _halves(self, size: int) -> bool:
        return size // 2 >= self.quantum and size // 2 % self.quantum == 0

    def _shrink(self) -> None:
        live, size = [i for i, row in enumerate(self.rows) if row], len(self.rows)
        while len(live) <= size // 2 and self._halves(size):
            size //= 2
        if size < len(self.rows):
            spare = [i for i, row in enumerate(self.rows) if row is None]
            chosen = live + spare[:size - len(live)]
            self.state = self._call("take", _take, self.state, np.array(chosen))
            self.rows = [self.rows[i] for i in chosen]

    def _make_room(self) -> None:
        length = np.asarray(self.state.length)
        live = [int(length[i]) for i, row in enumerate(self.rows) if row]
        needed = max(live) + step_width(self.guessing)
        if needed > self.state.tokens.shape[1]:
            self.state = self._widened(self._slots(needed))

    def _widened(self, slots: int) -> DecodeState:
        if slots <= self.state.tokens.shape[1]:
            return self.state
        return self._call("widen", _widen, self.state, slots=slots)

    def _slots(self, needed: int) -> int:
        """The size of rows: a power of two, or what the longest request can need."""
        return max(min(power_of_two(needed, MIN_SLOTS), -(-self.capacity // 64) * 64), needed)

    def _stop_ids(self, one: SamplingConfig) -> tuple[int, ...]:
        return one.stop_ids if one.ignore_eos or self.eos_id is None else (*one.stop_ids, self.eos_id)

    def _stops(self, settings: Sequence[SamplingConfig]) -> np.ndarray:
        rows = [self._stop_ids(one) for one in settings]
        return np.array([[*row, *[-1] * (self.num_stops - len(row))] for row in rows], np.int32).reshape(
            len(rows), self.num_stops)

    def _round(self, rows: int) -> int:
        return -(-rows // self.quantum) * self.quantum

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The function's result; its name with all shapes and static arguments counts as a program."""
        leaves, structure = jax.tree.flatten(([x for x in arguments if x is not self.params], keywords))
        key = tuple((x.shape, str(x.dtype)) if hasattr(x, "dtype") else x for x in leaves)
        self.report.programs.add((name, hash((key, structure))))
        return function(*arguments, **keywords)


def _shared_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What different prompts have in common at their beginning; each has more than that.

    Cut to a multiple of `MIN_SHARED`: the next prompts of a job, which share a few tokens more or less, then find
    their programs compiled.
    """
    if len(set(prompts)) < 2:
        return ()
    first, last = min(prompts), max(prompts)  # in sorted order: what these two share, all share
    count = 0
    while count < min(map(len, prompts)) - 1 and first[count] == last[count]:
        count += 1
    return first[:count - count % MIN_SHARED]
