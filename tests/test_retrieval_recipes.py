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
               "--mine.num-negatives", "2", "--vectors", str(tmp_path / "vectors")])
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
    assert numbers[str(model)]["groups"].keys() == {"vowel", "other"}
    run = tmp_path / "out/0_tiny.trec"
    assert read_run(run).keys() == QUERIES.keys()
    evaluate_retrieval.main(["--data", str(data), "--models", str(run), "bm25", "--measures", "ndcg@3"])
    assert f"{numbers[str(model)]['mean']['ndcg@3']:.4f}" in capsys.readouterr().out


def test_a_corpus_answers_from_the_shell(model, data, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(model), "--corpus", str(data / "corpus.jsonl"), "--vectors", str(tmp_path / "v"),
             "--k", "2"]
    search.main([*flags, "--query", "a b c"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# a b c" and lines[1].startswith("1. 1.0000  d1  a b c") and len(lines) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c\n\n"))
    search.main(flags)
    assert capsys.readouterr().out.replace("query> ", "").splitlines()[:3] == lines


def test_errors_are_one_sentence(model, data, tmp_path, capsys):
    run = ["--folder", str(tmp_path / "run")]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a"}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"_id": "x", "text": "a"}\n')
    search.main(["--model", str(model), "--corpus", str(data), "--vectors", str(tmp_path / "v"), "--query", "a"])
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
        (search, ["--model", str(model), "--corpus", str(other), "--vectors", str(tmp_path / "v"), "--query", "a"],
         "made differently"),
    ):
        with pytest.raises(SystemExit) as end:
            recipe.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err, message
    assert not (tmp_path / "run").exists()
