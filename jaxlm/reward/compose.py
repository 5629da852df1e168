"""Terms, weights and gates as one jitted reward that also returns every term."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.config import nearest
from jaxlm.reward.terms import TERMS, Missing, TermName
from jaxlm.reward.trajectory import NO_CALL, Trajectory, present

GateName = Literal["ended", "answered", "well_formed", "teacher_calls"]

OPTIONS = ("buffer", "num_tools", "correct_range", "wrong_range")  # of terms; fields of `TermConfig`


class Reward(NamedTuple):
    """The rewards of B rows and where they come from."""

    reward: jax.Array             # [B] float32; NaN: a term that the row needs is missing
    terms: dict[str, jax.Array]   # [B] float32 each, before weights and gates; NaN where it could not be computed
    gates: dict[str, jax.Array]   # [B] bool each, passed
    missing: dict[str, jax.Array] # int32 each, rows that passed all gates and lack the term


class Gate(NamedTuple):
    """A condition and what it reads."""

    function: Callable[[Trajectory], jax.Array]  # [B] bool, passed
    needs: str


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """A term and its share of the reward."""

    name: TermName
    weight: float = 1.0            # 0: computed for the log only
    when_wrong: float = 1.0        # factor of the weight where the answer is wrong; needs `correct`
    missing: Missing | None = None # of NaN; None: the term's own rule (`reward.terms`)
    # Options of the terms whose functions have them.
    buffer: int | None = None                          # overlong
    num_tools: int | None = None                       # tool_similarity, group_tool_similarity
    correct_range: tuple[float, float] | None = None   # length_cosine
    wrong_range: tuple[float, float] | None = None     # length_cosine

    def __post_init__(self) -> None:
        if self.name not in TERMS:
            raise ValueError(f"unknown reward term {self.name!r}{nearest(self.name, TERMS)}")
        for field in ("weight", "when_wrong"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"reward term {self.name}: {field} must be finite, got {getattr(self, field)}")
        if self.weight == 0 and self.when_wrong != 1:
            raise ValueError(f"reward term {self.name}: when_wrong has no effect on a weight of 0")
        known = inspect.signature(TERMS[self.name].function).parameters
        for option in OPTIONS:
            value = getattr(self, option)
            if value is not None and option not in known:
                raise ValueError(f"reward term {self.name} has no option {option!r}")
            if value is None and option in known and known[option].default is inspect.Parameter.empty:
                raise ValueError(f"reward term {self.name} needs the option {option!r}")
            if type(value) is int and value < 1:
                raise ValueError(f"reward term {self.name}: {option} must be at least 1, got {value}")
            if type(value) is tuple and not all(map(math.isfinite, value)):
                raise ValueError(f"reward term {self.name}: {option} must be finite, got {value}")

    def bound(self) -> Callable[[Trajectory], jax.Array]:
        """The term with its options."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return partial(TERMS[self.name].function, **{k: v for k, v in options.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A condition, and the reward of a row that does not meet it."""

    name: GateName
    reward: float

    def __post_init__(self) -> None:
        if self.name not in GATES:
            raise ValueError(f"unknown reward gate {self.name!r}{nearest(self.name, GATES)}")
        if not math.isfinite(self.reward):
            raise ValueError(f"reward gate {self.name}: the reward must be finite, got {self.reward}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """R = reward of the first gate that is not passed, else base + sum of weight * term; then clipped.

    Normalising each term within its group before the sum (GDPO) is the advantage estimator's: it has `Reward.terms`.
    """

    terms: tuple[TermConfig, ...]
    gates: tuple[GateConfig, ...] = ()
    base: float = 0.0
    clip: tuple[float, float] | None = None  # smallest and largest reward

    def __post_init__(self) -> None:
        for kind, members in (("term", self.terms), ("gate", self.gates)):
            if twice := [name for name, count in Counter(one.name for one in members).items() if count > 1]:
                raise ValueError(f"reward {kind} {twice[0]} stands there twice")
        if not any(term.weight for term in self.terms):
            raise ValueError("a reward needs at least one term with a weight")
        if not math.isfinite(self.base):
            raise ValueError(f"base must be finite, got {self.base}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be the smallest and the largest reward, got {self.clip}")


def needs(config: RewardConfig) -> dict[str, str]:
    """The optional fields of `Trajectory` that a reward reads, and for each who reads it."""
    read = {}
    for gate in config.gates:
        read.setdefault(GATES[gate.name].needs, f"gate {gate.name}")
    for term in config.terms:
        for field in (*TERMS[term.name].needs, *(("correct",) if term.when_wrong != 1 else ())):
            read.setdefault(field, f"term {term.name}")
    return read


def compose(config: RewardConfig, fields: Collection[str]) -> Callable[[Trajectory], Reward]:
    """One jitted function of a trajectory, as `config` says.

    A term that is NaN or infinite for a row follows its rule: "skip", the sum is taken without it, or "drop", the
    reward is NaN. Either way `Reward.missing` counts the rows. Where a gate has decided, terms do not matter. A damped
    weight, `weight * (when_wrong + (1 - when_wrong) * correct)`, is missing where `correct` is.

    Args:
      fields: names of the fields that the trajectories will have, such as `present(trajectory)`.

    Raises:
      ValueError: a field that is needed is not among them; so does the function itself.
    """
    _check(config, fields)
    terms = {term.name: term.bound() for term in config.terms}

    def reward(t: Trajectory) -> Reward:
        _check(config, present(t))
        chex.assert_rank([t.tokens, t.sampled, t.group], [2, 2, 1])
        chex.assert_equal_shape_prefix([t.group, *(getattr(t, name) for name in present(t) - {"max_length"})], 1)
        gates = {gate.name: GATES[gate.name].function(t) for gate in config.gates}
        values = {name: term(t) for name, term in terms.items()}
        judged = jnp.ones(t.group.shape, bool)
        for passed in gates.values():
            judged &= passed
        total, missing = jnp.full(t.group.shape, config.base, jnp.float32), {}
        for term in config.terms:
            part = _weight(term, t) * values[term.name]
            lost = ~jnp.isfinite(part)
            missing[term.name] = jnp.sum(lost & judged, dtype=jnp.int32)
            if term.weight:
                rule = term.missing or TERMS[term.name].missing
                total += jnp.where(lost, jnp.nan if rule == "drop" else 0, part)
        for gate in reversed(config.gates):
            total = jnp.where(gates[gate.name], total, gate.reward)
        return Reward(total if config.clip is None else jnp.clip(total, *config.clip), values, gates, missing)

    return jax.jit(reward)


def _weight(term: TermConfig, t: Trajectory) -> jax.Array | float:
    """[B] or a number."""
    if term.when_wrong == 1:
        return term.weight
    return term.weight * (term.when_wrong + (1 - term.when_wrong) * t.correct)


def _check(config: RewardConfig, fields: Collection[str]) -> None:
    if unknown := [name for name in fields if name not in Trajectory._fields]:
        raise ValueError(f"a trajectory has no field {unknown[0]!r}{nearest(unknown[0], Trajectory._fields)}")
    if absent := {name: who for name, who in needs(config).items() if name not in fields}:
        told = "; ".join(f"{who} needs {name!r}" for name, who in absent.items())
        raise ValueError(f"the trajectories lack what the reward reads: {told}")


GATES = {
    "ended": Gate(lambda t: t.ended.astype(bool), "ended"),
    "answered": Gate(lambda t: t.answered.astype(bool), "answered"),
    "well_formed": Gate(lambda t: t.well_formed.astype(bool), "well_formed"),
    "teacher_calls": Gate(lambda t: jnp.any(t.teacher_tool_ids != NO_CALL, axis=1), "teacher_tool_ids"),
}
