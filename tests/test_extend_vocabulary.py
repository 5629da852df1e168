"""Another vocabulary for a model: shared rows stay, new rows are those of their pieces, and logits say so."""

import functools
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.bpe_training import train_bpe
from jaxlm.data.sample import sample_documents
from jaxlm.data.tokenizer import ByteTokenizer, save_tokenizer
from jaxlm.data.tokenizer_training import train_sentencepiece
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import Pretrained, load_pretrained
from jaxlm.train.vocabulary import (
    ROW_INITS,
    Correspondence,
    RowInit,
    change_vocabulary,
    correspond,
    mean_rows,
    random_rows,
    token_bytes,
    with_tokens,
)
from recipes import extend_vocabulary
from tests.test_tokenizer_report import merged
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder

TEXTS = [doc.text for doc in sample_documents("both", 200)]
BPE = train_bpe(TEXTS, vocab_size=420)
SENTENCEPIECE = train_sentencepiece(TEXTS, vocab_size=900, user_symbols=["<think>"])
OLD = json_tokenizer()  # bytes and 5 special tokens


@functools.cache
def model(tied: bool) -> Pretrained:
    config = replace(MODEL, tie_embeddings=tied)
    params = jax.device_get(jax.jit(build(config).init)(jax.random.key(3)))
    return Pretrained(config, params, OLD, start=(OLD.bos_id,))


@functools.cache
def forward(config):
    return jax.jit(build(config).apply)


def logits(one: Pretrained, ids) -> np.ndarray:
    return np.asarray(forward(one.config)(one.params, jnp.asarray([ids])).logits[0])


def test_correspondence_of_the_docstring():
    """Bytes on both sides, then the old ab against the new bb and abb."""
    old, new = merged(("a", "b")), merged(("b", "b"), ("a", "bb"))
    found = correspond(old, new)
    assert found.pieces[:256] == [(i,) for i in range(256)]
    b, ab = old.token_id("b"), old.token_id("ab")
    assert found.pieces[new.token_id("bb")] == (b, b) and found.pieces[new.token_id("abb")] == (ab, b)
    assert (new.token_id("a") in found.shared) and new.token_id("bb") not in found.shared
    assert found.pieces[new.bos_id:] == [(old.bos_id,), (old.eos_id,), (old.pad_id,)]
    assert found.dropped == 1 and len(found.shared) == 256 + 3  # ab has no row any more, a and b have


@pytest.mark.parametrize(("old", "new"), [(BPE, SENTENCEPIECE), (SENTENCEPIECE, BPE), (ByteTokenizer(), BPE)])
def test_tokens_meet_by_bytes_whatever_the_file(old, new):
    found, before, after = correspond(old, new), token_bytes(old), token_bytes(new)
    roles = {new.bos_id, new.eos_id, new.pad_id}
    for i, pieces in enumerate(found.pieces):
        if i in roles:
            continue
        # The pieces spell the token; a cut character is spelled by its bytes.
        assert b"".join(before[j] for j in pieces) == after[i], (after[i], pieces)
        assert (i in found.shared) == (after[i] in set(before)), after[i]
    assert [found.pieces[getattr(new, f"{role}_id")] for role in ("bos", "eos", "pad")] == \
        [(old.bos_id,), (old.eos_id,), (old.pad_id,)]
    assert 256 <= len(found.shared) < new.vocab_size


def test_token_bytes():
    assert token_bytes(BPE)[BPE.token_id("<think>")] == b"<think>"
    for one in (BPE, SENTENCEPIECE, OLD, ByteTokenizer()):
        known = token_bytes(one)
        for text in ("한국의 통화는 2024", " a  b\n", "👍"):
            assert b"".join(known[i] for i in one.encode(text)) == text.encode()
    assert correspond(BPE, BPE).pieces == [(i,) for i in range(420)] and correspond(BPE, BPE).dropped == 0


def test_rows_by_hand():
    rows = np.array([[0.0, 4], [2, 8], [4, 0]], np.float32)
    found = Correspondence([(1,), (0, 1), (), (2, 2, 0)], frozenset({0}), 1)
    expected = [[2, 8], [1, 6], [2, 4], [8 / 3, 4 / 3], [2, 4]]
    np.testing.assert_allclose(mean_rows(rows, found, 5, seed=0), expected, rtol=1e-6)
    drawn = random_rows(rows, found, 5, seed=0)
    np.testing.assert_array_equal(drawn[[0, 4]], [[2, 8], [2, 4]])
    assert not np.isclose(drawn[1:4], np.array(expected)[1:4]).any()
    many = Correspondence([()] * 4000, frozenset(), 0)
    drawn = random_rows(rows, many, 4000, seed=0)
    np.testing.assert_allclose(drawn.mean(axis=0), rows.mean(axis=0), atol=0.2)
    np.testing.assert_allclose(drawn.std(axis=0), rows.std(axis=0), rtol=0.05)


def test_every_init_keeps_shared_rows_and_its_seed():
    assert set(ROW_INITS) == set(typing.get_args(RowInit))
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    found = Correspondence([(4,), (0, 1), (2,), ()], frozenset({0, 2}), 4)
    for init in ROW_INITS.values():
        made = init(rows, found, 6, seed=1)
        assert made.shape == (6, 3) and np.isfinite(made).all()
        np.testing.assert_array_equal(made[[0, 2]], rows[[4, 2]])
        np.testing.assert_array_equal(made, init(rows, found, 6, seed=1))
        np.testing.assert_allclose(made[4:], np.tile(rows.mean(axis=0), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_shared_tokens_are_unchanged(tied):
    """A text that both tokenizers spell alike; the new tokens' logits are the means of their pieces'."""
    before = model(tied)
    after, found = change_vocabulary(before, BPE, multiple=128)
    assert after.config.vocab_size == 512 and after.start == (BPE.bos_id,)
    text = "QZ~\x7f 9\t#"
    ids = BPE.encode(text)
    assert [found.pieces[i] for i in ids] == [(i,) for i in OLD.encode(text)]
    old = logits(before, [before.tokenizer.bos_id, *OLD.encode(text)])
    new = logits(after, [BPE.bos_id, *ids])
    expected = np.stack([old[:, list(pieces)].mean(axis=1) for pieces in found.pieces], axis=1)
    np.testing.assert_allclose(new[:, :BPE.vocab_size], expected, atol=2e-6)
    padding = old[:, :OLD.vocab_size].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(new[:, BPE.vocab_size:], np.tile(padding, (1, 512 - 420)), atol=2e-6)
    other, _ = change_vocabulary(before, BPE, init="random", multiple=128)
    shared = sorted(found.shared)
    np.testing.assert_allclose(logits(other, [BPE.bos_id, *ids])[:, shared], expected[:, shared], atol=2e-6)
    if not tied:  # drawn apart
        embedding, head = other.params["embed"]["embedding"], other.params["head"]["kernel"].T
        fresh = next(i for i in range(420) if i not in found.shared)
        assert not np.isclose(embedding[fresh] / embedding.std(), head[fresh] / head.std(), atol=1e-3).all()


def test_the_same_tokenizer_changes_nothing():
    before = model(False)
    after, found = change_vocabulary(before, OLD, multiple=MODEL.vocab_size)
    known = OLD.vocab_size
    assert len(found.shared) == known and found.dropped == 0
    for part, leaf in (("embed", "embedding"), ("head", "kernel")):
        kept, own = (np.asarray(one.params[part][leaf]) for one in (after, before))
        axis = int(part == "head")
        np.testing.assert_array_equal(kept.take(range(known), axis), own.take(range(known), axis))
    np.testing.assert_array_equal(after.params["layers"]["mlp"]["up"]["kernel"],
                                  before.params["layers"]["mlp"]["up"]["kernel"])


def test_number_format_is_kept():
    before = model(True)
    half = before._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), before.params))
    after, _ = change_vocabulary(half, BPE)
    assert after.params["embed"]["embedding"].dtype == jnp.bfloat16


def test_added_tokens():
    more = with_tokens(OLD, ["<think>", "</think>"], control=True)
    assert more.vocab_size == OLD.vocab_size + 2 and more.bos_id == OLD.bos_id
    assert more.encode("a<think>") == OLD.encode("a<think>") and "<think>" in more.symbols
    seen = with_tokens(OLD, ["<think>"], control=False)
    assert seen.token_id("<think>") in seen.encode("a<think>") and "<think>" not in seen.symbols
    for names in (["<s>"], [""], ["x1", "x1"]):
        with pytest.raises(ValueError, match="cannot be added"):
            with_tokens(OLD, names, control=True)
    with pytest.raises(ValueError, match=r"tokenizer\.json only"):
        with_tokens(SENTENCEPIECE, ["<x>"], control=True)


def test_recipe_with_a_tokenizer(tmp_path, capfd):
    source = tiny_folder(tmp_path / "m")
    save_tokenizer(BPE, tmp_path / "tok")
    extend_vocabulary.main(["--source", str(source), "--tokenizer", str(tmp_path / "tok"), "--target",
                            str(tmp_path / "x"), "--multiple", "128"])
    shown = capfd.readouterr()
    # Bytes and three roles are shared; the chat marks of the old model have no row any more.
    assert "420 tokens: 259 shared, 161 new (161 of them spelled by old ones), 2 dropped; 512 rows" in shown.out
    assert "the chat template writes <|im_start|>, <|im_end|>" in shown.err
    found = load_pretrained(tmp_path / "x")
    assert found.tokenizer.fingerprint() == BPE.fingerprint() and found.config.vocab_size == 512
    expected, _ = change_vocabulary(load_pretrained(source), BPE, multiple=128)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_recipe_with_added_tokens(tmp_path, capfd):
    source = tiny_folder(tmp_path / "m")
    extend_vocabulary.main(["--source", str(source), "--add-tokens", "<think>", "</think>", "--target",
                            str(tmp_path / "x"), "--init", "random", "--seed", "5"])
    shown = capfd.readouterr()
    assert "263 tokens: 261 shared, 2 new (2 of them spelled by old ones), 0 dropped" in shown.out
    assert "chat template" not in shown.err
    found = load_pretrained(tmp_path / "x")
    np.testing.assert_array_equal(found.params["embed"]["embedding"][:261],
                                  load_pretrained(source).params["embed"]["embedding"][:261])
    assert found.chat is not None


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give either --tokenizer with another tokenizer, or --add-tokens"),
    (["--tokenizer", "bytes", "--add-tokens", "x"], "give either"),
    (["--tokenizer", "nowhere"], "no such tokenizer file or folder"),
    (["--tokenizer", "bytes", "--seed", "1"], "--init random only"),
    (["--tokenizer", "bytes", "--no-control"], "--add-tokens only"),
    (["--tokenizer", "bytes", "--multiple", "0"], "--multiple must be positive"),
    (["--add-tokens", "<s>"], "cannot be added"),
])
def test_errors(arguments, message, tmp_path, capfd):
    source = tiny_folder(tmp_path / "m")
    with pytest.raises(SystemExit) as stopped:
        extend_vocabulary.main(["--source", str(source), "--target", str(tmp_path / "x"), *arguments])
    assert stopped.value.code == 2 and message in capfd.readouterr().err and not (tmp_path / "x").exists()


def test_a_model_without_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        change_vocabulary(model(True)._replace(tokenizer=None), BPE)
    with pytest.raises(ValueError, match="multiple must be positive"):
        change_vocabulary(model(True), BPE, multiple=0)
