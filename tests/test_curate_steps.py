"""Every step of curation on hand-made documents: what stays, what goes and why, in Korean and English."""

import codecs
import dataclasses
import gzip
import json
import typing
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.curate import config as settings
from jaxlm.curate.config import (
    KOREAN,
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    LanguageConfig,
    QualityConfig,
    RawConfig,
    Thresholds,
)
from jaxlm.curate.decontaminate import build_index, find_overlap, load_index, words_of
from jaxlm.curate.dedup import content_hash, first_of_each, minhash_signatures
from jaxlm.curate.extras import extra
from jaxlm.curate.filters import (
    FILTERS,
    build_filter,
    chosen_filters,
    hangul_share,
    particle_rule,
    particle_share,
    word_tokenizer,
)
from jaxlm.curate.language import identify, judge
from jaxlm.curate.quality import (
    evaluate,
    keep_threshold,
    load_model,
    read_labelled,
    score,
    split_rows,
    train,
)
from jaxlm.curate.raw import decode, read_raw, repair
from jaxlm.curate.stages import OUTPUTS

KO = """우리 마을에는 오래된 도서관이 하나 있는데 주말마다 많은 사람들이 찾아온다.
아이들은 그림책을 읽고 어른들은 창가에 앉아 신문을 천천히 넘긴다.
작년 봄에는 지붕이 새서 책이 젖었지만 주민들이 힘을 모아 고쳤다.
지금은 저녁에도 불을 켜 두기 때문에 퇴근한 뒤에 들를 수 있다.
사서는 새로 들어온 소설을 소개하면서 함께 읽을 모임을 만들었다."""
EN = """There is an old library in our village, and many people come to visit it on weekends with their families.
Children read picture books while the adults sit by the windows and slowly turn the pages of a newspaper.
Last spring the roof was leaking and some of the shelves got wet, but the neighbours repaired everything.
Now the lamps stay on in the evening, so that those who work late still have time to stop by.
The librarian presents recent novels and has started a small reading group for anyone who is curious."""


def verdict(name, text, language, config=None):
    """None if the filter keeps the text, else its reason."""
    document = extra("datatrove.data").Document(text, "1", metadata={"language": language})
    found = build_filter(name, config or FilterConfig()).filter(document)
    return None if found is True else found[1]


DROPPED = [
    ("gopher_quality", "ko", KO.split("\n")[0], "gopher_short_doc"),
    ("gopher_quality", "en", EN.split("\n")[0], "gopher_short_doc"),
    ("gopher_quality", "ko", "".join(KO.split()) + " " + KO.replace(" ", ""), "gopher_short_doc"),
    ("gopher_quality", "ko", " ".join(a + b + c for a, b, c in zip(*[iter((KO + KO).split())] * 3, strict=False)) * 3,
     "gopher_above_avg_threshold"),
    ("gopher_quality", "en", EN.replace(" ", " # "), "gopher_too_many_hashes"),
    ("gopher_quality", "ko", "\n".join(f"- {line}" for line in KO.replace(" ", "\n", 20).split("\n")),
     "gopher_too_many_bullets"),
    ("gopher_quality", "en", EN.replace(" the ", " ").replace(" and ", " ").replace(" of ", " ").replace(" to ", " ")
     .replace(" that ", " ").replace(" have ", " "), "gopher_enough_stop_words"),
    ("gopher_repetition", "ko", "\n".join([KO.split("\n")[1]] * 4 + [KO]), "dup_line_frac"),
    ("gopher_repetition", "en", " ".join([EN.split("\n")[2].lower()] * 9), "top_4_gram"),
    ("c4", "ko", KO + "\n코드는 { 로 시작해서 끝난다.", "curly_bracket"),
    ("c4", "en", EN + "\nThen lorem ipsum stands here as filler.", "lorem_ipsum"),
    ("c4", "en", EN.split("\n")[0], "too_few_sentences"),
    ("fineweb", "ko", KO.replace(" ", "\n"), "short_line_ratio"),
    ("fineweb", "en", EN.replace(".", ""), "line_punct_ratio"),
    ("particles", "ko", "서울맛집 부산여행 대구날씨 인천공항 광주카페 대전시장", "few_particles"),
    ("particles", "ko", "나무에 산에 집에 물에 길에", "same_particles"),
    ("particles", "ko", EN, "hangul_share"),
]


@pytest.mark.parametrize("name", FILTERS)
def test_prose_passes_every_filter(name):
    assert verdict(name, KO, "ko") is None and verdict(name, EN, "en") is None


@pytest.mark.parametrize(("name", "language", "text", "reason"), DROPPED)
def test_faulty_text_goes(name, language, text, reason):
    assert verdict(name, text, language) == reason


def test_every_filter_has_a_switch_and_a_fault():
    assert {name for name, *_ in DROPPED} == {*FILTERS}
    assert {one.name for one in dataclasses.fields(FilterConfig) if one.type is bool} == {*FILTERS}
    assert chosen_filters(FilterConfig(c4=False)) == [name for name in FILTERS if name != "c4"]
    assert {*OUTPUTS} == {*typing.get_args(settings.OutputFormat)}


def test_english_limits_would_drop_korean_prose():
    """Why KOREAN exists: the same text under the limits of English."""
    english = FilterConfig(ko=Thresholds())
    assert verdict("gopher_quality", KO, "ko", english) == "gopher_short_doc"
    only_words = dataclasses.replace(Thresholds(), min_words=30)
    assert verdict("gopher_quality", KO, "ko", FilterConfig(ko=only_words)) == "gopher_below_avg_threshold"
    assert verdict("fineweb", KO.replace(".", ""), "ko") is None  # sentences end in 다 without a full stop


def test_c4_removes_lines():
    document = extra("datatrove.data").Document(EN + "\nPlease enable Javascript to see this page.", "1",
                                                metadata={"language": "en"})
    assert build_filter("c4", FilterConfig()).filter(document) is True
    assert document.text == EN


def test_particles_by_hand():
    assert particle_share("나무가 산에 있다 서울") == (0.75, 3)
    assert particle_share("abc 1, 가") == (0.0, 0)
    assert hangul_share("가나 ab 12") == 0.5 and hangul_share("12") == 0.0
    assert particle_rule(KO, KOREAN) is None


def test_sentences():
    words = word_tokenizer()
    text = "값은 3.5이다. 정말? “그렇다.” 끝\n다음"
    assert words.sent_tokenize(text) == ["값은 3.5이다.", "정말?", "“그렇다.”", "끝", "다음"]
    assert words.sent_tokenize("") == []


def test_language():
    assert identify(KO)[0] == "ko" and identify(EN)[0] == "en"
    assert judge(KO, LanguageConfig()) == ("ko", None)
    assert judge(EN, LanguageConfig(keep=("ko",))) == ("en", "language en")
    assert judge("吾輩は猫である。名前はまだ無い。", LanguageConfig())[1] == "language ja"
    _, confidence = identify("data 데이터")
    sure = judge("data 데이터", LanguageConfig(min_confidence=1.0))[1]
    assert confidence < 1.0 and sure is not None


def test_decode_and_repair():
    assert decode(codecs.BOM_UTF8 + "가".encode()).text == "가"
    assert decode("한국어 문장".encode("cp949")) == ("한국어 문장", ("cp949",), "")
    assert decode("뷁 똠방각하".encode("cp949")).text == "뷁 똠방각하"  # syllables that EUC-KR does not have
    assert decode("über".encode("latin-1")).text is None
    assert "Größe".encode("latin-1").decode("cp949") == "Gr秤e" and decode("Größe".encode("latin-1")).text is None
    assert decode(b"\x80\xff\xfe").reason == "neither UTF-8 nor CP949"
    assert repair(KO.encode().decode("latin-1")) == (KO, ("mojibake",), "")
    assert repair(unicodedata.normalize("NFD", "한글")) == ("한글", ("nfc",), "")
    assert repair("a\x00b\r\nc") == ("ab\nc", ("control characters",), "")
    assert repair("잃은 \ufffd\ufffd 글자").reason == "replacement characters"


def test_raw_files(tmp_path):
    """The same rows in every format; what cannot be read is a row with a reason."""
    rows = [json.dumps({"text": KO}).encode(), json.dumps({"text": KO}, ensure_ascii=False).encode("cp949"),
            b'{"text": 1}', b"[]", b"{", b"", b'{"text": "\\ud800"}', json.dumps({"text": " \n"}).encode()]
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(b"\n".join(rows) + b"\n")
    found = list(read_raw(plain, RawConfig()))
    assert [row.text for row in found] == [KO, KO] + [None] * 6
    assert [row.reason for row in found] == ["", "", "no text in field 'text'", "no text in field 'text'", "not JSON",
                                             "empty", "lone surrogate", "empty"]
    assert found[1].repairs == ("cp949",) and found[2].id == f"{plain}:3"
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(pyarrow.compress(plain.read_bytes(), "zstd", asbytes=True))
    assert [row[1:] for row in read_raw(packed, RawConfig())] == [row[1:] for row in found]
    table = pyarrow.table({"body": pyarrow.array([KO.encode(), KO.encode("cp949"), None, b"\xff"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    texts = list(read_raw(tmp_path / "a.parquet", RawConfig(text_field="body")))
    assert [row.text for row in texts] == [KO, KO, None, None] and texts[3].reason == "neither UTF-8 nor CP949"
    with pytest.raises(ValueError, match="no column 'text'; columns: body"):
        list(read_raw(tmp_path / "a.parquet", RawConfig()))
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(KO.encode("cp949"))
    assert [row.text for row in read_raw(tmp_path / "a.txt.gz", RawConfig())] == [KO]
    lines = read_raw(tmp_path / "a.txt.gz", RawConfig(txt_documents="line"))
    assert [row.text for row in lines] == KO.split("\n")
    (tmp_path / "cut.txt.gz").write_bytes((tmp_path / "a.txt.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="ends in the middle"):
        list(read_raw(tmp_path / "cut.txt.gz", RawConfig()))


def test_first_of_each():
    a, b, c = (content_hash(text) for text in ("a b", "b", "c"))
    assert a == content_hash(" a\n b ") and len({a, b, c}) == 3
    found = first_of_each([np.array([a, b], "V16"), np.array([], "V16"), np.array([b, a, c], "V16")])
    assert [one.tolist() for one in found] == [[True, True], [], [False, False, True]]
    # Hashes may hold zero bytes anywhere, also at the end.
    zeros = np.array([b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\0" * 16], "V16")
    assert first_of_each([zeros])[0].tolist() == [True, True, True, False]


def test_minhash_estimates_jaccard(tmp_path):
    """The share of equal hashes is the similarity of the sets of 5-grams, within three standard deviations."""
    step = minhash_signatures(DedupConfig(buckets=32, hashes=8), tmp_path)
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)]
    texts = [words, [*words[:100], "x", *words[101:]], words[::-1]]
    shingles = [step.get_shingles(" ".join(one)) for one in texts]
    signs = [np.array(step.get_signature(one)).ravel() for one in shingles]
    sets = [{*one.ravel().tolist()} for one in shingles]
    for i, expected in ((1, 191 / 201), (2, 0.0)):
        jaccard = len(sets[0] & sets[i]) / len(sets[0] | sets[i])
        assert jaccard == expected
        assert abs((signs[0] == signs[i]).mean() - jaccard) <= 3 * np.sqrt(jaccard * (1 - jaccard) / 256)


def test_overlap_by_hand():
    config = DecontaminateConfig(ngram=3, min_ngram=2)
    index = build_index([("q1", "B, c  D"), ("q2", "x Y"), ("q3", "z")], config)
    assert (index.texts, index.too_short) == (3, 1)
    assert index.ngrams == {3: {"b c d": "q1"}, 2: {"x y": "q2"}}
    assert find_overlap(list("abcde"), index) == (0.6, ((1, 4),), ("q1",))
    assert find_overlap(words_of("x y! b c d b c d"), index) == (1.0, ((0, 8),), ("q1", "q2"))
    assert find_overlap(list("bcxd"), index) == (0.0, (), ())
    assert find_overlap([], index).share == 0.0


def test_benchmark_files(tmp_path):
    path = tmp_path / "b.jsonl"
    long = " ".join(KO.split()[:13])
    path.write_text(json.dumps({"question": long, "choices": ["하나", EN.split("\n")[0]], "answer": 1}) + "\n")
    index = load_index(DecontaminateConfig(benchmarks=(str(path),)))
    assert index.texts == 3 and index.too_short == 1
    assert find_overlap(words_of(KO), index).spans == ((0, 13),)
    assert len(load_index(DecontaminateConfig(benchmarks=(str(path),), fields=("question",))).ngrams) == 1
    with pytest.raises(ValueError, match=r"no field 'questions' \(did you mean 'question'\?\)"):
        load_index(DecontaminateConfig(benchmarks=(str(path),), fields=("questions",)))
    with pytest.raises(ValueError, match="none of 1 texts has 8 words"):
        (tmp_path / "short.jsonl").write_text('{"q": "two words"}\n')
        load_index(DecontaminateConfig(benchmarks=(str(tmp_path / "short.jsonl"),)))


def test_evaluation_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.7, 0.1]), np.array([True, False, True, False, False])
    # Of 6 pairs: 0.9 beats three, 0.7 beats one and ties with one.
    assert evaluate(scores, positive, 0.4) == (5, 2, pytest.approx(4.5 / 6), 0.4, 0.5)
    assert keep_threshold(scores, 0.4) == 0.8 and keep_threshold(scores, 0.01) == 0.9


def labelled_file(path, count=60):
    rng = np.random.default_rng(0)
    good = ["연구", "결과를", "설명하고", "근거를", "제시한다", "evidence"]
    bad = ["할인", "대박", "클릭", "쿠폰", "무료", "casino"]
    rows = [{"label": int(kind), "text": " ".join(rng.choice(good if kind else bad, 12))}
            for kind in rng.integers(0, 2, count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return good, bad


def test_classifier_separates_planted_classes(tmp_path):
    good, bad = labelled_file(tmp_path / "l.jsonl")
    config = QualityConfig(model=tmp_path / "q.safetensors", labelled=tmp_path / "l.jsonl", keep_share=0.3,
                           features=2**12, held_out=0.4)
    found = train(config)
    assert found.auc == 1.0 and found.precision == 1.0 and 10 < found.rows < 40
    assert score(config.model, " ".join(good)) > 0.8 > 0.2 > score(config.model, " ".join(bad))
    # Under other particles the words of the training are known.
    assert score(config.model, "연구는 근거가 결과의") > 0.6
    assert json.loads((tmp_path / "q.json").read_text())["auc"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.jsonl", "q.json", "q.safetensors"]
    first = config.model.read_bytes()
    train(config)
    assert config.model.read_bytes() == first
    learned, held = split_rows(read_labelled(config.labelled), 0.4)
    assert not {text for _, text in learned} & {text for _, text in held}


def test_model_is_that_of_sklearn(tmp_path):
    """The saved weights give the probabilities of the library's own classifier."""
    labelled_file(tmp_path / "l.jsonl")
    config = QualityConfig(model=tmp_path / "q.safetensors", labelled=tmp_path / "l.jsonl", threshold=0.5, features=512)
    train(config)
    model, (learned, held) = load_model(config.model), split_rows(read_labelled(config.labelled), 0.2)
    own = extra("sklearn.linear_model").LogisticRegression(C=10.0, max_iter=1000)
    own.fit(model.vectors([text for _, text in learned]), [label == "1" for label, _ in learned])
    texts = [text for _, text in held]
    np.testing.assert_allclose(model.scores(texts), own.predict_proba(model.vectors(texts))[:, 1], rtol=1e-5)


def test_classifier_faults(tmp_path):
    labelled_file(tmp_path / "l.jsonl")
    config = QualityConfig(model=tmp_path / "q.safetensors", labelled=tmp_path / "l.jsonl", threshold=0.5,
                           positive="good")
    with pytest.raises(ValueError, match=r"need both texts labelled 'good' \(quality.positive\) and others"):
        train(config)
    (tmp_path / "bad.jsonl").write_text('{"label": 1, "text": "a"}\n{"label": true, "text": "a"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: a labelled row needs 'label'"):
        read_labelled(tmp_path / "bad.jsonl")
    (tmp_path / "x.safetensors").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"x.safetensors: no quality model"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Thresholds(min_words=-1), "min_words must be a number from 0 up"),
    (lambda: Thresholds(min_words=9, max_words=8), "must not be above"),
    (lambda: LanguageConfig(keep=()), "at least one"),
    (lambda: LanguageConfig(min_confidence=2), "from 0 to 1"),
    (lambda: DedupConfig(buckets=0), "dedup.buckets must be at least 1"),
    (lambda: QualityConfig(threshold=0.5), "no effect without quality.model"),
    (lambda: QualityConfig(model="m"), "needs one of"),
    (lambda: QualityConfig(model="m", threshold=2.0), "above 0 and below 1"),
    (lambda: DecontaminateConfig(min_ngram=20), "min_ngram must be from 1 to ngram 13"),
    (lambda: DecontaminateConfig(fields=("q",)), "no effect"),
    (lambda: RawConfig(min_chars=0), "at least 1"),
])
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_extra():
    with pytest.raises(ValueError, match=r"needs the package no_such_module: pip install 'jaxlm\[curate\]"):
        extra("no_such_module")
