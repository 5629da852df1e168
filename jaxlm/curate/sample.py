"""Raw files with planted faults, composed from the embedded facts: every count of a report is known beforehand."""

import gzip
import itertools
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from jaxlm.data.sample import sample_documents

CLEAN = 12              # documents of each language without a fault
SENTENCES = 12          # of a clean document
EXACT, NEAR, MOJIBAKE, CP949, LEAKS = 4, 3, 2, 1, 2
_SENTENCE = re.compile(r"[^.?!]+[.?!](?=\s|$)")


class RawSample(NamedTuple):
    """What was written: raw files, a benchmark whose texts leaked, and how many documents each step must drop."""

    files: tuple[Path, ...]
    benchmark: Path
    rows: int
    dropped: dict[str, int]
    notes: dict[str, int]
    kept: int


def write_sample(folder: Path, seed: int = 0) -> RawSample:
    """Writes raw.jsonl (faults), copy.jsonl.gz (duplicates), legacy.txt (CP949), broken.txt and table.parquet."""
    rng = random.Random(f"curate {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    ko, en = _documents("ko", CLEAN + LEAKS + CP949), _documents("en", CLEAN)
    leaks, legacy, ko = ko[:LEAKS], ko[LEAKS:LEAKS + CP949], ko[LEAKS + CP949:]
    faults = _faults(ko[0])
    broken = [text.encode().decode("latin-1") for text in ko[-MOJIBAKE:]]
    planted = [text for texts in faults.values() for text in texts]
    lines = [json.dumps({"text": text}, ensure_ascii=False)
             for text in [*ko[:-MOJIBAKE], *broken, *en[:-2], *leaks, *planted]]
    lines += ['{"text": "cut off', json.dumps({"text": "  "}), json.dumps({"body": "no text"})]
    rng.shuffle(lines)
    (folder / "raw.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    near = [_changed(text, rng) for text in en[:NEAR]]
    with gzip.open(folder / "copy.jsonl.gz", "wt", encoding="utf-8") as file:
        for text in [*ko[:EXACT - 1], en[0].replace(" ", "  ", 3), *near]:
            file.write(json.dumps({"text": text}) + "\n")
    (folder / "legacy.txt").write_bytes(legacy[0].encode("cp949"))
    (folder / "broken.txt").write_bytes(bytes(range(128, 256)) * 4)
    pyarrow.parquet.write_table(pyarrow.table({"text": en[-2:]}), folder / "table.parquet")
    with (folder / "benchmark.jsonl").open("w", encoding="utf-8") as file:
        for text in leaks:
            sentence = " ".join(text.split()[8:28])
            file.write(json.dumps({"question": sentence, "answer": "."}, ensure_ascii=False) + "\n")
    files = tuple(folder / name for name in ("broken.txt", "copy.jsonl.gz", "legacy.txt", "raw.jsonl", "table.parquet"))
    dropped = {"read": 4, **{name: len(texts) for name, texts in faults.items()}, "decontaminate": LEAKS,
               "exact_dedup": EXACT, "minhash_dedup": NEAR}
    kept = 2 * CLEAN + CP949
    return RawSample(files, folder / "benchmark.jsonl", kept + sum(dropped.values()), dropped,
                     {"repaired: cp949": CP949, "repaired: mojibake": MOJIBAKE}, kept)


def write_web(path: Path, language: str, count: int) -> Path:
    """`count` raw documents in ko or en, each three of the embedded sample; the filters drop about a fifth of them."""
    texts = [document.text for document in sample_documents(language, 3 * count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": "\n".join(texts[i:i + 3])}, ensure_ascii=False) + "\n"
                            for i in range(0, 3 * count, 3)), encoding="utf-8")
    return path


def _documents(language: str, count: int) -> list[str]:
    """Texts without a common sentence, in paragraphs of four, and within a text without a common pair of words.

    So none repeats itself as the facts' templates do, and none is a near-duplicate of another.
    """
    pool, texts = _sentences(language), []
    for _ in range(count):
        own: list[str] = []
        pairs: set[tuple[str, str]] = set()
        for sentence in pool:
            words = sentence.split()
            new = {*itertools.pairwise(words)}
            if len(own) < SENTENCES and not new & pairs:
                own.append(sentence)
                pairs |= new
        assert len(own) == SENTENCES, "too few sentences"
        pool = [sentence for sentence in pool if sentence not in own]
        texts.append("\n".join(" ".join(own[i:i + 4]) for i in range(0, SENTENCES, 4)))
    return texts


def _sentences(language: str) -> list[str]:
    """Different sentences of at least four words, shuffled."""
    found = {sentence.strip(): None for document in sample_documents(language, 1500, seed=7)
             for sentence in _SENTENCE.findall(document.text)}
    chosen = [one for one in found if len(one.split()) > 3 and "'" not in one and one[:1].isalpha()]
    random.Random(language).shuffle(chosen)
    return chosen


def _changed(text: str, rng: random.Random) -> str:
    """One word replaced: 5 of the 5-grams differ."""
    words = text.split(" ")
    words[rng.randrange(len(words) // 3, len(words) // 2)] = "elsewhere"
    return " ".join(words)


def _faults(good: str) -> dict[str, list[str]]:
    """Texts by the step that must drop them."""
    menu = "홈 회사소개 사업분야 고객센터 공지사항 로그인 회원가입 사이트맵 이용약관 개인정보 채용정보 오시는길"
    lines = good.split("\n")
    return {
        "language": ["吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
                     "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß, warum er das tut."],
        "gopher_repetition": ["\n".join([lines[0]] * 6), "Buy cheap tickets now and save a lot of money. " * 30],
        "gopher_quality": [_hashed(good), _numbered(good)],
        "c4": [good + "\n함수는 { 로 시작하고 줄마다 명령이 하나씩 있다."],
        "fineweb": [_short_lines(good)],
        "particles": [_keywords(menu)],
    }


def _hashed(good: str) -> str:
    """A hash sign at every fourth word."""
    return " ".join(f"#{word}" if i % 4 == 0 else word for i, word in enumerate(good.split()))


def _numbered(good: str) -> str:
    """A number after every second word, each another one."""
    return " ".join(f"{word} {i * 7919 % 1000}" if i % 2 else word for i, word in enumerate(good.split()))


def _short_lines(good: str) -> str:
    """Prose broken after every few words, as in poems, subtitles and listings."""
    words = good.split()
    return "\n".join(" ".join(words[i:i + 2]) for i in range(0, len(words), 2))


def _keywords(menu: str) -> str:
    """Nouns without particles, in lines that end in a full stop, so that only the particles are missing."""
    prefixes = ("서울", "부산", "대구", "인천", "광주", "대전", "울산", "제주")
    return "\n".join(" ".join(f"{prefix}{word}" for word in menu.split()) + "." for prefix in prefixes)
