"""The sharding table of decoders and encoders: which mesh axis splits which dimension of each parameter.

`tensor` splits heads, feed-forward columns and the vocabulary; `fsdp` splits the model dimension. The layer axis
of the stacked parameters is never split: the scan slices it. The int8 numbers of a quantized weight (`quantize`) are
split like the weight, its scales are whole everywhere. For `jaxlm.core.mesh.tree_shardings`.
"""

from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import BATCH, ROWS, Rules

HEADS = P(*BATCH, "tensor", None)  # activations with heads, [B, T, N or K, H]


def activations(decoding: bool, *rest: str | None) -> P:
    """The layout of activations [B, T, *rest].

    Decoding takes one token at a time, which cannot be split: there the `context` axis splits rows as well.
    """
    return P((*ROWS, "context"), None, *rest) if decoding else P(*BATCH, *rest)


# Matched at the end of a path, so that the moments of an optimizer are split like their parameters.
PARAM_RULES: Rules = (
    (r"embed/embedding(/numbers)?$", P("tensor", "fsdp")),                                  # [V, D]
    (r"head/kernel(/numbers)?$", P("fsdp", "tensor")),                                      # [D, V]
    (r"attention/(query|key|value)/kernel(/numbers)?$", P(None, "fsdp", "tensor", None)),   # [L, D, N or K, H]
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),                        # [L, N or K, H]
    (r"attention/out/kernel(/numbers)?$", P(None, "tensor", None, "fsdp")),                 # [L, N, H, D]
    (r"attention/(query_norm|key_norm)/scale$", P()),                                       # [L, H]
    (r"(mlp/(gate|up)|mtp/project)/kernel(/numbers)?$", P(None, "fsdp", "tensor")),         # [L, D, F]; [L, 2D, D]
    (r"mlp/down/kernel(/numbers)?$", P(None, "tensor", "fsdp")),                            # [L, F, D]
    (r"(attention_norm|mlp_norm|final_norm|mtp/(hidden|token)_norm|kernel|embedding)/scale$", P()),  # [L, D] or [D]
)
# Of encoders, whose attention and MLP are split as above.
ENCODER_RULES: Rules = (
    (r"(positions|types)/embedding$", P()),                                                 # [positions, D]
    (r"mlp/up/bias$", P(None, "tensor")),                                                   # [L, F]
    (r"mlm/transform/kernel$", P("fsdp", None)),                                            # [D, D]
    (r"mlm/bias$", P("tensor")),                                                            # [V]
    (r"embed_norm/(scale|bias)$", P()),                                                     # [D]
    (r"(attention_norm|mlp_norm|attention/out|mlp/down)/bias$", P()),                       # [L, D]
    (r"mlm/(norm/(scale|bias)|transform/bias)$", P()),                                      # [D]
    *PARAM_RULES,
)
# Beside kernels (`lora`); the rank is never split.
LORA_RULES: Rules = (
    (r"attention/(query|key|value)/lora_a$", P(None, "fsdp", None)),                # [L, D, R]
    (r"attention/(query|key|value)/lora_b$", P(None, None, "tensor", None)),        # [L, R, N or K, H]
    (r"attention/(query|key|value)/magnitude$", P(None, "tensor", None)),           # [L, N or K, H]
    (r"attention/out/lora_a$", P(None, "tensor", None, None)),                      # [L, N, H, R]
    (r"mlp/(gate|up)/lora_a$", P(None, "fsdp", None)),                              # [L, D, R]
    (r"mlp/(gate|up)/lora_b$", P(None, None, "tensor")),                            # [L, R, F]
    (r"mlp/(gate|up)/magnitude$", P(None, "tensor")),                               # [L, F]
    (r"mlp/down/lora_a$", P(None, "tensor", None)),                                 # [L, F, R]
    (r"(attention/out|mlp/down)/lora_b$", P(None, None, "fsdp")),                   # [L, R, D]
    (r"(attention/out|mlp/down)/magnitude$", P()),                                  # [L, D]
    (r"/lora_scale$", P()),                                                         # [L]
)
