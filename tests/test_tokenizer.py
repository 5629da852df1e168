"""Round trips on random strings, names and ids, storage, and what goes wrong with a wrong file or size."""

import json
import logging
import pickle
import random
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlm.data.sample import sample_documents
from jaxlm.data.sources import open_source
from jaxlm.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_files,
)
from jaxlm.data.tokenizer_training import TokenizerConfig, make_tokenizer, train_sentencepiece

TEXTS = [doc.text for doc in sample_documents("both", 300)]
HARD = ["", " ", "  two  spaces  ", " lead", "trail ", "tab\there", "line\nline\n\nend\r\n", "\0nul\0", "▁ sign ▁▁",
        "2024년 100.5%", "ᄒ\u1161ᆫ 한 ㅋㅋㅋ ㅠ", "👨‍👩‍👧 🇰🇷 👍🏽", "e\u0301 é", "\ufeffbom", "a\u2028b\u00a0c\u3000d",
        "\U0010ffff", "<s></s><pad><unk>", "<0x41>", "def f(x):\n    return x\n"]


def random_texts(count: int = 1500) -> list[str]:
    rng = random.Random(0)
    ranges = [(0, 128), (0xAC00, 0xD7A4), (0x1100, 0x1200), (0x3130, 0x3190), (0x4E00, 0xA000), (0x1F300, 0x1F700),
              (0x2000, 0x2100), (0xA0, 0xD800), (0xE000, 0x110000), (0x2581, 0x2582), (0x20, 0x21), (0x09, 0x0E)]
    return HARD + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
                   for _ in range(count)]


def make_json(specials=("<s>", "</s>", "<pad>", "<|im_start|>")) -> bytes:
    """A byte-level BPE file with the additions that real ones carry: BOS, truncation and padding."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{specials[0]} $A",
                                                             special_tokens=[(specials[0], 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    return tokenizer.to_str().encode()


SENTENCEPIECE = train_sentencepiece(TEXTS, vocab_size=900, user_symbols=["<think>", "\n\n"],
                                    control_symbols=["<|user|>"])
ALL = {"sentencepiece": SENTENCEPIECE, "json": JsonTokenizer(make_json()), "bytes": ByteTokenizer()}
each = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)


@each
def test_round_trip_of_any_string(tokenizer):
    for text in random_texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, repr(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


@each
def test_decode_hides_only_bos_eos_pad(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("한 글"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == tokenizer.decode(iter(ids)) == "한 글"
    assert isinstance(tokenizer.decode(tokenizer.encode("한")[:1]), str)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


@each
def test_spans_cover_the_text_and_give_the_same_ids(tokenizer):
    for text in random_texts(400):
        for inside in (False, True):
            ids, spans = tokenizer.encode_spans(text, inside=inside)
            assert ids == tokenizer.encode(text) and len(spans) == len(ids)
            assert {i for start, end in spans for i in range(start, end)} == set(range(len(text))), repr(text)
            assert spans == sorted(spans) and all(start < end for start, end in spans)
            for i, (start, end) in zip(ids, spans, strict=True):
                # A token of whole characters is its span; others are bytes of one.
                assert "\ufffd" in tokenizer.decode([i]) or tokenizer.decode([i]) == text[start:end]


def test_spans_of_the_docstring():
    assert ByteTokenizer().encode_spans("a한") == ([97, 0xED, 0x95, 0x9C], [(0, 1), (1, 2), (1, 2), (1, 2)])


@each
def test_symbols_and_bytes(tokenizer):
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} <= {one.id for one in tokenizer.symbols.values()}
    assert all(tokenizer.token_id(name) == one.id for name, one in tokenizer.symbols.items())
    found = set(tokenizer.encode(" ".join(tokenizer.symbols) + "".join(tokenizer.symbols)))
    assert not found & {one.id for one in tokenizer.symbols.values()}
    for byte in range(256):
        i = tokenizer.byte_id(byte)
        assert tokenizer.decode([i]) == bytes([byte]).decode("utf-8", errors="replace")
    assert tokenizer.decode([tokenizer.byte_id(byte) for byte in "한👍".encode()]) == "한👍"


def test_symbols_are_what_text_cannot_forge():
    assert {"<s>", "<pad>", "<|user|>"} <= SENTENCEPIECE.symbols.keys()
    assert not {"<think>", "<unk>"} & SENTENCEPIECE.symbols.keys()
    assert set(ALL["json"].symbols) == {"<s>", "</s>", "<pad>", "<|im_start|>"}


@each
def test_storage_pickle_fingerprint(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "a" / "b")
    for copy in (load_tokenizer(tmp_path / "a" / "b"), tokenizer_from_files(tokenizer.files()),
                 pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint() == tokenizer.fingerprint() and copy.vocab_size == tokenizer.vocab_size
        assert [copy.encode(text) for text in TEXTS[:50]] == [tokenizer.encode(text) for text in TEXTS[:50]]
        assert (copy.bos_id, copy.eos_id, copy.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert len(tokenizer.fingerprint()) == 64
    assert len({other.fingerprint() for other in ALL.values()}) == len(ALL)


@each
def test_vocabulary_check(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, tokenizer.vocab_size + 128)
    with pytest.raises(ValueError, match=f"wrong tokenizer: it has {tokenizer.vocab_size} tokens"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_sentencepiece_digits_and_symbols():
    think, user = SENTENCEPIECE.token_id("<think>"), SENTENCEPIECE.token_id("<|user|>")
    assert len(SENTENCEPIECE.encode("2024")) in (4, 5), "each digit is a token"
    for text in TEXTS[:100]:
        pieces = [SENTENCEPIECE.decode([i]) for i in SENTENCEPIECE.encode(text)]
        assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)
    assert SENTENCEPIECE.encode("a<think>b").count(think) == 1
    assert SENTENCEPIECE.token_id("\n\n") in SENTENCEPIECE.encode("가\n\n나")
    # A control symbol cannot be forged by text, and shows when it is decoded.
    assert user not in SENTENCEPIECE.encode("<|user|>")
    assert SENTENCEPIECE.decode([1, user, think, 2]) == "<|user|><think>"
    with pytest.raises(ValueError, match=r"no token '<thnk>' \(did you mean '<think>'"):
        SENTENCEPIECE.token_id("<thnk>")
    assert (SENTENCEPIECE.bos_id, SENTENCEPIECE.eos_id, SENTENCEPIECE.pad_id) == (1, 2, 3)
    assert SENTENCEPIECE.vocab_size == 900


def test_training_is_deterministic_quiet_and_leaves_no_files(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    first, second = (train_sentencepiece(iter(TEXTS), vocab_size=700) for _ in range(2))
    assert first.fingerprint() == second.fingerprint() != SENTENCEPIECE.fingerprint()
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    with caplog.at_level(logging.WARNING, "jaxlm"):
        a, b, c = (train_sentencepiece(TEXTS, vocab_size=600, max_chars=9000, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint() and "random sample" in caplog.text
    # sentencepiece itself would drop one line of a megabyte in silence.
    assert train_sentencepiece(["가나다라 마바사 " * 100_000], vocab_size=280).encode("가나다라")


@pytest.mark.parametrize(("options", "message"), [
    ({"vocab_size": 100}, r"too small: special tokens, 256 bytes and the characters of the text need at least \d+"),
    ({"vocab_size": 90_000}, r"too large for this text, which yields at most \d+"),
    ({"vocab_size": 900, "user_symbols": ["a", "a"]}, "distinct"),
    ({"vocab_size": 900, "user_symbols": ["<s>"]}, "none of"),
])
def test_training_errors(options, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(TEXTS, **options)


def test_training_bounds_are_exact():
    for size in (100, 90_000):
        with pytest.raises(ValueError) as error:
            train_sentencepiece(TEXTS, vocab_size=size)
        bound = int(re.search(r"at (?:least|most) (\d+)", str(error.value))[1])
        assert train_sentencepiece(TEXTS, vocab_size=bound).vocab_size == bound
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece([], vocab_size=300)


def test_json_tokens_are_found_named_or_missing(tmp_path):
    tokenizer = ALL["json"]
    assert tokenizer.bos_id not in tokenizer.encode("a" * 50), "no BOS, truncation or padding from the file"
    assert tokenizer.decode(tokenizer.encode("a b " * 50)) == "a b " * 50
    assert tokenizer.token_id("<|im_start|>") not in tokenizer.encode("<|im_start|>")
    assert tokenizer.decode([tokenizer.token_id("<|im_start|>")]) == "<|im_start|>"
    with pytest.raises(ValueError, match=r"no token 'im_start' \(did you mean '<\|im_start\|>'"):
        tokenizer.token_id("im_start")
    content = make_json(("<A>", "<B>", "<C>"))
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"no usual bos token; name it with bos=\.\.\., one of <A>, <B>, <C>"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no token '<D>'"):
        load_tokenizer(tmp_path, bos="<A>", eos="<D>", pad="<C>")
    named = load_tokenizer(tmp_path / "tokenizer.json", bos="<A>", eos="<B>", pad="<C>")
    assert tokenizer_from_files(named.files()).eos_id == named.eos_id == named.token_id("<B>")
    config = {"bos_token": "<A>", "eos_token": {"content": "<C>"}, "pad_token": "<C>", "other": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_id == named.token_id("<C>")
    assert load_tokenizer(tmp_path, eos="<B>").eos_id == named.token_id("<B>")


def test_loading_errors(tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    with pytest.raises(ValueError, match="no such tokenizer file or folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"for a tokenizer\.json only"):
        load_tokenizer("bytes", eos="x")
    for name, message in {"a.txt": "ends in", "a.model": "not a sentencepiece", "a.json": "not a tokenizer"}.items():
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        SentencePieceTokenizer(b"")
    with pytest.raises(ValueError, match="did you mean '<eos>'"):
        ByteTokenizer().token_id("eos")


def test_make_tokenizer_trains_loads_and_refuses_settings_without_effect(tmp_path):
    source = open_source(TEXTS)
    trained = make_tokenizer(TokenizerConfig(documents=200), [source], 800)
    assert trained.vocab_size == 800 and trained.encode("<think>") == [trained.token_id("<think>")]
    save_tokenizer(trained, tmp_path)
    assert make_tokenizer(TokenizerConfig(path=str(tmp_path)), [source], 5).fingerprint() == trained.fingerprint()
    assert make_tokenizer(TokenizerConfig(path="bytes"), [source], 5).vocab_size == 259
    for options in ({"documents": 5}, {"symbols": ("<x>",)}):
        with pytest.raises(ValueError, match="train only"):
            TokenizerConfig(path="bytes", **options)
