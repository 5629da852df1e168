"""The product of activations and a float32 weight, with its backward products written out."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import BATCH, constrain, split_axes


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None, layout: P | None = None) -> jax.Array:
    """`x @ w`: [..., K] times [K, N] to [..., N] in `dtype` (default: that of x).

    Operands are multiplied in the type of x and summed in float32. The gradient of w keeps the type of w: with
    bfloat16 activations it is not rounded before it reaches the optimizer.

    Written out because JAX transposes the product for w into (gᵀx)ᵀ, for which XLA on CPU copies g to the other
    layout inside the fusion that makes it; xᵀg takes half the time there and is the same product elsewhere.

    Args:
      layout: how w lies while it is multiplied, on the mesh of the context. It is gathered to this layout after the
        cast to the type of x; without it the TPU compiler may split the product instead, and add its float32 parts.
    """
    y = jax.lax.dot_general(x, _operand(x, w, layout), (((x.ndim - 1,), (0,)), ((), ())),
                            preferred_element_type=jnp.float32)
    return y.astype(dtype or x.dtype)


def _operand(x: jax.Array, w: jax.Array, layout: P | None) -> jax.Array:
    w = w.astype(x.dtype)
    return w if layout is None else constrain(w, layout)


def _forward(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None, layout: P | None) -> tuple[jax.Array, tuple]:
    return matmul(x, w, dtype, layout), (x, w)


def _backward(dtype: jnp.dtype | None, layout: P | None, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple:
    x, w = saved
    g, last = g.astype(x.dtype), x.ndim - 1
    dx = jax.lax.dot_general(g, _operand(x, w, layout), (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or split_axes(BATCH[1], mesh)[1] == 1:
        # Of a matrix XLA on CPU reads the transpose where it lies; of more axes it makes a copy, which takes as long as
        # the product. Not where time is split too: rows and time merged would be gathered first.
        x, g = x.reshape(-1, x.shape[last]), g.reshape(-1, g.shape[last])
    rows = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_forward, _backward)
