"""Text encoders of the BERT family as pure functions of a parameter tree (Devlin et al. 2018, arXiv:1810.04805)."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import constrain, split_axes
from jaxlm.model.attention import attention
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import REMAT_POLICIES
from jaxlm.model.encoder_config import EncoderConfig
from jaxlm.model.layers import Embedding, Linear
from jaxlm.model.partition import activations

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis, in float32 (Ba et al. 2016)."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lead = tuple(range(x.ndim - 1))
        scale = jnp.expand_dims(self.param("scale", nn.initializers.ones, (x.shape[-1],)), lead)
        bias = jnp.expand_dims(self.param("bias", nn.initializers.zeros, (x.shape[-1],)), lead)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(self.dtype)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Each number is 0 with probability `rate`, else divided by `1 - rate`; without a key x as it is."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class EncoderAttention(nn.Module):
    """Every token of a text sees every other; projections with biases."""

    config: EncoderConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, segments_BT):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        layout = activations(False, "tensor")

        def heads(name: str) -> jax.Array:
            y = Linear((c.d_model,), (c.num_heads, c.head_dim), c.init_std, dtype, use_bias=True, name=name)(x_BTD)
            return constrain(y, layout)

        y_BTNH = attention(
            heads("query"), heads("key"), heads("value"), q_segments=segments_BT, kv_segments=segments_BT,
            causal=False, backend=self.compute.attention, query_chunk=self.compute.query_chunk)
        out = Linear((c.num_heads, c.head_dim), (c.d_model,), c.init_std, dtype, use_bias=True, split_inputs=True,
                     name="out")
        return out(constrain(y_BTNH, layout))


class EncoderMLP(nn.Module):
    """`down(activation(up(x)))`."""

    config: EncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        up = Linear((c.d_model,), (c.d_ff,), c.init_std, self.dtype, use_bias=True, name="up")
        h_BTF = constrain(ACTIVATIONS[c.activation](up(x_BTD)), activations(False, "tensor"))
        down = Linear((c.d_ff,), (c.d_model,), c.init_std, self.dtype, use_bias=True, split_inputs=True, name="down")
        return down(h_BTF)


class EncoderBlock(nn.Module):
    """`h = norm(x + attention(x)); norm(h + mlp(h))`. The second result is what a scan wants and nobody reads."""

    config: EncoderConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, key, segments_BT):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        first, second = (None, None) if key is None else jax.random.split(key)
        y_BTD = EncoderAttention(c, self.compute, name="attention")(x_BTD, segments_BT)
        x_BTD = LayerNorm(c.norm_eps, dtype, name="attention_norm")(x_BTD + dropout(y_BTD, first, c.dropout))
        y_BTD = EncoderMLP(c, dtype, name="mlp")(x_BTD)
        x_BTD = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x_BTD + dropout(y_BTD, second, c.dropout))
        return constrain(x_BTD, activations(False)), None


class Body(nn.Module):
    """Tokens and their positions [B, T] to hidden states [B, T, D]."""

    config: EncoderConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, key, segments_BT):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        # Summed in float32 and rounded once, in the norm.
        table = lambda name, rows: Embedding(rows, c.d_model, c.init_std, jnp.float32, name=name)
        x_BTD = table("embed", c.vocab_size)(tokens_BT)
        x_BTD = x_BTD + table("positions", c.first_position + c.max_positions)(c.first_position + positions_BT)
        x_BTD = x_BTD + table("types", c.num_types)(jnp.zeros((1, 1), jnp.int32))
        x_BTD = constrain(LayerNorm(c.norm_eps, dtype, name="embed_norm")(x_BTD), activations(False))
        keys = None
        if key is not None:
            first, *rest = jax.random.split(key, 1 + c.num_layers)
            x_BTD, keys = dropout(x_BTD, first, c.dropout), jnp.stack(rest)
        policy = REMAT_POLICIES[self.compute.remat]
        # Inside a scan nothing can be merged with its recomputation, so the barrier against that is left out.
        block = nn.remat(EncoderBlock, policy=policy, prevent_cse=False) if policy else EncoderBlock
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast),
            length=c.num_layers, unroll=min(self.compute.scan_unroll, c.num_layers))
        return layers(c, self.compute, name="layers")(x_BTD, keys, segments_BT)[0]


class MLMHead(nn.Module):
    """Hidden states to what is multiplied with the embedding, and the bias of each token."""

    config: EncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        x_BTD = Linear((c.d_model,), (c.d_model,), c.init_std, self.dtype, use_bias=True, name="transform")(x_BTD)
        x_BTD = LayerNorm(c.norm_eps, self.dtype, name="norm")(ACTIVATIONS[c.activation](x_BTD))
        return x_BTD, self.param("bias", nn.initializers.zeros, (c.vocab_size,))


@dataclass(frozen=True)
class Encoder:
    """An encoder: `init` makes parameters, `apply` uses them. Hashable, so it may be closed over or static."""

    config: EncoderConfig
    compute: ComputeConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters: kernels and tables N(0, init_std), norms identity, biases 0. May be jitted."""
        body, head = jax.random.split(key)
        # One token per device of the context's mesh, both ways: the sharding constraints on activations must divide.
        size = max(1, jax.sharding.get_abstract_mesh().size)
        tokens_BT = jnp.zeros((size, size), jnp.int32)
        params = Body(self.config, ComputeConfig()).init(body, tokens_BT, tokens_BT, None, None)["params"]
        if self.config.mlm_head:
            hidden_BTD = jnp.zeros((size, size, self.config.d_model))
            params = {**params, "mlm": MLMHead(self.config, jnp.dtype("float32")).init(head, hidden_BTD)["params"]}
        return params

    def apply(
        self, params: dict[str, Any], tokens: jax.Array, *, segments: jax.Array | None = None,
        positions: jax.Array | None = None, dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the last layer, [B, T, D] in the compute dtype, of tokens [B, T].

        A token sees all tokens of its own segment. `segments` [B, T]: number of the text within the row, 0 is padding,
        so that a mask of ones and zeros is one text a row; None: no padding. `positions` [B, T], from 0; None: those
        within the segment (`text_positions`), wherever the padding is. Without `dropout_key` nothing is dropped; the
        same key drops the same numbers. Attention probabilities are not dropped.

        Raises ValueError: tokens, segments or positions of a wrong shape or type, rows longer than
        `config.max_positions` without positions, a mesh that does not divide them.
        """
        self._check(tokens, segments, positions)
        if positions is None:
            whole = jnp.ones_like(tokens) if segments is None else segments
            positions = text_positions(whole)
        body = Body(self.config, self.compute)
        own = {name: part for name, part in params.items() if name != "mlm"}
        return body.apply({"params": own}, tokens, positions, dropout_key, segments)

    def vocabulary(self, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """Logits of masked language modelling, [B, T, V] float32, for `hidden` [B, T, D] of `apply`.

        Raises ValueError when the parameters have no such head.
        """
        if "mlm" not in params:
            raise ValueError("these parameters have no head of masked language modelling: set mlm_head in the "
                             "configuration, and load it from a checkpoint that has one")
        hidden, bias_V = MLMHead(self.config, hidden.dtype).apply({"params": params["mlm"]}, hidden)
        # Gathered over fsdp, as `matmul` does with kernels: left to itself, XLA's partitioner (jax 0.10.2) got the
        # gradient wrong in chunks on a mesh of data, fsdp and tensor.
        table_VD = constrain(params["embed"]["embedding"].astype(hidden.dtype), P("tensor", None))
        logits = jnp.einsum("BTD,VD->BTV", hidden, table_VD, preferred_element_type=jnp.float32)
        return logits + bias_V[None, None]

    def _check(self, tokens, segments, positions) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
        for name, x in (("segments", segments), ("positions", positions)):
            if x is not None and (x.shape != tokens.shape or not jnp.issubdtype(x.dtype, jnp.integer)):
                raise ValueError(
                    f"{name} must be integers of the tokens' shape {tokens.shape}, got {x.dtype} of shape {x.shape}")
        if positions is None and tokens.shape[1] > self.config.max_positions:
            raise ValueError(f"{tokens.shape[1]} tokens are more than max_positions {self.config.max_positions}: "
                             "shorten the rows, or give positions")
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            for size, axes in zip(tokens.shape, activations(False), strict=True):
                axes, parts = split_axes(axes, mesh)
                if size % parts:
                    raise ValueError(f"tokens of shape {tokens.shape} cannot be split: {size} does not divide by "
                                     f"{parts} (mesh axes {', '.join(axes)})")


def text_positions(segments_BT: jax.Array) -> jax.Array:
    """The place of each token within its run of equal segments, 0 for padding, [B, T] int32.

        segments   0 0 1 1 1 2 2 0
        positions  0 0 0 1 2 0 1 0
    """
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start_BT = jax.lax.cummax(jnp.where(segments_BT != before, index_T, 0), axis=1)
    return jnp.where(segments_BT > 0, index_T - start_BT, 0)


def build_encoder(config: EncoderConfig, compute: ComputeConfig | None = None) -> Encoder:
    """The encoder of a configuration; float32 on the default kernels unless `compute` says otherwise.

    Raises ValueError for a remat policy without effect, as `jaxlm.model.decoder.build` does.
    """
    compute = compute or ComputeConfig()
    if compute.remat != "none" and config.num_layers > 1 and compute.scan_unroll >= config.num_layers:
        raise ValueError(f"remat '{compute.remat}' saves nothing when scan_unroll {compute.scan_unroll} unrolls all "
                         f"{config.num_layers} layers; use a smaller scan_unroll, or remat none")
    return Encoder(config, compute)
