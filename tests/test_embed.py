"""Texts to vectors: pooling by hand and without padding, batches that do not matter, frames, truncation, a mesh."""

import functools
import json
import logging
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxlm.core.mesh import MeshConfig, make_mesh, tree_shardings
from jaxlm.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.encoder import build_encoder
from jaxlm.model.encoder_config import EncoderConfig
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.retrieval.embed import (
    POOLINGS,
    Pooling,
    TextEncoder,
    bucket,
    embed_texts,
    plan_batches,
    to_batch,
    tokenize,
    unit_length,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
ENCODER = EncoderConfig(vocab_size=16, d_model=16, num_layers=2, num_heads=4, d_ff=24, max_positions=40)
DECODER = ModelConfig(vocab_size=16, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24,
                      max_positions=40, tie_embeddings=True)
TEXTS = ["a b c", "", "h", "a b c d e f g h a b c d", "c b a", "a b c", "b " * 19, "d e"]


@functools.cache
def word_tokenizer():
    """[CLS] words [SEP], as BERT's file says it."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.add_special_tokens(WORDS[:5])
    words.normalizer, words.pre_tokenizer = (tokenizers.normalizers.BertNormalizer(),
                                             tokenizers.pre_tokenizers.BertPreTokenizer())
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    words.enable_truncation(5)
    words.enable_padding(length=9)
    return JsonTokenizer(words.to_str().encode())


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


@functools.cache
def encoder_of(kind="encoder", **settings):
    model = build_encoder(ENCODER) if kind == "encoder" else build(DECODER)
    tokenizer = word_tokenizer()
    before, after = tokenizer.frame
    encoder = TextEncoder(model=model, tokenizer=tokenizer, before=before, after=after,
                          **{"max_length": 20, **settings})
    return encoder, random_params(model)


def test_the_names_of_the_poolings():
    assert set(POOLINGS) == set(get_args(Pooling))


HIDDEN = np.array([[[1.0, 10], [2, 20], [4, 40], [8, 80]]], np.float32)


@pytest.mark.parametrize("name, mask, expected", [
    ("mean", [1, 1, 0, 0], [1.5, 15]), ("mean", [0, 1, 1, 1], [14 / 3, 140 / 3]), ("mean", [0] * 4, [0, 0]),
    ("weighted", [1, 1, 1, 0], [17 / 6, 170 / 6]), ("weighted", [0, 1, 1, 0], [10 / 3, 100 / 3]),
    ("cls", [1, 1, 0, 0], [1, 10]), ("cls", [0, 0, 1, 1], [4, 40]), ("cls", [0] * 4, [0, 0]),
    ("last", [1, 1, 1, 0], [4, 40]), ("last", [0, 1, 1, 1], [8, 80]), ("last", [0] * 4, [0, 0])])
def test_pooling_by_hand(name, mask, expected):
    np.testing.assert_allclose(POOLINGS[name](HIDDEN, np.array([mask])), [expected], rtol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_ignores_what_stands_in_the_padding_and_where_it_is(name):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(5, 3)).astype(np.float32)
    found = []
    for left, right, filling in ((0, 0, 0), (0, 3, np.nan), (3, 0, np.inf), (2, 1, 7.0)):
        hidden = np.concatenate([np.full((left, 3), filling), text, np.full((right, 3), filling)])[None]
        mask = np.array([[0] * left + [1] * 5 + [0] * right])
        found.append(POOLINGS[name](hidden.astype(np.float32), mask))
        grad = jax.grad(lambda h, mask=mask: jnp.sum(POOLINGS[name](h, mask)))(jnp.nan_to_num(hidden))
        assert not np.asarray(grad)[mask == 0].any()
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-6)
    with pytest.raises(AssertionError):
        POOLINGS[name](hidden, mask[:, 1:])


def test_unit_length():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_length(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(unit_length(x)))(x)).all()


def test_widths():
    assert [bucket(n) for n in (1, 8, 9, 64, 65, 128, 129, 257)] == [8, 8, 16, 64, 80, 128, 160, 320]
    assert all(n <= bucket(n) <= max(8, n * 5 / 4 + 1) for n in range(1, 3000) if n > 32)


@pytest.mark.parametrize("parts", [(1, 1), (4, 2)])
def test_batches_hold_every_text_once_and_few_shapes(parts):
    lengths = np.random.default_rng(0).geometric(0.02, 3000)
    found = list(plan_batches(lengths, 2048, *parts))
    assert sorted(i for chosen, _, _ in found for i in chosen) == list(range(3000))
    for chosen, rows, width in found:
        assert len(chosen) <= rows and lengths[chosen].max() <= width
        assert rows % parts[0] == 0 and width % parts[1] == 0 and rows * width <= max(2048, width * parts[0])
    padded = sum(rows * width for _, rows, width in found)
    assert padded < 1.15 * lengths.sum()
    assert len({(rows, width) for _, rows, width in found}) <= 50
    assert list(plan_batches([], 2048)) == [] and next(plan_batches([5], 2048))[1:] == (1, 8)
    assert next(plan_batches([250], 2048, max_length=250))[2] == 250


@pytest.mark.parametrize("kind, pooling", [("encoder", "mean"), ("encoder", "cls"), ("decoder", "last"),
                                           ("decoder", "weighted")])
def test_a_vector_depends_on_its_text_alone(kind, pooling):
    encoder, params = encoder_of(kind, pooling=pooling)
    together = embed_texts(encoder, params, TEXTS, "query")
    np.testing.assert_array_equal(together[0], together[5])
    assert np.abs(together[0] - together[4]).max() > 1e-4, "the order of words counts"
    alone = np.concatenate([embed_texts(encoder, params, [text], "query") for text in TEXTS[:4]])
    np.testing.assert_allclose(alone, together[:4], rtol=0, atol=1e-6)
    backwards = embed_texts(encoder, params, TEXTS[::-1], "query", batch_tokens=64)[::-1]
    np.testing.assert_allclose(backwards, together, rtol=0, atol=1e-6)


class OnDisk:
    """Texts that can only be read in slices; remembers the largest one."""

    def __init__(self, texts):
        self.texts, self.largest = texts, 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        found = self.texts[rows]
        self.largest = max(self.largest, len(found))
        return found


def test_texts_are_read_block_by_block(caplog):
    """Blocks of any size give the same vectors in the same order, and one count of texts that were cut."""
    encoder, params = encoder_of(max_length=8)
    texts = [" ".join("abcdefgh"[(i * j) % 8] for j in range(1, 2 + i % 11)) for i in range(40)]
    num_long = sum(len(text.split()) > 6 for text in texts)
    whole = embed_texts(encoder, params, texts, "passage")
    assert len({tuple(row) for row in whole.round(4).tolist()}) > 20
    for block in (1, 7, 40):
        stored = OnDisk(texts)
        caplog.clear()
        found = embed_texts(encoder, params, stored, "passage", block_texts=block, batch_tokens=64)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
        assert stored.largest == block
        assert [one.getMessage() for one in caplog.records] == [
            f"{num_long} of 40 texts are longer than 8 tokens; their ends were cut off"]
    bare = replace(encoder, before=(), after=())
    with pytest.raises(ValueError, match=r"1 text\(s\) have no token, .*: 5; leave them out"):
        embed_texts(bare, params, ["a"] * 5 + [""], "query", block_texts=2)


@pytest.mark.parametrize("kind, pooling", [("encoder", "mean"), ("decoder", "last")])
def test_the_side_of_the_padding_does_not_matter(kind, pooling):
    encoder, params = encoder_of(kind, pooling=pooling)
    tokens, mask = to_batch(tokenize(encoder, TEXTS[:5], "query").ids, 5, 16)
    roll = lambda x: np.stack([np.roll(row, 16 - n) for row, n in zip(x, mask.sum(1), strict=True)])
    vectors = jax.jit(encoder.vectors)
    right, left = vectors(params, tokens, mask), vectors(params, roll(tokens), roll(mask))
    np.testing.assert_allclose(left, right, rtol=0, atol=2e-6)


def test_frames_prompts_and_truncation(caplog):
    encoder, params = encoder_of(max_length=5)
    assert encoder.tokenizer.frame == ((2,), (3,))
    assert tokenize(encoder, ["a b", "", "a [SEP] b"], "query").ids[:2] == [[2, 5, 6, 3], [2, 3]]
    assert 3 not in tokenize(encoder, ["a [SEP] b"], "query").ids[0][1:-1], "what a user writes is never special"
    found = tokenize(encoder, ["a b c", "a b c d", "h " * 50], "query")
    assert found == ([[2, 5, 6, 7, 3]] * 2 + [[2, 12, 12, 12, 3]], 2)
    prompted = replace(encoder, query_prompt="e ", passage_prompt="f g ")
    assert tokenize(prompted, ["a"], "query").ids == [[2, 9, 5, 3]]
    assert tokenize(prompted, ["a"], "passage").ids == [[2, 10, 11, 5, 3]]
    with caplog.at_level(logging.WARNING):
        embed_texts(encoder, params, ["a", "a b c d"], "query")
    assert "1 of 2 texts are longer than 5 tokens" in caplog.text
    with pytest.raises(ValueError, match="a query or a passage, not 'document'"):
        tokenize(encoder, ["a"], "document")


def test_the_same_ids_as_the_library_with_its_post_processor():
    whole = tokenizers.Tokenizer.from_str(word_tokenizer().files()["tokenizer.json"].decode())
    whole.no_padding()
    whole.enable_truncation(6)
    encoder, _ = encoder_of(max_length=6)
    assert tokenize(encoder, TEXTS, "query").ids == [one.ids for one in whole.encode_batch(TEXTS)]


def test_texts_without_any_token():
    encoder, params = encoder_of()
    assert np.isfinite(embed_texts(encoder, params, ["", "a"], "query")).all()
    bare = replace(encoder, before=(), after=())
    with pytest.raises(ValueError, match=r"2 text\(s\) have no token, .*: 1, 2; leave them out"):
        embed_texts(bare, params, ["a", "", " "], "query")
    assert embed_texts(encoder, params, [], "query").shape == (0, 16)


def test_cut_and_normalised():
    encoder, params = encoder_of()
    plain = embed_texts(encoder, params, TEXTS, "query")
    cut = embed_texts(replace(encoder, dimension=4, normalize=True), params, TEXTS, "query")
    expected = plain[:, :4] / np.linalg.norm(plain[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, rtol=0, atol=1e-6)


def test_a_decoder_reads_forward_only():
    encoder, params = encoder_of("decoder", pooling="cls")
    found = embed_texts(encoder, params, ["a", "a b c"], "query")
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="decoders have no dropout"):
        encoder.vectors(params, jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32), jax.random.key(0))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_eight_devices_compute_what_one_does(sizes):
    encoder, params = encoder_of(normalize=True)
    expected = embed_texts(encoder, params, TEXTS, "passage")
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, ENCODER_RULES, mesh))
        ours = embed_texts(encoder, placed, TEXTS, "passage")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"max_length": 2}, "max_length must be 3 to 40"), ({"max_length": 41}, "max_length must be 3 to 40"),
    ({"pooling": "max"}, "unknown pooling 'max'"), ({"dimension": 17}, "dimension must be 1 to 16"),
    ({"tokenizer": ByteTokenizer()}, "wrong tokenizer")])
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(encoder_of()[0], **change)


def test_tokenizers_without_a_frame_or_with_an_odd_one():
    content = json.loads(word_tokenizer().files()["tokenizer.json"])
    assert JsonTokenizer(json.dumps(content | {"post_processor": None}).encode()).frame == ((), ())
    twice = content["post_processor"] | {"single": [{"Sequence": {"id": "A", "type_id": 0}},
                                                    {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]}
    assert JsonTokenizer(json.dumps(content | {"post_processor": twice}).encode()).frame == ((), (3,))
    texts = ["a", "", "한글 b"]
    for tokenizer in (word_tokenizer(), ByteTokenizer()):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]

