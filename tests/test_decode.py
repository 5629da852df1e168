"""Greedy decoding equals the argmax of full forward passes, whatever stands beside a row in its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate.decode import greedy_decode, left_pad
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build

MODEL = build(ModelConfig(vocab_size=40, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
                          max_positions=64, init_std=0.3))
PARAMS = MODEL.init(jax.random.key(1))
PROMPTS = [[3, 5, 7, 9], [4], [6, 6, 8]]


def decode(prompts, count=8, eos_id=99, **options):
    out = greedy_decode(MODEL, PARAMS, *left_pad(prompts, 0), max_new_tokens=count, eos_id=eos_id, **options)
    return np.asarray(out)


def slow(prompt, count, num_tokens=None):
    """One full forward pass a token."""
    ids = list(prompt)
    for _ in range(count):
        logits = MODEL.apply(PARAMS, jnp.asarray([ids])).logits[0, -1, :num_tokens]
        ids.append(int(jnp.argmax(logits)))
    return ids[len(prompt):]


def test_equals_full_forward_passes():
    assert decode(PROMPTS).tolist() == [slow(prompt, 8) for prompt in PROMPTS]


def test_stops_at_eos():
    free = decode(PROMPTS)
    eos = int(free[0, 2])
    stopped = decode(PROMPTS, eos_id=eos)
    for row, other in zip(free.tolist(), stopped.tolist(), strict=True):
        end = row.index(eos) if eos in row else len(row)
        assert other == row[:end] + [eos] * (len(row) - end)


def test_padded_vocabulary_is_never_chosen():
    free, cut = decode(PROMPTS), decode(PROMPTS, num_tokens=20)
    assert free.max() >= 20 > cut.max()
    assert cut.tolist() == [slow(prompt, 8, 20) for prompt in PROMPTS]


def test_left_pad():
    tokens, segments = left_pad([[5, 6], [7]], 0)
    assert tokens.tolist() == [[5, 6], [0, 7]] and segments.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(ValueError, match="at least one token"):
        left_pad([[1], []], 0)
