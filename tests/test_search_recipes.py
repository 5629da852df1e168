"""Mining, search and measuring from the command line: BM25 and both sources, indexes of FAISS, two towers."""

import json

import jax
import numpy as np
import pytest

from jaxlm.data.retrieval_rows import read_retrieval_rows
from jaxlm.eval.ranking import read_run
from jaxlm.retrieval.bm25 import bm25_index, bm25_search
from jaxlm.retrieval.embed import embed_texts
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from jaxlm.retrieval.mine import interleaved
from jaxlm.retrieval.searcher import reader
from recipes import evaluate_retrieval, mine, search
from tests.test_embed import encoder_of

DOCUMENTS = {"d1": "a b c", "d2": "a c d", "d3": "a e", "d4": "h h", "d5": "a a b", "d6": "g e", "d7": "d c b",
             "d8": "f f f a"}
QUERIES = {"q1": ("a", "d1", "E"), "q2": ("h g", "d4", ["x", "y"]), "q3": ("c", "d2", "b")}
TEXTS = list(DOCUMENTS.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two towers of one width, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    encoder, params = encoder_of(pooling="mean", normalize=True, similarity="cosine")
    save_text_encoder(folder / "passages", encoder, params, architecture="bert")
    save_text_encoder(folder / "queries", encoder, jax.tree.map(lambda leaf: leaf[..., ::-1], params),
                      architecture="bert")
    save_text_encoder(folder / "narrow", encoder_of(pooling="mean", similarity="cosine", dimension=4)[0], params,
                      architecture="bert")
    prompted, _ = encoder_of(pooling="mean", normalize=True, similarity="cosine", query_prompt="e f ",
                             passage_prompt="g ")
    save_text_encoder(folder / "prompted", prompted, params, architecture="bert")
    save_text_encoder(folder / "dot", encoder_of(pooling="mean")[0], params, architecture="bert")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("corpus.jsonl", [{"_id": name, "text": text} for name, text in DOCUMENTS.items()])
    write("queries.jsonl", [{"_id": name, "text": text, "answers": answers}
                            for name, (text, _, answers) in QUERIES.items()])
    lines = "".join(f"{name}\t{document}\t1\n" for name, (_, document, _) in QUERIES.items())
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def vectors(folder, texts, kind):
    return embed_texts(*load_text_encoder(folder), texts, kind)


def mined(tmp_path, data, *flags):
    """Query to the ids of its negatives."""
    output = tmp_path / "mined.jsonl"
    mine.main(["--data", str(data), "--output", str(output), "--overwrite", "--mine.num-negatives", "8", *flags])
    return {row.query: [one.id for one in row.negatives] for row in read_retrieval_rows(output).rows}


def ranked(scores, query):
    """Ids but that of the positive, by score; the first of equals first."""
    return [list(DOCUMENTS)[i] for i in np.argsort(-scores, kind="stable")
            if scores[i] > -np.inf and list(DOCUMENTS)[i] != QUERIES[query][1]]


def test_negatives_by_words(data, tmp_path):
    """No model: only documents that share a word with the query; filters by the scores of BM25."""
    index = bm25_index(TEXTS)
    hits = bm25_search(index, ["a", "h g", "c"], 8)
    expected = {text: [list(DOCUMENTS)[row] for row in hits.rows[i] if row >= 0 and list(DOCUMENTS)[row] != own]
                for i, (text, own, _) in enumerate(QUERIES.values())}
    assert expected["h g"] == ["d6"] and len(expected["a"]) == 4
    assert mined(tmp_path, data, "--source", "bm25") == expected
    best = float(hits.scores[0, 0])
    assert mined(tmp_path, data, "--source", "bm25", "--mine.max-score", str(best - 1e-3))["a"] == expected["a"][1:]


def test_candidates_of_words_with_the_scores_of_a_model(models, data, tmp_path):
    scores = vectors(models / "queries", ["a"], "query") @ vectors(models / "passages", TEXTS, "passage").T
    order = mined(tmp_path, data, "--source", "bm25")["a"]
    of = dict(zip(DOCUMENTS, scores[0], strict=True))
    bound = sorted(of[name] for name in order)[1] + 1e-4  # two documents are below
    towers = ["--source", "bm25", "--model", str(models / "passages"), "--query-model", str(models / "queries")]
    assert mined(tmp_path, data, *towers, "--mine.max-score", str(bound))["a"] == [
        name for name in order if of[name] < bound]
    margin = float(np.mean(sorted(of["d1"] - of[name] for name in order)[1:3]))  # two documents are nearer
    assert margin > 0
    assert mined(tmp_path, data, *towers, "--mine.absolute-margin", str(margin))["a"] == [
        name for name in order if of[name] + margin <= of["d1"]]


def test_both_sources_in_turn(models, data, tmp_path):
    passages = vectors(models / "passages", TEXTS, "passage")
    names = np.array([*DOCUMENTS, "none"])
    dense = [np.argsort(-(query @ passages.T), kind="stable")[:3]
             for query in vectors(models / "passages", [text for text, _, _ in QUERIES.values()], "query")]
    words = bm25_search(bm25_index(TEXTS), [text for text, _, _ in QUERIES.values()], 3).rows
    expected = {text: [name for name in names[rows[:3]] if name not in (own, "none")] for (text, own, _), rows in zip(
        QUERIES.values(), interleaved(np.array(dense), words), strict=True)}
    found = mined(tmp_path, data, "--source", "mixed", "--model", str(models / "passages"), "--depth", "3")
    assert found == {text: own for text, own in expected.items() if own}
    assert found != mined(tmp_path, data, "--model", str(models / "passages"), "--depth", "3")


def test_interleaved_by_hand():
    first, second = np.array([[4, 7, 2], [1, -1, -1]]), np.array([[7, 9, -1], [-1, -1, -1]])
    assert interleaved(first, second).tolist() == [[4, 7, 9, 2, -1, -1], [1, -1, -1, -1, -1, -1]]


def test_vectors_are_read_from_any_block():
    vectors = np.arange(14.0).reshape(7, 2)
    read = reader(np.split(vectors, [3, 3, 4]))
    for rows in ([0, 2, 3, 4, 6, 3], [], [6]):
        np.testing.assert_array_equal(read(np.array(rows, int)), vectors[np.array(rows, int)])


def test_no_negative_holds_an_answer(data, tmp_path):
    plain = mined(tmp_path, data, "--source", "bm25")
    assert "d3" in plain["a"] and "d7" in plain["c"]
    filtered = mined(tmp_path, data, "--source", "bm25", "--answers", "answers")
    assert filtered == {"a": [one for one in plain["a"] if one != "d3"], "h g": plain["h g"]}  # of c all have a b
    rows = tmp_path / "rows.jsonl"
    write = lambda *lines: rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write({"question": "a", "positive": "a b c", "negative": "a e", "gold": "E"},
          {"question": "a", "positive": "a b", "negative": ["a f", "a a h"], "gold": ["h"]})  # one query with both
    assert mined(tmp_path, rows, "--source", "bm25", "--answers", "gold") == {"a": ["a f"]}
    write({"question": "a", "positive": "a b c", "negative": "a e", "gold": 7})
    with pytest.raises(SystemExit):
        mined(tmp_path, rows, "--source", "bm25", "--answers", "gold")


@pytest.mark.parametrize("index", ["exact", "faiss_flat"])
def test_two_towers_answer_and_are_measured(models, data, tmp_path, capsys, index):
    if index != "exact":
        pytest.importorskip("faiss", reason="the extra faiss is not installed")
    kind = ["--index.kind", index]
    kept = [] if index == "exact" else ["--index.file", str(tmp_path / "index")]
    scores = vectors(models / "queries", ["a", "h g", "c"], "query") @ vectors(models / "passages", TEXTS, "passage").T
    alone = vectors(models / "passages", ["c"], "query") @ vectors(models / "passages", TEXTS, "passage").T
    assert np.abs(alone - scores[2]).max() > 0.05
    best = ranked(scores[2], "q3")
    order = [list(DOCUMENTS)[i] for i in np.argsort(-scores[2], kind="stable")]
    for _ in range(2 if kept else 1):  # the second time with the index that was kept
        search.main(["--model", str(models / "passages"), "--query-model", str(models / "queries"), "--corpus",
                     str(data), "--query", "c", "--k", "8", *kind, *kept])
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[2] for line in lines] == order
        np.testing.assert_allclose([float(line.split()[1]) for line in lines], sorted(scores[2])[::-1], atol=1e-4)
    evaluate_retrieval.main(["--data", str(data), "--models", str(models / "passages"), "--query-model",
                             str(models / "queries"), "--output", str(tmp_path / "out"), *kind, *kept])
    run = read_run(tmp_path / "out/0_passages.trec")
    for row, query in enumerate(QUERIES):
        np.testing.assert_allclose([run[query][name] for name in DOCUMENTS], scores[row], atol=1e-6)
    found = mined(tmp_path, data, "--model", str(models / "passages"), "--query-model", str(models / "queries"), *kind,
                  *kept)
    assert found["c"] == best


def test_prompts_of_the_command_line_are_those_of_a_folder_that_says_them(models, data, tmp_path, capsys):
    scores = {name: vectors(models / name, ["a", "h g", "c"], "query") @ vectors(models / name, TEXTS, "passage").T
              for name in ("passages", "prompted")}
    best = {name: ranked(own[2], "q3") for name, own in scores.items()}
    assert best["passages"] != best["prompted"]
    given = ["--model", str(models / "passages"), "--query-prompt", "e f ", "--passage-prompt", "g "]
    assert mined(tmp_path, data, *given)["c"] == best["prompted"]
    assert "passages: 'e f ' before every query and 'g ' before every passage" in capsys.readouterr().err
    search.main([*given, "--corpus", str(data), "--query", "c", "--k", "8"])
    found = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [name for name in found if name != QUERIES["q3"][1]] == best["prompted"]
    for asked, said, prompts in (("passages", "prompted", given[2:]),
                                 ("prompted", "passages", ["--query-prompt", "", "--passage-prompt", ""])):
        evaluate_retrieval.main(["--data", str(data), "--models", str(models / asked), "--output", str(tmp_path / said),
                                 *prompts])
        run = read_run(tmp_path / said / f"0_{asked}.trec")
        for row, query in enumerate(QUERIES):
            np.testing.assert_allclose([run[query][name] for name in DOCUMENTS], scores[said][row], atol=1e-6)


def test_errors_are_one_sentence(models, data, tmp_path, capsys):
    passages = str(models / "passages")
    output = ["--data", str(data), "--output", str(tmp_path / "x.jsonl")]
    asked = ["--model", passages, "--corpus", str(data), "--query", "a"]
    measured = ["--data", str(data), "--models"]
    for recipe, arguments, message in (
        (mine, [*output, "--source", "bm25", "--mine.relative-margin", "0.05"], "name a --model that scores them"),
        (mine, [*output, "--source", "bm25", "--query-model", passages], "--query-model has no effect with --source"),
        (mine, [*output, "--source", "bm25", "--index.kind", "faiss_flat"], "--index has no effect with --source bm25"),
        (mine, [*output, "--source", "bm25", "--query-prompt", ""], "--query-prompt has no effect with --source bm25"),
        (mine, [*output, "--source", "mixed"], "--model names a folder"),
        (mine, [*output, "--source", "bm25", "--answers", "gold"], "field 'gold' must be a text or a list of texts"),
        (search, [*asked, "--query-model", str(models / "narrow")], "the width of its vectors is 4, not 16"),
        (search, [*asked, "--query-model", str(models / "dot")], "the similarity of its vectors is dot, not cosine"),
        (search, [*asked, "--index.probes", "3"], "index.probes has no effect with index.kind exact"),
        (evaluate_retrieval, [*measured, "bm25", "--query-model", passages], "--query-model has no effect on bm25 and"),
        (evaluate_retrieval, [*measured, "bm25", "--passage-prompt", ""], "--passage-prompt has no effect on bm25 and"),
        (evaluate_retrieval, [*measured, passages, "--query-prompt", "a " * 18], "give a shorter prompt"),
        (evaluate_retrieval, [*measured, passages, str(models / "dot"), "--index.kind", "faiss_flat", "--index.file",
                              str(tmp_path / "i")], "keeps the index of one model"),
        (evaluate_retrieval, ["--models", passages], "--data names a BEIR folder or --mteb tasks"),
    ):
        with pytest.raises(SystemExit) as end:
            recipe.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err, message
    assert not any(tmp_path.iterdir())
