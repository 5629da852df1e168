"""Published decoders and encoders, and this project's own small ones, by name.

`tests/test_presets.py` and `tests/test_encoder.py` count their parameters.
"""

from dataclasses import replace

from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.encoder_config import EncoderConfig

# KORMo (arXiv:2510.09426): a Llama block with 4 query heads a key-value head, nothing tied.
_KORMO_10B = ModelConfig(
    vocab_size=125_184, d_model=4096, num_layers=40, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=16_384,
    max_positions=131_072, rope_theta=500_000.0)
_KORMO_1B = replace(_KORMO_10B, d_model=2048, num_layers=16, num_heads=16, d_ff=6144)

_LLAMA2_7B = ModelConfig(
    vocab_size=32_000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11_008,
    max_positions=4096)
_LLAMA3_8B = replace(
    _LLAMA2_7B, vocab_size=128_256, num_kv_heads=8, d_ff=14_336, max_positions=8192, rope_theta=500_000.0)
_LLAMA3_1_8B = replace(
    _LLAMA3_8B, max_positions=131_072, rope_scaling=RopeScaling(kind="llama3", factor=8.0))
_LLAMA3_2_1B = replace(
    _LLAMA3_1_8B, d_model=2048, num_layers=16, head_dim=64, d_ff=8192, tie_embeddings=True,
    rope_scaling=RopeScaling(kind="llama3", factor=32.0))
_MISTRAL_7B = replace(_LLAMA2_7B, num_kv_heads=8, d_ff=14_336, max_positions=32_768, window=4096)

_QWEN2_5_0_5B = ModelConfig(
    vocab_size=151_936, d_model=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, d_ff=4864,
    max_positions=32_768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tie_embeddings=True)
_QWEN2_5_1_5B = replace(
    _QWEN2_5_0_5B, d_model=1536, num_layers=28, num_heads=12, head_dim=128, d_ff=8960, max_positions=131_072)
_QWEN2_5_7B = replace(
    _QWEN2_5_1_5B, vocab_size=152_064, d_model=3584, num_heads=28, num_kv_heads=4, d_ff=18_944, tie_embeddings=False)
_QWEN3_0_6B = ModelConfig(
    vocab_size=151_936, d_model=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, d_ff=3072,
    max_positions=40_960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tie_embeddings=True)
_QWEN3_1_7B = replace(_QWEN3_0_6B, d_model=2048, d_ff=6144)
_QWEN3_8B = replace(
    _QWEN3_0_6B, d_model=4096, num_layers=36, num_heads=32, d_ff=12_288, tie_embeddings=False)

_GEMMA_2B = ModelConfig(
    vocab_size=256_000, d_model=2048, num_layers=18, num_heads=8, num_kv_heads=1, head_dim=256, d_ff=16_384,
    max_positions=8192, norm_eps=1e-6, activation="gelu_tanh", tie_embeddings=True, scale_embeddings=True,
    norm_offset=1.0)

_SMOLLM2_135M = ModelConfig(
    vocab_size=49_152, d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=1536,
    max_positions=8192, rope_theta=100_000.0, tie_embeddings=True)
_SMOLLM2_360M = replace(_SMOLLM2_135M, d_model=960, num_layers=32, num_heads=15, num_kv_heads=5, d_ff=2560)

# `tiny` learns in minutes on a laptop CPU; `base` is the model of the CPU throughput figures.
_TINY = ModelConfig(
    vocab_size=2048, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=384,
    max_positions=2048)
_BASE = ModelConfig(
    vocab_size=16_384, d_model=384, num_layers=8, num_heads=6, num_kv_heads=2, head_dim=64, d_ff=1024,
    max_positions=4096)

MODELS = {
    "kormo_10b": _KORMO_10B,
    "kormo_1b": _KORMO_1B,
    "llama2_7b": _LLAMA2_7B,
    "llama3_8b": _LLAMA3_8B,
    "llama3_1_8b": _LLAMA3_1_8B,
    "llama3_2_1b": _LLAMA3_2_1B,
    "mistral_7b": _MISTRAL_7B,
    "qwen2_5_0_5b": _QWEN2_5_0_5B,
    "qwen2_5_1_5b": _QWEN2_5_1_5B,
    "qwen2_5_7b": _QWEN2_5_7B,
    "qwen3_0_6b": _QWEN3_0_6B,
    "qwen3_1_7b": _QWEN3_1_7B,
    "qwen3_8b": _QWEN3_8B,
    "gemma_2b": _GEMMA_2B,
    "smollm2_135m": _SMOLLM2_135M,
    "smollm2_360m": _SMOLLM2_360M,
    "tiny": _TINY,
    "base": _BASE,
}

# BERT-base is Contriever, E5-base and BGE-base as well; XLM-R-base is the multilingual E5-base.
_BERT_BASE = EncoderConfig(
    vocab_size=30_522, d_model=768, num_layers=12, num_heads=12, d_ff=3072, max_positions=512)
_XLM_R_BASE = replace(
    _BERT_BASE, vocab_size=250_002, num_types=1, first_position=2, norm_eps=1e-5)
_MINILM_L6 = replace(_BERT_BASE, d_model=384, num_layers=6, d_ff=1536)
_TINY_ENCODER = EncoderConfig(
    vocab_size=2048, d_model=128, num_layers=2, num_heads=4, d_ff=384, max_positions=256)

ENCODERS = {
    "bert_base": _BERT_BASE,
    "bert_large": replace(_BERT_BASE, d_model=1024, num_layers=24, num_heads=16, d_ff=4096),
    "xlm_r_base": _XLM_R_BASE,
    "xlm_r_large": replace(_XLM_R_BASE, d_model=1024, num_layers=24, num_heads=16, d_ff=4096),
    "minilm_l6": _MINILM_L6,
    "minilm_l12": replace(_MINILM_L6, num_layers=12),
    "tiny": _TINY_ENCODER,
}
