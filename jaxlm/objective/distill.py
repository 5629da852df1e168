"""White-box distillation: divergences between the next-token distributions of a teacher T and a student S.

Every divergence takes log-probabilities [..., V] of both and returns [...], never negative and 0 where they are equal.
Only the student is differentiated.
"""

from dataclasses import dataclass
from math import log, log1p
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.matmul import matmul
from jaxlm.objective.chunks import map_chunks

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "jsd_normalized", "skew_kl", "skew_reverse_kl"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student minimises at each token."""

    divergence: Divergence = "forward_kl"
    mix: float | None = None         # beta of jsd (the share of the teacher), alpha of skew (0.1 in DistiLLM)
    temperature: float = 1.0         # divides the logits of both
    scale_gradient: bool = False     # times temperature^2, so that gradients keep their size (Hinton et al. 2015)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be above 0, got {self.temperature}")
        if self.scale_gradient and self.temperature == 1:
            raise ValueError("distill.scale_gradient has no effect at temperature 1; drop it")
        if self.divergence in ("forward_kl", "reverse_kl"):
            if self.mix is not None:
                raise ValueError(f"distill.mix has no effect on {self.divergence}; drop it")
        elif self.mix is None:
            raise ValueError(f"distill.divergence {self.divergence} needs distill.mix, a number from 0 to 1")
        elif self.divergence == "jsd" and not 0 < self.mix < 1:
            raise ValueError(f"jsd is 0 for any two models at distill.mix {self.mix}; use a number between 0 and 1, or "
                             "jsd_normalized, which is forward_kl at 0 and reverse_kl at 1")
        elif not 0 <= self.mix <= 1 or (self.mix == 1 and self.divergence.startswith("skew")):
            raise ValueError(f"distill.mix must be at least 0 and at most 1 (below 1 for skew), got {self.mix}")


def forward_kl(teacher: jax.Array, student: jax.Array, mix: None = None) -> jax.Array:
    """KL(T, S): the student covers what the teacher does."""
    return _kl(teacher, student)


def reverse_kl(teacher: jax.Array, student: jax.Array, mix: None = None) -> jax.Array:
    """KL(S, T): the student keeps to what the teacher would do."""
    return _kl(student, teacher)


def jsd(teacher: jax.Array, student: jax.Array, mix: float) -> jax.Array:
    """mix KL(T, M) + (1 - mix) KL(S, M), M = mix T + (1 - mix) S (GKD, Agarwal et al. 2024, arXiv:2306.13649).

    Tends to 0 at both ends of mix, and its gradient with it: `jsd_normalized` does not.
    """
    middle = _mixture(teacher, student, mix)
    return mix * _kl(teacher, middle) + (1 - mix) * _kl(student, middle)


def jsd_normalized(teacher: jax.Array, student: jax.Array, mix: float) -> jax.Array:
    """jsd / (mix (1 - mix)), which is continuous: KL(T, S) at mix 0, KL(S, T) at mix 1."""
    middle = _mixture(teacher, student, mix)
    left = 0 if mix == 1 else _kl(teacher, middle) / (1 - mix)
    return left if mix == 0 else left + _kl(student, middle) / mix


def skew_kl(teacher: jax.Array, student: jax.Array, mix: float) -> jax.Array:
    """KL(T, mix T + (1 - mix) S) (DistiLLM, Ko et al. 2024, arXiv:2402.03898)."""
    return _kl(teacher, _mixture(teacher, student, mix))


def skew_reverse_kl(teacher: jax.Array, student: jax.Array, mix: float) -> jax.Array:
    """KL(S, (1 - mix) T + mix S), of DistiLLM too."""
    return _kl(student, _mixture(student, teacher, mix))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd_normalized": jsd_normalized,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def divergence(teacher_logits: jax.Array, student_logits: jax.Array, config: DistillConfig) -> jax.Array:
    """The configured divergence of softmax(logits / temperature), [..., V] to [...] float32."""
    chex.assert_equal_shape([teacher_logits, student_logits])
    teacher, student = (log_softmax(x, config) for x in (teacher_logits, student_logits))
    return from_logprobs(teacher, student, config)


def chunked_divergence(
    teacher_hidden: jax.Array, teacher_head: jax.Array, student_hidden: jax.Array, student_head: jax.Array,
    config: DistillConfig, num_chunks: int = 1,
) -> jax.Array:
    """`divergence` of both `hidden @ head`, [B, T], with at most 1/num_chunks of either logits in memory.

    Args:
      teacher_hidden: [B, T, Dt]; teacher_head: [Dt, V].
      student_hidden: [B, T, Ds]; student_head: [Ds, V]. Widths may differ, the vocabulary may not.
      num_chunks: must divide T.
    """
    chex.assert_rank([teacher_hidden, teacher_head, student_hidden, student_head], [3, 2, 3, 2])
    if teacher_head.shape[1] != student_head.shape[1]:
        raise ValueError(f"distillation by logits needs one vocabulary: the teacher's has {teacher_head.shape[1]} "
                         f"tokens, the student's {student_head.shape[1]}")
    # Detached before the products, so that none of the teacher's are transposed.
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))

    def one(teacher: jax.Array, student: jax.Array, teacher_head: jax.Array, student_head: jax.Array) -> jax.Array:
        return divergence(matmul(teacher, teacher_head, jnp.float32), matmul(student, student_head, jnp.float32),
                          config)

    return map_chunks(one, (teacher_hidden, student_hidden), (teacher_head, student_head), num_chunks)


def log_softmax(logits: jax.Array, config: DistillConfig) -> jax.Array:
    """Log-probabilities at the configured temperature, float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / config.temperature, axis=-1)


def from_logprobs(teacher: jax.Array, student: jax.Array, config: DistillConfig) -> jax.Array:
    """The configured divergence of log-probabilities at the configured temperature, [..., V] to [...]."""
    value = DIVERGENCES[config.divergence](jax.lax.stop_gradient(teacher), student, config.mix)
    return value * config.temperature**2 if config.scale_gradient else value


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum_v p log(p / q) - p + q: KL(p, q), since both sum to 1, as a sum in which no term is negative.

    Terms of nearly equal p and q cancel in float32; there the series of q (d e^d - e^d + 1) in d = log(p / q) is used.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    some = p > 0
    # A class that neither has would be -inf - -inf; one without p adds q.
    d = jnp.where(some, log_p, 0) - jnp.where(some, log_q, 0)
    near = some & (jnp.abs(d) < 0.05)
    small = jnp.where(near, d, 0)
    series = small**2 * (1 / 2 + small * (1 / 3 + small * (1 / 8 + small / 30)))
    return jnp.sum(jnp.where(near, q * series, p * d - p + q), axis=-1)


def _mixture(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    # The gradient of logaddexp is NaN where both are -inf: a token that neither has.
    none = (log_a == -jnp.inf) & (log_b == -jnp.inf)
    a, b = (jnp.where(none, 0, x) for x in (log_a, log_b))
    return jnp.where(none, -jnp.inf, jnp.logaddexp(a + log(share), b + log1p(-share)))
