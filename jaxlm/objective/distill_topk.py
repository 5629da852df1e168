"""Distillation from a teacher of whom only the K most probable tokens are known, and one class for all the others.

The K + 1 classes are a coarse view of the V tokens, so a divergence between them lies between 0 and the full one.
Dropping the rest instead makes KL negative, or lets the student's mass escape there.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.matmul import matmul
from jaxlm.objective.chunks import map_chunks
from jaxlm.objective.distill import DistillConfig, from_logprobs, log_softmax


class TopK(NamedTuple):
    """What is kept of a teacher, [..., K] each; the ids of a token are distinct."""

    ids: jax.Array   # int32
    logp: jax.Array  # log-probabilities at the temperature of the distillation, among all V tokens


class TopKAgreement(NamedTuple):
    """How much the two see in common, [...] float32 each."""

    teacher_mass: jax.Array  # of the teacher on its own K tokens
    student_mass: jax.Array  # of the student on the teacher's K tokens
    overlap: jax.Array       # share of the teacher's K tokens that are among the student's K most probable


def top_k(logits: jax.Array, k: int, config: DistillConfig) -> TopK:
    """The K most probable tokens of softmax(logits / temperature), [..., V] to [..., K]."""
    logp, ids = jax.lax.top_k(log_softmax(logits, config), k)
    return TopK(ids, logp)


def chunked_top_k(
    hidden: jax.Array, head: jax.Array, k: int, config: DistillConfig, num_chunks: int = 1
) -> TopK:
    """`top_k(hidden @ head)`, [B, T, D] to [B, T, K], with at most 1/num_chunks of the logits in memory."""
    chex.assert_rank([hidden, head], [3, 2])

    def one(hidden: jax.Array, head: jax.Array) -> TopK:
        return top_k(matmul(hidden, head, jnp.float32), k, config)

    return map_chunks(one, (hidden,), (head,), num_chunks)


def topk_divergence(teacher: TopK, student_logits: jax.Array, config: DistillConfig) -> jax.Array:
    """The configured divergence of K + 1 classes, [...] float32.

        teacher   ids 3 0, p .6 .3                    classes .6 .3 .1
        student   p .2 .1 .1 .5 .1 of ids 0 to 4      classes .5 .2 .3

    Args:
      student_logits: [..., V].
    """
    chex.assert_equal_shape(teacher)
    chex.assert_equal_shape_prefix([teacher.ids, student_logits], teacher.ids.ndim - 1)
    if teacher.ids.shape[-1] >= student_logits.shape[-1]:
        raise ValueError(f"top-k distillation: k {teacher.ids.shape[-1]} leaves nothing of a vocabulary of "
                         f"{student_logits.shape[-1]}; use a smaller k, or the full divergence")
    student = log_softmax(student_logits, config)
    picked = jnp.take_along_axis(student, teacher.ids, axis=-1)
    # The student's rest is summed, not taken from 1: that difference is rounding once the K hold nearly all mass.
    others = jnp.put_along_axis(student, teacher.ids, -jnp.inf, axis=-1, inplace=False)
    student_rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    teacher_logp = teacher.logp.astype(jnp.float32)
    mass = jnp.sum(jnp.exp(teacher_logp), axis=-1, keepdims=True)
    # What float32 cannot tell from 0 beside 1 is not 0: the reverse KL would be infinite.
    teacher_rest = jnp.log(jnp.maximum(1 - mass, 2**-24))
    return from_logprobs(jnp.concatenate((teacher_logp, teacher_rest), axis=-1),
                         jnp.concatenate((picked, student_rest), axis=-1), config)


def chunked_topk_divergence(
    teacher: TopK, hidden: jax.Array, head: jax.Array, config: DistillConfig, num_chunks: int = 1
) -> jax.Array:
    """`topk_divergence(teacher, hidden @ head)`, [B, T], with at most 1/num_chunks of the logits in memory.

    Args:
      teacher: [B, T, K] each.
      hidden: [B, T, D] of the student; head: [D, V].
      num_chunks: must divide T.
    """
    chex.assert_rank([*teacher, hidden, head], [3, 3, 3, 2])

    def one(ids: jax.Array, logp: jax.Array, hidden: jax.Array, head: jax.Array) -> jax.Array:
        return topk_divergence(TopK(ids, logp), matmul(hidden, head, jnp.float32), config)

    return map_chunks(one, (*teacher, hidden), (head,), num_chunks)


def topk_agreement(teacher: TopK, student_logits: jax.Array, config: DistillConfig) -> TopKAgreement:
    """Mass and overlap of the teacher's K tokens; student_logits [..., V]."""
    student = log_softmax(student_logits, config)
    own = jax.lax.top_k(student, teacher.ids.shape[-1])[1]
    common = jnp.any(teacher.ids[..., :, None] == own[..., None, :], axis=-1)
    mass = jnp.sum(jnp.exp(jnp.take_along_axis(student, teacher.ids, axis=-1)), axis=-1)
    return TopKAgreement(jnp.sum(jnp.exp(teacher.logp), axis=-1), mass, jnp.mean(common, axis=-1, dtype=jnp.float32))
