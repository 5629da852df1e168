"""Multi-token prediction: modules behind the decoder, each of which predicts one token further than the one before it.

    h^0 = the decoder's hidden states;  h^k = norm(block(W_k [norm(h^(k-1)); norm(embedding(token t+k))]))

h^k times the head of the decoder are the logits of token t+k+1 (DeepSeek-V3, arXiv:2412.19437, section 2.2): the chain
of predictions stays causal, unlike independent heads. Embedding and head are shared, everything else is of its depth.
The targets are `objective.lm.look_ahead`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.core.mesh import constrain
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.layers import Linear, RMSNorm
from jaxlm.model.partition import activations

NAME = "mtp"  # of these parameters in the tree, all stacked by depth


class Depth(nn.Module):
    """One depth: h^(k-1) [B, T, D] and the embeddings of tokens t+k to h^k, as the carry and the output of a scan.

    `block`: the layer of the decoder, pre-norm whatever `post_norm_layers` says.
    """

    config: ModelConfig
    compute: ComputeConfig
    block: type[nn.Module]

    @nn.compact
    def __call__(self, h_BTD, next_BTD, context):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, dtype, name=name)(x)

        both_BTE = jnp.concatenate((norm("hidden_norm", h_BTD), norm("token_norm", next_BTD)), axis=-1)
        x_BTD = Linear((2 * c.d_model,), (c.d_model,), c.init_std, dtype, name="project")(both_BTE)
        x_BTD, _ = self.block(c, self.compute, name="block")(constrain(x_BTD, activations(False)), None, context)
        h_BTD = norm("final_norm", x_BTD)
        return h_BTD, h_BTD


def depths(config: ModelConfig, compute: ComputeConfig, block: type[nn.Module]) -> nn.Module:
    """All depths as one module: h^0 [B, T, D] and embeddings [K, B, T, D] to (h^K, h^1 to h^K as [K, B, T, D])."""
    scanned = nn.scan(Depth, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast),
                      length=config.mtp_depth)
    return scanned(config, compute, block)
