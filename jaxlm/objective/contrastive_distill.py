"""A retriever learns the scores of a teacher, such as a cross-encoder, on the passages of each query."""

import chex
import jax
import jax.numpy as jnp

from jaxlm.objective.distill import DistillConfig, divergence


def margin_mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """((s_0 - s_n) - (t_0 - t_n))^2: scores [B, P], the answer first, to [B, P - 1] float32, one per negative.

    What the scores of absent negatives are does not matter; reduce with their mask. Hofstätter et al. 2020,
    arXiv:2010.02666.
    """
    chex.assert_rank(student, 2)
    chex.assert_equal_shape([student, teacher])
    student, teacher = (x.astype(jnp.float32) for x in (student, jax.lax.stop_gradient(teacher)))
    margin = lambda scores: scores[:, :1] - scores[:, 1:]
    return jnp.square(margin(student) - margin(teacher))


def score_distillation(
    student: jax.Array, teacher: jax.Array, valid: jax.Array, config: DistillConfig
) -> jax.Array:
    """The configured divergence, say KL(T, S), of softmax(scores / temperature) over the passages of a query, [B].

    With `config.scale_gradient` it is multiplied by temperature^2 (Hinton et al. 2015, arXiv:1503.02531; so does
    sentence-transformers, tevatron does not).

    Args:
      student, teacher: [B, P], in one scale: cosines and logits of a cross-encoder need temperatures of their own
        before.
      valid: [B, P] bool; scores elsewhere may be anything. A query without any has loss 0.
    """
    chex.assert_rank(student, 2)
    chex.assert_equal_shape([student, teacher, valid])
    some = jnp.any(valid, axis=1)
    kept = valid | ~some[:, None]  # -inf everywhere would be NaN
    part = lambda scores: jnp.where(kept, jnp.where(some[:, None], scores, 0), -jnp.inf)
    return jnp.where(some, divergence(part(teacher), part(student), config), 0)
