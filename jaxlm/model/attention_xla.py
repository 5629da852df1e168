"""Attention as products and a softmax that XLA compiles for any device. Run on CPU; written for all."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.attention_call import Call, Labels, per_device, visible

MASKED = -1e30  # finite, so that a masked score never gives infinity minus infinity
NUM_BLOCKS = 4  # of queries in causal attention


def xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, call: Call) -> jax.Array:
    """See `attention`. The compiler splits rows and heads; what `context` splits is split by `per_device`."""
    if call.shards > 1:
        return per_device(_one_device, q_BTNH, k_BSKH, v_BSKH, call)
    return _one_device(q_BTNH, k_BSKH, v_BSKH, call)


def _one_device(q_BTNH, k_BSKH, v_BSKH, call: Call, table: None = None) -> jax.Array:
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if call.query_chunk is not None and call.query_chunk < num_queries:
        return by_chunks(lambda q_BTNH, q: _attend(q_BTNH, k_BSKH, v_BSKH, q, call.kv, call), q_BTNH, call.q,
                         call.query_chunk)
    # Under context parallelism all devices wait for the last one, whose queries see nearly every key: cutting the
    # square into blocks would shorten no step.
    if not call.causal or call.offset is None or num_queries < 32 * NUM_BLOCKS:
        return _attend(q_BTNH, k_BSKH, v_BSKH, call.q, call.kv, call)
    # Blocks of queries against the keys up to their end: 5/8 of the scores of the whole square with 4 blocks.
    block, out = -(-num_queries // NUM_BLOCKS), []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        last = min(call.offset + stop, num_keys)
        first = 0
        if call.window is not None and call.q.positions is None:
            first = min(max(call.offset + start - call.window + 1, 0), last - 1)
        out.append(_attend(_cut(q_BTNH, start, stop), *_cut((k_BSKH, v_BSKH), first, last),
                           _cut(call.q, start, stop), _cut(call.kv, first, last), call))
    return jnp.concatenate(out, axis=1)


def _cut(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[:, start:stop], tree)


def _attend(q_BTNH, k_BSKH, v_BSKH, q: Labels, kv: Labels, call: Call) -> jax.Array:
    """All queries against all keys.

    The query heads of a key-value head are rows of one product: on CPU half the time of a fifth einsum axis, and the
    keys need no copy in decoding. Dividing by the sum after the second product spares a pass over [T, S].
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("BKRH,BSKH->BKRS", q_BKRH, k_BSKH, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, N // K, T, S) * call.scale
    mask_BTS = visible(q, kv, call.causal, call.window)
    if mask_BTS is not None:
        scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    # Without any visible key the maximum is MASKED: the floor then makes every weight 0, and so the result.
    highest = jnp.maximum(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), MASKED / 2)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)  # at least 1 where a key is seen, or 0
    weights_BKRS = weights.astype(v_BSKH.dtype).reshape(B, K, -1, S)
    y = jnp.einsum("BKRS,BSKH->BKRH", weights_BKRS, v_BSKH, preferred_element_type=jnp.float32)
    y = (y.reshape(B, K, N // K, T, H) / jnp.maximum(total, 0.5)).astype(q_BTNH.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def by_chunks(attend: Callable[[jax.Array, Any], jax.Array], q_BTNH: jax.Array, labels: Any, size: int) -> jax.Array:
    """`attend(queries, labels)` of `size` queries at a time; the last chunk is filled up and its surplus cut off.

    Each chunk is computed again in the backward pass. `labels`: a tree of arrays whose axis 1 is that of the queries.
    """
    num_queries = q_BTNH.shape[1]
    num_chunks = -(-num_queries // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - num_queries)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]), 1, 0)

    # A loop body is not merged with its recomputation, so the barrier against that is left out.
    one = functools.partial(jax.checkpoint, prevent_cse=False)(lambda chunk: attend(*chunk))
    y = jnp.moveaxis(jax.lax.map(one, jax.tree.map(split, (q_BTNH, labels))), 0, 1)
    return y.reshape(y.shape[0], num_chunks * size, *y.shape[3:])[:, :num_queries]
