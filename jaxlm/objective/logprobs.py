"""Log-probabilities of sampled tokens and the entropy of their distribution: what policy objectives differentiate."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.matmul import matmul
from jaxlm.objective.chunks import map_chunks


class TokenLogprob(NamedTuple):
    """Per-token results, float32 with the shape of the targets; nats."""

    logp: jax.Array     # log p(target)
    entropy: jax.Array  # of p


def token_logprobs(logits: jax.Array, targets: jax.Array, temperature: float = 1.0) -> TokenLogprob:
    """log p(target) and -sum_v p_v log p_v, with p = softmax(logits / temperature), in float32.

    The temperature is that of sampling: only then are these the probabilities of the policy that sampled.

    Args:
      logits: [..., V], any float type; -inf for a token that cannot be.
      targets: [...] int32 in [0, V).
      temperature: above 0; greedy samples have no policy gradient.
    """
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 for log-probabilities of samples, got {temperature}")
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    p = jnp.exp(logp)
    # Selected before the product: 0 * -inf is NaN, in the gradient too.
    return TokenLogprob(picked, -jnp.sum(p * jnp.where(p > 0, logp, 0), axis=-1))


def chunked_token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, num_chunks: int = 1, temperature: float = 1.0
) -> TokenLogprob:
    """`token_logprobs(hidden @ head, targets, temperature)` with at most 1/num_chunks of the logits in memory.

    Args:
      hidden: [B, T, D] in the compute type.
      head: [D, V], cast to the type of `hidden`; the product accumulates in float32.
      targets: [B, T] int32.
      num_chunks: must divide T. Old and new log-probabilities must use the same, or the first ratio is 1 only up to
        rounding.
    """
    chex.assert_rank([hidden, head, targets], [3, 2, 2])

    def one(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> TokenLogprob:
        return token_logprobs(matmul(hidden, head, jnp.float32), targets, temperature)

    return map_chunks(one, (hidden, targets), (head,), num_chunks)
