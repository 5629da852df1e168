"""What is asked of the engine and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxlm.generate.settings import SamplingConfig


class Completion(NamedTuple):
    """One text. Its tokens include the id that ended it; `text` does not, and is cut before a stop string."""

    prompt: int                        # number of its prompt
    sample: int                        # number among the samples of that prompt
    tokens: list[int]
    logprobs: list[float]              # see `sampling.Choice`
    kept: list[float]
    text: str | None                   # None without a tokenizer
    reason: Literal["stop_id", "stop_string", "length"]
    steps: int                         # forward passes, without the prompt; with those behind a stop string, which the
                                       # device went on to write until the host saw it
    accepted: dict[str, int]           # guesses that were right, by source; likewise


class Piece(NamedTuple):
    """Text of a row that no later token changes, while the row is being written."""

    prompt: int
    sample: int
    text: str


@dataclass
class Report:
    """What calls of the engine cost; adds up over calls."""

    tokens: int = 0
    prompt_tokens: int = 0             # of all requests
    prefilled_tokens: int = 0          # of those, fed to the model: without what prompts and samples share
    steps: int = 0                     # forward passes, summed over texts
    seconds: float = 0.0
    accepted: dict[str, int] = field(default_factory=dict)
    programs: set[tuple] = field(default_factory=set)   # (name, shapes): so many compilations at most

    def line(self) -> str:
        """One line for people."""
        sources = ", ".join(f"{name} {count / max(self.tokens, 1):.0%}" for name, count in self.accepted.items())
        guessed = f" (guessed right: {sources})" if sources else ""
        return (f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s; "
                f"{self.tokens / max(self.steps, 1):.2f} tokens a forward pass{guessed}; {self.prefilled_tokens} of "
                f"{self.prompt_tokens} prompt tokens computed; {len(self.programs)} programs")


class Turn(NamedTuple):
    """What a text is answered with, and how much may be written after it."""

    ids: Sequence[int]
    max_new_tokens: int


# What ended a text may be answered: with a turn, after which the same row goes on, or with None.
Respond = Callable[[Completion], Turn | None]


@dataclass(frozen=True)
class Request:
    """One text to write, or a conversation: `budget` bounds all texts and answers together."""

    prompt: int
    sample: int
    ids: tuple[int, ...]
    sampling: SamplingConfig
    budget: int
