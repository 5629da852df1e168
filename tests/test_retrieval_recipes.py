"""The recipes of retrieval on a tiny encoder: trained in chunks or not, resumed, exported, mined, measured, asked."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm.core.log import read_metrics
from jaxlm.data.retrieval_rows import read_retrieval_rows
from jaxlm.eval.ranking import read_run
from jaxlm.retrieval.embed import embed_texts
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from jaxlm.train.checkpoint import saved_params
from recipes import evaluate_retrieval, mine, search, train_retriever
from tests.test_embed import encoder_of

DOCUMENTS = {"d1": "a b c", "d2": "c d", "d3": "e f g", "d4": "h h", "d5": "b b a", "d6": "g e", "d7": "d c a",
             "d8": "f f f"}
QUERIES = {f"q{i}": (text, answer) for i, (text, answer) in enumerate(
    [("a", "d1"), ("c", "d2"), ("e", "d3"), ("h", "d4"), ("b", "d5"), ("g", "d6"), ("d", "d7"), ("f", "d8")])}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    encoder, params = encoder_of(pooling="mean", normalize=True, similarity="cosine")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_text_encoder(folder, encoder, params, architecture="bert")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A BEIR folder whose queries have a kind."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in DOCUMENTS.items()])
    write("queries.jsonl", [{"_id": name, "text": text, "kind": "vowel" if text in "ae" else "other"}
                            for name, (text, _) in QUERIES.items()])
    lines = "".join(f"{name}\t{answer}\t1\n" for name, (_, answer) in QUERIES.items())
    for split in ("train", "dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def train(model, data, folder, *more):
    train_retriever.main([
        "--init", str(model), "--data.train", str(data), "--data.dev", str(data), "--batch.batch-size", "8",
        "--batch.num-negatives", "0", "--loop.steps", "24", "--loop.log-every", "1", "--mesh.data", "4",
        "--mesh.tensor", "2", "--optim.lr", "1e-2", "--checkpoint.every", "12", "--folder", str(folder), *more])
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def params_of(model, folder):
    return saved_params(folder, jax.eval_shape(lambda: load_text_encoder(model)[1]))


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(model, data, folder)


def test_it_is_measured_and_exported(model, data, trained):
    folder, losses = trained
    assert len(losses) == 24 and np.isfinite(losses).all()
    [measured] = [row for row in read_metrics(folder / "metrics.jsonl") if f"eval/{data.name}/ndcg@10" in row]
    assert 0 < measured[f"eval/{data.name}/ndcg@10"] <= 1
    encoder, params = load_text_encoder(folder / "exported")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(params_of(model, folder)))
    assert embed_texts(encoder, params, ["a b"], "query").shape == (1, 16)


def test_it_learns_and_in_chunks_the_same(model, data, tmp_path):
    """Without dropout: the chunks of a batch draw their own."""
    whole = train(model, data, tmp_path / "whole", "--no-dropout")
    chunked = train(model, data, tmp_path / "chunked", "--no-dropout", "--chunks", "2")
    np.testing.assert_allclose(chunked[:4], whole[:4], rtol=1e-4)
    assert max(whole[-1], chunked[-1]) < 0.5 * whole[0]


def test_a_resumed_run_is_bit_identical(model, data, trained, tmp_path):
    whole, losses = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/24")
    assert train(model, data, tmp_path / "run", "--resume")[-12:] == losses[-12:]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(params_of(model, folder))
                                                  for folder in (whole, tmp_path / "run")))


def test_mined_rows_train_a_retriever(model, data, tmp_path):
    mine.main(["--model", str(model), "--data", str(data), "--output", str(tmp_path / "mined.jsonl"), "--depth", "8",
               "--mine.num-negatives", "2", "--cache", str(tmp_path / "vectors")])
    rows = read_retrieval_rows(tmp_path / "mined.jsonl").rows
    assert len(rows) == 8 and all(len(row.negatives) == 2 for row in rows)
    assert not any(set(row.positives) & set(row.negatives) for row in rows)
    losses = train(model, tmp_path / "mined.jsonl", tmp_path / "run", "--batch.num-negatives", "2", "--loop.steps", "2",
                   "--data.dev", str(data))
    assert len(losses) == 2


def test_models_are_measured_by_group_and_compared(model, data, trained, tmp_path, capsys):
    exported = trained[0] / "exported"
    evaluate_retrieval.main(["--data", str(data), "--models", str(model), str(exported), "--group", "kind",
                             "--measures", "ndcg@3", "mrr@10", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| ndcg@3 | mrr@10 |" in printed and "vowel: ndcg@3" in printed and f"{exported} - {model}" in printed
    numbers = json.loads((tmp_path / "out/measures.json").read_text())
    for own in numbers.values():
        assert own["groups"].keys() == {"vowel", "other"} and own["groups"]["vowel"]["queries"] == 2
        for part in (own, *own["groups"].values()):
            for name, (low, high) in part["intervals"].items():
                assert low - 1e-12 <= part["mean"][name] <= high + 1e-12  # where all are equal, they round apart
        assert own["intervals"]["ndcg@3"] != own["groups"]["other"]["intervals"]["ndcg@3"]
    rows = [json.loads(line) for line in (tmp_path / "out/per_query.jsonl").read_text().splitlines()]
    assert {(row["model"], row["query"]) for row in rows} == {(str(name), query) for name in (model, exported)
                                                             for query in QUERIES} and len(rows) == 16
    for measure in ("ndcg@3", "mrr@10"):
        mine = [row[measure] for row in rows if row["model"] == str(model) and row["group"] == "other"]
        assert np.mean(mine) == pytest.approx(numbers[str(model)]["groups"]["other"]["mean"][measure])
    run = tmp_path / "out/0_tiny.trec"
    assert read_run(run).keys() == QUERIES.keys()
    evaluate_retrieval.main(["--data", str(data), "--models", str(run), "bm25", "--measures", "ndcg@3"])
    assert f"{numbers[str(model)]['mean']['ndcg@3']:.4f}" in capsys.readouterr().out


def test_the_document_with_the_id_of_its_query_takes_no_place(model, tmp_path, capsys):
    """Queries stand in the corpus, and what they look for is the next best; d5 has other words there."""
    (tmp_path / "qrels").mkdir()
    texts = {"d1": "a b c", "d2": "a b c d", "d3": "h h", "d4": "h h e"}
    for name, last in (("corpus", "e e e"), ("queries", "a b c")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"_id": key, "text": text}) + "\n"
                                                        for key, text in (texts | {"d5": last}).items()))
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nd1\td2\t1\nd3\td4\t1\nd5\td1\t1\n")
    run = tmp_path / "whole.trec"
    run.write_text("d1 Q0 d1 1 2 t\nd1 Q0 d2 2 1 t\nd3 Q0 d4 1 1 t\nd5 Q0 d1 1 1 t\n")
    flags = ["--data", str(tmp_path), "--models", str(model), "bm25", str(run), "--measures", "success@1", "--depth",
             "1", "--output", str(tmp_path / "out")]
    for more, expected, kept in ((["--ignore-identical-ids"], [1, 1, 1], {"d1": ["d2"], "d3": ["d4"], "d5": ["d1"]}),
                                 ([], [1 / 3, 1 / 3, 2 / 3], {"d1": ["d1"], "d3": ["d3"], "d5": ["d1"]})):
        evaluate_retrieval.main([*flags, *more])
        means = [own["mean"]["success@1"] for own in json.loads((tmp_path / "out/measures.json").read_text()).values()]
        assert means == pytest.approx(expected)
        for name in ("0_tiny", "1_bm25"):
            assert {key: list(own) for key, own in read_run(tmp_path / f"out/{name}.trec").items()} == kept
    assert "no effect" not in capsys.readouterr().err


def test_what_is_wrong_is_found_before_anything_is_encoded(model, data, tmp_path, capsys, monkeypatch):
    broken, other = tmp_path / "broken.trec", tmp_path / "other.trec"
    broken.write_text("q1 Q0 d1 1 high t\n")
    other.write_text("x Q0 d1 1 1.0 t\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "spaces/qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        (tmp_path / f"spaces/{name}.jsonl").write_text('{"_id": "a b", "text": "a"}\n')
    (tmp_path / "spaces/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\na b\ta b\t1\n")

    def encode(*args, **kwargs):
        raise AssertionError("this encodes")

    monkeypatch.setattr(evaluate_retrieval, "open_searcher", encode)
    known, out = ["--data", str(data), "--models", str(model)], ["--output", str(tmp_path / "out")]
    for arguments, message in (
        ([*known, "--measures", "mrr@10", "ndgc@10"], "did you mean 'ndcg'"),
        ([*known, "--measures"], "--measures names at least one"),
        ([*known, "--depth", "5", "--measures", "mrr@5", "recall@100"], "recall@100 needs 100 documents"),
        ([*known, "typo"], "'typo' is no folder, no run file and not bm25"),
        ([*known, str(tmp_path / "empty")], str(tmp_path / "empty")),
        ([*known, "--query-model", "typo"], "typo"),
        ([*known, str(broken)], "broken.trec:1: the score 'high' is not a number"),
        ([*known, str(other)], "no query of the run is judged"),
        ([*known, f"{model}/"], "--models names a model twice"),
        ([*known, *out, "--data", str(tmp_path / "spaces")], "'a b' is empty or has a space"),
        ([*known, "bm25", "--data", str(tmp_path / "spaces")], "at least 2 judged queries"),
        (["--data", str(data), "--models", str(broken), "--depth", "5"], "--depth has no effect on run files"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate_retrieval.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err, message
    with pytest.raises(AssertionError, match="this encodes"):
        evaluate_retrieval.main([*known, "--ignore-identical-ids"])
    assert "no query has the id of a document" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_run_of_a_model_is_kept_when_the_next_one_fails(model, data, trained, tmp_path, monkeypatch, capsys):
    opened, searcher = [], evaluate_retrieval.open_searcher

    def fail(found, *args, **kwargs):
        opened.append(found.init)
        if len(opened) > 1:
            raise ValueError("no memory")
        return searcher(found, *args, **kwargs)

    monkeypatch.setattr(evaluate_retrieval, "open_searcher", fail)
    with pytest.raises(ValueError, match="no memory"):
        evaluate_retrieval.main(["--data", str(data), "--models", str(model), str(trained[0] / "exported"), "--output",
                                 str(tmp_path / "out")])
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["0_tiny.trec"]
    run = tmp_path / "short.trec"
    run.write_text("q1 Q0 d1 1 1.0 t\n")
    evaluate_retrieval.main(["--data", str(data), "--models", str(run), "--measures", "recall@3"])
    assert "has 1 documents of a query at most" in capsys.readouterr().err


def test_a_corpus_answers_from_the_shell(model, data, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(model), "--corpus", str(data / "corpus.jsonl"), "--cache", str(tmp_path / "v"),
             "--k", "2"]
    search.main([*flags, "--query", "a b c"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# a b c" and lines[1].startswith("1. 1.0000  d1  a b c") and len(lines) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c\n\n"))
    search.main(flags)
    assert capsys.readouterr().out.replace("query> ", "").splitlines()[:3] == lines


def test_an_empty_query_is_refused():
    for query in ("", " \n"):
        with pytest.raises(ValueError, match="--query must have text"):
            search.Config(query=("a", query))


def test_errors_are_one_sentence(model, data, tmp_path, capsys):
    run = ["--folder", str(tmp_path / "run")]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a"}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"_id": "x", "text": "a"}\n')
    kept = ["--model", str(model), "--cache", str(tmp_path / "v"), "--query", "a", "--corpus"]
    search.main([*kept, str(data)])
    for recipe, arguments, message in (
        (train_retriever, ["--data.train", str(data), *run], "--init names the model"),
        (train_retriever, ["--init", str(model), *run], "--data.train names the rows"),
        (train_retriever, ["--init", str(model), "--data.train", str(bad), *run], "bad.jsonl:1: no field 'positive'"),
        (train_retriever, ["--init", str(model), "--data.train", f"{data}?split=no", *run], "no split 'no'"),
        (train_retriever, ["--init", str(model), "--data.train", str(data), "--batch.num-negatives", "0",
                           "--batch.batch-size", "8", "--chunks", "3", *run], "does not divide into 3 chunks"),
        (evaluate_retrieval, ["--data", str(data), "--models", str(model), "--group", "colour"], "no field 'colour'"),
        (evaluate_retrieval, ["--data", str(data), "--models", str(model), "--measures", "ndgc@10"], "did you mean"),
        (mine, ["--model", str(model), "--data", str(data), "--output", str(bad)], "exists; --overwrite"),
        (train_retriever, ["--init", str(tmp_path / "no"), "--data.train", str(data), *run], "no: no such folder"),
        (search, [*kept, str(other)], "made differently"),
        (search, [*kept, str(data), "--passage-prompt", "f "], "made differently"),
    ):
        with pytest.raises(SystemExit) as end:
            recipe.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err, message
    assert not (tmp_path / "run").exists()
