"""Learning-rate schedules: functions from the number of updates done to a learning rate."""

from dataclasses import dataclass
from typing import Literal

import optax

Kind = Literal["wsd", "cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up from 0 to the peak, then `kind`."""

    kind: Kind = "wsd"
    warmup: float = 0.03     # fraction of all updates
    decay: float = 0.0       # wsd only: fraction of all updates spent on the final linear decay
    min_ratio: float = 0.0   # learning rate at the end, as a fraction of the peak

    def __post_init__(self):
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(f"schedule: warmup {self.warmup} and decay {self.decay} are fractions of the run, "
                             "together at most 1")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"schedule: min_ratio must be in [0, 1], got {self.min_ratio}")
        if self.min_ratio and (self.kind == "constant" or (self.kind == "wsd" and not self.decay)):
            raise ValueError(f"schedule: min_ratio has no effect with kind {self.kind}"
                             f"{' and decay 0' if self.kind == 'wsd' else ''}: the rate never falls")
        if self.decay and self.kind != "wsd":
            raise ValueError(f"schedule: decay has an effect with kind wsd only, not with {self.kind}")


def wsd(peak: float, end: float, rest: int, decay: int) -> optax.Schedule:
    """Warmup-stable-decay after the warm-up: constant, then linear to `end` over the last `decay` updates."""
    parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(decay, 1))]
    return optax.join_schedules(parts, [rest - decay]) if decay else parts[0]


def cosine(peak: float, end: float, rest: int, decay: int) -> optax.Schedule:
    """Half a cosine from `peak` to `end`."""
    return optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0)


def linear(peak: float, end: float, rest: int, decay: int) -> optax.Schedule:
    """A straight line from `peak` to `end`."""
    return optax.linear_schedule(peak, end, rest)


def constant(peak: float, end: float, rest: int, decay: int) -> optax.Schedule:
    """`peak` to the end of the run."""
    return optax.constant_schedule(peak)


def make_schedule(config: ScheduleConfig, peak: float, num_updates: int) -> optax.Schedule:
    """The schedule of a run of `num_updates` updates with the given peak.

    The first update already has a positive rate: warm-up over W updates goes 1/W, 2/W, ..., 1.
    """
    warmup = round(config.warmup * num_updates)
    if warmup < 2:  # the first rate of such a warm-up is the peak already
        warmup = 0
    rest = max(1, num_updates - warmup)
    main = SCHEDULES[config.kind](peak, config.min_ratio * peak, rest, round(config.decay * num_updates))
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), main], [warmup])


SCHEDULES = {"wsd": wsd, "cosine": cosine, "linear": linear, "constant": constant}
