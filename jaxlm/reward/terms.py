"""Reward terms: a trajectory of B rows in, [B] float32 out; pure and jittable.

A term that cannot be computed for a row is NaN there. `Term.missing` says what then becomes of the row's reward, unless
the configuration says otherwise: "drop", the reward is NaN and the advantage estimators leave the row out; or "skip",
the row is rewarded by its other terms. Skipping is the default only where the reason lies in the prompt, so that all
rows of a group lose the same term.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide
from jaxlm.reward.tool_match import (
    group_tool_similarity,
    match_any_overlap,
    match_exact_set,
    match_ordered,
    match_ordered_with_arguments,
    match_set_f1,
    tool_similarity,
    toolrl_match,
)
from jaxlm.reward.trajectory import UNKNOWN_TOOL, Trajectory, lengths

Missing = Literal["drop", "skip"]
TermName = Literal[
    "correctness", "match_exact_set", "match_any_overlap", "match_set_f1", "match_ordered",
    "match_ordered_with_arguments", "toolrl_match", "tool_similarity", "group_tool_similarity", "valid_tools",
    "valid_calls", "format", "length_cosine", "length_group", "overlong",
]


class Term(NamedTuple):
    """A term and what it reads."""

    function: Callable[..., jax.Array]  # (trajectory, **options) -> [B]
    needs: tuple[str, ...]              # optional fields of the trajectory
    missing: Missing = "drop"           # the rule for NaN


def correctness(t: Trajectory) -> jax.Array:
    """What the judge said; NaN where it could not judge."""
    chex.assert_rank(t.correct, 1)
    return t.correct.astype(jnp.float32)


def valid_tools(t: Trajectory) -> jax.Array:
    """1[no unknown tool was called], also without any call (MENTOR, specification 3.2)."""
    chex.assert_rank(t.tool_ids, 2)
    return jnp.all(t.tool_ids != UNKNOWN_TOOL, axis=1).astype(jnp.float32)


def valid_calls(t: Trajectory) -> jax.Array:
    """1[no unknown tool was called and every call parsed]: `valid_tools` with `count_unparsable_as_invalid`."""
    chex.assert_rank([t.tool_ids, t.num_unparsable], [2, 1])
    return valid_tools(t) * (t.num_unparsable == 0)


def well_formed(t: Trajectory) -> jax.Array:
    """1[the tags are as they should be]: ToolRL's R_format."""
    chex.assert_rank(t.well_formed, 1)
    return t.well_formed.astype(jnp.float32)


def length_cosine(
    t: Trajectory, *, correct_range: tuple[float, float] = (1.0, 0.5), wrong_range: tuple[float, float] = (-1.0, -0.5)
) -> jax.Array:
    """A right answer is worth less the longer it is, a wrong one more (arXiv 2502.03373).

        R = last + (first - last) / 2 * (1 + cos(pi n / L)),  n tokens, L the budget; beyond L as at L

    Args:
      correct_range: (first, last): the value at 0 tokens and at L, of a right answer; both defaults are open-r1's.
      wrong_range: of a wrong one. Between the two where `correct` lies between 0 and 1.
    """
    progress = jnp.clip(safe_divide(lengths(t), _budget(t)), 0, 1)
    scale = (1 + jnp.cos(jnp.pi * progress)) / 2
    right, wrong = (last + (first - last) * scale for first, last in (correct_range, wrong_range))
    return wrong + (right - wrong) * t.correct


def length_group(t: Trajectory) -> jax.Array:
    """Shorter than the others of its group is better (Kimi k1.5, arXiv 2501.12599, section 2.3.3).

        R = 1/2 - (n - min) / (max - min),  of a wrong answer (correct < 1) at most 0;  0 where max == min

    min and max over the tokens of the rows of the same prompt.
    """
    chex.assert_rank([t.group, t.correct], 1)
    num = lengths(t)
    same = t.group[:, None] == t.group[None]
    least = jnp.min(jnp.where(same, num[None], jnp.inf), axis=1)
    most = jnp.max(jnp.where(same, num[None], -jnp.inf), axis=1)
    value = jnp.where(most > least, 0.5 - safe_divide(num - least, most - least), 0)
    value = jnp.where(t.correct < 1, jnp.minimum(value, 0), value)
    return jnp.where(jnp.isnan(t.correct), jnp.nan, value)


def overlong(t: Trajectory, *, buffer: int) -> jax.Array:
    """0 up to L - Lc tokens, then linear to -1 at L, never below (DAPO, arXiv 2503.14476, equation 13).

    L is the budget of sampled tokens; what tools said does not count.

    Args:
      buffer: Lc, in tokens, at least 1.
    """
    return jnp.clip((_budget(t) - buffer - lengths(t)) / buffer, -1, 0)


def _budget(t: Trajectory) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(t.max_length, jnp.float32), t.group.shape)


_TEACHER = ("tool_ids", "teacher_tool_ids")
_FULL_CALLS = ("params", "values", "teacher_params", "teacher_values", "num_unparsable")

TERMS = {
    "correctness": Term(correctness, ("correct",)),
    "match_exact_set": Term(match_exact_set, _TEACHER, "skip"),
    "match_any_overlap": Term(match_any_overlap, _TEACHER, "skip"),
    "match_set_f1": Term(match_set_f1, _TEACHER, "skip"),
    "match_ordered": Term(match_ordered, _TEACHER, "skip"),
    "match_ordered_with_arguments": Term(
        match_ordered_with_arguments, (*_TEACHER, "call_keys", "teacher_call_keys"), "skip"),
    "toolrl_match": Term(toolrl_match, (*_TEACHER, *_FULL_CALLS)),
    "tool_similarity": Term(tool_similarity, _TEACHER, "skip"),
    "group_tool_similarity": Term(group_tool_similarity, _TEACHER, "skip"),
    "valid_tools": Term(valid_tools, ("tool_ids",)),
    "valid_calls": Term(valid_calls, ("tool_ids", "num_unparsable")),
    "format": Term(well_formed, ("well_formed",)),
    "length_cosine": Term(length_cosine, ("correct", "max_length")),
    "length_group": Term(length_group, ("correct",)),
    "overlong": Term(overlong, ("max_length",)),
}
