"""What a text encoder of the BERT family is (`EncoderConfig`)."""

from dataclasses import dataclass
from typing import Literal

EncoderActivation = Literal["gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A BERT-style encoder: post-norm, LayerNorm, learnt absolute positions, attention in both directions.

    BERT, MiniLM, Contriever, E5 and BGE as they are; RoBERTa and XLM-R with one token type, and `first_position` 2.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    max_positions: int           # tokens a text may have
    num_types: int = 2           # rows of the table of token types; every token is of type 0
    first_position: int = 0      # row of the position table of a text's first token; RoBERTa: padding id + 1
    norm_eps: float = 1e-12
    activation: EncoderActivation = "gelu"
    dropout: float = 0.1         # of embeddings and of both residual branches, where a key is given
    mlm_head: bool = False       # whether the parameters include the head of masked language modelling
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_positions", "num_types",
                     "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}")
        if self.first_position < 0:
            raise ValueError(f"first_position must not be negative, got {self.first_position}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """H."""
        return self.d_model // self.num_heads


def num_encoder_parameters(config: EncoderConfig) -> int:
    """Stored parameters; the head of masked language modelling uses the embedding, which counts once."""
    c = config
    tables = (c.vocab_size + c.first_position + c.max_positions + c.num_types) * c.d_model
    layer = 4 * (c.d_model + 1) * c.d_model + 2 * c.d_model * c.d_ff + c.d_ff + c.d_model + 4 * c.d_model
    head = c.d_model * (c.d_model + 1) + 2 * c.d_model + c.vocab_size
    return tables + 2 * c.d_model + c.num_layers * layer + c.mlm_head * head
