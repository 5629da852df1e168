"""Encoders of Hugging Face: round trips, everything wrong with a folder, and hidden states against transformers."""

import functools
import json
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.core.tree import named_leaves
from jaxlm.model.encoder import build_encoder
from jaxlm.model.encoder_config import EncoderConfig
from jaxlm.model.hf_encoder import TENSORS, load_encoder, save_encoder
from jaxlm.model.hf_encoder_config import ENCODERS, from_hf_encoder_config, to_hf_encoder_config

TINY = EncoderConfig(vocab_size=19, d_model=12, num_layers=2, num_heads=3, d_ff=20, max_positions=14, mlm_head=True)
CONFIGS = {"bert": replace(TINY, activation="gelu_tanh"), "roberta": replace(TINY, first_position=2, num_types=1),
           "xlm-roberta": replace(TINY, first_position=2, num_types=1, dropout=0.0, norm_eps=1e-5)}
ATOL = 1e-5


def random_params(config):
    shapes = jax.eval_shape(build_encoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def without_head(params):
    return {name: part for name, part in params.items() if name != "mlm"}


def assert_equal_trees(ours, theirs):
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    assert sorted(ours) == sorted(theirs)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.fixture
def bert(tmp_path):
    save_encoder(tmp_path / "bert", TINY, random_params(TINY), architecture="bert")
    return tmp_path / "bert"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_fields(folder, **fields):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("mlm_head", [False, True])
def test_round_trip_is_exact(architecture, mlm_head, tmp_path):
    config = replace(CONFIGS[architecture], mlm_head=mlm_head)
    params = random_params(config)
    save_encoder(tmp_path / "model", config, params, architecture=architecture, max_shard_bytes=3000)
    loaded, tree = load_encoder(tmp_path / "model", mlm_head=mlm_head)
    assert loaded == config
    assert_equal_trees(tree, params)


def test_the_table_covers_every_parameter():
    assert set(named_leaves(random_params(TINY))) == set(TENSORS)


def test_old_names_and_parts_of_other_tasks(bert, caplog):
    def change(tensors):
        for name in list(tensors):
            if "LayerNorm" in name:
                old = name.replace("weight", "gamma").replace("bias", "beta")
                tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(14)[None]
        tensors["bert.pooler.dense.weight"] = np.zeros((12, 12), np.float32)
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 12), np.float32)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()

    edit(bert, change)
    assert_equal_trees(load_encoder(bert, mlm_head=True)[1], random_params(TINY))
    with caplog.at_level(logging.INFO):
        config, params = load_encoder(bert)
    assert not config.mlm_head and "bert.pooler.dense.weight" in caplog.text and "cls.predictions.bias" in caplog.text
    assert_equal_trees(params, without_head(random_params(TINY)))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"), r"missing: bert.encoder.layer.1.output.dense.bias"),
    (lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": np.zeros(12, np.float32)}),
     "unknown: bert.encoder.layer.2"),
    (lambda t: t.update({"bert.embeddings.position_embeddings.weight": np.zeros((9, 12), np.float32)}), "wrong shape"),
    (lambda t: t.update({"bert.embeddings.LayerNorm.bias": np.zeros(12, np.int32)}), "number format I32 is not read"),
    (lambda t: t.update({"cls.predictions.decoder.weight": np.zeros((19, 12), np.float32)}), "contradiction"),
    (lambda t: t.update({"cls.predictions.decoder.bias": np.zeros(19, np.float32)}), "contradiction"),
])
def test_tensors_that_do_not_fit(bert, change, message):
    edit(bert, change)
    with pytest.raises(ValueError, match=message):
        load_encoder(bert, mlm_head=True)


def test_a_head_that_is_not_there_is_missing(tmp_path):
    config = replace(TINY, mlm_head=False)
    save_encoder(tmp_path / "plain", config, random_params(config), architecture="bert")
    with pytest.raises(ValueError, match=r"missing: cls\.predictions\.bias"):
        load_encoder(tmp_path / "plain", mlm_head=True)


@pytest.mark.parametrize("fields, message", [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
    ({"is_decoder": True}, "is_decoder=True"), ({"hidden_act": "silu"}, "hidden_act 'silu'"),
    ({"embedding_size": 7}, "unknown field embedding_size=7"), ({"hidden_size": ...}, "hidden_size is missing"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be int"), ({"model_type": "bart"}, "did you mean 'bert'"),
    ({"hidden_size": 13}, "d_model 13 is not divisible"), ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
])
def test_configurations_that_are_refused(bert, fields, message):
    set_fields(bert, **fields)
    with pytest.raises(ValueError, match=message):
        load_encoder(bert)


def test_what_an_architecture_cannot_express():
    with pytest.raises(ValueError, match=r"'bert' cannot express .*first_position"):
        to_hf_encoder_config(CONFIGS["roberta"], "bert")
    with pytest.raises(ValueError, match="the head of roberta computes with gelu"):
        to_hf_encoder_config(replace(CONFIGS["roberta"], activation="relu"), "roberta")
    with pytest.raises(ValueError, match="unknown architecture 'bort'"):
        to_hf_encoder_config(TINY, "bort")


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_logits(model, params, tokens, segments):
    hidden = model.apply(params, tokens, segments=segments)
    return hidden, model.vocabulary(params, hidden)


def rows(config):
    """Tokens and mask [3, 9]: a whole row, and two with padding on the right (as RoBERTa's own positions need it)."""
    tokens = np.random.default_rng(2).integers(3, config.vocab_size, (3, 9)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, 6:] = mask[2, 2:] = 0
    return np.where(mask, tokens, max(config.first_position - 1, 0)).astype(np.int32), mask


@pytest.mark.parametrize("architecture", ENCODERS)
def test_hidden_states_and_logits_agree_with_transformers(architecture, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = to_hf_encoder_config(CONFIGS[architecture], architecture)
    for name in ("model_type", "architectures", "torch_dtype", "dtype"):
        settings.pop(name)
    reference = transformers.AutoModelForMaskedLM.from_config(
        transformers.AutoConfig.for_model(architecture, **settings), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(0.6 * torch.randn(weight.shape, generator=generator))
    reference.save_pretrained(tmp_path / "theirs")
    config, params = load_encoder(tmp_path / "theirs", mlm_head=True)
    assert config == CONFIGS[architecture]
    tokens, mask = rows(config)

    def theirs(model):
        with torch.no_grad():
            found = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
                          output_hidden_states=True)
        return found.hidden_states[-1].numpy(), found.logits.numpy()

    ours = hidden_and_logits(build_encoder(config), params, tokens, mask)
    for one, other in zip(ours, theirs(reference), strict=True):
        assert other.std() > 0.5, "numbers near zero would agree by themselves"
        np.testing.assert_allclose(np.asarray(one)[mask > 0], other[mask > 0], rtol=0, atol=ATOL)

    save_encoder(tmp_path / "ours", config, params, architecture=architecture)
    exported, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    for one, other in zip(theirs(exported), theirs(reference), strict=True):
        np.testing.assert_array_equal(one, other)

    plain = replace(config, mlm_head=False)
    save_encoder(tmp_path / "plain", plain, without_head(params), architecture=architecture)
    body = transformers.AutoModel.from_pretrained(tmp_path / "plain", attn_implementation="eager",
                                                  add_pooling_layer=False).eval()
    with torch.no_grad():
        found = body(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    np.testing.assert_array_equal(found.numpy()[mask > 0], theirs(reference)[0][mask > 0])


@pytest.mark.parametrize("architecture", ENCODERS)
def test_absent_fields_mean_what_they_mean_in_transformers(architecture):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(architecture)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size",
                                                      "num_hidden_layers", "num_attention_heads")}
    assert from_hf_encoder_config({"model_type": architecture, **sizes}) == from_hf_encoder_config(config.to_dict())


def test_bfloat16_is_stored_and_read(tmp_path):
    save_encoder(tmp_path / "half", TINY, random_params(TINY), architecture="bert", dtype="bfloat16")
    params = load_encoder(tmp_path / "half", dtype=jnp.bfloat16, mlm_head=True)[1]
    assert_equal_trees(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TINY)))
