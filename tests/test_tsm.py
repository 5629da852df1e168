"""TSM from data to summary; the recipes it calls run in this process, and training is replaced by a push."""

import importlib
import itertools
import json

import jax
import numpy as np
import pytest

from jaxlm.core import command
from jaxlm.core.config import load_config
from jaxlm.data.beir import BeirSet, read_beir
from jaxlm.data.beir_files import write_beir
from jaxlm.data.retrieval_rows import read_retrieval_rows
from jaxlm.data.specifier_rows import linked, read_specifier_rows
from jaxlm.data.time_material import material_of_pages
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

    def run(line):
        module, arguments = line[2], line[3:]
        found.append((module, arguments))
        if module != "recipes.train_retriever":
            importlib.import_module(module).main(arguments)
            return 0
        options = dict(itertools.pairwise(arguments))
        encoder, params = load_text_encoder(options["--init"])
        pushed = jax.tree.map(lambda leaf: leaf + len(found), params)
        save_text_encoder(f"{options['--folder']}/exported", encoder, pushed, architecture="bert")
        return 0

    monkeypatch.setattr(command, "run_process", run)
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
    before, kept = len(called), written(folder / "data")
    tsm.main(flags)
    assert len(called) == before and written(folder / "data") == kept, "everything was there"


def written(folder):
    """When every file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rows_files(folder, *, count=20, specifiers=("in_late", "before", "after"), negatives=2):
    """A file of rows for each specifier, and the pairs that name them; row i of all is about passage i."""
    folder.mkdir()
    pairs = []
    for name in specifiers:
        rows = [{"question": f"where was P{i} {name} {1950 + i}?", "positive_ctxs": [{"text": f"P{i} lived"}],
                 "negative_ctxs": [{"text": f"{name} other {i} {j}"} for j in range(negatives)]} for i in range(count)]
        path = folder / f"dev_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs.append(f"{name}={path}")
    return pairs


def test_given_rows_need_no_mining(base, called, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tsm, "measure", lambda config, models, sets: [*models, *sets.values()])
    monkeypatch.setattr(tsm, "summarise", lambda config, found: measured.extend(*found))
    measured = []
    pairs = rows_files(tmp_path / "rows")
    path = tmp_path / "rows/dev_before.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    short = json.loads(lines[0])
    short["negative_ctxs"].pop()
    path.write_text("".join([json.dumps(short) + "\n", *lines[1:]]))
    # Of seed 2 row 0 is one to train on.
    tsm.main(["--init", str(base), "--rows", *pairs, "--negatives", "2", "--batch-size", "2", "--line", "--seeds", "2",
              "--folder", str(tmp_path / "run")])
    folder = tmp_path / "run/seed_2"
    assert "before: 1 of 15 questions have fewer than 2 negatives" in capsys.readouterr().err
    assert measured == ["base", "joint", "merged", "after", "before", "in_late", folder / "data/temporal"]
    assert not any(module == "recipes.mine" for module, _ in called)
    trained = [arguments for module, arguments in called if module == "recipes.train_retriever"]
    assert [str(folder / f"models/{name}") in arguments for name, arguments in
            zip(["after", "before", "in_late", "joint"], trained, strict=True)] == 4 * [True]
    assert [arguments[arguments.index("--loop.steps") + 1] for arguments in trained] == ["60", "60", "60", "180"]
    _, merged = load_text_encoder(folder / "models/merged")
    specialists = [load_text_encoder(folder / f"models/{name}/exported")[1] for name in ("after", "before", "in_late")]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *specialists)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, mean)
    learnt = {name: read_retrieval_rows(folder / f"data/{name}.jsonl").rows for name in ("after", "before", "in_late")}
    for name, rows in learnt.items():
        for row in rows:
            i = row.query.split()[2][1:]
            assert f" {name} " in row.query and [one.text for one in row.positives] == [f"P{i} lived"]
            assert [one.text for one in row.negatives] == [f"{name} other {i} 0", f"{name} other {i} 1"]
    asked = read_beir(folder / "data/temporal", "test")
    assert len(asked.corpus) == 20 + 3 * 2 * 20 - 1, "the passages of all rows"
    held_out = {asked.corpus[name] for gains in asked.qrels.values() for name in gains}
    assert held_out.isdisjoint(one.text for rows in learnt.values() for row in rows for one in row.positives)
    assert len(asked.queries) + sum(map(len, learnt.values())) == 60 - 1
    assert all(asked.fields[name]["specifier"] == text.split()[3] for name, text in asked.queries.items())


def test_a_folder_keeps_its_settings(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tsm, "make_models", lambda _: {})
    monkeypatch.setattr(tsm, "measure", lambda *_: {})
    monkeypatch.setattr(tsm, "summarise", lambda *_: None)
    folder, pairs = tmp_path / "run", rows_files(tmp_path / "rows")
    flags = ["--init", str(base), "--rows", *pairs, "--negatives", "2", "--batch-size", "2", "--folder", str(folder)]
    tsm.main(flags)
    kept = written(folder)
    for changed, message in ((["--max-length", "32"], "--max-length: 128 -> 32"), (["--line", "0.5"], "--line: (0.25,"),
                             (["--init", "other", "--negatives", "1"], "'other'; --negatives: 2 -> 1"),
                             (["--rows", *pairs[:2], "--seeds", "1", "2"], "--rows: ("),
                             (["--documents", "500"], "--documents: None -> 500")):
        with pytest.raises(SystemExit) as end:
            tsm.main([*flags, *changed])
        assert end.value.code == 2 and message in capsys.readouterr().err and written(folder) == kept
    tsm.main([*flags, "--seeds", "1", "2"])
    now = written(folder)
    assert {path for path in kept if now[path] != kept[path]} == {folder / "config.json"}
    assert (folder / "seed_2/base").is_dir()
    assert load_config(tsm.Config, folder / "config.json").seeds == (1, 2)
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit):
        tsm.main(flags)
    assert "holds seed_1 but no config.json" in capsys.readouterr().err


def test_given_rows_of_one_passage_stay_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        {"question": "a", "positives": ["c", "b"], "negatives": ["x"]},
        {"question": "d", "positives": ["e"], "negatives": [" c "]},
        {"question": "f", "positives": ["b  "], "negatives": []},
        {"question": "d", "positives": ["g"], "negatives": ["x"]})))
    given = read_specifier_rows({"before": path})
    assert list(given.corpus.values()) == ["c", "b", "x", "e", "g"]
    assert [one.page for one in given.questions] == ["a", "d", "a", "d"]
    assert given.questions[1].negatives == given.questions[0].question.positives[:1]
    # A link that a later set makes holds for earlier ones too.
    assert linked([("c",), ("b",), ("z",), ("b", "c"), ("a", "c")]) == ["a", "a", "z", "a", "a"]


def test_fewer_documents_make_the_set_of_generated_lives_smaller_too():
    whole = tsm.material_of(tsm.Config(entities=20, batch_size=1))
    count = len(whole.everything.corpus) - 5
    few = tsm.material_of(tsm.Config(entities=20, batch_size=1, documents=count))
    assert len(few.everything.corpus) == count and few.asked == whole.asked


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
    found = material_of_pages(data, 1)
    pages = {split: {one.positives[0] for part in groups.values() for one in part}
             for split, groups in found.asked.items()}
    assert len(found.everything.corpus) == 20 and not found.plain and pages["train"] and pages["test"]
    assert pages["train"].isdisjoint(pages["test"]) and len(pages["train"] | pages["test"]) == 20


def test_errors(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_process", lambda line: 2)
    pairs, few = rows_files(tmp_path / "rows"), rows_files(tmp_path / "few", count=4)
    one = ["--init", str(base), "--folder", str(tmp_path / "run")]
    # All go to one folder: what fails for reasons of the user leaves nothing that binds the next start.
    for flags, message in (([], "--init names the base"),
                           (["--entities", "3"], "entities must be"),
                           (["--data", str(tmp_path)], "no split 'train'"),
                           (["--data", str(tmp_path), "--rows", *pairs], "give one of them"),
                           (["--rows", *pairs, "--entities", "20"], "--entities counts generated lives"),
                           (["--questions", "5"], "--questions is about further test sets"),
                           (["--rows", pairs[0]], "nothing to merge"),
                           (["--rows", "befor=x.jsonl"], "did you mean 'before'?"),
                           (["--rows", "x.jsonl"], "is not SPECIFIER=FILE"),
                           (["--rows", pairs[0], pairs[0]], "in_late has two files"),
                           (["--rows", *pairs], "5 negatives, but after has 0, before has 0, in_late has 0; lower"),
                           (["--rows", *pairs, "--negatives", "2", "--batch-size", "16"], "lower --batch-size"),
                           (["--rows", *few, "--negatives", "2", "--batch-size", "1", "--seeds", "11"], "held out"),
                           (["--rows", *pairs, "--negatives", "2", "--plain", "none", "--batch-size", "2"], "no split"),
                           (["--entities", "10", "--batch-size", "2"], "recipes.mine failed")):
        with pytest.raises(SystemExit) as end:
            tsm.main([*(one if flags else one[2:]), *flags])
        assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split()), flags
