"""The recipe from raw files to a corpus: planted faults counted, resumed after a kill, each fault one sentence."""

import json
from pathlib import Path

import dill
import pyarrow.parquet
import pytest

from jaxlm.curate import stages
from jaxlm.curate.pipeline import CurationConfig, ExecutorConfig, make_executors, make_stages, step_names
from jaxlm.curate.report import Tally, merged
from jaxlm.curate.sample import write_sample
from jaxlm.data.sources import open_source, parse_source
from recipes import curate
from tests.test_curate_steps import EN, KO, labelled_file

# datatrove's local executor starts a manager process for each stage, with whatever way of starting Python prefers.
pytestmark = [pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
              pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")]


def run(*argv):
    curate.main([str(one) for one in argv])


def report_of(target):
    return json.loads((target / "report.json").read_text())


def texts_of(target):
    tables = [pyarrow.parquet.read_table(path) for path in target.glob("*.parquet")]
    return sorted(row["text"] for table in tables for row in table.to_pylist())


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    target = tmp_path_factory.mktemp("curated") / "out"
    run("--target", target)
    return target


def test_planted_faults_are_counted_exactly(curated, tmp_path):
    sample, report = write_sample(tmp_path), report_of(curated)
    steps = {one["step"]: one for one in report["steps"]}
    assert list(steps) == [*step_names(CurationConfig())[:-2], "decontaminate", "exact_dedup", "minhash_dedup"]
    assert {name: one["dropped"] for name, one in steps.items()} == sample.dropped
    assert steps["read"]["documents_in"] == sample.rows and steps["read"]["notes"] == sample.notes
    assert report["output"]["documents"] == sample.kept == sum(report["output"]["languages"].values())
    assert steps["read"]["reasons"] == {"empty": 1, "neither UTF-8 nor CP949": 1, "no text in field 'text'": 1,
                                        "not JSON": 1}
    assert steps["language"]["reasons"] == {"language de": 1, "language ja": 1}
    leak = steps["decontaminate"]["examples"]["benchmark overlap"][0]["detail"]
    assert 0 < leak["share"] < 1 and len(leak["spans"][0].split()) >= 13
    assert report["facts"]["benchmarks"] == {"texts": 4, "too_short_to_search": 2} and not report["warnings"]
    table = (curated / "report.md").read_text()
    assert f"| minhash_dedup | {sample.kept + 3} | {sample.kept} | 3 |" in table and "1 dropped: few_particles" in table
    assert not curated.with_name("out.work").exists()


def test_output_is_a_source(curated):
    source = open_source(parse_source(f"{curated}/*.parquet?language_field=language&source_field=source"))
    assert len(source) == 25 and {document.language for document in source} == {"ko", "en"}
    assert {document.source for document in source} >= {"raw.jsonl", "legacy.txt", "table.parquet"}
    texts = [document.text for document in source]
    assert len({*texts}) == 25 and sum(len(text.encode()) for text in texts) == report_of(curated)["output"]["bytes"]


def test_resumed_after_a_kill(curated, tmp_path, monkeypatch):
    """The second task is killed while it reads: the first is not done again, and the result is the same."""
    read, seen = stages.read_raw, []

    def killed(path, config):
        if path.name == "raw.jsonl":
            raise KeyboardInterrupt
        return read(path, config)

    def watched(path, config):
        seen.append(path.name)
        return read(path, config)

    target = tmp_path / "out"
    monkeypatch.setattr(stages, "read_raw", killed)
    with pytest.raises(SystemExit, match="130"):
        run("--target", target)
    assert not target.exists() and (tmp_path / "out.work" / "filtered" / "00000.parquet").exists()
    assert not list((tmp_path / "out.work" / "filtered").glob("00001*"))
    monkeypatch.setattr(stages, "read_raw", watched)
    with pytest.raises(SystemExit, match="2"):
        run("--target", target, "--curation.examples", 1)
    run("--target", target)
    assert seen == ["copy.jsonl.gz", "raw.jsonl"]
    assert texts_of(target) == texts_of(curated)
    strip = lambda report: [{**one, "examples": None} for one in report["steps"]]
    assert strip(report_of(target)) == strip(report_of(curated))


def corpus(path):
    """Six different Korean texts, and one of them again."""
    lines = KO.split("\n")
    texts = ["\n".join(lines[i:] + lines[:i]) + f" 끝으로 {word} 이야기를 덧붙인다." for i, word in
             enumerate(("바다", "하늘", "시장"))]
    texts += [text.replace("도서관", "박물관") for text in texts]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[2]]))
    return texts


def test_array_record_classifier_and_an_empty_language(tmp_path, capfd):
    texts = corpus(tmp_path / "a.jsonl")
    labelled_file(tmp_path / "l.jsonl")
    target, model = tmp_path / "out", tmp_path / "q.safetensors"
    run("--target", target, "--data", tmp_path / "a.jsonl", "--curation.format", "array_record",
        "--curation.dedup.no-minhash", "--curation.quality.model", model, "--curation.quality.labelled",
        tmp_path / "l.jsonl", "--curation.quality.keep-share", 0.5, "--curation.quality.features", 4096)
    report = report_of(target)
    assert [one["dropped"] for one in report["steps"]][-2:] == [1, 3]
    assert [one["documents_in"] for one in report["steps"]] == [7] * 8 + [6]
    source = open_source(parse_source(f"{target}/*.array_record"))
    kept = {source[i].text for i in range(len(source))}
    rows = {text: stages.score(model, text) for text in texts}
    assert kept == {*sorted(texts, key=rows.get)[3:]}
    assert report["facts"]["quality_thresholds"]["ko"] == pytest.approx(sorted(rows.values())[3])
    assert report["facts"]["quality_evaluation"]["auc"] == 1.0
    assert report["warnings"] == ["no document in language 'en' is left"]
    assert "language 'en' is left" in capfd.readouterr().err


def test_what_is_there_stays_when_nothing_is_left(tmp_path, capfd):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "짧은 글이다."}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    target = tmp_path / "out"
    target.mkdir()
    (target / "good").write_text("good")
    with pytest.raises(SystemExit, match="2"):
        run("--target", target, "--overwrite", "--data", tmp_path / "short.jsonl", tmp_path / "empty.jsonl",
            "--curation.dedup.no-minhash")
    assert "no document is left; after each step: read 1, language 1, gopher_repetition 0" in capfd.readouterr().err
    assert (target / "good").read_text() == "good"


def failing(tmp_path, capfd, *argv):
    with pytest.raises(SystemExit, match="2"):
        run("--target", tmp_path / "new", *argv)
    return capfd.readouterr().err


def test_faults_before_any_work(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": EN}) + "\n")
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "short.jsonl").write_text('{"question": "two words"}\n')
    assert "is a folder; name its files" in failing(tmp_path, capfd, "--data", tmp_path)
    assert "a.csv: unknown ending; raw files are .jsonl" in failing(tmp_path, capfd, "--data", tmp_path / "a.csv")
    assert "no such file" in failing(tmp_path, capfd, "--data", tmp_path / "b.jsonl")
    assert "more than once" in failing(tmp_path, capfd, "--data", path, tmp_path / "*.jsonl")
    assert "cannot be mixed" in failing(tmp_path, capfd, "--data", path, "sample:")
    assert "quality.labelled FILE.jsonl trains it" in failing(
        tmp_path, capfd, "--data", path, "--curation.quality.model", "no.bin", "--curation.quality.threshold", 0.5)
    assert "exists; --overwrite replaces it" in failing(tmp_path, capfd, "--target", tmp_path, "--data", path)
    assert "none of 1 texts has 8 words" in failing(
        tmp_path, capfd, "--data", path, "--curation.decontaminate.benchmarks", tmp_path / "short.jsonl")
    assert not list(tmp_path.glob("new*"))


def test_executors_are_built(tmp_path):
    """As far as this goes without a cluster: types, tasks, order, and that what is sent to a job can be sent."""
    made = make_stages(CurationConfig(), [Path("a.jsonl")] * 3, tmp_path / "w", tmp_path / "t", 3, {})
    assert [stage.tasks for stage in made] == [3, 1, 3, 3, 14, 1, 3, 1]
    config = ExecutorConfig(kind="slurm", partition="cpu", time="1:00:00", workers=8)
    slurm = make_executors(made, config, tmp_path / "l")
    assert {type(one).__name__ for one in slurm} == {"SlurmPipelineExecutor"}
    assert [one.depends for one in slurm] == [None, *slurm[:-1]] and slurm[0].workers == 3
    assert [one.job_name for one in slurm][-1] == "curate-publish"
    ray = make_executors(made, ExecutorConfig(kind="ray", cpus_per_task=2), tmp_path / "l")
    assert {type(one).__name__ for one in ray} == {"RayPipelineExecutor"} and ray[0].cpus_per_task == 2
    for one in (*slurm, *ray):
        one.depends = None
        assert dill.loads(dill.dumps(one)).world_size == one.tasks
    for wrong in ({"kind": "slurm"}, {"time": "1:00:00"}, {"kind": "ray", "partition": "cpu"}, {"workers": 0}):
        with pytest.raises(ValueError, match=r"executor\.|slurm executor"):
            ExecutorConfig(**wrong)


def test_records_of_tasks_add_up(tmp_path):
    for rank in range(2):
        tally = Tally(1)
        tally.counts.update(documents_in=3, documents_out=2, bytes_in=30, bytes_out=20)
        tally.drop("bad", f"{rank}", "x" * 400)
        tally.save(tmp_path / "one" / f"{rank:05d}.json")
    (found,) = merged(tmp_path, ["one"], 1)
    assert (found["documents_in"], found["dropped"], found["bytes_out"], found["reasons"]) == (6, 2, 40, {"bad": 2})
    assert [one["id"] for one in found["examples"]["bad"]] == ["0"]
    assert len(found["examples"]["bad"][0]["text"]) == 301
    tally.reasons.clear()
    tally.save(tmp_path / "one" / "00001.json")
    with pytest.raises(AssertionError, match="not every drop has a reason"):
        merged(tmp_path, ["one"], 1)
