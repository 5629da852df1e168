"""The miniature chain: every command is one that its recipe understands, stages hand on what they made, once."""

import importlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from jaxlm.core import command
from jaxlm.core import config as flags
from jaxlm.data.rows import Document
from jaxlm.data.sources import open_source, parse_source
from recipes import kormo_mini


def parsed(module, arguments):
    """The configuration that a recipe makes of flags; SystemExit if it does not take them."""
    recipe = importlib.import_module(module)
    presets = recipe.PRESETS if hasattr(recipe, "PRESETS") else {"default": recipe.Config()}
    return flags.parse(presets, arguments, prog=module, description="")


@pytest.fixture
def called(monkeypatch):
    """Processes that check their flags and leave what the recipes would."""
    lines = []

    def run(line):
        module, arguments = line[2], line[3:]
        config = parsed(module, arguments)
        lines.append((module.removeprefix("recipes."), config, arguments))
        options = dict(itertools.pairwise(arguments))
        if module == "recipes.curate":
            config.target.mkdir(parents=True)
            (config.target / "report.md").write_text("# Curation\n")
        elif module == "recipes.train_tokenizer":
            config.folder.mkdir(parents=True)
            (config.folder / "report.md").write_text("")
        elif module == "recipes.convert":
            shutil.copytree(config.source, config.target)
        elif module == "recipes.evaluate":
            config.output.parent.mkdir(exist_ok=True)
            config.output.write_text(json.dumps({"results": {"facts_ko": {"acc,none": 0.25 + len(lines) / 100}}}))
        elif module == "recipes.generate":
            Path(options["--output"]).write_text("".join(
                json.dumps({"prompt": i, "text": f"answer {i}"}) + "\n"  # in the order in which they were ready
                for i in reversed(range(len(kormo_mini.QUESTIONS)))))
        else:
            (config.folder / "checkpoints/1").mkdir(parents=True)
            (config.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/bpb_ko": 0.5}) + "\n")
        return 0

    monkeypatch.setattr(command, "run_process", run)
    return lines


def test_every_stage_starts_where_the_one_before_ended(called, tmp_path, capsys):
    folder = tmp_path / "chain"
    kormo_mini.main(["--folder", str(folder), "--flags.sft=--loop.steps 7", "--vocab-size", "1024"])
    names = [name for name, _, _ in called]
    assert names == ["curate", "train_tokenizer", "pretrain", "pretrain", "sft", "preference", "convert",
                     *["evaluate"] * 4, "generate", "generate"]
    by_folder = {config.folder.name: config for name, config, _ in called if hasattr(config, "folder")}
    first, second = by_folder["stage1"], by_folder["stage2"]
    assert first.model.vocab_size == 1024 and first.tokenizer.path == str(folder / "tokenizer/tokenizer")
    assert second.init == str(first.folder) and second.stage.keep_optimizer and not first.init
    assert first.optim.schedule.decay == 0 and second.optim.schedule.warmup == 0
    weights = [[parse_source(spec).weight for spec in config.data.path] for config in (first, second)]
    assert weights == [[0.9, 0.1], [0.6, 0.4]] and first.data.never_predict == ("<think>",)
    sft, dpo = by_folder["sft"], by_folder["preference"]
    assert (sft.init, sft.template, sft.loop.steps) == (str(second.folder), "kormo", 7)
    assert (dpo.init, dpo.loss.method) == (str(sft.folder), "dpo")
    assert [config.model.name for name, config, _ in called if name == "evaluate"] == [
        "stage1", "stage2", "sft", "exported"]
    text = (folder / "summary.md").read_text()
    assert "| preference | 0.360 |" in text and "- sft: bpb_ko 0.5000" in text
    assert text.index("'answer 0'") < text.index(kormo_mini.QUESTIONS[1]) < text.index("'answer 1'")
    assert text.strip() in capsys.readouterr().out
    kormo_mini.main(["--folder", str(folder), "--flags.sft=--loop.steps 7", "--vocab-size", "1024"])
    assert len(called) == len(names) + 2, "nothing is made twice; generate itself finds its texts"
    with pytest.raises(SystemExit):
        kormo_mini.main(["--folder", str(folder), "--vocab-size", "1024"])
    assert "was made with another --flags" in capsys.readouterr().err


def test_raw_text_is_generated_with_faults_or_given(called, tmp_path):
    kormo_mini.main(["--folder", str(tmp_path / "a")])
    web = open_source(parse_source(str(tmp_path / "a/raw/web_ko.jsonl")))
    assert len(web) == kormo_mini.RAW_DOCUMENTS and isinstance(web[0], Document) and web[0].text.count("\n") >= 2
    assert str(tmp_path / "a/raw/broken.txt") in called[0][1].data
    kormo_mini.main(["--folder", str(tmp_path / "b"), "--raw", "some/*.jsonl.gz", "--held-out", "dev.jsonl"])
    again = called[13:]
    assert again[0][1].data == ("some/*.jsonl.gz",) and again[2][1].data.held_out == ("dev.jsonl",)
