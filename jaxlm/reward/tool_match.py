"""Terms that compare the calls of a trajectory with those of a teacher. All [B] float32; formulas per row.

U is the set of known tools that were called, T that of the teacher's. Calls of unknown names stay out of U: the term
`valid_tools` judges them. Where the teacher called nothing there is nothing to match and the value is NaN. An unknown
name of the teacher belongs to T, so that U cannot equal it.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.masked import safe_divide
from jaxlm.reward.trajectory import NO_CALL, NO_HASH, Trajectory


def match_exact_set(t: Trajectory) -> jax.Array:
    """1[U == T]; order and counts do not matter (MENTOR, arXiv 2510.18383, specification 3.2)."""
    sizes = _overlap(t)
    return _where_taught(t, (sizes.both == sizes.student) & (sizes.both == sizes.teacher))


def match_any_overlap(t: Trajectory) -> jax.Array:
    """1[U and T share a tool] (MENTOR's ABLATION2)."""
    return _where_taught(t, _overlap(t).both > 0)


def match_set_f1(t: Trajectory) -> jax.Array:
    """2 |U and T| / (|U| + |T|), the harmonic mean of precision |U and T| / |U| and recall (MENTOR's ABLATION4)."""
    sizes = _overlap(t)
    return _where_taught(t, safe_divide(2 * sizes.both, sizes.student + sizes.teacher))


def match_ordered(t: Trajectory) -> jax.Array:
    """1[the names of the known tools called, in order, are the teacher's]."""
    return _where_taught(t, _same_sequence(t, t.tool_ids, t.teacher_tool_ids))


def match_ordered_with_arguments(t: Trajectory) -> jax.Array:
    """1[the calls of known tools, names and arguments, in order, are the teacher's]."""
    return _where_taught(t, _same_sequence(t, t.call_keys, t.teacher_call_keys))


def toolrl_match(t: Trajectory) -> jax.Array:
    """ToolRL's fine-grained match in [-3, 3] (arXiv 2504.13958, section 3.3).

        s  = J(names called, the teacher's names) + sum over the teacher's calls, in order, of the largest
             J(parameter names) + number of equal values, over calls of the same name not taken yet
        s* = 1 + sum over the teacher's calls of 1 + number of parameters
        R  = 6 s / s* - 3

    J of multisets is intersection over union by counts, 1 for two empty ones. A call is taken by the first of the
    teacher's that scores above 0 with it and not better with another. A call that did not parse makes it -3, a
    teacher without calls 0.

    Worked example, teacher add(a=1, b=2), called add(a=1, c=2): J(names) 1, J({a, b}, {a, c}) 1/3, one equal value,
    so s = 7/3, s* = 4 and R = 1/2.
    """
    chex.assert_rank([t.tool_ids, t.params, t.teacher_tool_ids, t.teacher_params], [2, 3, 2, 3])
    score = jax.vmap(_toolrl_row)(t.tool_ids, t.params, t.values, t.teacher_tool_ids, t.teacher_params,
                                  t.teacher_values)
    score = jnp.where(t.num_unparsable > 0, -3, score)
    return jnp.where(_taught(t), score, 0).astype(jnp.float32)


def tool_similarity(t: Trajectory, *, num_tools: int) -> jax.Array:
    """`similarity` of the tools a row called with those of the teacher; 0 where it called none, NaN where he did.

    Args:
      num_tools: tools in the list. Unknown names are one more.
    """
    return _tool_similarity(t, _histogram(t.tool_ids, num_tools), num_tools)


def group_tool_similarity(t: Trajectory, *, num_tools: int) -> jax.Array:
    """`tool_similarity` with the calls of all rows of the group taken together."""
    same = (t.group[:, None] == t.group[None]).astype(jnp.float32)
    return _tool_similarity(t, same @ _histogram(t.tool_ids, num_tools), num_tools)


def similarity(counts: jax.Array, teacher: jax.Array, eps: float = 1e-6) -> jax.Array:
    """1 - JSD(p, q) with logarithms to base 2, where p = (counts + eps) / sum, q alike.

        JSD(p, q) = (KL(p, m) + KL(q, m)) / 2,  m = (p + q) / 2

    1 for equal distributions, 0 for disjoint ones up to eps (MENTOR's figure; specification 5).

    Args:
      counts: [..., N] of each tool.
      teacher: the same shape.
      eps: above 0; tools that nobody called then count as little as that.
    """
    chex.assert_equal_shape([counts, teacher])
    p, q = ((x + eps) / jnp.sum(x + eps, axis=-1, keepdims=True) for x in (counts, teacher))
    m = (p + q) / 2
    divergence = jnp.sum(p * jnp.log2(p / m) + q * jnp.log2(q / m), axis=-1) / 2
    return 1 - jnp.clip(divergence, 0, 1)  # rounding may leave the range


class _Overlap(NamedTuple):
    """Sizes of sets, [B] float32."""

    both: jax.Array
    student: jax.Array
    teacher: jax.Array


def _overlap(t: Trajectory) -> _Overlap:
    chex.assert_rank([t.tool_ids, t.teacher_tool_ids], 2)
    student = _first(t.tool_ids, t.tool_ids >= 0)
    teacher = _first(t.teacher_tool_ids, t.teacher_tool_ids != NO_CALL)
    same = t.tool_ids[:, :, None] == t.teacher_tool_ids[:, None]
    both = student & jnp.any(same & teacher[:, None], axis=2)
    return _Overlap(*(jnp.sum(x, axis=1).astype(jnp.float32) for x in (both, student, teacher)))


def _first(ids: jax.Array, used: jax.Array) -> jax.Array:
    """Where a used id stands for the first time in its row: [4, 1, 4] gives [1, 1, 0]."""
    same = (ids[:, :, None] == ids[:, None]) & used[:, None]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)[None]
    return used & ~jnp.any(same & earlier, axis=2)


def _same_sequence(t: Trajectory, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    chex.assert_equal_shape([t.tool_ids, ours])
    chex.assert_equal_shape([t.teacher_tool_ids, theirs])
    ours, theirs = _compact(ours, t.tool_ids >= 0), _compact(theirs, t.teacher_tool_ids != NO_CALL)
    width = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=NO_CALL) for x in (ours, theirs))
    return jnp.all(ours == theirs, axis=1)


def _compact(values: jax.Array, keep: jax.Array) -> jax.Array:
    """What is kept, moved together to the left: [5, 6, 7] with [1, 0, 1] gives [5, 7, -1]."""
    order = jnp.argsort(~keep, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(keep, values, NO_CALL), order, axis=1)


def _toolrl_row(
    ids_C: jax.Array, params_CA: jax.Array, values_CA: jax.Array,
    gold_ids_C: jax.Array, gold_params_CA: jax.Array, gold_values_CA: jax.Array,
) -> jax.Array:
    """The match of one row whose calls all parsed."""
    def gold_call(carry: tuple[jax.Array, jax.Array], gold: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        taken_C, score = carry
        gold_id, gold_params, gold_values = gold
        shared_CAA = (params_CA[:, :, None] == gold_params[None, None]) & (gold_params != NO_HASH)[None, None]
        equal_CAA = shared_CAA & (values_CA[:, :, None] == gold_values[None, None])
        num_shared, num_equal = (jnp.sum(x, axis=(1, 2)) for x in (shared_CAA, equal_CAA))
        union = jnp.sum(params_CA != NO_HASH, axis=1) + jnp.sum(gold_params != NO_HASH) - num_shared
        match_C = jnp.where(union == 0, 1, safe_divide(num_shared, union)) + num_equal
        match_C = jnp.where((ids_C == gold_id) & (gold_id != NO_CALL) & ~taken_C, match_C, 0)
        best = jnp.argmax(match_C)
        return (taken_C.at[best].set(taken_C[best] | (match_C[best] > 0)), score + match_C[best]), None

    start = (jnp.zeros(ids_C.shape, bool), jnp.float32(0))
    (_, score), _ = jax.lax.scan(gold_call, start, (gold_ids_C, gold_params_CA, gold_values_CA))
    called_C, gold_C = ids_C != NO_CALL, gold_ids_C != NO_CALL
    # Multisets share min(count, count) of each name: our k-th call of it has a partner if the teacher has k of them.
    earlier = jnp.tril(jnp.ones((len(ids_C), len(ids_C)), bool))
    rank_C = jnp.sum((ids_C[:, None] == ids_C[None]) & earlier, axis=1)
    theirs_C = jnp.sum((ids_C[:, None] == gold_ids_C[None]) & gold_C[None], axis=1)
    shared = jnp.sum(called_C & (rank_C <= theirs_C))
    names = safe_divide(shared, jnp.sum(called_C) + jnp.sum(gold_C) - shared)
    num_params = jnp.sum((gold_params_CA != NO_HASH) & gold_C[:, None])
    return 6 * (names + score) / (1 + jnp.sum(gold_C) + num_params) - 3


def _tool_similarity(t: Trajectory, counts: jax.Array, num_tools: int) -> jax.Array:
    value = similarity(counts, _histogram(t.teacher_tool_ids, num_tools))
    return _where_taught(t, jnp.where(jnp.any(counts > 0, axis=1), value, 0))


def _histogram(ids: jax.Array, num_tools: int) -> jax.Array:
    """Calls of each tool, and last of all others, [B, num_tools + 1] float32."""
    known = (ids >= 0) & (ids < num_tools)
    places = jnp.where(known, ids, jnp.where(ids == NO_CALL, -1, num_tools))
    return jnp.sum(jax.nn.one_hot(places, num_tools + 1, dtype=jnp.float32), axis=1)


def _taught(t: Trajectory) -> jax.Array:
    return jnp.any(t.teacher_tool_ids != NO_CALL, axis=1)


def _where_taught(t: Trajectory, value: jax.Array) -> jax.Array:
    return jnp.where(_taught(t), value.astype(jnp.float32), jnp.nan)
