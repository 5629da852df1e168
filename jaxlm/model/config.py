"""What a decoder is (`ModelConfig`) and how it is computed (`ComputeConfig`)."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
Backend = Literal["auto", "xla", "splash", "cudnn", "cudnn_packed", "triton"]  # see `attention.resolve_backend`
RematPolicy = Literal["none", "full", "dots", "dots_no_batch"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pretraining; names as in Hugging Face.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides only the
    slow ones: wavelengths over `original_max_positions / low_freq_factor`, blended up to `.../high_freq_factor`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope scaling factor must be at least 1, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError("llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, got "
                             f"{self.low_freq_factor} and {self.high_freq_factor}")
        if self.kind == "linear" and (self.low_freq_factor, self.high_freq_factor) != (1.0, 4.0):
            raise ValueError("low_freq_factor and high_freq_factor have no effect on linear rope scaling")
        if self.original_max_positions < 1:
            raise ValueError(f"original_max_positions must be positive, got {self.original_max_positions}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP.

    Layers are pre-norm, `x + f(norm(x))`. With Mix-LN (Li et al. 2024, arXiv:2412.13795) the first ones are post-norm,
    `norm(x + f(x))`; the paper and KORMo's ablation take a quarter of them. The norm at the end is there either way.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    qkv_bias: bool = False          # Qwen 2
    qk_norm: bool = False           # Qwen 3: RMSNorm over each query and key head
    tie_embeddings: bool = False
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(D)
    norm_offset: float = 0.0        # Gemma: 1, the norm multiplies by offset + stored weight
    window: int | None = None       # Mistral: a key is seen iff q_position - k_position < window
    init_std: float = 0.02
    post_norm_layers: int = 0       # Mix-LN: how many layers, from the first one; all of them is the post-norm model
    mtp_depth: int = 0              # multi-token prediction (`mtp`): how many tokens beyond the next one are predicted

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff",
                     "max_positions", "rope_theta", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary positions turn pairs of channels")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be positive or None, got {self.window}")
        if not 0 <= self.post_norm_layers <= self.num_layers:
            raise ValueError(f"post_norm_layers must be 0 (pre-norm) to num_layers {self.num_layers} (post-norm), got "
                             f"{self.post_norm_layers}")
        if self.mtp_depth < 0:
            raise ValueError(f"mtp_depth must not be negative, got {self.mtp_depth}")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Number format, memory and kernels; none of it changes the function beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    remat: RematPolicy = "none"      # what the backward pass recomputes, layer by layer
    attention: Backend = "auto"
    scan_unroll: int = 1             # layers per iteration of the scan
    query_chunk: int | None = None   # xla attention in blocks of this many queries: memory B*N*chunk*S

    def __post_init__(self) -> None:
        if self.scan_unroll < 1:
            raise ValueError(f"scan_unroll must be positive, got {self.scan_unroll}")
        if self.query_chunk is not None and self.query_chunk < 1:
            raise ValueError(f"query_chunk must be positive or None, got {self.query_chunk}")
        if self.query_chunk is not None and self.attention not in ("auto", "xla"):
            raise ValueError(f"query_chunk has no effect on {self.attention} attention: leave it None")


def num_parameters(config: ModelConfig) -> int:
    """Stored parameters; a tied embedding counts once.

    A depth of multi-token prediction has a layer, a projection [2D, D] and three norms.
    """
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.d_model * (2 * heads + 2 * kv_heads)
    attention += c.qkv_bias * (heads + 2 * kv_heads) + c.qk_norm * 2 * c.head_dim
    layer = attention + 3 * c.d_model * c.d_ff + 2 * c.d_model
    depth = layer + 2 * c.d_model**2 + 3 * c.d_model
    return (c.num_layers * layer + c.mtp_depth * depth + c.d_model
            + c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2))


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per token of a causal row of `seq_len` tokens.

        6 * (parameters without the input embedding + K * V * D) + 12 * (L + K) * N * H * keys

    A parameter costs 2 forward and 4 backward; the embedding look-up costs nothing, the vocabulary product counts
    (also when tied). A query sees `keys` = T/2 on average (w - w^2/2T with a window w < T), at 2 * 2 * H forward
    for scores and values. Causal masking is therefore counted half, unlike PaLM appendix B (arXiv:2204.02311);
    packing, remat and work on masked scores are not counted. Each of K depths of multi-token prediction has a layer
    and multiplies by the shared head once more; what does not train it (decoding, a loss without it) costs less.
    """
    c = config
    matmul = num_parameters(c) - (0 if c.tie_embeddings else c.vocab_size * c.d_model)
    matmul += c.mtp_depth * c.vocab_size * c.d_model
    window = min(seq_len, c.window or seq_len)
    keys = window - window**2 / (2 * seq_len)
    return 6.0 * matmul + 12.0 * (c.num_layers + c.mtp_depth) * c.num_heads * c.head_dim * keys
