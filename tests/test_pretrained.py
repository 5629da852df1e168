"""Models of every kind of source come with their tokenizer, first token and chat template."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxlm.data.chat_template import CHATML
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf
from jaxlm.model.quantize import quantize_leaf
from jaxlm.train import pretrained
from jaxlm.train.pretrained import load_pretrained, open_pretrained
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder


def test_folder_brings_tokenizer_template_and_start(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    found = load_pretrained(folder)
    assert found.chat.source == CHATML and found.start == ()
    assert found.tokenizer.fingerprint() == json_tokenizer().fingerprint()
    opened = open_pretrained(folder)
    assert opened.params is None and opened.config == found.config


def test_bos_where_transformers_would_put_it(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    config, content = folder / "tokenizer_config.json", folder / "tokenizer.json"
    plain = config.read_bytes()
    set_fields(config, add_bos_token=True)
    assert open_pretrained(folder).start == (0,)
    config.write_bytes(plain)
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    set_fields(content, post_processor={"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, b],
                                        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}})
    assert transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 0
    assert open_pretrained(folder).start == (0,)
    set_fields(config, add_bos_token=False)
    assert open_pretrained(folder).start == ()


def set_fields(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_as_asked_for(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    plain = load_pretrained(folder).params
    for leaf in jax.tree.leaves(load_pretrained(folder, dtype="bfloat16").params):
        assert leaf.dtype == jnp.bfloat16
    int8 = load_pretrained(folder, put=quantize_leaf).params
    assert int8["embed"]["embedding"].numbers.dtype == jnp.int8
    assert jax.tree.leaves(plain)[0].dtype == np.float32


def test_gguf_is_read_once(tmp_path, monkeypatch):
    """With what the file states: the template, and tokens by name."""
    params = jax.jit(build(MODEL).init)(jax.random.key(0))
    calls = []
    monkeypatch.setattr(pretrained, "load_gguf", lambda path: (calls.append(path), (MODEL, params))[1])
    content = json_tokenizer().files()["tokenizer.json"].decode()
    monkeypatch.setattr(pretrained, "gguf_tokenizer_json", lambda path: content)
    monkeypatch.setattr(pretrained, "gguf_special_tokens", lambda path: {"eos": "<|im_end|>"})
    monkeypatch.setattr(pretrained, "gguf_chat_template", lambda path: CHATML)
    found = load_pretrained(tmp_path / "x.gguf", dtype="bfloat16", put=lambda path, leaf: (path, leaf.dtype))
    assert len(calls) == 1 and found.chat.source == CHATML and found.start == ()
    assert found.tokenizer.eos_id == found.tokenizer.token_id("<|im_end|>")
    assert found.params["embed"]["embedding"] == ("embed/embedding", jnp.bfloat16)


def test_without_tokenizer_or_template(tmp_path):
    params = jax.jit(build(MODEL).init)(jax.random.key(0))
    save_hf(tmp_path / "bare", MODEL, params, architecture="llama")
    found = load_pretrained(tmp_path / "bare")
    assert found.tokenizer is None and found.chat is None and found.start == ()
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a run folder"):
        load_pretrained(tmp_path)
    folder = tiny_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="no Jinja template"):
        open_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    set_fields(folder / "config.json", vocab_size=40)
    with pytest.raises(ValueError, match="wrong tokenizer"):
        open_pretrained(folder)
