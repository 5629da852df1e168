"""Variants of a run compared: paired by seed, by hand; runs that are there are not made again."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.core import command
from jaxlm.core import config as flags
from jaxlm.eval.ablation import ablation_table, difference
from recipes import ablate, pretrain

SCORES = {"plain": {1: {"bpb": 1.0}, 2: {"bpb": 2.0}, 3: {"bpb": 3.0}},
          "other": {1: {"bpb": 1.1}, 2: {"bpb": 2.2}, 3: {"bpb": 3.3}}}


def test_differences_are_paired_by_seed():
    found = difference(SCORES, "other", "bpb")
    assert found.mean == pytest.approx(0.2) and found.margin == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t(0.975, 2)
    text = ablation_table(SCORES, ["bpb"])
    assert "| plain | 2.0000 ± 1.0000 |" in text
    assert "| other | 2.2000 ± 1.1000 (+0.2000 ± 0.2484) |" in text and "Seeds 1, 2, 3" in text
    alone = {name: {1: runs[1]} for name, runs in SCORES.items()}
    assert "| other | 1.1000 (+0.1000) |" in ablation_table(alone, ["bpb"])


@pytest.fixture
def called(monkeypatch):
    """Processes that leave what the recipes would."""
    lines = []

    def run(line):
        module, given = line[2], line[3:]
        lines.append((module, given))
        options = dict(itertools.pairwise(given))
        if module == "recipes.evaluate":
            Path(options["--output"]).write_text(json.dumps({"results": {"facts_ko": {
                "alias": "facts_ko", "acc,none": 0.5, "acc_stderr,none": 0.1}}}))
            return 0
        if options.get("--optim.lr") == "nan":
            return 2
        folder = Path(options["--folder"])
        (folder / "checkpoints/3").mkdir(parents=True)
        value = 1.0 + float(options.get("--optim.lr", 0)) + int(options["--seed"]) / 10
        records = [{"step": 0, "eval/bpb_ko": 9.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval/bpb_ko": value}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return 0

    monkeypatch.setattr(command, "run_process", run)
    return lines


def test_runs_are_made_once_and_summarised(called, tmp_path, capsys):
    given = ["--arguments=--preset smoke", "--variants", "plain=", "fast=--optim.lr 1", "--tasks", "facts_ko",
             "--folder", str(tmp_path), "--seeds"]
    ablate.main([*given, "2"])
    ablate.main([*given, "1", "2"])
    assert [module for module, _ in called] == ["recipes.pretrain", "recipes.evaluate"] * 4
    assert shlex.join(called[2][1]).startswith("--preset smoke --optim.lr 1 --seed 2 --folder")
    text = (tmp_path / "summary.md").read_text()
    assert "| variant | bpb_ko | facts_ko/acc |" in text and "| fast | 2.1500 ± 0.0707 (+1.0000 ± 0.0000)" in text
    assert (tmp_path / "figure.png").stat().st_size > 1000 and "bpb_ko" in capsys.readouterr().out
    given[2:4] = ["plain=", "fast=--optim.lr 2"]
    with pytest.raises(SystemExit):
        ablate.main([*given, "1"])
    assert "seed_1 was made by recipes.pretrain --preset smoke --optim.lr 1 --seed 1, not by" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(called, tmp_path):
    (tmp_path / "plain/seed_1/checkpoints/2").mkdir(parents=True)
    ablate.main(["--variants", "plain=", "fast=--optim.lr 1", "--seeds", "1", "--folder", str(tmp_path)])
    assert called[0][1][-1] == "--resume" and called[1][1][-1] == "--overwrite"


def test_the_default_differs_in_the_mask_alone():
    masked, unmasked = (flags.parse(pretrain.PRESETS, given, prog="", description="")
                        for given in ablate.Config().flags().values())
    assert masked.pipeline.mask_documents
    assert replace(masked, pipeline=replace(masked.pipeline, mask_documents=False)) == unmasked


@pytest.mark.parametrize(("given", "said"), [
    (["--variants", "plain="], "needs two at least"),
    (["--variants", "plain=", "plain=--optim.lr 1"], "each name once"),
    (["--variants", "plain=", "a b=--optim.lr 1"], "write NAME=FLAGS"),
    (["--variants", "plain=", "a=--seed 3"], "--seed is given by recipes.ablate"),
    (["--variants", "plain=", "a=--folder=x"], "--folder=x is given by"),
    (["--seeds", "1", "1"], "needs different numbers"),
    (["--seeds", "1", "--measures", "bpb_kr", "--variants", "plain=", "a=--optim.lr 1"], "no 'bpb_kr' in every run"),
    (["--seeds", "1", "--variants", "plain=", "a=--optim.lr nan"], "recipes.pretrain failed"),
])
def test_faults_are_one_sentence(called, tmp_path, capsys, given, said):
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["--folder", str(tmp_path), *given])
    assert stopped.value.code in (1, 2) and said in " ".join(capsys.readouterr().err.split())
