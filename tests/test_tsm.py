"""TSM from data to summary; the recipes it calls run in this process, and training is replaced by a push."""

import importlib
import itertools
import json
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.core import command
from jaxlm.data.beir import BeirSet
from jaxlm.data.beir_files import write_beir
from jaxlm.data.time_specifiers import SPECIFIERS
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from recipes import tsm
from tests.test_embed import encoder_of


@pytest.fixture
def base(tmp_path):
    encoder, params = encoder_of(pooling="mean", normalize=True, similarity="cosine")
    save_text_encoder(tmp_path / "model", encoder, params, architecture="bert")
    return tmp_path / "model"


@pytest.fixture
def called(monkeypatch):
    """The commands that were run, in order."""
    found = []

    def run(line, check, env):
        module, arguments = line[2], line[3:]
        found.append((module, arguments))
        if module != "recipes.train_retriever":
            importlib.import_module(module).main(arguments)
            return SimpleNamespace(returncode=0)
        options = dict(itertools.pairwise(arguments))
        encoder, params = load_text_encoder(options["--init"])
        pushed = jax.tree.map(lambda leaf: leaf + len(found), params)
        save_text_encoder(f"{options['--folder']}/exported", encoder, pushed, architecture="bert")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", run)
    return found


def test_from_data_to_summary_and_again_without_work(base, called, tmp_path, capsys):
    folder = tmp_path / "run"
    other = tmp_path / "elsewhere"
    write_beir(other, BeirSet({f"d{i}": f"a text {i}" for i in range(9)}, {f"q{i}": f"text {i}" for i in range(5)}, {},
                              {f"q{i}": {f"d{i}": 1} for i in range(5)}, {}, 0), "dev")
    flags = ["--init", str(base), "--entities", "10", "--negatives", "2", "--batch-size", "2", "--line", "0.5",
             "--plain", f"{other}?split=dev", "--questions", "3", "--folder", str(folder)]
    tsm.main(flags)
    summary = (folder / "results/summary.md").read_text()
    assert summary.count("| merged |") == 3 and (folder / "results/gains.png").stat().st_size > 1000
    assert "## elsewhere (3 questions)" in summary and "elsewhere, merged - joint" in summary
    folder = folder / "seed_1"
    trained = [arguments for module, arguments in called if module == "recipes.train_retriever"]
    assert len(trained) == len(SPECIFIERS) + 1
    joint = trained[-1]
    assert joint[joint.index("--loop.steps") + 1] == str(60 * len(SPECIFIERS))
    # Each row is asked with the specifier of its file; the joint model reads all files.
    for name in SPECIFIERS:
        rows = [json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text().splitlines()]
        assert str(folder / f"data/{name}.jsonl") in joint
        assert all(len(row["negatives"]) == 2 for row in rows)
    asked = [json.loads(line)["query"] for line in (folder / "data/before.jsonl").read_text().splitlines()]
    assert asked and all(" before " in query for query in asked)
    # The merged model is the mean of the specialists.
    _, merged = load_text_encoder(folder / "models/merged")
    specialists = [load_text_encoder(folder / f"models/{name}/exported")[1] for name in SPECIFIERS]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *specialists)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, mean)
    before = len(called)
    tsm.main(flags)
    assert len(called) == before, "everything was there"


def test_questions_of_a_folder_split_by_page(tmp_path):
    data = tmp_path / "beir"
    (data / "qrels").mkdir(parents=True)
    rows = [{"_id": f"q{i}", "text": f"Where did P{i} live from {1950 + i} to {1955 + i}?", "link": f"/wiki/P{i}",
             "relation": "R"} for i in range(20)]
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "title": "", "text": f"P{i} lived"}) + "\n"
                                               for i in range(20)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(20))
    (data / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    corpus, asked, plain = tsm.questions_of(tsm.Config(data=str(data)))
    pages = {split: {one.positives[0] for part in groups.values() for one in part} for split, groups in asked.items()}
    assert len(corpus) == 20 and not plain and pages["train"] and pages["test"]
    assert pages["train"].isdisjoint(pages["test"]) and len(pages["train"] | pages["test"]) == 20


def test_errors(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2))
    for flags, message in (([], "--init names the base"),
                           (["--init", str(base), "--entities", "3"], "entities must be"),
                           (["--init", str(base), "--entities", "10"], "recipes.mine failed"),
                           (["--init", str(base), "--data", str(tmp_path)], "no split 'train'")):
        with pytest.raises(SystemExit) as end:
            tsm.main([*flags, "--folder", str(tmp_path / "run")])
        assert end.value.code == 2 and message in capsys.readouterr().err
