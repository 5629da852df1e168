"""Hugging Face folders without transformers: configurations, round trips, and everything that can be wrong with one."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.core.mesh import MeshConfig, make_mesh, tree_shardings
from jaxlm.core.tree import named_leaves
from jaxlm.model import safetensors_io
from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.decoder import build
from jaxlm.model.hf import TENSORS, load_hf, save_hf
from jaxlm.model.hf_config import ARCHITECTURES, from_hf_config, load_config, to_hf_config
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS

TINY = ModelConfig(vocab_size=16, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24,
                   max_positions=64)
CONFIGS = {
    "llama": replace(TINY, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=32)),
    "mistral": replace(TINY, window=5, rope_scaling=RopeScaling(kind="linear", factor=2.0)),
    "qwen2": replace(TINY, qkv_bias=True, tie_embeddings=True, window=3),
    "qwen3": replace(TINY, qk_norm=True),
    "gemma": replace(TINY, tie_embeddings=True, scale_embeddings=True, norm_offset=1.0, activation="gelu_tanh",
                     num_kv_heads=1),
    "kormo": replace(TINY, rope_theta=500_000.0, init_std=0.1),
}


def random_params(config: ModelConfig, dtype=np.float32) -> dict:
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)


def assert_equal_trees(ours, theirs) -> None:
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.fixture
def llama(tmp_path) -> Path:
    """A folder with a good llama model."""
    save_hf(tmp_path / "llama", TINY, random_params(TINY), architecture="llama")
    return tmp_path / "llama"


def edit(folder: Path, change) -> None:
    """Passes the tensors of a one-file folder through `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 2000])
def test_round_trip_is_exact(architecture, max_shard_bytes, tmp_path):
    config = CONFIGS[architecture]
    params = random_params(config)
    save_hf(tmp_path / "model", config, params, architecture=architecture, max_shard_bytes=max_shard_bytes)
    loaded, tree = load_hf(tmp_path / "model")
    assert loaded == config == load_config(tmp_path / "model")
    assert_equal_trees(tree, params)
    assert (tmp_path / "model" / "model.safetensors").exists() == (max_shard_bytes > 2000)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_round_trip_is_exact(architecture, tmp_path):
    config = CONFIGS[architecture]
    params = random_params(config, jnp.bfloat16)
    save_hf(tmp_path / "model", config, params, architecture=architecture, dtype="bfloat16")
    assert_equal_trees(load_hf(tmp_path / "model", dtype=jnp.bfloat16)[1], params)
    assert_equal_trees(load_hf(tmp_path / "model")[1], jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def test_the_tables_cover_every_parameter():
    paths = [set(named_leaves(random_params(config))) for config in CONFIGS.values()]
    assert set.union(*paths) == set(TENSORS)


def test_float16_does_not_overflow_silently(tmp_path):
    params = random_params(TINY)
    params["final_norm"]["scale"][0] = 1e5
    with pytest.raises(ValueError, match="final_norm/scale has values beyond the range of float16"):
        save_hf(tmp_path / "model", TINY, params, architecture="llama", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_leaves_are_placed_one_by_one(llama):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    expected = random_params(TINY)
    shardings = named_leaves(tree_shardings(expected, PARAM_RULES, mesh))
    _, tree = load_hf(llama, put=lambda path, leaf: jax.device_put(leaf, shardings[path]))
    assert {path: leaf.sharding for path, leaf in named_leaves(tree).items()} == shardings
    assert_equal_trees(tree, expected)
    save_hf(llama, TINY, tree, architecture="llama", overwrite=True)
    assert_equal_trees(load_hf(llama)[1], expected)


def test_the_vocabulary_is_padded_and_cut(llama, tmp_path):
    config, tree = load_hf(llama, pad_vocab_to=24)
    assert config == replace(TINY, vocab_size=24)
    assert tree["embed"]["embedding"].shape == (24, 8) and tree["head"]["kernel"].shape == (8, 24)
    assert not tree["embed"]["embedding"][16:].any() and not tree["head"]["kernel"][:, 16:].any()
    save_hf(tmp_path / "cut", config, tree, architecture="llama", vocab_size=16)
    assert_equal_trees(load_hf(tmp_path / "cut")[1], random_params(TINY))
    with pytest.raises(ValueError, match="pad_vocab_to 8 is less than the 16 tokens"):
        load_hf(llama, pad_vocab_to=8)


def test_tied_weights_may_be_stored_twice_but_not_differ(tmp_path):
    config = CONFIGS["qwen2"]
    params = random_params(config)
    save_hf(tmp_path, config, params, architecture="qwen2")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_equal_trees(load_hf(tmp_path)[1], params)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        load_hf(tmp_path)


def test_all_wrong_tensors_are_named_together(llama):
    def change(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 8), np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((17, 8), np.float32)
        tensors["model.norm.weight"] = np.zeros(8, np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # a buffer of old files

    edit(llama, change)
    with pytest.raises(ValueError) as error:
        load_hf(llama)
    assert sorted(str(error.value).split("\n  ")[1:]) == [
        "missing: lm_head.weight (16, 8)",
        "missing: model.layers.1.mlp.up_proj.weight (24, 8)",
        "number format I8 is not read (only F64, F32, F16, BF16): model.norm.weight",
        "unknown: model.layers.2.mlp.up_proj.weight (24, 8)",
        "wrong shape: model.embed_tokens.weight is (17, 8), the configuration says (16, 8)",
    ]


def test_wrong_trees_are_not_written(tmp_path):
    params = random_params(TINY)
    del params["final_norm"]
    params["head"] = {"kernel": np.zeros((8, 15)), "bias": np.zeros(16)}
    with pytest.raises(ValueError) as error:
        save_hf(tmp_path / "model", TINY, params, architecture="llama")
    for line in ("missing: final_norm/scale", "unknown: head/bias", r"wrong shape: head/kernel is (8, 15)"):
        assert line in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(llama, keep):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_hf(llama)


def test_a_pickle_is_refused(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which can run any code"):
        load_hf(llama)


def test_a_broken_index_is_named(tmp_path):
    save_hf(tmp_path, TINY, random_params(TINY), architecture="llama", max_shard_bytes=2000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))

    with_x = lambda shard: json.dumps({"weight_map": {**good["weight_map"], "x": shard}})
    for text, words in ((with_x(shards[0]), f"{shards[0]} and model.safetensors.index.json disagree about x"),
                        (with_x("../other.safetensors"), "lies outside the folder"), ("{", "is not an index")):
        index.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_hf(tmp_path)
    index.write_text(json.dumps(good))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"not there: {shards[1]}"):
        load_hf(tmp_path)
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        load_hf(tmp_path)


def test_a_missing_or_broken_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        load_hf(tmp_path)
    wrong = json.dumps({**BASE, "rope_scaling": "linear"})
    for text in ("{", "[]", "\xff", wrong):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_config(tmp_path)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_no_half_model(existing, tmp_path, monkeypatch):
    folder, params = tmp_path / "model", random_params(TINY)
    if existing:
        save_hf(folder, TINY, params, architecture="llama")
    written, write_shard = [], safetensors_io.write_shard

    def write_two_shards(path, specs, tensors):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_shard(path, specs, tensors)

    monkeypatch.setattr(safetensors_io, "write_shard", write_two_shards)
    with pytest.raises(OSError, match="No space left"):
        save_hf(folder, TINY, jax.tree.map(np.zeros_like, params), architecture="llama", max_shard_bytes=2000,
                overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * existing
    if existing:
        assert_equal_trees(load_hf(folder)[1], params)


def test_only_exports_are_replaced(llama, tmp_path):
    params = random_params(TINY)
    with pytest.raises(ValueError, match="is not empty; overwrite=True"):
        save_hf(llama, TINY, params, architecture="llama")
    (llama / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not replaced: notes\.txt"):
        save_hf(llama, TINY, params, architecture="llama", overwrite=True)
    (llama / "notes.txt").unlink()
    with pytest.raises(ValueError, match=r"notes\.txt is not one of the files"):
        save_hf(llama, TINY, params, architecture="llama", overwrite=True, files=[llama / "notes.txt"])
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save_hf(llama, TINY, params, architecture="llama", overwrite=True, files=[tokenizer],
            token_ids={"eos_token_id": 7}, max_shard_bytes=2000)
    assert (llama / "tokenizer.json").read_text() == "{}"
    config = json.loads((llama / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, None)
    assert not (llama / "model.safetensors").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert (llama / "model-00001-of-00006.safetensors").stat().st_mode & 0o044 == llama.stat().st_mode & 0o044


# Published `config.json` files, the fields that matter here, against the presets.
PUBLISHED = {
    "smollm2_135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "head_dim": None,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192, "rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False,
        "tie_word_embeddings": True, "is_llama_config": True, "attention_bias": False, "hidden_act": "silu",
        "pretraining_tp": 1, "torch_dtype": "bfloat16", "use_cache": True, "bos_token_id": 0, "eos_token_id": 0},
    "llama3_2_1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True, "mlp_bias": False,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
    "mistral_7b": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen2_5_0_5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "rms_norm_eps": 1e-06,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
    "qwen3_0_6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "rms_norm_eps": 1e-06,
        "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": True,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
    "gemma_2b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "num_hidden_layers": 18, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 16384, "rms_norm_eps": 1e-06,
        "max_position_embeddings": 8192, "hidden_act": "gelu", "hidden_activation": None},
    "kormo_10b": {
        "model_type": "kormo", "vocab_size": 125184, "hidden_size": 4096, "num_hidden_layers": 40, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 16384, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": None, "mask_type": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name):
    assert from_hf_config(PUBLISHED[name]) == MODELS[name]
    assert from_hf_config(to_hf_config(MODELS[name], PUBLISHED[name]["model_type"])) == MODELS[name]


BASE = {name: value for name, value in to_hf_config(TINY, "llama").items() if value is not None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = replace(TINY, rope_theta=100.0, rope_scaling=RopeScaling(kind="linear", factor=2.0))


def check_reading(values: dict, expected: ModelConfig | str) -> None:
    """`values` give the expected configuration, or an error with these words."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            from_hf_config(values)
    else:
        assert from_hf_config(values) == expected


def test_every_unsupported_setting_is_listed():
    bad = {"attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1, "hidden_act": "relu",
           "final_logit_softcapping": 30.0, "partial_rotary_factor": 0.5, "sliding_window": 7, "query_scale": 3,
           "use_mrope": True, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "hidden_size": "8",
           "layer_types": ["linear"] * 2, "quantization_config": {"bits": 4}, "intermediate_size": ...}
    values = {name: value for name, value in {**BASE, **bad}.items() if value is not ...}
    with pytest.raises(ValueError) as error:
        from_hf_config(values)
    text = str(error.value)
    for words in ("attention_bias=True", "mlp_bias=True", "attention_dropout=0.1", "activation 'relu'",
                  "final_logit_softcapping=30.0", "partial_rotary_factor=0.5", "sliding_window=7 has no effect",
                  "use_mrope=True", "unknown field query_scale=3", "rope type 'yarn'",
                  "hidden_size must be int, got '8'", "layer_types ['linear']", "quantization_config=",
                  "intermediate_size is missing"):
        assert words in text, words
    assert text.startswith("14 problem(s) in a llama configuration: ")
    assert from_hf_config({**BASE, "query_scale": 3}, ignore=["query_scale"]) == TINY
    with pytest.raises(ValueError, match="use_sliding_window=False has no effect in mistral"):
        from_hf_config({**to_hf_config(CONFIGS["mistral"], "mistral"), "use_sliding_window": False})
    check_reading({**BASE, "model_type": "qwen"}, r"model_type 'qwen' is not supported \(did you mean 'qwen\d'")


@pytest.mark.parametrize("rope, expected", [
    ({"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2}}, LINEAR),
    ({"rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}, LINEAR),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100}}, LINEAR),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 100.0}, LINEAR),
    ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}}, "contradict"),
    ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "contradict"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_type": "linear", "factor": 3.0}}, "contradict"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, r"takes the fields \['factor'\], got \[\]"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "beta": 1}}, "takes the fields"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "takes the fields"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "must be numbers"),
    ({"rope_theta": "1e4"}, "must be a number"),
])
def test_both_spellings_of_rotary_settings_are_read_and_wrong_ones_refused(rope, expected):
    check_reading({name: value for name, value in BASE.items() if not name.startswith("rope")} | rope, expected)


@pytest.mark.parametrize("settings, window", [
    ({"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, None),
    ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, None),
    ({"use_sliding_window": True, "sliding_window": 7}, None),  # 28 by default, more than there are layers
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
    ({"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, 7),
    ({"layer_types": ["full_attention"] * 2}, None),
    ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "some layers only"),
    ({"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
     "some layers only"),
    ({"layer_types": ["sliding_attention"] * 2}, "contradict"),
])
def test_windows_of_qwen(settings, window):
    base = {name: value for name, value in to_hf_config(CONFIGS["qwen3"], "qwen3").items()
            if name not in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")}
    check_reading(base | settings, window if isinstance(window, str) else replace(CONFIGS["qwen3"], window=window))


@pytest.mark.parametrize("settings, expected", [
    ({"hidden_act": "gelu", "hidden_activation": None}, CONFIGS["gemma"]),
    ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, CONFIGS["gemma"]),
    ({"hidden_act": None}, CONFIGS["gemma"]),
    ({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}, "activation .* is not supported"),
    ({"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "activation .* is not supported"),
])
def test_activations_of_gemma(settings, expected):
    check_reading({**to_hf_config(CONFIGS["gemma"], "gemma"), "hidden_activation": None, **settings}, expected)


def test_an_architecture_refuses_what_it_cannot_express(tmp_path):
    with pytest.raises(ValueError, match=r"'llama' cannot express this model .*qk_norm: True -> False"):
        save_hf(tmp_path / "model", CONFIGS["qwen3"], random_params(CONFIGS["qwen3"]), architecture="llama")
    for config, architecture, words in (
            (CONFIGS["mistral"], "llama", "cannot express"), (CONFIGS["gemma"], "qwen2", "cannot express"),
            (replace(TINY, scale_embeddings=True), "kormo", "cannot express"),
            (replace(TINY, num_heads=6), "llama", "'mistral' is the same function"),
            (TINY, "lama", r"unknown architecture 'lama' \(did you mean 'llama'\?\)")):
        with pytest.raises(ValueError, match=words):
            to_hf_config(config, architecture)
    with pytest.raises(ValueError, match="unknown token ids bos"):
        to_hf_config(TINY, "llama", token_ids={"bos": 1})
