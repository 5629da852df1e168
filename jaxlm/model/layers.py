"""The parts of a decoder layer: projections, norm, rotary positions, gated MLP.

Parameters are float32; every module casts what it uses to its compute dtype. Kernels and the embedding may also be int8
(`jaxlm.model.quantize`), for inference.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxlm.core.matmul import matmul
from jaxlm.core.mesh import constrain
from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.lora import ADAPTER_PARTS, adapt
from jaxlm.model.quantize import Quantized, product, rows

PRODUCT = "product"  # results of Linear by name: a remat policy does not see into a custom derivative
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


class Linear(nn.Module):
    """A tensor product over the last axes of the input: [..., *inputs] to [..., *outputs]; with the adapter (`lora`)
    that lies beside its kernel, if one does.

    The mesh axis `tensor` splits the outputs, or the inputs if `split_inputs`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    init_std: float
    dtype: jnp.dtype
    use_bias: bool = False
    split_inputs: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), self.inputs + self.outputs)
        lead = x.shape[: x.ndim - len(self.inputs)]
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        layout = P("tensor", None) if self.split_inputs else P(None, "tensor")
        x = x.reshape(*lead, fan_in)
        if isinstance(kernel, Quantized):
            w = Quantized(kernel.numbers.reshape(fan_in, fan_out), kernel.scale.reshape(fan_out))
            y = product(x, w, 0, layout).astype(x.dtype)
        else:
            y = matmul(x, kernel.reshape(fan_in, fan_out), layout=layout)
        if self.has_variable("params", "lora_a"):
            adapter = {name: self.get_variable("params", name) for name in ADAPTER_PARTS
                       if self.has_variable("params", name)}
            y = adapt(x, y, kernel, adapter)
        y = checkpoint_name(y.reshape(*lead, *self.outputs), PRODUCT)
        if not self.use_bias:
            return y
        # Rounded first and added in float32: the same sum, and its gradient over all tokens is not summed in bfloat16.
        bias = self.param("bias", nn.initializers.zeros, self.outputs).astype(self.dtype).astype(jnp.float32)
        return (y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))).astype(self.dtype)


class Embedding(nn.Module):
    """Rows of a table, tokens [B, T] to [B, T, D].

    Cast after the look-up: the gradient of a frequent token is then summed in float32, and no copy of the table made.
    """

    vocab_size: int
    d_model: int
    init_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        shape = (self.vocab_size, self.d_model)
        table_VD = self.param("embedding", nn.initializers.normal(self.init_std), shape)
        found = rows(table_VD, tokens_BT) if isinstance(table_VD, Quantized) else jnp.take(table_VD, tokens_BT, axis=0)
        return found.astype(self.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + scale)` over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    The mean is float32. As in the reference models, Llama's weight multiplies after the cast to the compute
    dtype, Gemma's (offset 1) before it.
    """

    eps: float
    offset: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        scale = jnp.expand_dims(scale + self.offset, tuple(range(x.ndim - 1)))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if not self.offset:  # both rounded, but multiplied in float32: the gradient of the scale is summed in it
            y, scale = (part.astype(self.dtype).astype(jnp.float32) for part in (y, scale))
        return (y * scale).astype(self.dtype)


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    config: ModelConfig
    dtype: jnp.dtype
    layout: P  # of the hidden activations, [B, T, F]

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        gate_BTF = Linear((c.d_model,), (c.d_ff,), c.init_std, self.dtype, name="gate")(x_BTD)
        up_BTF = Linear((c.d_model,), (c.d_ff,), c.init_std, self.dtype, name="up")(x_BTD)
        h_BTF = ACTIVATIONS[c.activation](gate_BTF) * up_BTF
        h_BTF = constrain(h_BTF, self.layout)
        return Linear((c.d_ff,), (c.d_model,), c.init_std, self.dtype, split_inputs=True, name="down")(h_BTF)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Radians per position of each channel pair, [H/2] float32: `theta^(-2i/H)`, then stretched by `scaling`."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Turns made within the original context: few turns are stretched, many are kept, between them a blend.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_tables(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, [B, T, 1, H/2] float32 each, for positions [B, T] (or [1, T] for all rows)."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + H/2) by their angles, in float32 (Su et al. 2021, arXiv:2104.09864)."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BTNH.dtype)
