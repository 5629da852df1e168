"""Measure retrievers on BEIR folders: per query, per group, with intervals and paired tests.

    python -m recipes.evaluate_retrieval --data scifact --models all-MiniLM-L6-v2 runs/retriever/exported
    python -m recipes.evaluate_retrieval --data "timeqa?split=dev" --models base merged --group relation --output out
    python -m recipes.evaluate_retrieval --mteb SciFact STSBenchmark --models runs/retriever/exported --output out

A model is a folder of sentence-transformers, or with `--pooling` one of transformers; a SparseEncoder (SPLADE); with
`--vectors late` a model whose tokens are compared (MaxSim); what `recipes.train_retriever` exports, two towers too.
`bm25` ranks by words (needs `jaxlm[rl]`); a TREC run file is measured as it is. Search is exact, or of dense vectors
with `--index.kind` that of FAISS; sparse and late vectors are encoded and scored block by block. Measures have
trec_eval's semantics; every model is compared with the first by a paired permutation test, corrected for their number
(Holm). `--output` keeps the runs as TREC files and the numbers as JSON. With `--mteb` the package mteb (`jaxlm[mteb]`)
loads its tasks, from the network the first time, and measures; `--output` keeps its files, and what is there is not run
again. Minutes for 10,000 passages on a laptop CPU with MiniLM.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import BeirSet, read_beir, split_of
from jaxlm.eval.mteb_model import mteb_model, mteb_scores, mteb_tasks
from jaxlm.eval.ranking import BEIR, RankingResult, Run, evaluate_run, group_means, means, read_run, write_run
from jaxlm.eval.stats import bootstrap_interval, holm, paired_test
from jaxlm.retrieval.bm25 import bm25_index, bm25_search
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.faiss_index import IndexConfig
from jaxlm.retrieval.index import as_run
from jaxlm.retrieval.representations import Vectors
from jaxlm.retrieval.searcher import open_searcher
from jaxlm.retrieval.towers import find_towers, load_towers

PROG = "recipes.evaluate_retrieval"
OURS = ("data", "measures", "depth", "group", "ignore_identical_ids", "index")  # what mteb decides itself
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured on what."""

    data: str = ""                       # a BEIR folder, `folder?split=dev`; the split test unless another is named
    mteb: tuple[str, ...] = ()           # names of tasks of mteb, instead of data
    models: tuple[str, ...] = ()         # the first is what the others are compared with
    query_model: str = ""                # another folder that encodes the queries for the models, of two towers
    vectors: Vectors | None = None       # of the models; None: as their folders say, which none says of late ones
    pooling: Pooling | None = None       # of folders without modules.json
    measures: tuple[str, ...] = BEIR
    depth: int = 100                     # documents of each query that are kept
    group: str = ""                      # a field of queries.jsonl: measures for each of its values
    ignore_identical_ids: bool = False   # a document with the query's id is no result, as BEIR has it for ArguAna
    batch_tokens: int = 8192             # tokens that are encoded at once
    index: IndexConfig = field(default_factory=IndexConfig)
    output: Path | None = None           # a folder for runs and numbers
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.depth < 1 or self.batch_tokens < 1:
            raise ValueError("--depth and --batch-tokens must be at least 1")
        if len(set(self.models)) < len(self.models):
            raise ValueError("--models names a model twice")


def is_encoder(name: str) -> bool:
    """Whether a model is the folder of one."""
    return name != "bm25" and not Path(name).is_file()


def check(config: Config) -> None:
    """ValueError for models that are missing or of the wrong kind for the settings."""
    if not (config.data or config.mteb) or not config.models:
        raise ValueError("--data names a BEIR folder or --mteb tasks, and --models what is measured on them")
    encoders = [name for name in config.models if is_encoder(name)]
    given = [name for name in OURS if getattr(config, name) != getattr(Config(), name)]
    if config.mteb and given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no effect on tasks of mteb; leave it out")
    if config.mteb and len(encoders) < len(config.models):
        raise ValueError("tasks of mteb are encoded: --models may name folders of models only")
    if not encoders and (config.query_model or config.vectors or config.index != IndexConfig()):
        raise ValueError("--query-model, --vectors and --index have no effect on bm25 and run files")
    if config.index.file and len(encoders) > 1:
        raise ValueError("--index.file keeps the index of one model; name one, or leave it out")


def run_of(config: Config, name: str, data: BeirSet) -> Run:
    """The ranking of one model."""
    if Path(name).is_file():
        return read_run(name)
    if name == "bm25":
        ids = list(data.corpus)
        hits = bm25_search(bm25_index(list(data.corpus.values())), list(data.queries.values()), config.depth, ids=ids)
        return as_run(hits, list(data.queries), ids)
    mesh = make_mesh(config.mesh)
    found = find_towers(name, config.query_model, vectors=config.vectors, pooling=config.pooling)
    searcher = open_searcher(found, mesh, list(data.corpus.values()), ids=list(data.corpus), index=config.index,
                             batch_tokens=config.batch_tokens, keep=False)
    with jax.set_mesh(mesh):
        hits = searcher.search(searcher.encode(list(data.queries.values())), config.depth)
    return as_run(hits, list(data.queries), list(data.corpus))


def groups_of(config: Config, data: BeirSet) -> dict[str, str]:
    """The group of every judged query."""
    without = [query for query, fields in data.fields.items() if config.group not in fields]
    if without:
        known = sorted({key for fields in data.fields.values() for key in fields})
        raise ValueError(f"{config.data}: query {without[0]!r} has no field {config.group!r}; fields are "
                         f"{', '.join(known) or 'none'}")
    return {query: str(fields[config.group]) for query, fields in data.fields.items()}


def compare(results: dict[str, RankingResult], measure: str) -> list[str]:
    """Every model against the first: difference and p-values, lines of text."""
    (first, base), *others = results.items()
    tests = {name: paired_test(result.values[measure], base.values[measure]) for name, result in others}
    corrected = holm({name: test.p_permutation for name, test in tests.items()})
    return [f"{measure}: {name} - {first}: {test.difference:+.4f}, p {test.p_permutation:.4f} (corrected "
            f"{corrected[name]:.4f}; t-test {test.p_t:.4f})" for name, test in tests.items()]


def report(config: Config, results: dict[str, RankingResult], groups: dict[str, str]) -> dict[str, dict]:
    """Prints what was found; returns the numbers."""
    numbers: dict[str, dict] = {}
    print("| model | " + " | ".join(config.measures) + " |\n| --- |" + " --- |" * len(config.measures))
    for name, result in results.items():
        numbers[name] = {"mean": means(result)}
        print(f"| {name} | " + " | ".join(f"{numbers[name]['mean'][key]:.4f}" for key in config.measures) + " |")
    lead = config.measures[0]
    for name, result in results.items():
        interval = bootstrap_interval(result.values[lead])
        numbers[name] |= {"interval": [interval.low, interval.high], "queries": len(result.queries)}
        print(f"{lead} of {name}: {interval.mean:.4f}, 95 % from {interval.low:.4f} to {interval.high:.4f}, "
              f"{len(result.queries)} queries")
        if groups:
            numbers[name]["groups"] = group_means(result, groups)
            for group, values in numbers[name]["groups"].items():
                print(f"  {group}: " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))
    for line in compare(results, lead):
        print(line)
    return numbers


def evaluate_on_mteb(config: Config) -> None:
    """The main score of every model in every task, by mteb."""
    mesh, scores = make_mesh(config.mesh), {}
    tasks = mteb_tasks(config.mteb)
    for name in config.models:
        found = find_towers(name, config.query_model, vectors=config.vectors, pooling=config.pooling)
        towers = load_towers(found, mesh)
        model = mteb_model(towers, Path(name).resolve().name, batch_tokens=config.batch_tokens)
        with jax.set_mesh(mesh):
            scores[name] = mteb_scores(model, tasks, config.output and config.output / "mteb")
    names = list(next(iter(scores.values())))
    print("| model | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for name, own in scores.items():
        print(f"| {name} | " + " | ".join(f"{own[task]:.5f}" for task in names) + " |")
    if config.output:
        keep(config.output / "mteb.json", scores)


def keep(path: Path, numbers: dict) -> None:
    """Numbers as JSON."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def evaluate(config: Config) -> None:
    """Ranks, measures, compares, keeps."""
    check(config)
    if config.mteb:
        return evaluate_on_mteb(config)
    data = read_beir(*split_of(config.data, "test"))
    groups = groups_of(config, data) if config.group else {}
    results, runs = {}, {}
    for name in config.models:
        runs[name] = run_of(config, name, data)
        results[name] = evaluate_run(runs[name], data.qrels, config.measures,
                                     ignore_identical_ids=config.ignore_identical_ids)
        log.info("%s: %s", name, "  ".join(f"{key} {value:.4f}" for key, value in means(results[name]).items()))
    numbers = report(config, results, groups)
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        for number, (name, run) in enumerate(runs.items()):
            write_run(config.output / f"{number}_{Path(name).name}.trec", run, Path(name).name.replace(" ", "_"))
        keep(config.output / "measures.json", numbers)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(evaluate, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
