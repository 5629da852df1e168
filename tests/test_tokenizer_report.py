"""The report on a tokenizer against numbers worked out by hand; parallel text and its faults; the text drawn."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxlm.data.parallel_text import Pair, open_parallel, sample_pairs
from jaxlm.data.sources import open_source, parse_source
from jaxlm.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxlm.data.tokenizer_report import Coverage, Overlap, measure, overlap, premium, rates
from jaxlm.data.tokenizer_text import draw_texts, make_pools

BYTES = ByteTokenizer()


def merged(*merges: tuple[str, str]) -> JsonTokenizer:
    """Bytes, and the tokens of these merges: id 256 is the first one."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return JsonTokenizer(tokenizer.to_str().encode())


def test_bytes_by_hand():
    found = measure(BYTES, ["2024 한"])
    assert found == Coverage(1, 8, 6, 2, 8, 4, 4, 3, frozenset({50, 48, 52, 32, 0xED, 0x95, 0x9C}))
    figures = rates(found, BYTES.vocab_size)
    assert figures == {"texts": 1, "bytes": 8, "tokens": 8, "bytes_per_token": 1.0, "characters_per_token": 6 / 8,
                       "fertility": 4.0, "single_digit_rate": 1.0, "cut_rate": 3 / 8, "unused_share": 1 - 7 / 259}


def test_merges_by_hand():
    """ "20" is one token, " \\xed" a space and a third of 한, which therefore is cut into three tokens."""
    space, first = BYTES_AS_LETTERS[0x20], BYTES_AS_LETTERS[0xED]
    tokenizer = merged(("2", "0"), (space, first), ("a", "b"))
    found = measure(tokenizer, ["2024 한", "ab ab"])
    # 20|2|4| \xed|\x95|\x9c and ab| |ab
    assert found[:8] == (2, 13, 11, 4, 9, 4, 2, 3)
    assert {256, 257, 258} <= found.used and len(found.used) == 8
    figures = rates(found, 100)
    assert figures["bytes_per_token"] == 13 / 9 and figures["fertility"] == 9 / 4
    assert figures["single_digit_rate"] == 0.5 and figures["unused_share"] == pytest.approx(0.92)


BYTES_AS_LETTERS = {0x20: "Ġ", 0xED: "í"}


def test_digits_of_other_scripts_and_of_bytes():
    """A fullwidth digit in three bytes is a digit, but no token; a fraction is no decimal digit."""
    assert measure(BYTES, ["１½7"])[5:8] == (2, 1, 5)
    assert rates(measure(BYTES, ["가"]), 259)["single_digit_rate"] is None
    assert rates(measure(BYTES, [" "]), 259)["fertility"] is None


def test_real_replacement_characters_are_whole():
    tokenizer = merged(("ï", "¿"), ("ï¿", "½"))
    assert measure(tokenizer, ["a\ufffdb"]).cut == 0 and measure(BYTES, ["a\ufffdb"]).cut == 3


def test_overlap_by_hand():
    coverage = lambda *used: Coverage(*[1] * 8, frozenset(used))
    assert overlap(coverage(1, 2, 3), coverage(3, 4)) == Overlap(1, 4, 0.25)
    assert overlap(coverage(1), coverage(1)).jaccard == 1 and overlap(coverage(1), coverage(2)).jaccard == 0


def test_premium_by_hand():
    """Two segments of 3:1 and 6:4 bytes: resamples are 6/2, 9/5 or 12/8, and the quartiles at the ends are certain."""
    found = premium(BYTES, [Pair("한", "a"), Pair("한글", "abcd")])
    assert found == (9 / 5, 1.5, 3.0, 2, 9, 5, 9 / 5)
    assert premium(merged(("a", "b")), [Pair("ab", "a"), Pair("abab", "aa")])[:3] == (1, 1, 1)  # no spread, no width
    many = [Pair("한" * (1 + i % 5), "abc") for i in range(40)]
    first, again, other = (premium(BYTES, many, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.low < first.ratio < first.high
    assert premium(BYTES, many, level=0.5).high < first.high


def test_nothing_to_measure():
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no text to measure"):
            measure(BYTES, texts)
    with pytest.raises(ValueError, match="no parallel text"):
        premium(BYTES, [])
    with pytest.raises(ValueError, match="no token"):
        premium(BYTES, [Pair("", "a")])


def test_embedded_pairs_state_the_same():
    pairs = sample_pairs()
    assert len(pairs) > 200 and pairs == sample_pairs()
    assert all("가" <= max(pair.ko) <= "힣" and pair.en.isprintable() for pair in pairs)
    assert sum(pair.ko.endswith("?") for pair in pairs) == 0  # a question comes with its answer


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_parallel_files(tmp_path):
    rows = [{"ko": "가", "en": "a", "src": "x"}, {"ko": "나", "en": "b", "src": "y"}]
    path = write(tmp_path / "p.jsonl", *rows)
    assert open_parallel(path) == [("가", "a"), ("나", "b")] == [(pair.ko, pair.en) for pair in open_parallel(path)]
    assert open_parallel(f"{path}?exclude=src:x") == [("나", "b")]
    (tmp_path / "p.tsv").write_text("en\tko\nc\t다\n")
    assert open_parallel(str(tmp_path / "p.tsv")) == [("다", "c")]


@pytest.mark.parametrize(("row", "message"), [
    ({"ko": "가"}, r"p\.jsonl:2: no field 'en'"),
    ({"ko": "가", "en": " "}, r"p\.jsonl:2: 'en' must be a text with something in it, got ' '"),
    ({"ko": None, "en": "a"}, r"p\.jsonl:2: 'ko' must be a text"),
    (["가", "a"], r"p\.jsonl:2: not a JSON object"),
])
def test_a_missing_side_is_named(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", {"ko": "가", "en": "a"}, row)
    with pytest.raises(ValueError, match=message):
        open_parallel(path)
    assert open_parallel(path, max_bad_rows=1) == [("가", "a")]


def test_parallel_options_without_effect(tmp_path):
    path = write(tmp_path / "p.jsonl", {"ko": "가", "en": "a"})
    for option in ("text_field=x", "weight=2", "language=ko", "text={ko}"):
        with pytest.raises(ValueError, match=f"{option.split('=')[0]} has (no|an) effect"):
            open_parallel(f"{path}?{option}")
    with pytest.raises(ValueError, match="just 'sample'"):
        open_parallel("sample:ko")
    (tmp_path / "bad.jsonl").write_bytes(b'{"ko": "\xff", "en": "a"}\n')
    with pytest.raises(ValueError, match="not valid UTF-8"):
        open_parallel(str(tmp_path / "bad.jsonl"))


def sources(tmp_path):
    """Korean, and two English sources of weight 1 and 4, of 3- and 1-byte characters in texts of 30 bytes."""
    ko = write(tmp_path / "ko.jsonl", *({"text": "가" * 10} for _ in range(40)))
    en = [write(tmp_path / f"{one}.jsonl", *({"text": one * 30} for _ in range(40))) for one in "ab"]
    specs = f"{ko}?language=ko", f"{en[0]}?language=en", f"{en[1]}?language=en&weight=4"
    return [open_source(parse_source(spec)) for spec in specs]


def test_draw_by_hand(tmp_path):
    """The example of the docstring; 150 bytes are whole characters of 3, so none is lost by the cut."""
    pools = make_pools(sources(tmp_path), ("ko", "en"))
    texts = "".join(draw_texts(pools, num_bytes=1000, seed=0, shares={"ko": 0.15, "en": 0.85}))
    assert {one: texts.count(one) for one in "가ab"} == {"가": 50, "a": 170, "b": 680}
    # Without shares the weights count alone: 1 : 1 : 4 of 600 bytes; 100 are 33 characters and a lost third.
    texts = "".join(draw_texts(make_pools(sources(tmp_path)), num_bytes=600, seed=0))
    assert {one: texts.count(one) for one in "가ab"} == {"가": 33, "a": 100, "b": 400}


def test_draws_are_samples_without_repetition():
    documents = [{"text": f"{i:03} ", "language": "ko" if i % 2 else "en"} for i in range(100)]
    pools = make_pools([open_source(documents)], ("ko", "en"))
    first, again, other = (draw_texts(pools, num_bytes=160, seed=seed, shares={"ko": 0.5, "en": 0.5})
                           for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == len(first) == 40
    assert sum(int(text) % 2 for text in first) == 20


def test_too_little_or_unlabelled_text(tmp_path, caplog):
    pools = make_pools(sources(tmp_path), ("ko", "en"))
    with pytest.raises(ValueError, match=r"ko\.jsonl: 1,200 bytes of ko text, but 1,500 are asked for"):
        draw_texts(pools, num_bytes=3000, seed=0, shares={"ko": 0.5, "en": 0.5})
    with pytest.raises(ValueError, match="no document of the training sources is labelled 'en'"):
        make_pools([open_source([{"text": "가", "language": "ko"}])], ("ko", "en"))
    make_pools([open_source([{"text": "가", "language": "ko"}, {"text": "x"}])], ("ko",))
    assert "left out 1 documents" in caplog.text
