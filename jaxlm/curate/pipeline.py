"""The stages of curation in order, and the datatrove executors that run them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.core.files import replacing
from jaxlm.curate.config import (
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    LanguageConfig,
    OutputFormat,
    QualityConfig,
    RawConfig,
)
from jaxlm.curate.decontaminate import build_decontamination, load_index
from jaxlm.curate.dedup import minhash_buckets, minhash_clusters, minhash_filter, minhash_signatures
from jaxlm.curate.extras import extra
from jaxlm.curate.filters import build_filter, chosen_filters
from jaxlm.curate.report import Recorded, markdown, merged
from jaxlm.curate.stages import (
    Choose,
    Only,
    ReadRaw,
    ReadRows,
    WriteOutput,
    WriteRows,
    build_exact,
    build_language,
    build_quality,
)


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Every step from raw files to the output."""

    raw: RawConfig = field(default_factory=RawConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    format: OutputFormat = "parquet"
    examples: int = 3              # texts shown per step and reason

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ValueError(f"examples must not be negative, got {self.examples}")


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Who runs the tasks: this machine, SLURM (jobs are submitted) or a Ray cluster, on a shared file system."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = 1               # tasks at a time; 1 on this machine needs no further process
    partition: str | None = None   # slurm
    time: str | None = None        # slurm: of a job, such as 04:00:00
    cpus_per_task: int | None = None  # slurm and ray
    gb_per_cpu: int | None = None  # slurm and ray

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"executor.workers must be at least 1, got {self.workers}")
        allowed = {"local": (), "slurm": ("partition", "time", "cpus_per_task", "gb_per_cpu"),
                   "ray": ("cpus_per_task", "gb_per_cpu")}[self.kind]
        for name in ("partition", "time", "cpus_per_task", "gb_per_cpu"):
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(f"executor.{name} has no effect on the {self.kind} executor")
        if self.kind == "slurm" and (self.partition is None or self.time is None):
            raise ValueError("the slurm executor needs executor.partition and executor.time")


class Stage(NamedTuple):
    """A datatrove pipeline, run by `tasks` tasks, all of which end before the next stage begins."""

    name: str
    pipeline: list[Callable]
    tasks: int


def step_names(config: CurationConfig) -> list[str]:
    """The steps of the report, in the order in which a document passes them."""
    return ["read", "language", *chosen_filters(config.filters),
            *(["decontaminate"] if config.decontaminate.benchmarks else []),
            *(["exact_dedup"] if config.dedup.exact else []),
            *(["quality"] if config.quality.model else []),
            *(["minhash_dedup"] if config.dedup.minhash else [])]


def make_stages(config: CurationConfig, files: Sequence[Path], work: Path, target: Path, tasks: int,
                facts: dict[str, Any]) -> list[Stage]:
    """All stages.

    Args:
      work: a folder for what lies between stages.
      target: the output folder, which the last stage replaces as a whole.
      tasks: of the stages that go through documents; a file belongs to one task.
      facts: further entries of the report.
    """
    records, chosen, minhash = work / "records", work / "chosen", work / "minhash"
    record = lambda name, build: Recorded(name, build, records, config.examples)
    first = [ReadRaw(tuple(files), config.raw, records, config.examples),
             record("language", partial(build_language, config.language)),
             *(record(name, partial(build_filter, name, config.filters)) for name in chosen_filters(config.filters))]
    if config.decontaminate.benchmarks:
        first.append(record("decontaminate", partial(build_decontamination, config.decontaminate)))
    first.append(WriteRows(work / "filtered", config.quality.model))
    second: list[Callable] = [ReadRows(work / "filtered")]
    if config.dedup.exact:
        second.append(record("exact_dedup", partial(build_exact, chosen)))
    if config.quality.model:
        second.append(record("quality", partial(build_quality, chosen)))
    second.append(WriteRows(work / "unique"))
    last: list[Callable] = [ReadRows(work / "unique")]
    stages = [Stage("filter", first, tasks),
              Stage("choose", [Choose(work / "filtered", chosen, config.dedup.exact, config.quality)], 1),
              Stage("unique", second, tasks)]
    if config.dedup.minhash:
        stages += [Stage("signatures", [ReadRows(work / "unique"),
                                        Only(partial(minhash_signatures, config.dedup, minhash))], tasks),
                   Stage("buckets", [Only(partial(minhash_buckets, config.dedup, minhash))], config.dedup.buckets),
                   Stage("clusters", [Only(partial(minhash_clusters, config.dedup, minhash))], 1)]
        last.append(record("minhash_dedup", partial(minhash_filter, minhash)))
    last.append(WriteOutput(work / "output", config.format))
    return [*stages, Stage("write", last, tasks), Stage("publish", [Publish(config, work, target, facts)], 1)]


@dataclass(frozen=True)
class Publish:
    """Puts the report together and moves the output to its place; what was there stays until then."""

    config: CurationConfig
    work: Path
    target: Path
    facts: dict[str, Any]

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> None:
        report = make_report(self.config, self.work, self.facts)
        if not report["steps"][-1]["documents_out"]:
            left = ", ".join(f"{one['step']} {one['documents_out']}" for one in report["steps"])
            raise ValueError(f"no document is left; after each step: {left} (records in {self.work / 'records'})")
        output = self.work / "output"
        with replacing(output / "report.json") as scratch:
            scratch.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with replacing(output / "report.md") as scratch:
            scratch.write_text(markdown(report), encoding="utf-8")
        before = self.work / "replaced"
        if self.target.exists():
            self.target.rename(before)
        output.rename(self.target)


def make_report(config: CurationConfig, work: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Steps with counts and examples, warnings, facts."""
    steps = merged(work / "records", step_names(config), config.examples)
    languages = steps[-1]["languages"]
    warnings = [f"no document in language {one!r} is left" for one in config.language.keep if one not in languages]
    facts = dict(facts)
    if config.decontaminate.benchmarks:
        index = load_index(config.decontaminate)
        facts["benchmarks"] = {"texts": index.texts, "too_short_to_search": index.too_short}
    if config.quality.model:
        facts["quality_thresholds"] = json.loads((work / "chosen" / "thresholds.json").read_text())
    output = {"documents": steps[-1]["documents_out"], "bytes": steps[-1]["bytes_out"], "languages": languages}
    return {"steps": steps, "warnings": warnings, "facts": facts, "output": output}


def make_executors(stages: Sequence[Stage], config: ExecutorConfig, logs: Path) -> list[Any]:
    """One datatrove executor a stage; those of SLURM depend on each other, the others are run in order."""
    executors: list[Any] = []
    for stage in stages:
        common = {"pipeline": stage.pipeline, "tasks": stage.tasks, "workers": min(config.workers, stage.tasks),
                  "logging_dir": str(logs / stage.name)}
        machine = {"cpus_per_task": config.cpus_per_task or 1, "mem_per_cpu_gb": config.gb_per_cpu or 2}
        if config.kind == "local":
            executors.append(extra("datatrove.executor.local").LocalPipelineExecutor(**common))
        elif config.kind == "ray":
            executors.append(extra("datatrove.executor.ray").RayPipelineExecutor(**common, **machine))
        else:
            executors.append(extra("datatrove.executor.slurm").SlurmPipelineExecutor(
                **common, **machine, time=config.time, partition=config.partition, job_name=f"curate-{stage.name}",
                depends=executors[-1] if executors else None))
    return executors


def run_stages(stages: Sequence[Stage], config: ExecutorConfig, logs: Path) -> None:
    """Runs what is not complete yet; SLURM jobs are submitted only."""
    executors = make_executors(stages, config, logs)
    if config.kind == "slurm":
        executors[-1].run()
        return
    extra("loguru").logger.disable("datatrove")  # pages of its progress on standard error; its statistics stay in files
    for executor in executors:
        executor.run()
