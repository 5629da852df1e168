"""Time-Specifier Model Merging (Han et al. 2025, arXiv:2507.06782): one retriever per time specifier, merged into one.

    python -m recipes.tsm --init all-MiniLM-L6-v2                             generated lives, no download
    python -m recipes.tsm --init contriever --pooling mean --data timeqa_human --steps 300 --seeds 1 2 3 \
      --temporal nobel_prize_temporal --plain "boolq?split=dev" --folder runs/timeqa

Facts that held for a time are asked for with each of the seven specifiers (in, from-to, before, ...); negatives are
mined with the base; a specialist learns each specifier; their mean is the merged model. Beside it: one model that
learns all specifiers in as many steps as all specialists together (joint), and the line from base to merged. All are
measured on temporal questions, by specifier, on questions without a time, and on further BEIR folders. `--data` is a
folder of BEIR whose questions read "... from X to Y ..." with the fields link and relation; pages are split, never
questions. `--documents` and `--questions` make every test set smaller, which makes it easier too.

Every stage is a command of another recipe, printed as it is run, and a stage whose result is there is not run again: an
interrupted run goes on. `results/summary.md` and `results/gains.png` are the outcome, over all seeds. Left out: the
authors' training files, which are not public, and choosing checkpoints by dev accuracy (the last one counts).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlm.core.command import run_command, run_recipe, run_training_recipe
from jaxlm.core.files import replacing
from jaxlm.data.beir import BeirSet, read_beir, split_of
from jaxlm.data.beir_files import shorten, write_beir
from jaxlm.data.time_lines import make_time_lines
from jaxlm.data.time_questions import Question, question_qrels, read_timed_facts, split_pages, with_specifiers
from jaxlm.data.time_specifiers import SPECIFIERS
from jaxlm.eval.gain_report import Results, gain_figure, paired_lines, table
from jaxlm.eval.ranking import evaluate_run, read_run
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
    temporal: tuple[str, ...] = ()    # further BEIR folders whose questions have times, only to measure on
    plain: tuple[str, ...] = ()       # such folders whose questions have none
    documents: int | None = None      # of every test set; None: all
    questions: int | None = None      # of every further test set; None: all
    steps: int = 60                   # of each specialist
    batch_size: int = 16              # questions of a step
    negatives: int = 5                # of each question
    lr: float = 2e-5
    temperature: float = 0.05         # of the contrastive loss; the paper's raw products have 1
    similarity: Similarity = "cosine"  # of the contrastive loss
    max_length: int = 128             # tokens of a text
    line: tuple[float, ...] = (0.25, 0.5, 0.75)  # shares of the merged model between base and merged
    seeds: tuple[int, ...] = (1,)     # of pages, dates, batches and dropout: a run each
    folder: Path = Path("runs/tsm")

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.negatives) < 1:
            raise ValueError("--steps, --batch-size and --negatives must be at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds needs different numbers, and one at least; got {self.seeds}")
        names = [Path(split_of(spec, "test")[0]).name for spec in (*self.temporal, *self.plain)]
        if taken := [name for i, name in enumerate(names) if name in (*names[:i], "temporal", "plain", "train")]:
            raise ValueError(f"--temporal and --plain: two sets would be called {taken[0]!r}; rename a folder")

    def own(self) -> Path:
        """The folder of the first seed; a configuration of one seed is one run."""
        return self.folder / f"seed_{self.seeds[0]}"


def questions_of(config: Config) -> tuple[dict[str, str], dict[str, dict[str, list[Question]]], list[Question]]:
    """Corpus; split to specifier to questions; questions without a time (of generated lives only)."""
    if not config.data:
        lines = make_time_lines(config.entities, config.seeds[0])
        asked = {split: with_specifiers(lines.facts[split], config.seeds[0]) for split in SHARES}
        return lines.corpus, asked, lines.plain["test"]
    data = read_beir(config.data, "train")
    facts = read_timed_facts(data)
    if config.documents is not None:
        data = shorten(data, documents=config.documents)  # the same for all seeds
    asked = {split: with_specifiers(part, config.seeds[0])
             for split, part in split_pages(facts, SHARES, config.seeds[0]).items()}
    return data.corpus, asked, []


def as_set(corpus: Mapping[str, str], questions: Sequence[Question]) -> BeirSet:
    """Questions to measure on; their field `specifier` is their group."""
    return BeirSet(dict(corpus), {one.id: one.text for one in questions}, {}, question_qrels(questions),
                   {one.id: {"specifier": one.group} for one in questions}, 0)


def prepare(config: Config) -> dict[str, Path]:
    """The base as an export, the test sets and the rows of every specifier; returns the test sets by name."""
    folder, base = config.own(), config.own() / "base"
    if not base.exists():
        encoder, params = load_text_encoder(config.init, pooling=config.pooling)
        # All models read as much of a text, or the measures would compare lengths.
        encoder = replace(encoder, max_length=min(encoder.max_length, config.max_length))
        kind = json.loads((Path(config.init) / "config.json").read_text(encoding="utf-8"))["model_type"]
        folder.mkdir(parents=True, exist_ok=True)
        save_text_encoder(base, encoder, params, architecture=kind)
    corpus, asked, plain = questions_of(config)
    everything = {split: [one for part in asked[split].values() for one in part] for split in SHARES}
    sets = {"temporal": as_set(corpus, everything["test"])} | ({"plain": as_set(corpus, plain)} if plain else {})
    for spec in (*config.temporal, *config.plain):
        path, split = split_of(spec, "test")
        sets[Path(path).name] = shorten(read_beir(path, split), documents=config.documents, queries=config.questions)
    for name, data in sets.items():
        write_beir(folder / "data" / name, data, "test")
    write_beir(folder / "data/train", as_set(corpus, everything["train"]), "train")
    mined = folder / "data/mined.jsonl"
    run_recipe("mine", mined, "--model", base, "--data", folder / "data/train", "--output", mined,
               "--mine.num-negatives", config.negatives)
    write_rows(config, mined, everything["train"])
    return {name: folder / "data" / name for name in sets}


def write_rows(config: Config, mined: Path, questions: Sequence[Question]) -> None:
    """The mined questions of every specifier, a file each; those with too few negatives are left out, and counted."""
    groups: dict[str, set[str]] = {}
    for one in questions:
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


def rows_of(config: Config, specifier: str) -> Path:
    """The training rows of a specifier."""
    return config.own() / f"data/{specifier}.jsonl"


def train(config: Config, name: str, files: Sequence[Path], steps: int) -> Path:
    """A model from the base; returns its export."""
    folder = config.own() / "models" / name
    run_training_recipe(
        "train_retriever", folder, "--init", config.own() / "base", "--data.train", *files,
        "--batch.batch-size", config.batch_size, "--batch.num-negatives", config.negatives, "--loop.steps", steps,
        "--loss.temperature", config.temperature, "--loss.similarity", config.similarity, "--optim.lr", config.lr,
        "--max-length", config.max_length, "--seed", config.seeds[0], "--batch.seed", config.seeds[0])
    return folder / "exported"


def make_models(config: Config) -> dict[str, Path]:
    """Base, joint, specialists, merged, and the points between base and merged."""
    base, files = config.own() / "base", [rows_of(config, name) for name in SPECIFIERS]
    specialists = {name: train(config, name, [path], config.steps)
                   for name, path in zip(SPECIFIERS, files, strict=True)}
    joint = train(config, "joint", files, config.steps * len(SPECIFIERS))
    merged = config.own() / "models/merged"
    run_recipe("merge", merged, "--models", *specialists.values(), "--target", merged)
    line = {}
    for share in config.line:
        line[f"line_{share:g}"] = target = config.own() / f"models/line_{share:g}"
        run_recipe("merge", target, "--models", base, merged, "--merge.weights", 1 - share, share, "--target", target)
    return {"base": base, "joint": joint, "merged": merged, **line, **specialists}


def measure(config: Config, models: Mapping[str, Path], sets: Mapping[str, Path]) -> Results:
    """What every model did on every set."""
    found = {}
    for name, folder in sets.items():
        output = config.own() / "results" / name
        grouped = ("--group", "specifier") if name in ("temporal", "plain") else ()
        run_recipe("evaluate_retrieval", output / "measures.json", "--data", folder, "--models", *models.values(),
                   "--measures", *MEASURES, *grouped, "--output", output)
        qrels = read_beir(folder, "test").qrels
        found[name] = {model: evaluate_run(read_run(output / f"{number}_{path.name}.trec"), qrels, MEASURES)
                       for number, (model, path) in enumerate(models.items())}
    return found


def summarise(config: Config, seeds: Sequence[Results]) -> None:
    """Tables and tests as Markdown, and where every model stands between temporal gain and loss elsewhere."""
    names = list(seeds[0])
    without = [name for name in names if name == "plain" or name in {Path(split_of(one, "")[0]).name
                                                                     for one in config.plain}]
    lines = [f"Seeds {', '.join(map(str, config.seeds))}."]
    for name in names:
        queries = ", ".join(str(len(results[name]["base"].queries)) for results in seeds)
        lines += ["", f"## {name} ({queries} questions)", "", table(seeds, name, MEASURES)]
    lines += ["", "## The merged model against others (paired permutation tests, Holm over all of them)", "",
              *paired_lines(seeds, "merged", ("base", "joint"), "ndcg@5"), ""]
    text = "\n".join(lines)
    print(text)
    (config.folder / "results").mkdir(parents=True, exist_ok=True)
    with replacing(config.folder / "results/summary.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    if without:
        gain_figure(config.folder / "results/gains.png", seeds, across=without, base="base", marked="merged",
                    up=[name for name in names if name not in without], measure="ndcg@5",
                    labels=("questions without a time: nDCG@5 against the base, points",
                            "temporal questions: nDCG@5 against the base, points"))


def reproduce(config: Config) -> None:
    """All stages, for every seed."""
    if not config.init:
        raise ValueError("--init names the base: a folder of sentence-transformers, or with --pooling one of "
                         "transformers")
    found = []
    for seed in config.seeds:
        one = replace(config, seeds=(seed,))
        sets = prepare(one)
        found.append(measure(one, make_models(one), sets))
    summarise(config, found)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(reproduce, {"default": Config()}, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
