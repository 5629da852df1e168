"""Time-Specifier Model Merging (Han et al. 2025, arXiv:2507.06782): one retriever per time specifier, merged into one.

    python -m recipes.tsm --init all-MiniLM-L6-v2                             generated lives, no download
    python -m recipes.tsm --init contriever --pooling mean --data timeqa_human --steps 300 --folder runs/timeqa

Facts that held for a time are asked for with each of the seven specifiers (in, from-to, before, ...); negatives are
mined with the base; a specialist learns each specifier; their mean is the merged model. Beside it: one model that
learns all specifiers in as many steps as all specialists together (joint), and the line from base to merged. All are
measured on temporal questions, by specifier, and on questions without a time. `--data` is a folder of BEIR whose
questions read "... from X to Y ..." with the fields link and relation; pages are split, never questions.

Every stage is a command of another recipe, printed as it is run, and a stage whose result is there is not run again: an
interrupted run goes on. `results/summary.md` and `results/gains.png` are the outcome. Left out: the authors' training
files, which are not public, and choosing checkpoints by dev accuracy (the last one counts).
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.data.beir import read_beir
from jaxlm.data.time_lines import make_time_lines
from jaxlm.data.time_questions import Question, read_timed_facts, split_pages, with_specifiers
from jaxlm.data.time_specifiers import SPECIFIERS
from jaxlm.objective.contrastive import Similarity
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder

PROG = "recipes.tsm"
MEASURES = ("ndcg@5", "ndcg@20", "mrr@10", "recall@5", "recall@20")
SHARES = {"train": 0.7, "test": 0.3}
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One reproduction."""

    init: str = ""                    # the base: a folder of sentence-transformers or transformers
    pooling: Pooling | None = None    # of a folder without modules.json
    data: str = ""                    # a BEIR folder of timed questions; empty: generated lives
    entities: int = 200               # generated lives
    steps: int = 60                   # of each specialist
    batch_size: int = 16              # questions of a step
    negatives: int = 5                # of each question
    lr: float = 2e-5
    temperature: float = 0.05         # of the contrastive loss; the paper's raw products have 1
    similarity: Similarity = "cosine"  # of the contrastive loss
    max_length: int = 128             # tokens of a text
    line: tuple[float, ...] = (0.25, 0.5, 0.75)  # shares of the merged model between base and merged
    seed: int = 1
    folder: Path = Path("runs/tsm")

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.negatives) < 1:
            raise ValueError("--steps, --batch-size and --negatives must be at least 1")


def questions_of(config: Config) -> tuple[dict[str, str], dict[str, dict[str, list[Question]]], list[Question]]:
    """Corpus; split to specifier to questions; questions without a time (of generated lives only)."""
    if not config.data:
        lines = make_time_lines(config.entities, config.seed)
        asked = {split: with_specifiers(lines.facts[split], config.seed) for split in SHARES}
        return lines.corpus, asked, lines.plain["test"]
    data = read_beir(config.data, "train")
    parts = split_pages(read_timed_facts(data), SHARES, config.seed)
    return data.corpus, {split: with_specifiers(facts, config.seed) for split, facts in parts.items()}, []


def write_beir(folder: Path, corpus: Mapping[str, str], questions: Iterable[Question], split: str) -> None:
    """A BEIR folder; its queries have the field `specifier`. The judgements come last: they say that it is whole."""
    questions = list(questions)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    rows = {"corpus.jsonl": [{"_id": name, "title": "", "text": text} for name, text in corpus.items()],
            "queries.jsonl": [{"_id": one.id, "text": one.text, "specifier": one.group} for one in questions]}
    for name, values in rows.items():
        with replacing(folder / name) as scratch:
            scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values), encoding="utf-8")
    judged = "".join(f"{one.id}\t{doc}\t1\n" for one in questions for doc in one.positives)
    with replacing(folder / "qrels" / f"{split}.tsv") as scratch:
        scratch.write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")


def command(recipe: str, result: Path, *arguments: object) -> None:
    """Runs a recipe in a process of its own, unless its result is there. ValueError if it fails."""
    if result.exists():
        log.info("%s is there", result)
        return
    line = [sys.executable, "-m", f"recipes.{recipe}", *map(str, arguments)]
    log.info("$ %s", " ".join(["python", *line[1:]]))
    if subprocess.run(line, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).returncode:
        raise ValueError(f"recipes.{recipe} failed, see above; the same command goes on from here")


def prepare(config: Config) -> dict[str, Path]:
    """The base as an export, the test sets and the rows of every specifier; returns the test sets by name."""
    folder, base = config.folder, config.folder / "base"
    if not base.exists():
        encoder, params = load_text_encoder(config.init, pooling=config.pooling)
        kind = json.loads((Path(config.init) / "config.json").read_text(encoding="utf-8"))["model_type"]
        folder.mkdir(parents=True, exist_ok=True)
        save_text_encoder(base, encoder, params, architecture=kind)
    corpus, asked, plain = questions_of(config)
    everything = {split: [one for part in asked[split].values() for one in part] for split in SHARES}
    sets = {"temporal": folder / "data/temporal"} | ({"plain": folder / "data/plain"} if plain else {})
    write_beir(folder / "data/train", corpus, everything["train"], "train")
    write_beir(sets["temporal"], corpus, everything["test"], "test")
    if plain:
        write_beir(sets["plain"], corpus, plain, "test")
    mined = folder / "data/mined.jsonl"
    command("mine", mined, "--model", base, "--data", folder / "data/train", "--output", mined,
            "--mine.num-negatives", config.negatives)
    groups: dict[str, set[str]] = {}
    for one in everything["train"]:
        groups.setdefault(one.text, set()).add(one.group)
    lines = mined.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if len(json.loads(line)["negatives"]) == config.negatives]
    if len(whole) < len(lines):
        log.warning("%d of %d questions have fewer than %d negatives and are left out", len(lines) - len(whole),
                    len(lines), config.negatives)
    for name in SPECIFIERS:
        with replacing(rows_of(config, name)) as scratch:
            scratch.write_text("".join(line for line in whole if name in groups[json.loads(line)["query"]]),
                               encoding="utf-8")
    return sets


def rows_of(config: Config, specifier: str) -> Path:
    """The training rows of a specifier."""
    return config.folder / f"data/{specifier}.jsonl"


def train(config: Config, name: str, files: Sequence[Path], steps: int) -> Path:
    """A model from the base; returns its export."""
    folder = config.folder / "models" / name
    started = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
    command("train_retriever", folder / "exported", "--init", config.folder / "base", "--data.train", *files,
            "--batch.batch-size", config.batch_size, "--batch.num-negatives", config.negatives, "--loop.steps", steps,
            "--loss.temperature", config.temperature, "--loss.similarity", config.similarity, "--optim.lr", config.lr,
            "--max-length", config.max_length, "--seed", config.seed, "--batch.seed", config.seed, "--folder", folder,
            "--resume" if started else "--overwrite")
    return folder / "exported"


def make_models(config: Config) -> dict[str, Path]:
    """Base, joint, specialists, merged, and the points between base and merged."""
    base, files = config.folder / "base", [rows_of(config, name) for name in SPECIFIERS]
    specialists = {name: train(config, name, [path], config.steps)
                   for name, path in zip(SPECIFIERS, files, strict=True)}
    joint = train(config, "joint", files, config.steps * len(SPECIFIERS))
    merged = config.folder / "models/merged"
    command("merge", merged, "--models", *specialists.values(), "--target", merged)
    line = {}
    for share in config.line:
        line[f"line_{share:g}"] = target = config.folder / f"models/line_{share:g}"
        command("merge", target, "--models", base, merged, "--merge.weights", 1 - share, share, "--target", target)
    return {"base": base, "joint": joint, "merged": merged, **line, **specialists}


def measure(config: Config, models: Mapping[str, Path], sets: Mapping[str, Path]) -> dict[str, dict[str, dict]]:
    """Set to model to its numbers."""
    found = {}
    for name, folder in sets.items():
        output = config.folder / "results" / name
        command("evaluate_retrieval", output / "measures.json", "--data", folder, "--models", *models.values(),
                "--measures", *MEASURES, "--group", "specifier", "--output", output)
        numbers = json.loads((output / "measures.json").read_text(encoding="utf-8"))
        found[name] = {model: numbers[str(path)] for model, path in models.items()}
    return found


def summarise(config: Config, found: Mapping[str, Mapping[str, dict]]) -> None:
    """Tables as Markdown, and where every model stands between temporal gain and loss elsewhere."""
    lines = []
    for name, models in found.items():
        lines += [f"## {name}", "", "| model | " + " | ".join(MEASURES) + " |", "| --- |" + " --- |" * len(MEASURES)]
        lines += [f"| {model} | " + " | ".join(f"{numbers['mean'][key]:.4f}" for key in MEASURES) + " |"
                  for model, numbers in models.items()] + [""]
    text = "\n".join(lines)
    print(text)
    with replacing(config.folder / "results/summary.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    if "plain" not in found:
        return
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 5))
    gain = lambda name, model: 100 * (found[name][model]["mean"]["ndcg@5"] - found[name]["base"]["mean"]["ndcg@5"])
    for model in found["plain"]:
        color = "tab:red" if model == "merged" else "tab:blue"
        axes.scatter(gain("plain", model), gain("temporal", model), color=color)
        axes.annotate(model, (gain("plain", model), gain("temporal", model)), fontsize=8)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="questions without a time: nDCG@5 against the base, points",
             ylabel="temporal questions: nDCG@5 against the base, points")
    figure.savefig(config.folder / "results/gains.png", dpi=120)
    plt.close(figure)


def reproduce(config: Config) -> None:
    """All stages."""
    if not config.init:
        raise ValueError("--init names the base: a folder of sentence-transformers, or with --pooling one of "
                         "transformers")
    sets = prepare(config)
    summarise(config, measure(config, make_models(config), sets))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(reproduce, {"default": Config()}, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
