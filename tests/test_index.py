"""Exact search against plain numpy, on one device and on eight, and the vectors of a corpus on disk."""

import re

import jax
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.eval.ranking import ranked
from jaxlm.retrieval.corpus_vectors import encode_corpus, fingerprint, open_vectors
from jaxlm.retrieval.index import as_run, descending_places, search


def corpus(rng, rows=77, width=4):
    """Small whole numbers, so that products are exact and many are equal; and ids that are not in order."""
    return rng.integers(-2, 3, (rows, width)).astype(np.float32), [f"d{i}" for i in rng.permutation(rows)]


def split(vectors, *cuts):
    return np.split(vectors, cuts)


def expected(queries, vectors, ids, k):
    scores = queries @ vectors.T
    return [ranked(dict(zip(ids, row.tolist(), strict=True)))[:k] for row in scores]


@pytest.mark.parametrize("devices", [1, 8])
def test_search_finds_what_a_full_sort_finds(devices):
    rng = np.random.default_rng(0)
    vectors, ids = corpus(rng)
    queries = rng.integers(-1, 2, (11, 4)).astype(np.float32)
    queries[5] = 0
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2 if devices > 1 else 1), jax.devices()[:devices])):
        hits = search(queries, split(vectors, 3, 3, 40), 10, ids=ids, block_rows=16, query_rows=4)
        assert [[ids[row] for row in rows] for rows in hits.rows] == expected(queries, vectors, ids, 10)
        np.testing.assert_array_equal(hits.scores, np.take_along_axis(queries @ vectors.T, hits.rows, axis=1))
        few = search(queries, split(vectors, 40), 2, ids=ids, block_rows=64)  # ties at the cut of a block
        assert [[ids[row] for row in rows] for rows in few.rows] == expected(queries, vectors, ids, 2)
        plain = search(queries, split(vectors, 3, 3, 40), 10, block_rows=16, query_rows=4)
    # Without ids: the first of equals.
    np.testing.assert_array_equal(plain.rows, np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10])


def test_blocks_do_not_matter_and_k_may_exceed_the_corpus():
    rng = np.random.default_rng(1)
    vectors, ids = corpus(rng, rows=23)
    queries = np.concatenate([vectors[:3], np.zeros((1, 4), np.float32)])
    whole = search(queries, [vectors], 50, ids=ids)
    pieces = search(queries, iter([row[None].astype(np.float16) for row in vectors]), 50, ids=ids, block_rows=1)
    assert whole.rows.shape == (4, 23) and sorted(whole.rows[0]) == list(range(23))
    np.testing.assert_array_equal(whole.rows, pieces.rows)
    np.testing.assert_array_equal(whole.scores, pieces.scores)
    # A query that scores all alike: the order of the ids alone.
    assert [ids[row] for row in whole.rows[3]] == sorted(ids, reverse=True)
    zeros = np.array([[0], [-0.0], [0], [-0.0]], np.float32)
    assert search(np.ones((1, 1)), [zeros], 4, ids="dcab").rows.tolist() == [[0, 1, 3, 2]]
    run = as_run(whole, ["a", "b", "c", "z"], ids)
    assert ranked(run["a"]) == [ids[row] for row in whole.rows[0]] and run["z"] == dict.fromkeys(ids, 0.0)


def test_cosine_is_the_inner_product_of_directions():
    rng = np.random.default_rng(2)
    vectors, queries = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    vectors[0], vectors[1], vectors[2] = 0, 1e-30 * queries[0], 1e30 * queries[1]
    hits = search(queries, [vectors], 40, similarity="cosine")
    directions = vectors.astype(np.float64) / np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-300
                                                         )[:, None]
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(unit @ directions.T, hits.rows, axis=1), atol=1e-6)
    assert hits.rows[0, 0] == 1 and hits.rows[1, 0] == 2 and np.all(np.diff(hits.scores) <= 0)


@pytest.mark.parametrize("call, error", [
    (lambda q, v: search(q[0], [v], 3), "queries must be finite and of shape [Q, D]"),
    (lambda q, v: search(q, [v], 0), "k, block_rows and query_rows must be at least 1"),
    (lambda q, v: search(q, [v], 3, similarity="l2"), "similarity is dot or cosine, not 'l2'"),
    (lambda q, v: search(q, [v, v[:, :2]], 3), "block 1 of the corpus has shape (77, 2), the queries need [any, 4]"),
    (lambda q, v: search(q, [], 3), "the corpus holds no document"),
    (lambda q, v: search(q, [v], 3, ids=["a"]), "more documents than the 1 ids"),
    (lambda q, v: search(q, [v], 3, ids=[str(i) for i in range(78)]), "has 77 documents, but there are 78 ids"),
    (lambda q, v: search(q, [np.where(v == 2, np.inf, v)], 3), "documents 0 to 76 of the corpus hold vectors that are"),
    (lambda q, v: search(q, [v, v * np.nan], 3), "documents 77 to 153"),
    (lambda q, v: descending_places(["a", "b", "a"]), "the id 'a' is given to two documents"),
    (lambda q, v: as_run(search(q, [v], 3), ["a", "a"], "abc"), "2 queries need as many different ids"),
])
def test_search_refuses(call, error):
    vectors, _ = corpus(np.random.default_rng(0))
    with pytest.raises(ValueError, match=re.escape(error)):
        call(vectors[:2], vectors)


TEXTS = [f"text {i}" for i in range(10)]


def encode(texts):
    return np.array([[len(text), int(text.split()[1])] for text in texts], np.float32)


def test_encoding_goes_on_at_the_first_missing_shard(tmp_path):
    calls = []

    def killed(texts):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(texts)

    folder, settings = tmp_path / "vectors", {"encoder": {"model": "m"}, "rows_per_shard": 3}
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(killed, TEXTS, folder, **settings)
    with pytest.raises(ValueError, match=r"2 of 4 shards are missing, 00002.npy first"):
        open_vectors(folder)
    (folder / "00000.npy").unlink()
    calls.clear()
    shards = encode_corpus(lambda texts: (calls.append(texts), encode(texts))[1], TEXTS, folder, **settings)
    assert calls == [TEXTS[:3], TEXTS[6:9], TEXTS[9:]]
    assert all(isinstance(shard, np.memmap) for shard in shards)
    np.testing.assert_array_equal(np.concatenate(shards), encode(TEXTS))
    assert not list(folder.glob("*.tmp"))
    hits = search(encode(TEXTS[7:8]), open_vectors(folder), 1)
    assert hits.rows.tolist() == [[9]]


def test_vectors_of_different_origin_are_never_mixed(tmp_path):
    folder = tmp_path / "vectors"
    encode_corpus(encode, TEXTS, folder, encoder={"model": "a"}, storage="float16")
    assert open_vectors(folder)[0].dtype == np.float16
    for texts, changed, error in (
        (TEXTS, {"encoder": {"model": "b"}}, 'encoder was {"model": "a"}, is now {"model": "b"}'),
        (TEXTS, {"storage": "float32"}, 'storage was "float16", is now "float32"'),
        (TEXTS, {"rows_per_shard": 5}, "rows_per_shard was 65536, is now 5"),
        ([*TEXTS[:-1], "text 11"], {}, "corpus was"),
        (["text 0text 1", "", *TEXTS[2:]], {}, "corpus was"),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            encode_corpus(encode, texts, folder, **({"encoder": {"model": "a"}, "storage": "float16"} | changed))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00000.npy").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no manifest.json"):
        encode_corpus(encode, TEXTS, tmp_path / "other", encoder={})
    with pytest.raises(ValueError, match=r"nowhere: holds no manifest.json"):
        open_vectors(tmp_path / "nowhere")
    (folder / "00000.npy").write_bytes((folder / "00000.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"00000.npy: not a sound .npy file"):
        open_vectors(folder)


@pytest.mark.parametrize("encode, storage, error", [
    (lambda texts: np.ones(len(texts)), "float32", "texts 3 to 5: the encoder gave shape (3,) for 3 texts"),
    (lambda texts: np.full((3, 2), np.nan), "float32", "3 vectors are not finite, that of text 3 first"),
    (lambda texts: np.full((3, 2), 1e5), "float16", "3 vectors are too large for float16"),
])
def test_bad_vectors_are_not_written(tmp_path, encode, storage, error):
    good = np.ones((3, 2))
    with pytest.raises(ValueError, match=re.escape(error)):
        encode_corpus(lambda texts: encode(texts) if "text 3" in texts else good, TEXTS, tmp_path / "v", encoder={},
                      rows_per_shard=3, storage=storage)
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["00000.npy", "manifest.json"]


def test_fingerprint_tells_parameters_apart():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2)}
    changed = {"a": tree["a"], "b": np.nextafter(tree["b"], 2, dtype=np.float32)}
    assert fingerprint(tree) == fingerprint(dict(tree)) != fingerprint(changed)
