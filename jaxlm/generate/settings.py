"""What a request asks of generation, checked, and as arrays of one value per row."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxlm.generate.text import check_stop_strings


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one request is continued.

    Order of application: bias, penalties, allowed tokens, temperature, top-k, top-p (of what top-k left, renormalised),
    min-p. So does transformers; vLLM puts min-p before top-k, which changes what top-p renormalises, nothing else.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0                       # 0: greedy
    top_k: int | None = None                       # the k largest logits and all that equal the k-th
    top_p: float | None = None                     # the smallest set {p >= t} with this mass at least
    min_p: float | None = None                     # p >= min_p * max p
    repetition_penalty: float | None = None        # logits of tokens in prompt or text: > 0 divided, <= 0 multiplied
    frequency_penalty: float | None = None         # subtracted as often as the token is in the text (not the prompt)
    presence_penalty: float | None = None          # subtracted once if the token is in the text
    logit_bias: tuple[tuple[int, float], ...] = () # (id, value added to its logit)
    allowed_tokens: tuple[int, ...] | None = None  # no other token is chosen
    stop_ids: tuple[int, ...] = ()                 # besides the tokenizer's end of text
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        greedy = self.temperature == 0
        if not greedy and not 1e-5 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a number from 1e-5 up, got {self.temperature}")
        for name in ("top_k", "top_p", "min_p", "seed"):
            if greedy and getattr(self, name):
                raise ValueError(f"{name} has no effect on greedy decoding: set a temperature above 0, or drop {name}")
        for name, value, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("top_k", self.top_k, self.top_k is None or 1 <= self.top_k < 2**31, "at least 1 and below 2**31"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty,
             self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty or 0), "finite"),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty or 0), "finite"),
            ("seed", self.seed, 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {value}")
        self._check_lists()

    def _check_lists(self) -> None:
        if self.allowed_tokens == ():
            raise ValueError("allowed_tokens is empty, so no token could be chosen: name some, or drop it")
        check_stop_strings(self.stop_strings)
        for name, ids in self.ids().items():
            if wrong := [i for i in ids if i < 0]:
                raise ValueError(f"{name}: token ids start at 0, got {_listed(wrong)}")
            if wrong := [i for i, count in Counter(ids).items() if count > 1]:
                raise ValueError(f"{name} names {_listed(wrong)} more than once")
            if self.allowed_tokens is not None and (wrong := sorted({*ids} - {*self.allowed_tokens})):
                raise ValueError(f"{name} names {_listed(wrong)}, which allowed_tokens rules out")
        if wrong := [i for i, value in self.logit_bias if not math.isfinite(value)]:
            raise ValueError(f"logit_bias of {_listed(wrong)} must be finite")

    def ids(self) -> dict[str, tuple[int, ...]]:
        """Every token id that the request names, by field."""
        return {"stop_ids": self.stop_ids, "logit_bias": tuple(i for i, _ in self.logit_bias),
                "allowed_tokens": self.allowed_tokens or ()}


def check_ids(config: SamplingConfig, vocab_size: int) -> None:
    """Raises ValueError that names the ids which a vocabulary of `vocab_size` tokens does not have."""
    for name, ids in config.ids().items():
        if wrong := [i for i in ids if i >= vocab_size]:
            raise ValueError(f"{name} names {_listed(wrong)}, but the vocabulary ends at {vocab_size - 1}")


class Settings(NamedTuple):
    """The requests of B rows as arrays. A field is None where no row uses it, and its code is then not compiled."""

    seed: Any          # [B] uint32
    temperature: Any   # [B] float32, 0 for a greedy row; None: all rows are greedy and nothing random is compiled
    top_k: Any         # [B] int32
    top_p: Any         # [B] float32
    min_p: Any         # [B] float32
    repetition: Any    # [B] float32
    frequency: Any     # [B] float32
    presence: Any      # [B] float32
    bias_ids: Any      # [B, J] int32; unused entries are (0, 0.0)
    bias_values: Any   # [B, J] float32
    allowed: Any       # [B, V] bool


def make_settings(
    configs: Sequence[SamplingConfig], vocab_size: int, like: Sequence[SamplingConfig] = ()
) -> Settings:
    """Requests as numpy arrays, row by row; a row that does not use a field gets the value without effect.

    Args:
      vocab_size: V of the logits.
      like: all requests of a queue. Rows made of any of them have the same fields and J, hence one compiled program.
    """
    queue = (*configs, *like)

    def column(name: str, neutral: float, dtype: type) -> np.ndarray | None:
        value = lambda config: neutral if getattr(config, name) is None else getattr(config, name)
        used = any(value(config) != neutral for config in queue)
        return np.array([value(config) for config in configs], dtype) if used else None

    temperature = column("temperature", 0.0, np.float32)
    width = max(len(config.logit_bias) for config in queue)
    bias = [(*config.logit_bias, *[(0, 0.0)] * (width - len(config.logit_bias))) for config in configs]
    allowed = None
    if any(config.allowed_tokens is not None for config in queue):
        allowed = np.ones((len(configs), vocab_size), bool)
        for row, config in zip(allowed, configs, strict=True):
            if config.allowed_tokens is not None:
                row[:] = np.isin(np.arange(vocab_size), config.allowed_tokens)
    return Settings(
        seed=None if temperature is None else np.array([config.seed for config in configs], np.uint32),
        temperature=temperature,
        top_k=column("top_k", vocab_size, np.int32),
        top_p=column("top_p", 1.0, np.float32),
        min_p=column("min_p", 0.0, np.float32),
        repetition=column("repetition_penalty", 1.0, np.float32),
        frequency=column("frequency_penalty", 0.0, np.float32),
        presence=column("presence_penalty", 0.0, np.float32),
        bias_ids=np.array([[i for i, _ in row] for row in bias], np.int32) if width else None,
        bias_values=np.array([[value for _, value in row] for row in bias], np.float32) if width else None,
        allowed=allowed,
    )


def _listed(ids: Sequence[int]) -> str:
    """`[7]` is "id 7", `[7, 9]` is "ids 7, 9"; long lists are cut."""
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"id{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:5]))}{more}"
