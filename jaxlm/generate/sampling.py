"""How a token is chosen from logits: one request's settings, penalties, truncation, and noise tied to the place.

The token at index i of a row's text is argmax_v(logits_v / temperature + g_v), where g is Gumbel noise that depends on
(seed, i) only (Gumbel-max). It is a sample of the softmax, and a deterministic function of (logits, seed, i): a
speculative run that computes the same logits in a tree writes the text of a plain run, token by token. A drafted token
x is accepted with probability p(x), several candidates with the sum, as in the sequential rejection of speculative
sampling. (Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding",
arXiv:2408.07978.)
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxlm.generate.settings import Settings


class Choice(NamedTuple):
    """The token that each node decides, [B, T] each.

    `logprobs - log(kept)` is the log-probability under the distribution that was sampled from.
    """

    tokens: jax.Array     # int32
    logprobs: jax.Array   # float32: log softmax(adjusted logits / temperature) of the token, before truncation;
                          # at temperature 1 in greedy rows
    kept: jax.Array       # float32: mass that top-k, top-p and min-p keep of that softmax; 1 without them


class Seen(NamedTuple):
    """What stands before the token that each node decides; a field that no penalty reads is not computed under jit."""

    in_prompt_or_text: jax.Array   # [B, T, V] bool
    count_in_text: jax.Array       # [B, T, V] float32


def needs_history(settings: Settings) -> bool:
    """Whether `choose` needs `Seen`: some row has a penalty."""
    return any(field is not None for field in (settings.repetition, settings.frequency, settings.presence))


def count_tokens(
    tokens_BS: jax.Array, start_B: jax.Array, length_B: jax.Array, path_BTD: jax.Array, path_valid_BTD: jax.Array,
    vocab_size: int,
) -> Seen:
    """The tokens before each node: those of the row, then those from the root (not counted again) down to the node.

    Worked example, a row with the prompt `5 6` and the text `6`, and a tree whose node 1 is a drafted `6`:

        tokens_BS [5, 6, 6, 0], start_B 2, length_B 3; path_BTD [[0], [6]], path_valid_BTD [[0], [1]]
        in_prompt_or_text  {5, 6} at both nodes
        count_in_text      {6: 1} at node 0, {6: 2} at node 1

    Args:
      tokens_BS: int32, prompt and text from the left; what lies from `length_B` on is not read.
      start_B, length_B: int32, where the text starts and how many tokens are known.
      path_BTD, path_valid_BTD: the tokens below the root on the way to the node, itself included; D may be 0.
    """
    chex.assert_rank([tokens_BS, start_B, length_B, path_BTD, path_valid_BTD], [2, 1, 1, 3, 3])
    batch, nodes, _ = path_BTD.shape
    row = jnp.arange(batch)[:, None]
    place = jnp.arange(tokens_BS.shape[1])[None]
    known = place < length_B[:, None]
    written = known & (place >= start_B[:, None])
    count = lambda valid: jnp.zeros((batch, vocab_size)).at[row, tokens_BS].add(valid.astype(jnp.float32))[:, None]
    node = jnp.arange(nodes)[None, :, None]
    below = jnp.zeros((batch, nodes, vocab_size)).at[row[..., None], node, path_BTD].add(
        path_valid_BTD.astype(jnp.float32))
    return Seen((count(known) > 0) | (below > 0), count(written) + below)


def choose(
    logits_BTV: jax.Array, settings: Settings, *, depths_BT: jax.Array, index_B: jax.Array, max_depth: int,
    seen: Seen | None = None, num_tokens: int | None = None,
) -> Choice:
    """The token that follows each node of a tree: argmax(truncated(adjusted logits / temperature) + noise).

    Noise is drawn once per (row, depth) and shared by all nodes of that depth: whichever of them turns out to lie on
    the text, its token is the one that plain decoding (T = 1, depth 0) chooses there. Equal scores: the lowest id.

    Args:
      logits_BTV: any float type.
      depths_BT: int32 in [0, max_depth]; the logits at depth d decide the token at place `index_B + d` of the row.
      index_B: int32, the place that the root decides. It counts from the start of the prompt: a place is decided once,
        so that the texts of several turns share no noise.
      seen: `count_tokens`; required where `needs_history(settings)`.
      num_tokens: ids from here on belong to no token (padded vocabulary) and are never chosen.
    """
    chex.assert_rank([logits_BTV, depths_BT, index_B], [3, 2, 1])
    chex.assert_equal_shape_prefix([logits_BTV, depths_BT], 2)
    logits = adjusted(logits_BTV, settings, seen, num_tokens)
    if settings.temperature is not None:
        temperature = settings.temperature[:, None, None]
        logits = logits / jnp.where(temperature > 0, temperature, 1)
    scores = truncated(logits, settings)
    top = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - top), axis=-1)
    kept = jnp.sum(jnp.exp(scores - top), axis=-1) / total
    if settings.temperature is not None:
        noise = _noise(settings.seed, index_B, max_depth + 1, logits.shape[-1])
        noise = jax.vmap(lambda row, depth: row[depth])(noise, depths_BT)
        scores = scores + jnp.where(temperature > 0, noise, 0)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return Choice(tokens, (picked - top)[..., 0] - jnp.log(total), kept)


def adjusted(
    logits: jax.Array, settings: Settings, seen: Seen | None = None, num_tokens: int | None = None
) -> jax.Array:
    """Logits [B, T, V] in float32 after bias, penalties (repetition, frequency, presence) and masks (-inf).

    The repetition penalty r is that of Keskar et al. 2019 (CTRL): a logit l of a token in prompt or text becomes l / r
    where l > 0, else l * r. Frequency and presence penalties are those of the OpenAI API, which see the text only.
    """
    batch, _, vocab_size = logits.shape
    logits = logits.astype(jnp.float32)
    if settings.bias_ids is not None:
        bias = jnp.zeros((batch, vocab_size)).at[jnp.arange(batch)[:, None], settings.bias_ids]
        logits = logits + bias.add(settings.bias_values)[:, None]
    if needs_history(settings):
        assert seen is not None, "a penalty needs the tokens seen"
        chex.assert_equal_shape([logits, seen.in_prompt_or_text, seen.count_in_text])
    if settings.repetition is not None:
        factor = settings.repetition[:, None, None]
        logits = jnp.where(seen.in_prompt_or_text, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    if settings.frequency is not None:
        logits = logits - settings.frequency[:, None, None] * seen.count_in_text
    if settings.presence is not None:
        logits = logits - settings.presence[:, None, None] * (seen.count_in_text > 0)
    if settings.allowed is not None:
        chex.assert_shape(settings.allowed, (batch, vocab_size))
        logits = jnp.where(settings.allowed[:, None], logits, -jnp.inf)
    if num_tokens is not None and num_tokens < vocab_size:
        logits = jnp.where(jnp.arange(vocab_size)[None, None] < num_tokens, logits, -jnp.inf)
    return logits


def truncated(logits: jax.Array, settings: Settings) -> jax.Array:
    """Logits [B, T, V], already divided by the temperature, with -inf where top-k, top-p or min-p drops a token.

    Nothing is sorted: a threshold comes from 32 sums over V. Tokens that tie with the last one kept are kept too.
    """
    if settings.top_k is None and settings.top_p is None and settings.min_p is None:
        return logits
    keys = _ordered(logits)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    keep = jnp.ones(logits.shape, bool)
    if settings.top_k is not None:
        keep = keys >= _threshold(keys, jnp.float32(1), settings.top_k[:, None, None].astype(jnp.float32))
    if settings.top_p is not None:
        top_p, left = settings.top_p[:, None, None], jnp.where(keep, weights, 0)
        enough = keys >= _threshold(keys, left, top_p * jnp.sum(left, axis=-1, keepdims=True))
        keep &= enough | (top_p >= 1)  # rounding must not drop a token
    if settings.min_p is not None:
        keep &= weights >= settings.min_p[:, None, None]
    return jnp.where(keep, logits, -jnp.inf)


def _threshold(keys: jax.Array, weights: jax.Array, needed: jax.Array) -> jax.Array:
    """The largest key t with sum(weights[keys >= t]) >= needed, found bit by bit from the top; 0 where there is none.

    Exact: float sums in a fixed order never fall when a weight is added.
    """
    def one(i: int, low: jax.Array) -> jax.Array:
        higher = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys >= higher, weights, 0), axis=-1, keepdims=True)
        return jnp.where(mass >= needed, higher, low)

    return jax.lax.fori_loop(0, 32, one, jnp.zeros((*keys.shape[:-1], 1), jnp.uint32))


def _ordered(values: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order: the sign bit flipped for positive numbers, all bits for negative ones."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # -0.0 equals 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _noise(seed: jax.Array, index: jax.Array, num_depths: int, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, num_depths, V]: that of (seed, index + depth), whatever the batch around it.

    From all 32 bits of a draw: with the 23 of `jax.random.gumbel` tokens of p < 1e-8, of which a vocabulary has many,
    are never chosen. The generator is named because others draw other numbers under vmap.
    """
    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), seed), index)
        bits = jax.random.bits(key, (vocab_size,), jnp.uint32).astype(jnp.float32)
        tail = jnp.minimum((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)  # uniform, finest where the noise is largest
        return -jnp.log(-jnp.log1p(-tail))

    # A loop, not another vmap: XLA on CPU would fuse the logarithms into the argmax of every node and take 3x the time.
    return jax.lax.map(lambda depth: jax.vmap(one)(seed, index + depth), jnp.arange(num_depths)).swapaxes(0, 1)
