"""The decoder as pure functions of a parameter tree. Flax Linen stays inside this package."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import constrain, split_axes
from jaxlm.model import mtp
from jaxlm.model.attention import attention
from jaxlm.model.attention_cached import cached_attention
from jaxlm.model.cache import Cache, append, cached_view, stored
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.layers import MLP, PRODUCT, Embedding, Linear, RMSNorm, rope_tables, rotate
from jaxlm.model.partition import activations
from jaxlm.model.quantize import Quantized, dequantize, product

# What a layer keeps for its backward pass: `dots` the results of all products, `dots_no_batch` of those with weights,
# and not of xla attention (splash's small result it keeps). None keeps everything, without `jax.checkpoint`.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)),
    "dots_no_batch": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class Output(NamedTuple):
    """What a model returns."""

    logits: jax.Array | None  # [B, T, V] float32
    hidden: jax.Array         # [B, T, D] after the final norm, compute dtype
    cache: Cache | None


class Context(NamedTuple):
    """What every layer shares. None for segments: one document a row; for positions: they are the indices."""

    cos: jax.Array                   # [B or 1, T, 1, H/2] float32
    sin: jax.Array
    segments: jax.Array | None       # [B, T]
    positions: jax.Array | None      # [B, T]
    mask: jax.Array | None = None    # [B, T, S + T] bool with a cache: the slots and new tokens that a token sees


class SelfAttention(nn.Module):
    """Queries, keys, values, rotary positions, attention, output projection.

    With a cache (of this layer) the tokens see it and each other, and their own slots of it are returned: it is not
    written to layer by layer.
    """

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, cache, context):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        layout = activations(cache is not None, "tensor")

        def heads(name: str, count: int) -> jax.Array:
            y = Linear((c.d_model,), (count, c.head_dim), c.init_std, dtype, c.qkv_bias, name=name)(x_BTD)
            return constrain(y, layout)

        q_BTNH = heads("query", c.num_heads)
        k_BTKH, v_BTKH = heads("key", c.num_kv_heads), heads("value", c.num_kv_heads)
        if c.qk_norm:
            q_BTNH = RMSNorm(c.norm_eps, c.norm_offset, dtype, name="query_norm")(q_BTNH)
            k_BTKH = RMSNorm(c.norm_eps, c.norm_offset, dtype, name="key_norm")(k_BTKH)
        q_BTNH = rotate(q_BTNH, context.cos, context.sin)
        k_BTKH = rotate(k_BTKH, context.cos, context.sin)
        new, chunk = None, self.compute.query_chunk
        if cache is None:
            y_BTNH = attention(
                q_BTNH, k_BTKH, v_BTKH, q_segments=context.segments, kv_segments=context.segments,
                q_positions=context.positions, kv_positions=context.positions, window=c.window,
                backend=self.compute.attention, query_chunk=chunk)
        else:
            new = stored(cache, k_BTKH, v_BTKH)
            y_BTNH = cached_attention(q_BTNH, cache, new, context.mask, query_chunk=chunk)
        out = Linear((c.num_heads, c.head_dim), (c.d_model,), c.init_std, dtype, split_inputs=True, name="out")
        return out(constrain(y_BTNH, layout)), new


class Block(nn.Module):
    """`h = x + attention(norm(x)); h + mlp(norm(h))`, and the new keys and values if there is a cache.

    Where `post` (a scalar bool; None: never) it is `h = norm(x + attention(x)); norm(h + mlp(h))`, of the same norms.
    """

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, cache, context, post=None):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        decoding = cache is not None
        attention_norm = RMSNorm(c.norm_eps, c.norm_offset, dtype, name="attention_norm")
        mlp_norm = RMSNorm(c.norm_eps, c.norm_offset, dtype, name="mlp_norm")
        y_BTD = _before(attention_norm, x_BTD, post)
        y_BTD, new = SelfAttention(c, self.compute, name="attention")(y_BTD, cache, context)
        x_BTD = _after(attention_norm, x_BTD + y_BTD, post)
        y_BTD = _before(mlp_norm, x_BTD, post)
        y_BTD = MLP(c, dtype, activations(decoding, "tensor"), name="mlp")(y_BTD)
        x_BTD = _after(mlp_norm, x_BTD + y_BTD, post)
        return constrain(x_BTD, activations(decoding)), new


def _before(norm: RMSNorm, x: jax.Array, post: jax.Array | None) -> jax.Array:
    """What a sublayer reads."""
    return norm(x) if post is None else jnp.where(post, x, norm(x))


def _after(norm: RMSNorm, x: jax.Array, post: jax.Array | None) -> jax.Array:
    """What a sublayer leaves, of its sum with the residual."""
    return x if post is None else jnp.where(post, norm(x), x)


class Decoder(nn.Module):
    """Everything but the vocabulary product: tokens [B, T] to hidden states [B, T, D], and their slots of a cache.

    Caches come and go as the leaves that begin with the layers; without one the slots are None. `stack`:
    parameters layer by layer (`unstack`), which then are not read from this module's own.
    """

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, tokens_BT, cache, context, stack=None):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        embed = Embedding(c.vocab_size, c.d_model, c.init_std, dtype, name="embed")
        x_BTD = constrain(embed(tokens_BT), activations(cache is not None))
        if c.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(c.d_model**0.5, dtype)
        final_norm = RMSNorm(c.norm_eps, c.norm_offset, dtype, name="final_norm")
        if stack is not None:
            block, new = Block(c, self.compute, parent=None), []
            for i, params in enumerate(stack):
                layer = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
                post = None if i >= c.post_norm_layers else jnp.asarray(True)
                x_BTD, new_of_layer = block.apply({"params": params}, x_BTD, layer, context, post)
                new.append(new_of_layer)
            return final_norm(x_BTD), jax.tree.map(lambda *parts: jnp.stack(parts), *new)
        # Which layers are post-norm, only where there are any: a pre-norm model is not to pay for the choice.
        post = (jnp.arange(c.num_layers) < c.post_norm_layers,) if c.post_norm_layers else ()
        # Inside a scan nothing can be merged with its recomputation, so the barrier against that is left out.
        layers = nn.scan(
            _rematted(self.compute, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast, *(0 for _ in post)), length=c.num_layers,
            unroll=min(self.compute.scan_unroll, c.num_layers))
        x_BTD, new = layers(c, self.compute, name="layers")(x_BTD, cache, context, *post)
        return final_norm(x_BTD), new


def _rematted(compute: ComputeConfig, *, prevent_cse: bool) -> type[nn.Module]:
    """The layer, with its recomputation in the backward pass."""
    policy = REMAT_POLICIES[compute.remat]
    return nn.remat(Block, policy=policy, prevent_cse=prevent_cse) if policy else Block


@dataclass(frozen=True)
class Model:
    """A decoder: `init` makes parameters, `apply` uses them. Hashable, so it may be closed over or static."""

    config: ModelConfig
    compute: ComputeConfig

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters: kernels and embedding N(0, init_std), norms identity, biases 0. May be jitted.

        Those of multi-token prediction lie under `mtp` and leave the others as they would be without them.
        """
        c = self.config
        body, head = jax.random.split(key)
        # One token per device of the context's mesh, both ways: the sharding constraints on activations must divide.
        size = max(1, jax.sharding.get_abstract_mesh().size)
        tokens_BT = jnp.zeros((size, size), jnp.int32)
        context = Context(*rope_tables(tokens_BT, c), None, None)
        params = Decoder(c, ComputeConfig()).init(body, tokens_BT, None, context)["params"]
        if not c.tie_embeddings:
            kernel_DV = c.init_std * jax.random.normal(head, (c.d_model, c.vocab_size))
            params = {**params, "head": {"kernel": kernel_DV}}
        if c.mtp_depth:
            h_BTD = jnp.zeros((size, size, c.d_model))
            next_KBTD = jnp.zeros((c.mtp_depth, *h_BTD.shape))
            module = mtp.depths(c, ComputeConfig(), Block)
            params = {**params, mtp.NAME: module.init(jax.random.fold_in(body, 1), h_BTD, next_KBTD, context)["params"]}
        return params

    def head(self, params: dict[str, Any]) -> jax.Array:
        """The matrix from hidden states to logits, [D, V] float32; the embedding's transpose when tied."""
        name = "embed" if self.config.tie_embeddings else "head"
        part = dequantize({name: params[name]})[name]
        return part["embedding"].T if self.config.tie_embeddings else part["kernel"]

    def apply(
        self, params: dict[str, Any], tokens: jax.Array, *, positions: jax.Array | None = None,
        segments: jax.Array | None = None, cache: Cache | None = None, tree: jax.Array | None = None,
        logits: bool = True,
    ) -> Output:
        """Runs the decoder on tokens [B, T].

        A token attends to the tokens of its own segment at or before its index, within `config.window` positions.
        `segments` [B, T]: document number within the row, 0 is padding; None: one document a row. `positions`
        [B, T] for the rotary embedding and the window; None: the index.

        With `cache`, the T tokens of row b are written to its slots from `cache.length[b]`, and see those before them;
        the cache comes back T longer. Positions are slots then, a row is one document, and attention is that of XLA.
        `tree` [B, T, T] bool: which of the T tokens each one sees (itself too) where they are no chain but a tree
        of guesses: a token stands at position `cache.length + (tokens it sees) - 1`.

        `logits=False` leaves the vocabulary product to the caller (see `head`). Multi-token prediction has no part in
        this: see `ahead`.

        Raises ValueError: tokens, positions, segments or tree of a wrong shape or type, more tokens than
        `config.max_positions` without positions, a cache of another model or batch.
        """
        self._check(tokens, positions, segments, cache, tree)
        if cache is None:
            at = jnp.arange(tokens.shape[1])[None] if positions is None else positions
            context = Context(*rope_tables(at, self.config), segments, positions)
        else:
            at, mask = cached_view(cache, tokens.shape[1], tree, self.config.window)
            context = Context(*rope_tables(at, self.config), None, None, mask)
        known = None if cache is None else cache._replace(length=None)
        decoder, stack = Decoder(self.config, self.compute), params["layers"]
        if isinstance(stack, tuple):
            rest = {name: part for name, part in params.items() if name != "layers"}
            hidden, new = decoder.apply({"params": rest}, tokens, known, context, stack)
        else:
            hidden, new = decoder.apply({"params": params}, tokens, known, context)
        if cache is not None:
            cache = append(cache, new)
        return Output(self._logits(params, hidden) if logits else None, hidden, cache)

    def ahead(self, params: dict[str, Any], hidden: jax.Array, following: jax.Array, *,
              positions: jax.Array | None = None, segments: jax.Array | None = None) -> jax.Array:
        """Hidden states of multi-token prediction, [K, B, T, D]: entry k-1 times `head` are logits of token t+k+1.

        Args:
          hidden: of `apply` with the same parameters, positions and segments.
          following: [K, B, T], token t+k in entry k-1. Where t+k lies in another document any token will do: no
            position of this document whose t+k+1 is in it too sees the result.

        Raises ValueError: a model without multi-token prediction, arrays of a wrong shape.
        """
        c = self.config
        if not c.mtp_depth:
            raise ValueError("this model has no multi-token prediction: mtp_depth is 0")
        if following.shape != (c.mtp_depth, *hidden.shape[:2]) or not jnp.issubdtype(following.dtype, jnp.integer):
            raise ValueError(f"following must be integers of shape {(c.mtp_depth, *hidden.shape[:2])}, got "
                             f"{following.dtype} of shape {following.shape}")
        at = jnp.arange(hidden.shape[1])[None] if positions is None else positions
        context = Context(*rope_tables(at, c), segments, positions)
        # Not times sqrt(D) where the decoder does that: a norm follows.
        embed = Embedding(c.vocab_size, c.d_model, c.init_std, hidden.dtype)
        next_KBTD = constrain(embed.apply({"params": params["embed"]}, following), P(None, *activations(False)))
        # The compiler takes a scan of one depth apart, so here a recomputation could be merged.
        module = mtp.depths(c, self.compute, _rematted(self.compute, prevent_cse=True))
        return module.apply({"params": params[mtp.NAME]}, hidden, next_KBTD, context)[1]

    def _logits(self, params, hidden_BTD) -> jax.Array:
        tied = self.config.tie_embeddings
        weight = params["embed"]["embedding"] if tied else params["head"]["kernel"]
        if isinstance(weight, Quantized):
            return product(hidden_BTD, weight, axis=1 if tied else 0)
        head_DV = self.head(params).astype(hidden_BTD.dtype)
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)

    def _check(self, tokens, positions, segments, cache, tree) -> None:
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
        for name, x in (("positions", positions), ("segments", segments)):
            if x is not None and (x.shape != tokens.shape or not jnp.issubdtype(x.dtype, jnp.integer)):
                raise ValueError(
                    f"{name} must be integers of the tokens' shape {tokens.shape}, got {x.dtype} of shape {x.shape}")
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            for size, axes in zip(tokens.shape, activations(cache is not None), strict=True):
                axes, parts = split_axes(axes, mesh)
                if size % parts:
                    raise ValueError(f"tokens of shape {tokens.shape} cannot be split: {size} does not divide by "
                                     f"{parts} (mesh axes {', '.join(axes)})")
        if positions is None and tokens.shape[1] > c.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than max_positions {c.max_positions}: shorten the rows, raise "
                "max_positions, or give positions")
        if cache is None:
            if tree is not None:
                raise ValueError("a tree of tokens needs a cache")
            return
        if positions is not None or segments is not None:
            raise ValueError("with a cache positions are its slots and a row is one document: leave positions and "
                             "segments None")
        if tree is not None and tree.shape != (*tokens.shape, tokens.shape[1]):
            raise ValueError(f"tree must be [B, T, T] for tokens of shape {tokens.shape}, got {tree.shape}")
        expected = (c.num_layers, c.num_kv_heads, c.head_dim)
        found = (cache.k.shape[0], cache.k.shape[2], cache.k.shape[4])
        if found != expected:
            raise ValueError(f"the cache has (layers, KV heads, head dim) {found}, this model {expected}")
        rows, slots = cache.k.shape[1], cache.k.shape[3]
        if rows != tokens.shape[0] or tokens.shape[1] > slots:
            raise ValueError(f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens do not fit a cache of {rows} rows "
                             f"and {slots} slots")


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with a tree of its own for each layer, which `Model.apply` takes as well; for one device.

    XLA on CPU copies the weights of a layer out of the stack before it multiplies; a step of one token reads them once
    instead. The layers are compiled one by one, which takes several times as long. Without effect on what is computed.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count))}


def build(config: ModelConfig, compute: ComputeConfig | None = None) -> Model:
    """The model of a configuration; float32 on the default kernels unless `compute` says otherwise.

    Raises ValueError for a remat policy without effect: once the scan over layers is unrolled whole, XLA merges what
    the backward pass should compute again with the forward pass.
    """
    compute = compute or ComputeConfig()
    if compute.remat != "none" and config.num_layers > 1 and compute.scan_unroll >= config.num_layers:
        raise ValueError(f"remat '{compute.remat}' saves nothing when scan_unroll {compute.scan_unroll} unrolls all "
                         f"{config.num_layers} layers; use a smaller scan_unroll, or remat none")
    return Model(config, compute)
