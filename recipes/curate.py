"""Curate a corpus: raw files to parquet or ArrayRecord, with a report of what each step dropped and examples.

The filters of FineWeb (arXiv:2406.17557) with Korean limits, and the three kinds of steps of KORMo (arXiv:2510.09426,
heuristics, deduplication, a classifier): encoding repair, language (py3langid), Gopher, C4, FineWeb and Korean particle
filters, benchmark decontamination by n-grams, exact duplicates, a quality classifier, MinHash near-duplicates.
Runs on datatrove (the extra `curate`).

    python -m recipes.curate                                     # embedded raw files with planted faults, a minute
    python -m recipes.curate --data 'raw/*.jsonl.zst' 'web/*.parquet' --target corpus --tasks 64 \\
      --executor.workers 16 --curation.decontaminate.benchmarks kmmlu.jsonl
    python -m recipes.curate ... --curation.quality.labelled labels.jsonl \\
      --curation.quality.model quality.safetensors --curation.quality.keep-share 0.2
    python -m recipes.curate ... --executor.kind slurm --executor.partition cpu --executor.time 04:00:00
    python -m recipes.pretrain --data.path 'corpus/*.parquet'

`report.json` and `report.md` lie beside the output. A run that was killed goes on from the tasks that are complete when
it is started again; TARGET.work keeps them until the output is in place. Left out: perplexity filter, filter of
translated reasoning, URL lists; KORMo's deduplication ("Old-both") and its labels are unpublished. SLURM and Ray are
tested as far as their executors are built; nothing was run on a cluster.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.curate.config import DecontaminateConfig
from jaxlm.curate.decontaminate import load_index
from jaxlm.curate.extras import extra
from jaxlm.curate.pipeline import CurationConfig, ExecutorConfig, make_stages, run_stages
from jaxlm.curate.quality import load_model, train
from jaxlm.curate.raw import check_ending
from jaxlm.curate.sample import write_sample
from jaxlm.data.sources import find_files

PROG = "recipes.curate"
SAMPLE = "sample:"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One corpus."""

    data: tuple[str, ...] = (SAMPLE,)  # files and globs; `sample:` writes raw files with planted faults
    target: Path = Path("runs/curated")  # a folder that appears whole
    tasks: int = 2                     # parts of the work; a file belongs to one task
    curation: CurationConfig = field(default_factory=CurationConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    overwrite: bool = False            # replace `target`, and start anew if the work folder is of other settings

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data needs at least one file")
        if self.tasks < 1:
            raise ValueError(f"--tasks must be at least 1, got {self.tasks}")
        if self.data == (SAMPLE,) and self.curation.decontaminate.benchmarks:
            raise ValueError("the sample brings its own benchmark: name --data, or leave out --curation.decontaminate")


def work_folder(target: Path) -> Path:
    """What lies between stages is kept beside the target, on the same file system."""
    return target.with_name(target.name + ".work")


def raw_files(config: Config, work: Path) -> tuple[CurationConfig, list[Path]]:
    """The files to read, each once, and the curation; those of the sample are written first."""
    if SAMPLE in config.data and config.data != (SAMPLE,):
        raise ValueError("--data sample: cannot be mixed with files")
    if config.data == (SAMPLE,):
        sample = write_sample(work / "raw")
        marks = DecontaminateConfig(**{**vars(config.curation.decontaminate), "benchmarks": (str(sample.benchmark),)})
        return replace(config.curation, decontaminate=marks), list(sample.files)
    files = [path for spec in config.data for path in find_files(spec)]
    for path in files:
        check_ending(path)
    if again := sorted({str(path) for path in files if files.count(path) > 1}):
        raise ValueError(f"--data names {again[0]} more than once, which would make every text a duplicate")
    return config.curation, files


def settings_of(config: Config, files: Sequence[Path]) -> dict[str, Any]:
    """What the results depend on: a work folder of other settings is not continued."""
    named = [*files, *map(Path, config.curation.decontaminate.benchmarks)]
    named += [path for path in (config.curation.quality.labelled,) if path]
    marks = {} if config.data == (SAMPLE,) else {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in named}
    return {"curation": flags.to_json(config.curation), "data": list(config.data), "tasks": config.tasks,
            "files": marks}


def prepare_work(config: Config, work: Path, settings: dict[str, Any]) -> None:
    """A work folder with these settings: continued, or made; ValueError if there is one of other settings."""
    mark = work / "settings.json"
    if mark.exists():
        before = json.loads(mark.read_text(encoding="utf-8"))
        if before == settings and not (work / "logs" / "publish" / "completions" / "00000").exists():
            log.info("going on in %s", work)
            return
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed and not config.overwrite:
            raise ValueError(f"{work} was begun with other settings ({', '.join(changed)}); --overwrite starts anew")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    with replacing(mark) as scratch:
        scratch.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def trained(curation: CurationConfig) -> dict[str, Any]:
    """Facts of the classifier, which is trained if it is not there; ValueError if it cannot be read."""
    quality = curation.quality
    if quality.model is None:
        return {}
    if not quality.model.exists() and quality.labelled is None:
        raise ValueError(f"quality.model {quality.model} does not exist; quality.labelled FILE.jsonl trains it")
    if not quality.model.exists():
        log.info("quality classifier: %s", train(quality))
    load_model(quality.model)
    notes = quality.model.with_suffix(".json")
    return {"quality_evaluation": json.loads(notes.read_text())} if notes.exists() else {}


def run(config: Config) -> None:
    """Checks, curates, says what came out."""
    if config.target.exists() and not config.overwrite:
        raise ValueError(f"--target {config.target} exists; --overwrite replaces it")
    extra("datatrove")
    began, work = time.perf_counter(), work_folder(config.target)
    prepare = None if config.data == (SAMPLE,) else raw_files(config, work)
    if config.curation.decontaminate.benchmarks:
        load_index(config.curation.decontaminate)
    facts = trained(config.curation)
    prepare_work(config, work, settings_of(config, prepare[1] if prepare else ()))
    curation, files = prepare or raw_files(config, work)
    stages = make_stages(curation, files, work, config.target, min(config.tasks, len(files)), facts)
    run_stages(stages, config.executor, work / "logs")
    if config.executor.kind == "slurm":
        print(f"submitted; {config.target} appears when the job curate-publish ends, then {work} can go")
        return
    report = json.loads((config.target / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    for warning in report["warnings"]:
        log.warning("%s", warning)
    for step in report["steps"]:
        log.info("%s: %d of %d documents stay", step["step"], step["documents_out"], step["documents_in"])
    out = report["output"]
    print(f"{config.target}: {out['documents']:,} documents, {out['bytes'] / 1e6:.2f} MB of text, "
          f"{time.perf_counter() - began:.1f} s; see report.md")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, {"default": Config()}, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
