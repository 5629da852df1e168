"""Every kind of index through the same checks; the file that keeps one."""

import sys
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest

from jaxlm.retrieval.faiss_index import INDEXES, SETTINGS, IndexConfig, IndexKind, open_index
from jaxlm.retrieval.index import NO_ROW, search

FAISS = [kind for kind in INDEXES if kind != "exact"]


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("faiss", reason="the extra faiss is not installed")


def clustered(rows=1500, queries=64, width=24):
    """Vectors of any length around 60 centres, in three blocks of uneven length, and queries near them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, width))
    near = lambda count: centres[rng.integers(0, 60, count)] + 0.4 * rng.normal(size=(count, width))
    return np.split(near(rows).astype(np.float32), [500, 501]), near(queries).astype(np.float32)


def test_the_names_of_the_kinds():
    assert tuple(INDEXES) == tuple(SETTINGS) == get_args(IndexKind)
    named = {name for names in SETTINGS.values() for name in names}
    assert named == {field.name for field in fields(IndexConfig)} - {"kind"}


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("kind", INDEXES)
def test_every_kind_finds_what_exact_search_finds(kind, similarity):
    blocks, queries = clustered()
    expected = search(queries, blocks, 10, similarity=similarity)
    hits = open_index(IndexConfig(kind=kind), blocks, similarity=similarity)(queries, 10)
    assert hits.scores.dtype == np.float32 and hits.rows.dtype == np.int64 and hits.rows.shape == (64, 10)
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(hits.rows, expected.rows, strict=True)])
    if kind in ("exact", "faiss_flat"):
        np.testing.assert_array_equal(hits.rows, expected.rows)
    assert recall >= 0.95
    found = np.concatenate(blocks)[hits.rows]
    scores = np.einsum("qd,qkd->qk", queries, found)
    if similarity == "cosine":
        scores /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(found, axis=2)
    np.testing.assert_allclose(hits.scores, scores, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kind", INDEXES)
def test_equal_documents_zeros_and_few_of_them(kind):
    """Stored as float16; ids decide among equals; a document of zeros has cosine 0; k is more than there are."""
    vectors = np.array([[1, 0], [2, 0], [0, 0], [0, 3], [4, 0]], np.float16)
    ask = open_index(IndexConfig(kind=kind), [vectors[:2], vectors[2:]], similarity="cosine", ids=list("bdaec"))
    hits = ask(np.array([[5, 0]]), 9)
    assert hits.rows.tolist() == [[1, 4, 0, 3, 2]]
    np.testing.assert_allclose(hits.scores, [[1, 1, 1, 0, 0]], atol=1e-6)


def test_depth_is_what_makes_an_index_better():
    blocks, queries = clustered()
    expected = search(queries, blocks, 10).rows
    recall = lambda config: np.mean([len(set(a) & set(b)) for a, b in zip(
        open_index(config, blocks)(queries, 10).rows, expected, strict=True)]) / 10
    clusters = lambda probes: recall(IndexConfig(kind="faiss_ivf", lists=30, probes=probes))
    assert clusters(1) < clusters(30) == 1
    graph = lambda depth, **built: recall(IndexConfig(kind="faiss_hnsw", search_depth=depth, **built))
    assert graph(1, neighbors=4, build_depth=4) < graph(64, neighbors=4, build_depth=4) < graph(64)


def test_where_fewer_are_found_the_rest_is_no_document():
    blocks, queries = clustered(rows=400)
    hits = open_index(IndexConfig(kind="faiss_ivf", lists=8, probes=1), blocks)(queries, 300)
    none = hits.rows == NO_ROW
    assert none.any(axis=1).all() and not none[:, 0].any()
    np.testing.assert_array_equal(none, np.isneginf(hits.scores))
    assert (np.sort(none, axis=1) == none).all(), "the last ones"


@pytest.mark.parametrize("kind", FAISS)
def test_an_index_is_kept_and_belongs_to_its_vectors(kind, tmp_path):
    blocks, queries = clustered(rows=800)
    config = IndexConfig(kind=kind, file=tmp_path / "new" / "index")
    first = open_index(config, blocks)(queries, 5)
    kept = config.file.read_bytes()
    again = open_index(config, [np.concatenate(blocks)])(queries, 5)  # other blocks, the same vectors
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.scores, again.scores)
    other = [block.copy() for block in blocks]
    other[2][-1, -1] += 1e-3
    with pytest.raises(ValueError, match=r"is the index of something else \(vectors was"):
        open_index(config, other)
    with pytest.raises(ValueError, match="similarity was 'dot', is now 'cosine'"):
        open_index(config, blocks, similarity="cosine")
    with pytest.raises(ValueError, match="kind was"):
        open_index(IndexConfig(kind=FAISS[FAISS.index(kind) - 1], file=config.file), blocks)
    assert config.file.read_bytes() == kept and [path.name for path in config.file.parent.iterdir()] == ["index"]
    config.file.write_bytes(kept[:-100])
    with pytest.raises(ValueError, match="the index is damaged; delete it"):
        open_index(config, blocks)
    config.file.write_bytes(b"\x80something else")
    with pytest.raises(ValueError, match="is no index that was kept here"):
        open_index(config, blocks)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    blocks, _ = clustered(rows=800)

    def fail(index, writer):
        raise OSError("no space left")

    monkeypatch.setattr(faiss, "write_index", fail)
    with pytest.raises(OSError, match="no space left"):
        open_index(IndexConfig(kind="faiss_flat", file=tmp_path / "index"), blocks)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", INDEXES)
def test_errors_are_those_of_exact_search(kind):
    vectors = np.eye(3, dtype=np.float32)
    index = lambda *blocks, **more: open_index(IndexConfig(kind=kind), blocks, **more)(np.ones((1, 3)), 2)
    with pytest.raises(ValueError, match="not finite"):
        index(vectors, np.where(vectors == 1, np.inf, vectors))
    with pytest.raises(ValueError, match="block 1 of the corpus has shape"):
        index(vectors, vectors[:, :2])
    with pytest.raises(ValueError, match="holds no document"):
        index(vectors[:0])
    with pytest.raises(ValueError, match="3 documents, but there are 4 ids"):
        index(vectors, ids=list("abcd"))
    with pytest.raises(ValueError, match="similarity is dot or cosine"):
        index(vectors, similarity="l2")
    ask = open_index(IndexConfig(kind=kind), [vectors])
    for queries, k in ((np.full((1, 3), np.nan), 1), (np.ones((1, 2)), 1), (np.ones(3), 1), (np.ones((1, 3)), 0)):
        with pytest.raises(ValueError, match=r"must be|the queries need"):
            ask(queries, k)


@pytest.mark.parametrize("settings, message", [
    ({"kind": "annoy"}, "index.kind is one of exact, faiss_flat"),
    ({"file": "x"}, "index.file has no effect with index.kind exact"),
    ({"kind": "faiss_ivf", "neighbors": 8}, "index.neighbors has no effect with index.kind faiss_ivf"),
    ({"kind": "faiss_hnsw", "search_depth": 0}, "index.search_depth must be at least 1"),
    ({"kind": "faiss_ivf", "lists": 8}, "index.probes 32 is more than index.lists 8")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        IndexConfig(**settings)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[faiss\]"):
        open_index(IndexConfig(kind="faiss_flat"), [np.eye(2)])
