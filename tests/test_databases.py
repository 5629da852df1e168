"""Builders equal plain counting and sorting; files come back the same or are refused with a reason."""

import collections
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlm.generate import databases as module
from jaxlm.generate.databases import build_corpus, build_model_table, database_facts, load_database, save_database
from jaxlm.generate.draft_sources import NONE
from jaxlm.generate.suffix_array import suffix_array

TEXTS = [[1, 2, 3, 1, 2, 3, 4], [], [2, 3, 1], [5], [1, 2, 3, 4, 0]]


def slow_table(texts, n, m, keep):
    """The construction of the specification: once per text, most common, inserted in ascending frequency, LRU."""
    grams = lambda ids: {tuple(ids[i:i + m + 1]) for i in range(len(ids) - m)}
    counts = collections.Counter(gram for ids in texts for gram in grams(ids))
    table = collections.defaultdict(list)
    for gram in reversed(sorted(counts, key=lambda gram: (-counts[gram], gram))[:keep]):
        table[gram[0]].append(list(gram[1:]))
        del table[gram[0]][:-n]
    return {key: values[::-1] for key, values in table.items()}


def listed(table):
    found = {}
    assert ((table.tokens == NONE) == (table.lengths == 0)[..., None]).all()
    for token in np.flatnonzero(table.lengths.any(1)).tolist():
        found[token] = table.tokens[token][table.lengths[token] > 0].tolist()
    return found


@pytest.mark.parametrize("vocab_size", [4, 200_000])
@pytest.mark.parametrize("n, m, keep", [(2, 2, 1000), (7, 4, 60), (3, 1, 7), (1, 20, 5)])
def test_model_table_counts_once_per_text(vocab_size, n, m, keep):
    rng = np.random.default_rng(keep)
    texts = [rng.integers(vocab_size - 4, vocab_size, size).tolist() for size in rng.integers(0, 30, 25)]
    table = build_model_table(texts, vocab_size, n, m, keep)
    assert table.tokens.shape == (vocab_size, n, m) and table.tokens.dtype == np.int32
    assert listed(table) == slow_table(texts, n, m, keep)
    for a, b in zip(table, build_model_table(texts[::-1], vocab_size, n, m, keep), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("alphabet, depth", [(1, 32), (2, 32), (2, 4), (50, 32)])
def test_suffix_array_is_sorting(alphabet, depth):
    rng = np.random.default_rng(alphabet)
    for size in (0, 1, 2, 33, 300):
        tokens = rng.integers(-1, alphabet, size).astype(np.int32)
        expected = sorted(range(size), key=lambda i, tokens=tokens: (tokens[i:i + depth].tolist(), i))
        found = suffix_array(tokens, depth)
        assert found.dtype == np.int32 and found.tolist() == expected
    assert suffix_array(np.array([2, 1, 2, 1])).tolist() == [3, 1, 2, 0]


def test_corpus_index():
    corpus = build_corpus(iter(TEXTS), 7)
    assert corpus.tokens.tolist() == [token for ids in TEXTS for token in [*ids, NONE]]
    for token in range(7):
        places = corpus.suffixes[corpus.starts[token]:corpus.starts[token + 1]]
        assert sorted(places.tolist()) == np.flatnonzero(corpus.tokens == token).tolist()
    assert all(array.dtype == np.int32 for array in corpus)


@pytest.mark.parametrize("build", [build_corpus, build_model_table])
def test_ids_are_checked(build):
    for ids, vocab_size, wrong in (([[1], [2, 7]], 7, 7), ([[1], [-1]], 7, -1)):
        with pytest.raises(ValueError, match=f"text 1 holds the id {wrong}, but the vocabulary has 7"):
            build(ids, vocab_size)
    build([], 7)
    with pytest.raises(ValueError, match="must be positive"):
        build_model_table([], 7, keep=0)


@pytest.mark.parametrize("kind, build", [("corpus", build_corpus), ("model_table", build_model_table)])
def test_files_come_back(tmp_path, kind, build):
    database, path = build(TEXTS, 7), tmp_path / "new" / "db.safetensors"
    save_database(path, database, "abc", {"texts": len(TEXTS)})
    loaded = load_database(path, "abc", kind)
    assert type(loaded) is type(database) is type(load_database(path, "abc"))
    for a, b in zip(loaded, database, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    facts = database_facts(path)
    assert facts["texts"] == 5 and facts["vocab_size"] == 7
    assert list(path.parent.iterdir()) == [path]
    first = path.read_bytes()
    save_database(path, build(TEXTS, 7), "abc", {"texts": len(TEXTS)})
    assert path.read_bytes() == first


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "db.safetensors"
    table = build_model_table(TEXTS, 7, m=2)
    save_database(path, table, "abc", {})
    good = path.read_bytes()
    refused(path, "another tokenizer", tokenizer="xyz")
    refused(path, "of kind model_table, not corpus", kind="corpus")
    for damaged in (good[:-3], good[:20], b"", good + b"x"):
        path.write_bytes(damaged)
        refused(path, "not a whole safetensors file")
    path.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    refused(path, "is damaged")
    for header in (None, {module.FORMAT: "{"}, {module.FORMAT: "[1]"}, {module.FORMAT: '{"kind": "corpus"}'}):
        save_file({"weight": np.zeros(3)}, path, metadata=header)
        refused(path, "is not a draft database")
    refused(tmp_path / "missing.safetensors", "not a whole safetensors file")
    refused(tmp_path, "not a whole safetensors file")
    with pytest.raises(ValueError, match=r"a \.safetensors file"):
        save_database(tmp_path / "db.bin", table, "abc", {})


def test_wrong_contents_are_refused(tmp_path):
    path, table, corpus = tmp_path / "db.safetensors", build_model_table(TEXTS, 7, m=2), build_corpus(TEXTS, 7)
    for database, message in (
        (table._replace(tokens=np.where(table.tokens == 3, 7, table.tokens)), "ids outside the vocabulary of 7"),
        (table._replace(lengths=table.lengths * 0), "tokens and lengths disagree"),
        (table._replace(lengths=table.lengths[:-1]), "do not fit"),
        (table._replace(tokens=table.tokens.astype(np.int64)), "not int32"),
        (corpus._replace(tokens=np.where(corpus.tokens == 3, 7, corpus.tokens)), "ids outside the vocabulary"),
        (corpus._replace(suffixes=corpus.suffixes + 99), "points outside"),
        (corpus._replace(suffixes=corpus.suffixes[:-1]), "index does not fit"),
        (corpus._replace(starts=corpus.starts[::-1]), "index does not fit"),
    ):
        save_database(path, database, "abc", {})
        refused(path, message)


def refused(path, message, tokenizer="abc", kind=None):
    with pytest.raises(ValueError, match=message) as error:
        load_database(path, tokenizer, kind)
    assert str(path) in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, database = tmp_path / "db.safetensors", build_corpus(TEXTS, 7)
    save_database(path, database, "abc", {})
    good = path.read_bytes()

    def fails(arrays, scratch, metadata):
        Path(scratch).write_bytes(good[:30])
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_database(path, database, "abc", {})
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
