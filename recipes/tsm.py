"""Time-Specifier Model Merging (Han et al. 2025, arXiv:2507.06782): one retriever per time specifier, merged into one.

    python -m recipes.tsm --init all-MiniLM-L6-v2                             generated lives, no download
    python -m recipes.tsm --init contriever --pooling mean --data timeqa_human --steps 300 --seeds 1 2 3 \
      --temporal nobel_prize_temporal --plain "boolq?split=dev" --folder runs/timeqa
    python -m recipes.tsm --init contriever --pooling mean --rows before=dev_before.jsonl.gz after=dev_after.jsonl.gz \
      in_early=dev_in_early.jsonl.gz in_late=dev_in_late.jsonl.gz --folder runs/rows

Facts that held for a time are asked for with each of the seven specifiers (in, from-to, before, ...); negatives are
mined with the base; a specialist learns each specifier; their mean is the merged model. Beside it: one model that
learns all specifiers in as many steps as all specialists together (joint), and the line from base to merged. All are
measured on temporal questions, by specifier, on questions without a time, and on further BEIR folders.

- Without a flag, the facts are those of generated lives.
- `--data` is a folder of BEIR whose questions read "... from X to Y ..." with the fields link and relation; pages are
  split, never questions.
- `--rows` gives files of rows for some specifiers, with the negatives to learn from; nothing is mined, and the corpus
  is the passages of all rows. Rows do not name their page: questions are kept together that share a positive or their
  text, over all files, so no positive of a test question is one of a training question, but a page may be in both.

`--documents` makes every test set smaller, and `--questions` the further ones; both make them easier too.

Every stage is a command of another recipe, printed as it is run, and a stage whose result is there is not run again: an
interrupted run goes on. `config.json` says how the folder was made; there other seeds may be added, and nothing else
changed. `results/summary.md` and `results/gains.png` are the outcome, over all seeds. Left out: the authors' training
files, which are not public, and choosing checkpoints by dev accuracy (the last one counts).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlm.core.command import run_command, run_recipe, run_training_recipe
from jaxlm.core.config import differences, load_config, save_config
from jaxlm.core.files import replacing
from jaxlm.data.beir import read_beir, split_of
from jaxlm.data.beir_files import shorten, write_beir
from jaxlm.data.retrieval_rows import RetrievalRow, read_retrieval_rows
from jaxlm.data.specifier_rows import rows_by_specifier, specifier_files, write_rows
from jaxlm.data.time_material import (
    Material,
    joined,
    material_of_lives,
    material_of_pages,
    material_of_rows,
    question_set,
)
from jaxlm.data.time_specifiers import SPECIFIERS
from jaxlm.eval.gain_report import Results, gain_figure, paired_lines, table
from jaxlm.eval.ranking import evaluate_run, read_run
from jaxlm.objective.contrastive import Similarity
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder

PROG = "recipes.tsm"
MEASURES = ("ndcg@5", "ndcg@20", "mrr@10", "recall@5", "recall@20")
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One reproduction."""

    init: str = ""                    # the base: a folder of sentence-transformers or transformers
    pooling: Pooling | None = None    # of a folder without modules.json
    data: str = ""                    # a BEIR folder of timed questions
    rows: tuple[str, ...] = ()        # SPECIFIER=FILE: rows to train on; neither these nor data: generated lives
    entities: int = 200               # generated lives
    temporal: tuple[str, ...] = ()    # further BEIR folders whose questions have times, only to measure on
    plain: tuple[str, ...] = ()       # such folders whose questions have none
    documents: int | None = None      # of every test set; None: all
    questions: int | None = None      # of every further test set; None: all
    steps: int = 60                   # of each specialist
    batch_size: int = 16              # questions of a step
    negatives: int = 5                # of each question; of more that its row gives, other ones each epoch
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
        if self.data and self.rows:
            raise ValueError("--data and --rows both say what is learnt; give one of them")
        if (self.data or self.rows) and self.entities != Config.entities:
            raise ValueError("--entities counts generated lives, of which there are none with --data or --rows")
        if self.rows and len(specifier_files(self.rows)) < 2:
            raise ValueError("--rows needs the files of two specifiers at least, or there is nothing to merge")
        if self.questions is not None and not (self.temporal or self.plain):
            raise ValueError("--questions is about further test sets; name one by --temporal or --plain, or drop it")
        names = self.further()
        if taken := [name for i, name in enumerate(names) if name in (*names[:i], "temporal", "plain", "train")]:
            raise ValueError(f"--temporal and --plain: two sets would be called {taken[0]!r}; rename a folder")

    def own(self) -> Path:
        """The folder of the first seed; a configuration of one seed is one run."""
        return self.folder / f"seed_{self.seeds[0]}"

    def specifiers(self) -> tuple[str, ...]:
        """Those that are learnt, a specialist each."""
        return tuple(specifier_files(self.rows) if self.rows else SPECIFIERS)

    def further(self) -> list[str]:
        """The names of the further test sets."""
        return [Path(split_of(spec, "test")[0]).name for spec in (*self.temporal, *self.plain)]


def check_folder(config: Config) -> None:
    """ValueError if the folder holds stages that were made with other settings than these; changes nothing."""
    kept, begun = config.folder / "config.json", sorted(config.folder.glob("seed_*"))
    if not kept.exists():
        if begun:
            raise ValueError(f"{config.folder} holds {begun[0].name} but no config.json that says how it was made; "
                             "delete the folder or name another --folder")
        return
    saved = load_config(Config, kept)
    changed = [line.partition(":") for line in differences(
        replace(saved, seeds=config.seeds, folder=config.folder), config)]
    if begun and changed:
        listed = "; ".join(f"--{name.replace('_', '-')}:{values}" for name, _, values in changed)
        raise ValueError(f"{config.folder} was made with other settings (there -> asked for): {listed}; name another "
                         "--folder or delete this one")


def material_of(config: Config) -> Material:
    """From the source that the flags name. ValueError: a specifier without enough questions."""
    seed = config.seeds[0]
    if config.rows:
        found = material_of_rows(specifier_files(config.rows), seed)
    else:
        found = material_of_pages(config.data, seed) if config.data else material_of_lives(config.entities, seed)
    if config.documents is not None:
        found = found._replace(everything=shorten(found.everything, documents=config.documents))
    if config.rows:
        found = found._replace(rows=whole(config, found.rows))
    check_enough(config, found.asked["train"])
    if none := [name for name in config.specifiers() if not found.asked["test"][name]]:
        raise ValueError(f"no question with {none[0]} is among those held out to measure on; give more data")
    return found


def check_enough(config: Config, found: Mapping[str, Sequence[object]]) -> None:
    """ValueError if a specifier has fewer training questions than a batch holds."""
    counts = {name: len(found.get(name, ())) for name in config.specifiers()}
    if short := [f"{name} has {count}" for name, count in counts.items() if count < config.batch_size]:
        raise ValueError(f"a batch of {config.batch_size} needs as many training questions with {config.negatives} "
                         f"negatives, but {', '.join(short)}; lower --batch-size or --negatives, or give more data")


def whole(config: Config, rows: Mapping[str, Sequence[RetrievalRow]]) -> dict[str, list[RetrievalRow]]:
    """The rows with enough negatives; others are left out, and counted. ValueError if too few are left."""
    kept = {name: [row for row in part if len(row.negatives) >= config.negatives] for name, part in rows.items()}
    for name, part in rows.items():
        if len(kept[name]) < len(part):
            log.warning("%s: %d of %d questions have fewer than %d negatives and are left out", name,
                        len(part) - len(kept[name]), len(part), config.negatives)
    check_enough(config, kept)
    return kept


def make_data(config: Config) -> None:
    """The base as an export, the test sets, the training questions; all is read before the first of them is written."""
    folder, base = config.own(), config.own() / "base"
    material = material_of(config)
    corpus = material.everything.corpus
    sets = {"temporal": question_set(corpus, joined(material.asked["test"]))}
    if material.plain:
        sets["plain"] = question_set(corpus, material.plain)
    for name, spec in zip(config.further(), (*config.temporal, *config.plain), strict=True):
        sets[name] = shorten(read_beir(*split_of(spec, "test")), documents=config.documents, queries=config.questions)
    if not base.exists():
        encoder, params = load_text_encoder(config.init, pooling=config.pooling)
        # All models read as much of a text, or the measures would compare lengths.
        encoder = replace(encoder, max_length=min(encoder.max_length, config.max_length))
        kind = json.loads((Path(config.init) / "config.json").read_text(encoding="utf-8"))["model_type"]
        folder.mkdir(parents=True, exist_ok=True)
        save_text_encoder(base, encoder, params, architecture=kind)
    for name, data in sets.items():
        write_beir(folder / "data" / name, data, "test")
    for name, part in material.rows.items():
        write_rows(rows_of(config, name), part)
    write_beir(folder / "data/train", question_set(corpus, joined(material.asked["train"])), "train")


def prepare(config: Config) -> dict[str, Path]:
    """Base, test sets and the rows of every specifier, each unless it is there; returns the test sets by name."""
    data = config.own() / "data"
    if not (data / "train/qrels/train.tsv").exists():  # what is written last
        make_data(config)
    if not all(rows_of(config, name).exists() for name in config.specifiers()):
        mined = data / "mined.jsonl"
        run_recipe("mine", mined, "--model", config.own() / "base", "--data", data / "train", "--output", mined,
                   "--mine.num-negatives", config.negatives)
        asked = rows_by_specifier(read_retrieval_rows(mined).rows, read_beir(data / "train", "train"))
        for name, part in whole(config, asked).items():
            write_rows(rows_of(config, name), part)
    generated = not (config.data or config.rows)
    return {name: data / name for name in ("temporal", *(["plain"] if generated else []), *config.further())}


def rows_of(config: Config, specifier: str) -> Path:
    """The training rows of a specifier."""
    return config.own() / f"data/{specifier}.jsonl"


def train(config: Config, name: str, files: Sequence[Path], steps: int) -> Path:
    """A model from the base, which says how much of a text is read; returns its export."""
    folder = config.own() / "models" / name
    run_training_recipe(
        "train_retriever", folder, "--init", config.own() / "base", "--data.train", *files,
        "--batch.batch-size", config.batch_size, "--batch.num-negatives", config.negatives, "--loop.steps", steps,
        "--loss.temperature", config.temperature, "--loss.similarity", config.similarity, "--optim.lr", config.lr,
        "--seed", config.seeds[0], "--batch.seed", config.seeds[0])
    return folder / "exported"


def make_models(config: Config) -> dict[str, Path]:
    """Base, joint, specialists, merged, and the points between base and merged."""
    base, files = config.own() / "base", {name: rows_of(config, name) for name in config.specifiers()}
    specialists = {name: train(config, name, [path], config.steps) for name, path in files.items()}
    joint = train(config, "joint", list(files.values()), config.steps * len(files))
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
    check_folder(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    save_config(config, config.folder / "config.json")  # of the last start, which the results are of
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
