"""Every format gives the same documents, and every fault is one clear error or a counted, named row."""

import gzip
import json
import logging
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.data import record_files
from jaxlm.data.sources import Document, SourceConfig, open_source, parse_source
from tests.tiny_tfds.tiny_documents import TEXTS

# A tab or newline in a text cannot stand in TSV, so the common rows have none.
ROWS = [{"id": str(i), "src": "a" if i % 3 else "b", "lang": "ko" if i % 2 else "en", "text": text}
        for i, text in enumerate(['"말"만 하지', "plain", " 앞 공백", "😀\u2028줄", "한\x0c글", "끝", "한 \\n 줄"])]
EXPECTED = [Document(row["text"], row["lang"], row["src"]) for row in ROWS]
OPTIONS = {"language_field": "lang", "source_field": "src"}


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def tsv(rows=ROWS) -> bytes:
    return ("\n".join(["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]) + "\n").encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def write_parquet(path: Path, rows=ROWS) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def write_array_record(path: Path, records) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def open_text(path: Path, content: bytes, max_bad_rows: int = 0, **options):
    path.write_bytes(content)
    return open_source(SourceConfig(path=str(path), **options), max_bad_rows=max_bad_rows)


def fails(match: str, config, max_bad_rows: int = 0) -> str:
    """The message of the error that opening raises."""
    with pytest.raises(ValueError, match=match) as caught:
        open_source(config, max_bad_rows=max_bad_rows)
    return str(caught.value)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    # tfds leaves its own progress bars and a few handles to the garbage collector: not this project's warnings.
    subprocess.run([sys.executable, "-c", "import sys, pathlib; from tests.tiny_tfds.tiny_documents import prepare; "
                    "prepare(pathlib.Path(sys.argv[1]))", str(folder)], check=True, capture_output=True)
    return folder


FORMATS = {
    "a.jsonl": jsonl(), "a.ndjson": jsonl(), "a.jsonl.gz": gzip.compress(jsonl()), "a.jsonl.zst": zstd(jsonl()),
    "a.tsv": tsv(), "a.tsv.gz": gzip.compress(tsv()), "a.tsv.zst": zstd(tsv()),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(), "blank.jsonl": jsonl().replace(b"}\n", b"}\n\n"),
    "members.jsonl.gz": gzip.compress(jsonl(ROWS[:3])) + gzip.compress(jsonl(ROWS[3:])),
    "bom.tsv": b"\xef\xbb\xbf" + tsv(), "crlf.tsv": tsv().replace(b"\n", b"\r\n"), "no-newline.tsv": tsv()[:-1],
}


@pytest.mark.parametrize("name", [*FORMATS, "a.parquet", "a.array_record", "list"])
def test_every_format_gives_the_same_documents(name, tmp_path):
    path = tmp_path / name
    if name == "list":
        source = open_source([doc._asdict() for doc in EXPECTED])
    elif name == "a.parquet":
        write_parquet(path)
        source = open_source(SourceConfig(path=str(path), **OPTIONS))
    elif name == "a.array_record":
        write_array_record(path, jsonl().splitlines())
        source = open_source(SourceConfig(path=str(path), **OPTIONS))
    else:
        source = open_text(path, FORMATS[name], **OPTIONS)
    assert list(source) == EXPECTED and len(source) == len(EXPECTED)
    assert source[-1] == EXPECTED[-1] and source.bad_rows == []
    with pytest.raises(IndexError):
        source[len(source)]
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == EXPECTED and copy.name == source.name and copy.config == source.config


def test_glob_reads_all_files_in_order(tmp_path):
    (tmp_path / "a-1.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[4:])))
    (tmp_path / "a-0.tsv").write_bytes(tsv(ROWS[:4]))
    (tmp_path / "b.jsonl").write_bytes(b"broken")
    source = open_source(SourceConfig(path=f"{tmp_path}/a-*", **OPTIONS))
    assert list(source) == EXPECTED and source.name == "a"


def test_sharded_array_record_must_be_complete(tmp_path):
    for shard in range(2):
        write_array_record(tmp_path / f"x.array_record-0000{shard}-of-00002", jsonl().splitlines()[shard::2])
    source = open_source(SourceConfig(path=f"{tmp_path}/x.array_record-*", **OPTIONS))
    assert sorted(source) == sorted(EXPECTED) and source.name == "x"
    (tmp_path / "x.array_record-00001-of-00002").unlink()
    fails("1 of 2 shards are there", SourceConfig(path=f"{tmp_path}/x.array_record-*"))


def test_tfds_without_tensorflow_and_without_the_builder_class(tfds_folder):
    config = parse_source(f"tfds:tiny_documents/small?data_dir={tfds_folder}&language_field=language&name=tiny")
    source = open_source(config)
    assert {doc.text for doc in source if doc} == set(TEXTS) and len(source) == len(TEXTS) + 1
    assert source.dropped == {"bad": 0, "empty": 1, "filtered": 0}
    assert {doc for doc in pickle.loads(pickle.dumps(source)) if doc} == {doc for doc in source if doc}
    assert source.dropped["empty"] == 1, "a second pass must not count again"
    assert len(open_source(parse_source(f"tfds:tiny_documents?data_dir={tfds_folder}&split=test"))) == 1
    for spec, message in (("tiny_documents?split=tst", "no split 'tst' .did you mean 'test'"),
                          ("tiny_documents?split=train[:x]", "split 'train.:x.' cannot be read"),
                          ("tiny_documents?text_field=txt", "did you mean 'text'"),
                          ("tiny_docs?split=train", "no such data set in .*data_dir")):
        fails(message, parse_source(f"tfds:{spec}&data_dir={tfds_folder}"))
    assert "tensorflow" not in sys.modules


def test_in_memory_strings():
    source = open_source(["하나", " ", "two"])
    assert [doc.text for doc in source] == ["하나", "two"] and source.dropped["empty"] == 1
    fails("empty corpus", [])
    fails("parse_source", "a.jsonl")


def test_template_filters_and_constant_language(tmp_path):
    rows = [{"src": s, "n": n, "ko": k, "en": e} for s, n, k, e in
            [("x", 1, "가", "a"), ("dev", 2, "나", "b"), ("y", 3, "다", "c"), ("y", 4, "", " ")]]
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    source = open_source(parse_source(f"{tmp_path}/p.jsonl?text={{{{{{ko}}}}}}%0A{{en}}&exclude=src:dev&language=ko&"
                                      "source_field=n&weight=2&name=pair"))
    assert list(source) == [Document("{가}\na", "ko", "1"), Document("{다}\nc", "ko", "3")]
    assert source.dropped == {"bad": 0, "empty": 1, "filtered": 1}
    assert source.name == "pair" and source.config.weight == 2
    kept = open_source(parse_source(f"{tmp_path}/p.jsonl?text_field=ko&include=src:x&include=src:dev&exclude=n:1"))
    assert [doc.text for doc in kept] == ["나"]
    # A misspelt exclusion would let held-out rows into training.
    fails("exclude=src:dve matches no row", parse_source(f"{tmp_path}/p.jsonl?text_field=ko&exclude=src:dve"))
    fails("no field 'scr' .did you mean 'src'", parse_source(f"{tmp_path}/p.jsonl?text_field=ko&exclude=scr:dev"))


BAD_LINES = {b"{broken": "not JSON", b"[1, 2]": "not a JSON object but list", b'{"txt": "x"}': "no field 'text'.*'txt'",
             b'{"text": 3}': "not a string but int", b'{"text": null}': "not a string but NoneType",
             b'{"text": "\xff"}': "not valid UTF-8", b'{"text": "\\ud800"}': "lone surrogate", b"[" * 100_000: "deep"}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12].decode("latin-1"))
def test_bad_rows_are_named_counted_and_limited(line, tmp_path, caplog):
    path, content = tmp_path / "a.jsonl", jsonl(ROWS[:2]) + line + b"\n" + b'{"text": " "}\n' + jsonl(ROWS[2:])
    with caplog.at_level(logging.WARNING, "jaxlm"):
        source = open_text(path, content, max_bad_rows=1, **OPTIONS)
    assert list(source) == EXPECTED and source.dropped == {"bad": 1, "empty": 1, "filtered": 0}
    assert source.bad_rows[0].startswith(f"{path}:3: ")
    message = fails(BAD_LINES[line], SourceConfig(path=str(path), **OPTIONS))
    assert f"{path}:3: " in message and "1 of 9 rows read are bad, 0 allowed" in message
    assert "dropped 1 bad rows and 1 without text" in caplog.text
    write_array_record(tmp_path / "a.array_record", content.splitlines())
    caplog.clear()
    config = SourceConfig(path=str(tmp_path / "a.array_record"), **OPTIONS)
    lazy = open_source(config, max_bad_rows=1)
    for _ in range(2):  # Reading must not count again what opening has tried.
        assert [doc for doc in lazy if doc] == EXPECTED
    assert lazy.dropped == {"bad": 1, "empty": 1, "filtered": 0}
    assert lazy.bad_rows[0].startswith(f"{config.path}:3: ")
    message = fails(BAD_LINES[line], config)
    assert f"{config.path}:3: " in message and "1 of 9 rows read are bad, 0 allowed" in message


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Every record that is decoded, by the number in its `id`."""
    indices, decode = [], record_files._row
    monkeypatch.setattr(record_files, "_row", lambda record: (row := decode(record), indices.append(row["id"]))[0])
    return indices


def write_numbered(path: Path, count: int, **fields) -> SourceConfig:
    write_array_record(path, [json.dumps({"id": i, "text": f"text {i}", **fields}).encode() for i in range(count)])
    return SourceConfig(path=str(path))


def test_opening_tries_spread_records(tmp_path, reads):
    write_numbered(tmp_path / "a.array_record", 3000)
    source = open_source(SourceConfig(path=f"{tmp_path}/a.array_record"))
    assert len(reads) == 1000 and [i // 3 for i in reads] == list(range(1000)), "one of each three records"
    assert len({i % 3 for i in reads}) == 3, "the distances have no period"
    assert source.dropped == {"bad": 0, "empty": 0, "filtered": 0}
    source = open_source(SourceConfig(path=f"{tmp_path}/a.array_record", exclude=("id:7777",)))
    assert source[0].text == "text 0", "what no record tried matches may stand in the others"


def test_each_bad_record_is_named_once_when_it_is_met(tmp_path, reads, caplog):
    path = tmp_path / "a.array_record"
    open_source(write_numbered(path, 1002))
    tried, late = reads[0], next(i for i in range(1002) if i not in reads)
    write_array_record(path, [json.dumps({"id": i} if i in (tried, late) else {"id": i, "text": "x"}).encode()
                              for i in range(1002)])
    source = open_source(SourceConfig(path=str(path)), max_bad_rows=2)
    named = [record.getMessage() for record in caplog.records]
    assert [f"{path}:{tried + 1}: no field 'text'" in line for line in named] == [True]
    assert source.dropped["bad"] == 1
    for copy in (pickle.loads(pickle.dumps(source)), source):
        caplog.clear()
        for _ in range(2):
            assert sum(document is None for document in copy) == 2
        (named,) = [record.getMessage() for record in caplog.records]
        assert f"number 2 of 2 allowed): {path}:{late + 1}: no field" in named and copy.dropped["bad"] == 2
    strict = open_source(SourceConfig(path=str(path)), max_bad_rows=1)
    with pytest.raises(ValueError, match=rf"2 of \d+ rows read are bad, 1 allowed .*\n.*\n.*:{late + 1}: no field"):
        list(strict)


def test_a_lazy_source_without_a_document_fails_at_open(tmp_path, tfds_folder):
    path = str(tmp_path / "a.array_record")
    write_numbered(tmp_path / "a.array_record", 20, lang="ko")
    fails("no row left of 20 tried of 20 .0 without text, 20 filtered, 0 bad",
          SourceConfig(path=path, include=("lang:kr",)))
    fails("include=lang:kr matches no row", SourceConfig(path=path, include=("lang:ko", "lang:kr")))
    fails("exclude=lang:em matches no row", SourceConfig(path=path, exclude=("lang:em",)))
    missing = SourceConfig(path=path, language_field="lng")
    fails("a.array_record:1: no field 'lng' .did you mean 'lang'.*in all 20 rows read", missing)
    fails("no row left of 20 tried of 20 .0 without text, 0 filtered, 20 bad", missing, 20)
    fails("no row left of 5 tried of 5", parse_source(
        f"tfds:tiny_documents/small?data_dir={tfds_folder}&include=language:kr"))
    write_numbered(tmp_path / "a.array_record", 1500, text=" ")
    fails("no row left of 1000 tried of 1500 .1000 without text", SourceConfig(path=path))


def test_fingerprints_notice_other_data(tmp_path):
    texts = [f"text {i}" for i in range(64)]
    prints = {name: open_source(changed).fingerprint() for name, changed in {
        "same": texts, "first": ["text x", *texts[1:]], "last": [*texts[:-1], "text x"], "shorter": texts[:-1],
        "order": texts[::-1], "border": ["text 0t", "ext 1", *texts[2:]], "longer": [*texts, *texts],
        "other length": [*texts, *texts, "x"]}.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["same"] == zlib.crc32(("64" + "".join(f":{len(text)}:{text}" for text in texts)).encode())
    assert pickle.loads(pickle.dumps(open_source(texts))).fingerprint() == prints["same"]
    records = [json.dumps({"text": text}).encode() for text in ["text 0", " ", *texts[2:]]]
    write_array_record(tmp_path / "a.array_record", records)
    with_empty = open_source(SourceConfig(path=f"{tmp_path}/a.array_record")).fingerprint()
    assert with_empty not in prints.values()
    write_array_record(tmp_path / "a.array_record", [records[0], b'{"text": "text 1"}', *records[2:]])
    assert open_source(SourceConfig(path=f"{tmp_path}/a.array_record")).fingerprint() == prints["same"]


def test_bad_tsv_rows(tmp_path):
    content = b"id\ttext\n1\tone\n2\n3\tthree\tmore\n\n4\t\xff\n5\tfive\n"
    source = open_text(tmp_path / "a.tsv", content, max_bad_rows=3)
    assert [doc.text for doc in source] == ["one", "five"] and source.dropped == {"bad": 3, "empty": 1, "filtered": 0}
    assert [line.partition("a.tsv")[2][:5] for line in source.bad_rows] == [":3: 1", ":4: 3", ":6: n"]
    message = fails("3 of 6 rows read are bad, 2 allowed", SourceConfig(path=str(tmp_path / "a.tsv")), 2)
    assert ":3: 1 columns, the header has 2" in message


def test_a_wholly_wrong_file_stops_early_with_one_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"txt": "x"}\n' * 5000)
    assert "\n" not in fails(r":1: no field 'text' \(did you mean 'txt'\?\); fields: txt", SourceConfig(path=str(path)))
    path.write_bytes(b"x\n" * 5000)
    fails("at least 101 of 101 rows read are bad", SourceConfig(path=str(path)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.tsv.gz", "a.jsonl.zst"])
def test_truncated_files_never_pass(name, tmp_path):
    rows = [row | {"id": str(i), "text": row["text"] * 20} for i, row in enumerate(ROWS * 20)]
    content = tsv(rows) if "tsv" in name else jsonl(rows)
    packed = gzip.compress(content) if name.endswith("gz") else zstd(content)
    for cut in (0, 1, 9, 20, len(packed) // 3, len(packed) // 2, len(packed) - 9, len(packed) - 5, len(packed) - 1):
        with pytest.raises(ValueError, match=r"ends in the middle of the (gzip|zstd) stream"):
            open_text(tmp_path / name, packed[:cut])
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    with pytest.raises(ValueError, match=r"sound (gzip|zstd) file|ends in the middle"):
        open_text(tmp_path / name, bytes(damaged))
    with pytest.raises(ValueError, match=r"not a sound (gzip|zstd) file"):
        open_text(tmp_path / name, content)


def test_damaged_binary_files(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    write_array_record(tmp_path / "a.array_record", jsonl().splitlines())
    for name in ("a.parquet", "a.array_record"):
        content = (tmp_path / name).read_bytes()
        for cut in (0, 10, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:cut])
            fails("not a sound (parquet|ArrayRecord) file", SourceConfig(path=str(tmp_path / name)))


def test_errors_of_opening(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(jsonl())
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "empty.tsv").write_bytes(b"text\n")
    (tmp_path / "twice.tsv").write_bytes(b"text\ttext\na\tb\n")
    (tmp_path / "a.tsv").write_bytes(tsv())
    (tmp_path / "a.csv").write_bytes(b"x")
    write_parquet(tmp_path / "a.parquet")
    write_array_record(tmp_path / "none.array_record", [])
    for path, message in {
            "corpu.jsonl": "no such file .did you mean 'corpus.jsonl'", "no/a.jsonl": "nor does the folder",
            "x*.jsonl": "no file matches", "a.csv": r"unknown ending; known: \.jsonl", "": "is a folder",
            "empty.jsonl": "empty corpus", "empty.tsv": "empty corpus", "none.array_record": "empty corpus",
            "twice.tsv": "each column once", "[c-n]*": "mixes ArrayRecord"}.items():
        fails(message, SourceConfig(path=f"{tmp_path}/{path}"))
    for name in ("a.tsv", "a.parquet"):
        fails("no field 'tex' .did you mean 'text'..; fields: id, src, lang, text",
              SourceConfig(path=str(tmp_path / name), text_field="tex"))
    fails("max_bad_rows must not be negative", SourceConfig(path="x"), -1)


@pytest.mark.parametrize(("spec", "message"), [
    ("", "needs a path"), ("a.jsonl?txt_field=x", "unknown option 'txt_field' .did you mean 'text_field'"),
    ("a.jsonl?weight=0", "positive"), ("a.jsonl?weight=nan", "positive"), ("a.jsonl?weight=x", "'weight': could not"),
    ("a.jsonl?weight", "needs a value"), ("a.jsonl?name=a&name=b", "given twice"), ("a.jsonl?path=b", "unknown option"),
    ("a.jsonl?text={a}&text_field=b", "one of them"), ("a.jsonl?language=ko&language_field=b", "one of them"),
    ("a.jsonl?text={a", "malformed|expected|braces"), ("a.jsonl?text=x", "names no field"),
    ("a.jsonl?text={a!r}", "only plain"), ("a.jsonl?text={}", "only plain"), ("a.jsonl?include=src", "'field:value'"),
    ("a.jsonl?split=train", "split has no effect"), ("a.jsonl?seed=3", "seed has no effect"),
    ("sample:kr", "'kr' is unknown.*ko, en, both"), ("sample:ko?split=test", "train, held_out"),
    ("sample:ko?documents=0", "at least 1"), ("sample:ko?text_field=x", "no effect"),
    ("tfds:a?documents=3", "no effect"),
])
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_source(spec)


def test_sample_source():
    source = open_source(parse_source("sample:ko?documents=20&split=held_out&seed=3"))
    assert len(source) == 20 and source[0].language == "ko" and source.name == "sample_ko"


def test_loader_workers_stay_light():
    code = "import sys, jaxlm.data.sources, jaxlm.data.tokenizer; print([m for m in sys.modules if m in " \
           "('jax', 'flax', 'optax', 'tensorflow', 'torch')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
