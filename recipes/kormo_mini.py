"""KORMo from raw text to a model that talks, in miniature: every stage is a recipe of this project, in its own process.

    curate -> train_tokenizer -> pretrain (stage 1, stage 2) -> sft -> preference -> convert -> evaluate, generate

    python -m recipes.kormo_mini                     embedded raw text with planted faults; under 10 minutes on 2 cores
    python -m recipes.kormo_mini --flags.stage1="--loop.steps 2000" --flags.sft="--loop.steps 1000" --folder runs/longer
    python -m recipes.kormo_mini --raw 'web/*.jsonl.gz' --chats chats.jsonl --pairs pairs.jsonl --vocab-size 8192 \\
        --held-out "dev_ko.jsonl?language=ko" "dev_en.jsonl?language=en" --folder runs/real

After KORMo (arXiv 2510.09426): byte-level BPE with its reserved tokens; stage 1 is 90 % English, stage 2 40 % Korean
with the optimizer's moments kept and the rate falling at the end; hybrid thinking in its chat format; DPO; a Llama
folder. The flags of a stage are those of its recipe; `--flags.STAGE` come behind them. A stage whose result is there
is left as it is, an interrupted one goes on. FOLDER/summary.md has bits per byte, what the models know, and what the
last one says. Left out: long context and reasoning stages (presets of recipes.pretrain), synthetic data
(recipes.synthesize). Needs the extras curate and eval.
"""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxlm.core.command import run_command, run_recipe, run_training_recipe
from jaxlm.core.config import to_json
from jaxlm.core.files import replacing
from jaxlm.core.log import read_metrics
from jaxlm.curate.sample import write_sample, write_web
from jaxlm.data.corpus import CorpusConfig

PROG = "recipes.kormo_mini"
RAW_DOCUMENTS = 2000  # of each language, beside the planted faults
QUESTIONS = ("일본의 통화는 무엇인가요?", "What is the currency of Japan?", "What is 47 + 38?",
             "월요일에서 3일 뒤는 무슨 요일인가요?")
SHARES = {"stage1": {"en": 0.9, "ko": 0.1}, "stage2": {"en": 0.6, "ko": 0.4}}  # specification, section 5
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """More flags of each stage, behind an equals sign: --flags.sft="--loop.steps 1000"."""

    curate: str = ""
    tokenizer: str = ""
    stage1: str = ""
    stage2: str = ""
    sft: str = ""
    preference: str = ""
    evaluate: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One chain."""

    raw: tuple[str, ...] = ()        # files and globs of raw text, see recipes.curate; default: generated
    held_out: tuple[str, ...] = CorpusConfig().held_out  # bits per byte are measured on these, by language
    chats: tuple[str, ...] = ("sample:both?documents=4000&weight=2", "sample_thinking:both")  # see recipes.sft
    pairs: tuple[str, ...] = ("sample:both?documents=4000",)  # see recipes.preference
    questions: tuple[str, ...] = QUESTIONS  # asked at the end, with and without reasoning
    vocab_size: int = 2048
    flags: Flags = field(default_factory=Flags)
    seed: int = 42
    folder: Path = Path("runs/kormo_mini")


def corpus(config: Config, shares: dict[str, float]) -> list[str]:
    """The curated text by language, as sources of a mixture."""
    files = config.folder / "curated/*.parquet"
    return [f"{files}?include=language:{name}&language={name}&name={name}&weight={share}"
            for name, share in shares.items()]


def curate(config: Config) -> None:
    """Raw text to `curated`."""
    files = config.raw
    if not files:
        raw = config.folder / "raw"
        files = [write_web(raw / f"web_{name}.jsonl", name, RAW_DOCUMENTS) for name in ("ko", "en")]
        files += write_sample(raw).files
    run_recipe("curate", config.folder / "curated", "--data", *files, "--target", config.folder / "curated",
               "--overwrite", *shlex.split(config.flags.curate))


def learn(config: Config) -> dict[str, Path]:
    """The tokenizer and the four models, by stage."""
    flags, folder = config.flags, config.folder
    tokenizer = folder / "tokenizer/tokenizer"
    run_recipe("train_tokenizer", folder / "tokenizer/report.md", "--data.path", *corpus(config, SHARES["stage2"]),
               "--vocab-size", config.vocab_size, "--folder", folder / "tokenizer", "--overwrite",
               *shlex.split(flags.tokenizer))
    models = {name: folder / name for name in ("stage1", "stage2", "sft", "preference")}

    def train(name: str, recipe: str, *arguments: object) -> None:
        more = shlex.split(getattr(flags, name))
        run_training_recipe(recipe, models[name], *arguments, "--seed", config.seed, *more)

    pretrain = ("--preset", "smoke", "--data.never-predict", "<think>", "--data.held-out", *config.held_out)
    train("stage1", "pretrain", *pretrain, "--tokenizer.path", tokenizer, "--model.vocab-size", config.vocab_size,
          "--optim.schedule.decay", 0, "--data.path", *corpus(config, SHARES["stage1"]))
    train("stage2", "pretrain", *pretrain, "--init", models["stage1"], "--stage.keep-optimizer",
          "--optim.schedule.warmup", 0, "--optim.schedule.decay", 0.5, "--data.path", *corpus(config, SHARES["stage2"]))
    train("sft", "sft", "--preset", "smoke", "--init", models["stage2"], "--template", "kormo", "--optim.lr", 1e-3,
          "--loop.steps", 500, "--data.thinking", "hybrid", "--data.path", *config.chats)
    train("preference", "preference", "--preset", "smoke", "--init", models["sft"], "--loss.method", "dpo",
          "--loss.beta", 0.1, "--optim.lr", 1e-4, "--loop.steps", 100, "--data.path", *config.pairs)
    return models


def talk(config: Config, model: Path) -> dict[str, list[str]]:
    """What a model says to every question, reasoning first, where it is asked to reason and where not."""
    asked = config.folder / "questions.jsonl"
    asked.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in config.questions),
                     encoding="utf-8")
    said = {}
    for thinking in ("on", "off"):
        output = config.folder / f"answers_thinking_{thinking}.jsonl"
        # The recipe goes on by itself: its output is there from the first text on, and must be of these questions.
        run_recipe("generate", None, "--source", model, "--file", asked, "--chat", "--thinking", thinking,
                   "--sampling.max-new-tokens", 96, "--output", output)
        rows = sorted(map(json.loads, output.read_text(encoding="utf-8").splitlines()), key=lambda row: row["prompt"])
        said[thinking] = [" → ".join(filter(None, (row.get("reasoning"), row["text"]))) for row in rows]
    return said


def known(config: Config, name: str, model: Path) -> dict[str, float]:
    """Accuracies of a model on the embedded facts."""
    output = config.folder / "scores" / f"{name}.json"
    run_recipe("evaluate", output, "--model", model, "--output", output, *shlex.split(config.flags.evaluate))
    results = json.loads(output.read_bytes())["results"]
    return {task: values["acc,none"] for task, values in results.items() if "acc,none" in values}


def summary(config: Config, models: dict[str, Path]) -> str:
    """Markdown: what was measured of each stage, and the answers of the last."""
    exported = config.folder / "exported"
    scores = {name: known(config, name, exported if name == "preference" else model) for name, model in models.items()}
    measured = {name: {key.removeprefix("eval/"): value for record in read_metrics(model / "metrics.jsonl")
                       for key, value in record.items() if key.startswith("eval/")} for name, model in models.items()}
    said = talk(config, exported)
    tasks = list(scores["stage1"])
    report = (config.folder / "curated/report.md").read_text(encoding="utf-8")
    counts = report.split("\n## ")[0].removeprefix("# Curation").strip()  # examples of what was dropped come after them
    lines = [f"# {config.folder}", "", "## Curation", "", counts, "",
             "## What the models know (accuracy of the tasks; chance of the embedded ones is 0.25)", "",
             f"| model | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks),
             *(f"| {name} | {' | '.join(f'{found[task]:.3f}' for task in tasks)} |" for name, found in scores.items()),
             "", "## Held out, at the end of each stage", "",
             *(f"- {name}: {', '.join(f'{key} {value:.4f}' for key, value in found.items() if value is not None)}"
               for name, found in measured.items()), "", "## What the last model says", ""]
    for i, question in enumerate(config.questions):
        lines += [f"- {question}", *(f"  - thinking {how}: {texts[i]!r}" for how, texts in said.items())]
    return "\n".join([*lines, ""])


def chain(config: Config) -> None:
    """All stages, then the summary."""
    config.folder.mkdir(parents=True, exist_ok=True)
    # Every stage is made of the ones before it: what is there must be of the same settings as what is not.
    kept, made = config.folder / "config.json", to_json(replace(config, folder=Config().folder))
    then = json.loads(kept.read_bytes()) if kept.exists() else made
    if other := [name for name in made if then.get(name) != made[name]]:
        raise ValueError(f"{config.folder} was made with another --{other[0].replace('_', '-')}; delete it or name "
                         "another --folder")
    with replacing(kept) as scratch:
        scratch.write_text(json.dumps(made), encoding="utf-8")
    curate(config)
    models = learn(config)
    run_recipe("convert", config.folder / "exported", "--source", models["preference"], "--target",
               config.folder / "exported")
    text = summary(config, models)
    print(text)
    with replacing(config.folder / "summary.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    log.info("talk to it: python -m recipes.generate --source %s --chat", config.folder / "exported")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(chain, {"default": Config()}, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
