"""Byte-level BPE with KORMo's rules: splits, ids, determinism, transformers; the recipe with its report and sweep."""

import json
import unicodedata

import pytest
import transformers
from tokenizers import Regex, pre_tokenizers

from jaxlm.core import config as flags
from jaxlm.data.bpe_training import KORMO_TOKENS, SPLIT_RULE, ReservedToken, train_bpe
from jaxlm.data.sample import sample_documents
from jaxlm.data.tokenizer import load_tokenizer, save_tokenizer
from jaxlm.eval.tokenizer_sweep import FIGURES, Row, SweepConfig, summarise, sweep_table
from recipes import train_tokenizer
from tests.test_tokenizer import random_texts

TEXTS = [doc.text for doc in sample_documents("both", 300)] + ["def f(x):\n\n    return 10\n\n"] * 3
BPE = train_bpe(TEXTS, vocab_size=700)


@pytest.mark.parametrize(("text", "parts"), [
    ("It's 2024!", ["It", "'s", " ", "2", "0", "2", "4", "!"]),
    ("WE'LL", ["WE", "'LL"]),
    ("값은 3,000원", ["값은", " ", "3", ",", "0", "0", "0", "원"]),
    ("(a) -- b", ["(a", ")", " --", " b"]),
    ("a  b", ["a", " ", " b"]),
    ("x\n\n  y\r\n", ["x", "\n\n", " ", " y", "\r\n"]),
    ("?!\n\nz", ["?!\n\n", "z"]),
    ("end  ", ["end", "  "]),
])
def test_split_rule(text, parts):
    found = pre_tokenizers.Split(Regex(SPLIT_RULE), "isolated").pre_tokenize_str(text)
    assert [part for part, _ in found] == parts


def test_ids_in_kormo_order():
    names = ["<|BOS|>", "<|EOS|>", "<|PAD|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
             "</tool_response>", "<|BOT|>", "<|EOT|>"]
    assert BPE.vocab_size == 700 and [BPE.token_id(name) for name in names] == list(range(689, 700))
    assert (BPE.bos_id, BPE.eos_id, BPE.pad_id) == (689, 690, 691)
    assert sorted(BPE.byte_id(byte) for byte in range(256)) == list(range(256))
    # Of a text, thought and tools are whole tokens; what users must not forge stays text.
    assert BPE.token_id("<think>") in BPE.encode("a<think>b")
    assert not {*BPE.encode("<|BOS|><|EOT|><|BOT|>")} & {*range(689, 700)}
    assert set(BPE.symbols) == {token.name for token in KORMO_TOKENS if token.control}


def test_round_trip_is_nfc_and_digits_stand_alone():
    for text in random_texts(300):
        assert BPE.decode(BPE.encode(text)) == unicodedata.normalize("NFC", text), repr(text)
    assert all(sum(c.isdigit() for c in BPE.decode([i])) <= 1 or i >= 689 for i in range(700))
    assert BPE.encode("e\u0301 한") == BPE.encode("é 한")


def test_training_is_deterministic_and_nested():
    """The same texts, the same file; a smaller vocabulary is the beginning of a larger one."""
    assert train_bpe(iter(TEXTS), vocab_size=700).fingerprint() == BPE.fingerprint()
    merges = [json.loads(one.files()["tokenizer.json"])["model"]["merges"]
              for one in (train_bpe(TEXTS, vocab_size=400), BPE)]
    assert len(merges[0]) == 400 - 256 - 11 and merges[1][:len(merges[0])] == merges[0]


def test_bounds_are_exact_and_named():
    with pytest.raises(ValueError, match="vocab_size 266 is too small: 256 bytes and 11 reserved tokens need at least "
                                         "267"):
        train_bpe(TEXTS, vocab_size=266)
    assert train_bpe(TEXTS, vocab_size=267).vocab_size == 267
    with pytest.raises(ValueError, match="too large for this text, which yields at most 268 tokens"):
        train_bpe(["ab ab"], vocab_size=300)
    assert train_bpe(["ab ab"], vocab_size=268, min_frequency=1).vocab_size == 268
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            train_bpe(texts, vocab_size=267)
    with pytest.raises(ValueError, match="distinct"):
        train_bpe(TEXTS, vocab_size=400, reserved=[ReservedToken("<s>", True)] * 3)


def test_transformers_opens_it_with_equal_ids(tmp_path):
    save_tokenizer(BPE, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in [*TEXTS[:20], *random_texts(100)]:
        if "<|" not in text:
            assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), repr(text)
    assert theirs("가").input_ids == [ours.bos_id, *ours.encode("가")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (689, 690, 691)


SMALL = ["--data.path", "sample:ko?documents=300", "sample:en?documents=300", "--data.held-out",
         "sample:ko?documents=5&split=held_out", "sample:en?documents=5&split=held_out", "--num-bytes", "20000",
         "--vocab-size", "400"]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_recipe(kind, tmp_path, capfd):
    folder = tmp_path / "out"
    sweep = ["--sweep.sizes", "600", "700", "--sweep.ratios", "0.2", "0.8", "--sweep.seeds", "2"]
    more = ["--vocab-size", "600"] if kind == "sentencepiece" else sweep
    train_tokenizer.main([*SMALL, *more, "--kind", kind, "--korean-share", "0.5", "--folder", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert report["fingerprint"] == tokenizer.fingerprint() and report["vocab_size"] == tokenizer.vocab_size
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "일본의 통화는 무엇입니까? It's 2024."
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert set(report["languages"]) == {"ko", "en"} and set(report["sources"]) == {"sample_ko", "sample_en"}
    assert report["languages"]["ko"]["bytes_per_token"] > 1.5 and report["premium"]["segments"] > 200
    page = (folder / "report.md").read_text()
    assert page in capfd.readouterr().out and "Premium: Korean takes" in page
    assert flags.from_json(train_tokenizer.Config, report["config"]).kind == kind
    if kind == "bpe":
        assert len(report["sweep"]) == 8 and (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
        cell = {(row["vocab_size"], row["korean_share"], row["seed"]): row for row in report["sweep"]}
        for size in (600, 700):  # more Korean in the text: Korean costs less, English more
            assert cell[size, 0.8, 0]["korean_tokens"] < cell[size, 0.2, 0]["korean_tokens"]
            assert cell[size, 0.8, 0]["english_tokens"] > cell[size, 0.2, 0]["english_tokens"]
        assert cell[600, 0.2, 0]["premium"] != cell[600, 0.2, 1]["premium"]
        assert page.count("±") == 1 + 4 * 8
        with pytest.raises(SystemExit):
            train_tokenizer.main([*SMALL, "--folder", str(folder)])
        assert "--overwrite" in capfd.readouterr().err
        train_tokenizer.main([*SMALL, "--folder", str(folder), "--overwrite"])
        assert not (folder / "sweep.png").exists() and load_tokenizer(folder / "tokenizer").vocab_size == 400


@pytest.mark.parametrize(("arguments", "message"), [
    (["--vocab-size", "200"], "need at least 267"),
    (["--kind", "sentencepiece", "--vocab-size", "300"], "need at least"),
    (["--sweep.sizes", "300", "--sweep.ratios", "0.5", "1.0"], "between 0 and 1, got 1.0"),
    (["--sweep.sizes", "300"], "come together"),
    (["--sweep.sizes", "260", "--sweep.ratios", "0.5"], "sweep, 260 tokens with a Korean share of 0.5: vocab_size 260"),
    (["--korean-share", "0"], "between 0 and 1"),
    (["--num-bytes", "90000000"], "bytes of text, but 45,000,000 are asked for"),
    (["--data.path", "sample:ko?documents=9", "--korean-share", "0.5"], "labelled 'en'"),
    (["--data.never-predict", "<think>"], "no effect on a tokenizer"),
    (["--parallel", "nowhere.jsonl"], "no such file"),
    (["--data.held-out", "BAD"], "not valid UTF-8"),
    (["--data.held-out", "PLAIN"], "labelled with no language"),
    (["--data.held-out", "PLAIN?language=ko", "PLAIN?language=en"], "same name"),
])
def test_errors(arguments, message, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    (tmp_path / "plain.jsonl").write_text('{"text": "abc"}\n')
    place = lambda one: one.replace("BAD", f"{tmp_path}/bad.jsonl").replace("PLAIN", f"{tmp_path}/plain.jsonl")
    with pytest.raises((SystemExit, ValueError)) as stopped:
        train_tokenizer.main([*SMALL, *map(place, arguments), "--folder", str(tmp_path / "out")])
    shown = capfd.readouterr().err + str(stopped.value)
    assert message in " ".join(shown.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_summary_by_hand():
    row = lambda seed, value: Row(512, 0.5, seed, *[value] * len(FIGURES))
    one, = summarise([row(0, 1.0), row(1, 3.0)])
    assert one.mean["premium"] == 2 and one.spread["premium"] == pytest.approx(2**0.5)
    assert summarise([row(0, 1.0)])[0].spread["jaccard"] == 0
    assert sweep_table([one]).splitlines()[2].startswith("| 512 | 0.5 | 2.000 ± 1.414 | 2.0 ± 1.4 |")
    with pytest.raises(ValueError, match="twice"):
        SweepConfig(sizes=(3, 3), ratios=(0.5,))
