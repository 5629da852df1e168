"""Many requests through a batch of few rows: `generate`, `stream` and `serve`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.methods import missing_database
from jaxlm.generate.requests import Completion, Piece, Report, Request, Respond
from jaxlm.generate.scheduler import Scheduler
from jaxlm.generate.settings import SamplingConfig, check_ids
from jaxlm.generate.speculative import Guessing, Sources
from jaxlm.model.cache import CacheDtype
from jaxlm.model.decoder import Model


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How requests share the device. None of it changes a text, but for the rounding of a smaller cache."""

    batch_size: int = 8                  # rows decoded together
    cache_dtype: CacheDtype = "float32"  # bfloat16 and int8 round keys and values

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model and all that stays the same from call to call. Nothing in it changes.

    Args:
      eos_id: ends a text unless its request ignores it; None: there is none.
      tokenizer: for texts; stop strings and streaming need it.
      guessing, sources: speculative decoding, see `speculative`.
      num_tokens: ids from here on belong to no token (padded vocabulary); None: the tokenizer's vocabulary.
    """

    model: Model
    params: Any
    eos_id: int | None
    tokenizer: Tokenizer | None = None
    guessing: Guessing | None = None
    sources: Sources = field(default_factory=Sources)
    num_tokens: int | None = None
    config: EngineConfig = field(default_factory=EngineConfig)

    def vocab_size(self) -> int:
        """Number of ids that are tokens."""
        if self.num_tokens is not None:
            return self.num_tokens
        return self.model.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingConfig | Sequence[SamplingConfig], *,
    num_samples: int = 1, report: Report | None = None,
) -> list[Completion]:
    """The completions of all prompts, in order, the samples of a prompt together; see `serve`.

        engine = Engine(model=model, params=params, eos_id=2)
        generate(engine, [[1, 5, 6]], SamplingConfig(max_new_tokens=32))[0].tokens
    """
    found = serve(engine, prompts, sampling, num_samples=num_samples, report=report)
    return sorted(found, key=lambda one: (one.prompt, one.sample))


def stream(
    engine: Engine, prompt: Sequence[int], sampling: SamplingConfig, *, report: Report | None = None,
) -> Iterator[str]:
    """The text after one prompt, piece by piece; a piece is text that no later token changes."""
    for event in serve(engine, [prompt], sampling, pieces=True, report=report):
        if isinstance(event, Piece):
            yield event.text


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingConfig | Sequence[SamplingConfig], *,
    num_samples: int = 1, pieces: bool = False, respond: Respond | None = None, budget: int | None = None,
    report: Report | None = None,
) -> Iterator[Completion | Piece]:
    """Completions as they are ready, each once.

    Args:
      prompts: token ids, special tokens included.
      sampling: for all prompts, or one each. Sample i of a prompt adds i to the seed; equal prompts with equal seeds
        get equal texts.
      pieces: also yield the texts while they grow.
      respond: called with every completion; the `Turn` it returns is fed to the model behind the text, which then goes
        on: what a tool or a user says. None ends the row. Each text of a row is a completion of its own.
      budget: with respond, the tokens of all texts and answers of a row together; None: those of its first text.
      report: filled with what the call cost.

    Raises ValueError, before anything runs: an empty prompt, ids outside the vocabulary, a prompt that leaves no room
    for its text within the model's positions, settings that conflict.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if budget is not None and respond is None:
        raise ValueError("budget has no effect without respond")
    _check(engine, prompts, each, num_samples, pieces, budget or 0)
    requests = [
        Request(number, sample, tuple(ids), replace(one, seed=one.seed + sample) if sample else one,
                budget or one.max_new_tokens)
        for number, (ids, one) in enumerate(zip(prompts, each, strict=True)) for sample in range(num_samples)]
    report = Report() if report is None else report
    return Scheduler(
        engine.model, engine.params, requests, eos_id=engine.eos_id, tokenizer=engine.tokenizer, pieces=pieces,
        batch_size=engine.config.batch_size, cache_dtype=engine.config.cache_dtype, guessing=engine.guessing,
        sources=engine.sources, num_tokens=engine.vocab_size(), report=report, respond=respond).run()


def _check(engine: Engine, prompts, each, num_samples: int, pieces: bool, budget: int) -> None:
    vocab_size, positions = engine.vocab_size(), engine.model.config.max_positions
    if vocab_size > engine.model.config.vocab_size:
        raise ValueError(f"wrong tokenizer: it has {vocab_size} tokens, the model {engine.model.config.vocab_size}")
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many sampling settings, or one; got {len(each)}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    if num_samples > 1 and any(one.temperature == 0 for one in each):
        raise ValueError(f"{num_samples} samples of a greedy text would be equal: set a temperature")
    if engine.eos_id is not None and not 0 <= engine.eos_id < vocab_size:
        raise ValueError(f"eos_id {engine.eos_id} is outside the vocabulary of {vocab_size}")
    if engine.tokenizer is None and (pieces or any(one.stop_strings for one in each)):
        raise ValueError(f"{'streaming text' if pieces else 'stop_strings'} needs a tokenizer")
    _check_guessing(engine)
    for number, (ids, one) in enumerate(zip(prompts, each, strict=True)):
        if not len(ids):
            raise ValueError(f"prompt {number} is empty: it needs at least one token, for instance bos")
        if not all(0 <= i < vocab_size for i in ids):
            raise ValueError(f"prompt {number} has ids outside the vocabulary of {vocab_size}")
        if budget and one.max_new_tokens > budget:
            raise ValueError(f"prompt {number}: max_new_tokens {one.max_new_tokens} is more than the budget {budget}")
        name, count = ("budget", budget) if budget else ("max_new_tokens", one.max_new_tokens)
        if len(ids) + count > positions:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens: with {name} {count} that is more than "
                f"the {positions} positions of the model; shorten it or ask for fewer tokens")
        check_ids(one, vocab_size)


def _check_guessing(engine: Engine) -> None:
    guessing, sources, vocab_size = engine.guessing, engine.sources, engine.vocab_size()
    if guessing is None:
        return
    if guessing.model is not None:
        if sources.params is None:
            raise ValueError("guessing names a draft model, and sources hold no parameters of it")
        if guessing.model.config.vocab_size < vocab_size:
            raise ValueError(f"the draft model has {guessing.model.config.vocab_size} tokens, the model {vocab_size}")
    elif name := missing_database(guessing, sources.databases):
        raise ValueError(f"guessing reads the database '{name}', and sources hold none")
