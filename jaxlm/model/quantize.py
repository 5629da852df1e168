"""Weights in int8 for inference: a quarter of the memory, activations as before.

    quantize(params) -> params              in seconds, whole tree
    load_hf(folder, put=quantize_leaf)      leaf by leaf: no float32 tree is ever held

`Model.apply` takes either tree. Gradients stop here with an error: train on float32 weights, then quantize.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import constrain
from jaxlm.core.tree import path_name


class Quantized(NamedTuple):
    """A weight in the place of its float32 array: about `numbers * scale`, one scale per layer and output channel."""

    numbers: jax.Array  # int8 -127 to 127, shape of the weight
    scale: jax.Array    # float32, shape of the weight without the axes that its product sums over


# What the product with a weight sums over, counted from the end, so that a layer may stand alone or in a stack. A row
# of the embedding is one channel: of the result in a look-up, of the logits where the head is tied.
SUMMED = (
    (r"embed/embedding$", (-1,)),                    # [V, D]
    (r"head/kernel$", (-2,)),                        # [D, V]
    (r"attention/(query|key|value)/kernel$", (-3,)),  # [L, D, N or K, H]
    (r"attention/out/kernel$", (-3, -2)),            # [L, N, H, D]
    (r"mlp/(gate|up|down)/kernel$", (-2,)),          # [L, D, F] and [L, F, D]
)
KEPT = ("scale", "bias")  # of norms and projections: vectors, float32


def quantize(params: Any) -> Any:
    """The parameter tree with every kernel and the embedding as `Quantized`; norms and biases stay as they are.

        numbers = round(w / scale), scale = max|w| / 127 over the inputs of an output channel

    so that no weight moves by more than scale / 2. May be jitted; a channel of zeros stays one. Raises ValueError for
    a weight that is not in `SUMMED`, and for a tree that is quantized already.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize_leaf(path_name(path), leaf), params, is_leaf=_is_quantized)


def quantize_leaf(path: str, leaf: Any) -> Any:
    """One leaf of `quantize`, its path as `layers/mlp/up/kernel`; the `put` of `load_hf` and `load_gguf`."""
    if _is_quantized(leaf):
        raise ValueError(f"parameter '{path}' is quantized already")
    if path.rsplit("/", 1)[-1] in KEPT:
        return jnp.asarray(leaf)
    return _round(leaf, _summed(path))


def dequantize(params: Any) -> Any:
    """The float32 tree that a quantized one stands for."""
    def restore(path: tuple, leaf: Any) -> Any:
        return dequantize_leaf(path_name(path), leaf) if _is_quantized(leaf) else leaf

    return jax.tree_util.tree_map_with_path(restore, params, is_leaf=_is_quantized)


def dequantize_leaf(path: str, leaf: Quantized) -> jax.Array:
    """`numbers * scale` in float32."""
    return leaf.numbers.astype(jnp.float32) * jnp.expand_dims(leaf.scale, _summed(path))


def product(x: jax.Array, w: Quantized, axis: int, layout: P | None = None) -> jax.Array:
    """`x @ w` for w [K, N], or [N, K] with `axis` 1: [..., K] to [..., N] in float32.

        y[n] = scale[n] * sum_k x[k] * numbers[k, n]

    The numbers are exact in the type of x, bfloat16 too. They are gathered to `layout` while they are int8.
    """
    numbers = w.numbers if layout is None else constrain(w.numbers, layout)
    y = jax.lax.dot_general(x, numbers.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())),
                            preferred_element_type=jnp.float32)
    return inference_only(y * jnp.expand_dims(w.scale, tuple(range(x.ndim - 1))))


def rows(table: Quantized, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] in float32: ids [...] to [..., D]."""
    return inference_only(jnp.take(table.numbers, ids, axis=0) * jnp.take(table.scale, ids, axis=0)[..., None])


@jax.custom_vjp
def inference_only(y: jax.Array) -> jax.Array:
    """y, and a ValueError for whoever differentiates through it: a gradient of 0 would go unnoticed."""
    return y


def _refuse(*_: Any) -> None:
    raise ValueError("quantized weights are for inference and have no gradient: train on float32 weights "
                     "(`dequantize` makes them)")


inference_only.defvjp(_refuse, _refuse)


@functools.partial(jax.jit, static_argnames="axes")
def _round(w: jax.Array, axes: tuple[int, ...]) -> Quantized:
    w = jnp.asarray(w, jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=axes, keepdims=True) / 127
    numbers = jnp.round(w / jnp.where(scale > 0, scale, 1))
    return Quantized(numbers.astype(jnp.int8), jnp.squeeze(scale, axes))


def _summed(path: str) -> tuple[int, ...]:
    axes = next((axes for pattern, axes in SUMMED if re.search(pattern, path)), None)
    if axes is None:
        raise ValueError(f"parameter '{path}' is not one that can be quantized; known: "
                         + ", ".join(pattern.removesuffix("$") for pattern, _ in SUMMED))
    return axes


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
