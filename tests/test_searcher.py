"""Sparse and late models put to work by the recipes: their scores are those of plain numpy, whoever asks for them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.eval.mteb_model import MtebModel
from jaxlm.eval.ranking import read_run
from jaxlm.model.encoder import build_encoder
from jaxlm.retrieval import rank, searcher, towers
from jaxlm.retrieval.embed import to_batch, tokenize
from jaxlm.retrieval.folder import save_text_encoder
from jaxlm.retrieval.representations import Encoded
from recipes import evaluate_retrieval, mine, search
from tests.test_embed import ENCODER, encoder_of, random_params
from tests.test_search_recipes import DOCUMENTS, QUERIES, mined

ASKED = {name: text for name, (text, _, _) in QUERIES.items()}
KINDS = {"sparse": "sparse", "sparse_pair": "sparse", "late": "late", "late_pair": "late", "late_dot": "late"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of each kind, and what lies in them: (encoder, params) of queries and passages."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, vectors in KINDS.items():
        encoder = encoder_of(similarity="cosine" if name in ("late", "late_pair") else "dot",
                             query_prompt="e f ", passage_prompt="g ")[0]
        encoder = replace(encoder, model=build_encoder(replace(ENCODER, num_layers=1, mlm_head=vectors == "sparse")))
        params = random_params(encoder.model)
        parts = {"": params}
        if name.endswith("pair"):
            parts = {"passage": params, "query": jax.tree.map(lambda x: x[..., ::-1], params)}
        for part, own in parts.items():
            save_text_encoder(folder / name / part, encoder, own, architecture="bert", vectors=vectors)
        found[name] = ((encoder, parts.get("query", params)), (encoder, params))
    save_text_encoder(folder / "dense", *encoder_of(pooling="mean", similarity="cosine"), architecture="bert")
    return folder, found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("corpus.jsonl", [{"_id": name, "text": text} for name, text in DOCUMENTS.items()])
    write("queries.jsonl", [{"_id": name, "text": text} for name, text in ASKED.items()])
    lines = "".join(f"{name}\t{document}\t1\n" for name, (_, document, _) in QUERIES.items())
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def states(encoder, params, texts, kind, head):
    """Per text, what its tokens have: hidden states, or logits of the vocabulary."""
    ids = tokenize(encoder, texts, kind).ids
    tokens, mask = to_batch(ids, len(ids), encoder.max_length)
    hidden = jax.jit(encoder.hidden)(params, tokens, mask)
    x = np.asarray(jax.jit(encoder.model.vocabulary)(params, hidden) if head else hidden, np.float64)
    return [row[:len(one)] for row, one in zip(x, ids, strict=True)]


def reference(made, name):
    """Scores [Q, N] by loops over texts and tokens."""
    (encoder, query), (_, passage) = made[1][name]
    sparse = KINDS[name] == "sparse"
    sides = [states(encoder, params, list(texts.values()), kind, sparse) for params, texts, kind in (
        (query, ASKED, "query"), (passage, DOCUMENTS, "passage"))]
    if sparse:
        a, b = (np.array([np.log1p(np.maximum(one, 0)).max(axis=0) for one in side]) for side in sides)
        return a @ b.T
    if encoder.similarity == "cosine":
        sides = [[one / np.linalg.norm(one, axis=1, keepdims=True) for one in side] for side in sides]
    return np.array([[sum(max(float(x @ y) for y in d) for x in q) for d in sides[1]] for q in sides[0]])


def flags(name):
    return ["--vectors", "late"] if KINDS[name] == "late" else []


@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_has_the_scores_of_numpy(name, made, data, tmp_path, capsys):
    scores, model, ids = reference(made, name), str(made[0] / name), list(DOCUMENTS)
    assert len(np.unique(scores.round(4))) == scores.size, "no ties, so that orders are unique"
    evaluate_retrieval.main(["--data", str(data), "--models", model, "--output", str(tmp_path / "out"), "--depth", "5",
                             "--measures", "ndcg@5", "--batch-tokens", "64", *flags(name)])
    run = read_run(tmp_path / f"out/0_{name}.trec")
    order = np.argsort(-scores, axis=1)
    capsys.readouterr()
    search.main(["--model", model, "--corpus", str(data), "--k", "8", *flags(name), "--query",
                 *ASKED.values()])
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    for i, query in enumerate(ASKED):
        assert sorted(run[query], key=run[query].get, reverse=True) == [ids[j] for j in order[i][:5]]
        np.testing.assert_allclose([run[query][ids[j]] for j in order[i][:5]], scores[i][order[i][:5]], rtol=2e-5,
                                   atol=2e-6)
        lines = printed[8 * i:8 * i + 8]
        assert [line[2] for line in lines] == [ids[j] for j in order[i]]
        np.testing.assert_allclose([float(line[1]) for line in lines], scores[i][order[i]], atol=1e-4, rtol=2e-5)
    positives = order[:, 1]
    (data / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"{query}\t{ids[j]}\t1\n" for query, j in zip(ASKED, positives, strict=True)))
    rows, model = f"{data}?split={name}", ["--model", model, *flags(name)]
    margin = 0.05 * float(np.ptp(scores, axis=1).min())
    found = mined(tmp_path, rows, *model, "--mine.absolute-margin", str(margin), "--depth", "8")
    for i, text in enumerate(ASKED.values()):
        assert found.get(text, []) == [ids[j] for j in order[i] if scores[i][j] + margin <= scores[i][positives[i]]]
    bound = np.median(scores[0])
    by_words = mined(tmp_path, rows, *model, "--source", "bm25", "--mine.max-score", str(bound))
    plain = mined(tmp_path, rows, "--source", "bm25")
    assert by_words["a"] == [one for one in plain["a"] if scores[0][ids.index(one)] <= bound]


def opened(made, name):
    (encoder, query), (_, passage) = made[1][name]
    if query is passage:
        return towers.siamese(encoder, KINDS[name], passage)
    return towers.Towers(encoder, encoder, False, KINDS[name], {"query": query, "passage": passage})


@pytest.mark.parametrize("name", ["sparse_pair", "late", "late_dot"])
def test_mteb_compares_as_the_recipes_do(name, made):
    model = MtebModel(opened(made, name), None)

    def encode(texts, kind):
        return model.encode([{"text": list(texts)}], task_metadata=None, hf_split="", hf_subset="", prompt_type=kind)

    scores = reference(made, name)
    asked, documents = encode(ASKED.values(), "query"), encode(DOCUMENTS.values(), "document")
    np.testing.assert_allclose(model.similarity(asked, documents), scores, rtol=2e-5)
    np.testing.assert_allclose(model.similarity_pairwise(asked, documents[:3]), np.diag(scores), rtol=2e-5)


def test_the_best_of_many_blocks_and_the_order_of_equals(monkeypatch):
    """Against one sort of everything; scores are small whole numbers, so that many are equal."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 4, (3, 30)).astype(np.float32)
    ids = [f"d{i}" for i in rng.permutation(30)]
    monkeypatch.setattr(rank, "MERGE", 7)
    monkeypatch.setattr(rank, "block_scores", lambda towers, asked, block, *_: table[None][:, :, block.chosen])
    blocks = [rank.Block(chosen, None) for chosen in np.split(rng.permutation(30), [4, 5, 11, 12, 25])]
    for names in (ids, None):
        for k in (1, 5, 30, 40):
            [hits] = rank.block_search(towers.siamese(encoder_of()[0]), [rank.Block(np.arange(3), None)], blocks, k,
                                       ids=names)
            expected = [sorted(range(30), key=lambda j, row=row: j if names is None else names[j],
                               reverse=names is not None) for row in table]
            expected = [sorted(one, key=lambda j, row=row: -row[j])[:k]
                        for one, row in zip(expected, table, strict=True)]
            np.testing.assert_array_equal(hits.rows, expected)
            np.testing.assert_array_equal(hits.scores, np.take_along_axis(table, hits.rows, axis=1))


def test_kept_sparse_blocks_are_what_they_were():
    x = np.array([[0, 0.5, 0], [0, 0, 0], [1, 0, 2]], np.float32)
    packed = searcher._packed(rank.Block(np.arange(2), Encoded(x)))
    assert packed.weights.tolist() == [0.5, 1, 2]
    np.testing.assert_array_equal(searcher._unpacked(packed).texts.x, x)


def test_faults_are_one_sentence_before_any_weights_are_read(made, data, tmp_path, capsys, monkeypatch):
    folder = made[0]
    (tmp_path / "half/query").mkdir(parents=True)
    save_text_encoder(tmp_path / "other", *made[1]["sparse"][0], architecture="bert", vectors="sparse")
    words = (tmp_path / "other/tokenizer.json").read_text()
    (tmp_path / "other/tokenizer.json").write_text(words.replace('"g":11', '"g":12').replace('"h":12', '"h":11'))
    assert words != (tmp_path / "other/tokenizer.json").read_text()
    monkeypatch.setattr(towers, "load_params", None)
    monkeypatch.setattr(searcher, "memory", lambda: 4000)
    asked = ["--corpus", str(data), "--query", "a", "--model"]
    measured = ["--data", str(data), "--models"]
    rows = ["--data", str(data), "--output", str(tmp_path / "x"), "--model"]
    name = lambda kind: str(folder / kind)
    for recipe, arguments, message in (
        (evaluate_retrieval, [*measured, name("sparse"), "--vectors", "late"], "its vectors are sparse, not late"),
        (evaluate_retrieval, [*measured, str(tmp_path / "half")], "half/query holds no model"),
        (evaluate_retrieval, [*measured, name("sparse"), "--pooling", "mean"], "no effect on sparse vectors"),
        (evaluate_retrieval, [*measured, name("late"), "--vectors", "late", "--pooling", "cls"], "effect on late vect"),
        (evaluate_retrieval, [*measured, name("sparse"), "--query-model", str(tmp_path / "other")],
         "have different vocabularies"),
        (evaluate_retrieval, [*measured, name("sparse"), "--query-model", name("dense")],
         "is made for dense vectors and"),
        (evaluate_retrieval, [*measured, name("late_pair"), "--query-model", name("late")], "tower of queries already"),
        (evaluate_retrieval, [*measured, name("late"), "--query-model", name("late_pair")], "holds two towers: name"),
        (evaluate_retrieval, [*measured, name("late"), "--query-model", name("late_dot"), "--vectors", "late"],
         "the similarity of its vectors is dot, not cosine"),
        (evaluate_retrieval, [*measured, name("late")], "give pooling"),
        (evaluate_retrieval, [*measured, name("sparse"), "--index.kind", "faiss_flat"], "ones are searched exactly"),
        (evaluate_retrieval, [*measured, "bm25", "--vectors", "late"], "--vectors has no effect on bm25"),
        (search, [*asked, name("late"), "--vectors", "late"], "the token vectors of 8 passages take"),
        (search, [*asked, name("sparse"), "--cache", str(tmp_path / "v")], "leave --cache out"),
        (mine, [*rows, name("late"), "--vectors", "late"], "the token vectors of 8 passages take"),
        (mine, [*rows, "", "--source", "bm25", "--vectors", "late"], "--vectors has no effect"),
    ):
        with pytest.raises(SystemExit) as end:
            recipe.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err, message
    assert not (tmp_path / "v").exists() and not (tmp_path / "x").exists()
