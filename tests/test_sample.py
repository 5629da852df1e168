"""Particles, and the embedded documents: deterministic, bounded, with the facts of the two splits apart."""

import pickle
import re
import string
import subprocess
import sys

import pytest

from jaxlm.data import sample_templates
from jaxlm.data.korean import Word, particle
from jaxlm.data.sample import compose, sample_documents, statements
from jaxlm.data.sample_facts import facts, names


@pytest.mark.parametrize(("words", "topic", "direction"), [
    ("일본 집 ㄱ 0 3 6 10 1,000 1.10 FM Spain 일본(Japan) '엔'", "은", "으로"),
    ("서울 달걀 ㄹ 1 7 8 12월 URL Seoul Google", "은", "로"),
    ("유로 로마자 ㅏ 2 4 5 9 2.5 1000000000000 50% KBS Peru 홍콩(특구)", "는", "로"),
    ("日本 € …", "은(는)", "으로(로)"),
])
def test_particles(words, topic, direction):
    for word in words.split():
        assert (particle(word, "은/는"), particle(word, "으로/로")) == (topic, direction), word
    assert particle("", "은/는") == "은(는)"


@pytest.mark.parametrize(("pair", "after_consonant", "after_vowel"), [
    ("은/는", "일본은", "독도는"), ("이/가", "일본이", "독도가"), ("을/를", "일본을", "독도를"),
    ("과/와", "일본과", "독도와"), ("이다/다", "일본이다", "독도다"), ("이라고/라고", "일본이라고", "독도라고"),
    ("으로/로", "일본으로", "독도로")])
def test_words_in_templates(pair, after_consonant, after_vowel):
    assert f"{Word('일본'):{pair}}" == after_consonant and f"{Word('독도'):{pair}}" == after_vowel
    assert f"{Word('독도'):>4}|{Word('독도')}" == "  독도|독도"
    with pytest.raises(ValueError, match="pair"):
        particle("일본", "은")


@pytest.mark.parametrize("language", ["ko", "en", "both"])
def test_documents_are_deterministic_and_well_formed(language):
    docs = list(sample_documents(language, 500))
    assert docs == list(sample_documents(language, 900))[:500]
    assert docs == list(pickle.loads(pickle.dumps(sample_documents(language, 500))))
    assert docs[-1] == sample_documents(language, 500)[-1] and len({doc.text for doc in docs}) > 450
    assert docs != list(sample_documents(language, 500, seed=1))
    assert docs[3] != sample_documents(language, 9, split="held_out")[3]
    assert {doc.language for doc in docs} == ({"ko", "en", None} if language == "both" else {language})
    for index, doc in enumerate(docs):
        text = doc.text
        assert text == text.strip() and "  " not in text and not re.search(r"[{}]|\([는가를로다]\)", text), text
        sentences = re.findall(r"[.?]'?(?= |\n|$)", text)
        assert 2 <= len(sentences) <= 16 and doc.source == "sample"
        stated = compose(language, index, False, 0)[2]
        assert 2 <= len(stated) <= 6
    with pytest.raises(IndexError):
        sample_documents(language, 3)[3]


def test_another_process_makes_the_same_text():
    code = "from jaxlm.data.sample import sample_documents as s; import hashlib; " \
           "print(hashlib.sha256('|'.join(d.text for d in s('both', 200)).encode()).hexdigest())"
    runs = [subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
            for seed in ("1", "2")]
    assert runs[0].stdout == runs[1].stdout != b""


def test_facts_of_the_splits_are_apart():
    train, held_out = facts(False), facts(True)
    assert not set(train) & set(held_out) and 0.07 < len(held_out) / (len(train) + len(held_out)) < 0.15
    for split, known in ((False, set(train)), (True, set(held_out))):
        for index in range(1500):
            assert set(compose("both", index, split, 7)[2]) <= known
    # The same on the surface: no wording of a held-out fact stands in a training document.
    text = "\n".join(doc.text for language in ("ko", "en", "both") for doc in sample_documents(language, 3000))
    sentences = set(re.split(r"(?<=[.?]) |\n", text)) | set(text.split("\n"))
    assert sum(statement in sentences for fact in train for statement in statements(fact, "en")) > 1000
    for fact in held_out:
        for language in ("ko", "en"):
            for statement in statements(fact, language):
                assert statement not in sentences, statement


def test_templates_cover_every_kind_in_both_languages():
    kinds = {fact.kind for fact in facts(False)}
    for table in (sample_templates.STATE, sample_templates.INTRO, sample_templates.QUESTION):
        assert set(table["ko"]) == set(table["en"]) == kinds
    for table in (sample_templates.FOLLOW, sample_templates.LIST):
        assert set(table["ko"]) == set(table["en"]) <= kinds
    for table in (sample_templates.STATE, sample_templates.FOLLOW):
        for forms in (*table["ko"].values(), *table["en"].values()):
            for form in forms:
                assert {name for _, name, _, _ in string.Formatter().parse(form) if name} <= {"a", "b"}


def test_known_facts_read_as_expected():
    by_key = {(fact.kind, fact.entity[1]): fact for fact in (*facts(False), *facts(True))}
    japan = by_key["currency", "JP"]
    assert "일본의 통화는 일본 엔화다." in statements(japan, "ko")
    assert "The currency of Japan is the Japanese yen." in statements(japan, "en")
    assert "프랑스에서는 프랑스어를 쓴다." in statements(by_key["language", "FR"], "ko")
    assert "English is spoken in the Bahamas." in statements(by_key["language", "BS"], "en")
    assert "러시아어는 키릴 문자로 적는다." in statements(by_key["script", "ru"], "ko")
    assert "Tokyo is in Japan." in statements(by_key["city", "Asia/Tokyo"], "en")
    assert names()["territory", "TT"] == ("트리니다드 토바고", "Trinidad and Tobago")


def test_wrong_arguments():
    for language, split in (("kr", "train"), ("ko", "test")):
        with pytest.raises(ValueError, match="is unknown; one of"):
            sample_documents(language, 3, split=split)
