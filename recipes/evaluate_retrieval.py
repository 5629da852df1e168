"""Measure retrievers on BEIR folders: per query, per group, with intervals and paired tests.

    python -m recipes.evaluate_retrieval --data scifact --models all-MiniLM-L6-v2 runs/retriever/exported
    python -m recipes.evaluate_retrieval --data "timeqa?split=dev" --models base merged --group relation --output out
    python -m recipes.evaluate_retrieval --mteb SciFact STSBenchmark --models runs/retriever/exported --output out

A model is a folder of sentence-transformers, or with `--pooling` one of transformers; a SparseEncoder (SPLADE); with
`--vectors late` a model whose tokens are compared (MaxSim); what `recipes.train_retriever` exports, two towers too.
Prompts before the texts are what the folder says, or `--query-prompt "query: " --passage-prompt "passage: "`.
`bm25` ranks by words (needs `jaxlm[rl]`); a TREC run file is measured as it is. Search is exact, or of dense vectors
with `--index.kind` that of FAISS; sparse and late vectors are encoded and scored block by block. Measures have
trec_eval's semantics; every model is compared with the first by a paired permutation test, corrected for their number
(Holm). `--output` keeps the runs as TREC files, each as soon as it is there; the values of every query, one line for
each and every model (`per_query.jsonl`); and the means, with 95 % intervals of every measure, over all queries and by
group (`measures.json`). With `--mteb` the package mteb (`jaxlm[mteb]`) loads its tasks, from the network the first
time, and measures; `--output` keeps its files, and what is there is not run again. Minutes for 10,000 passages on a
laptop CPU with MiniLM.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import BeirSet, read_beir, split_of
from jaxlm.eval.mteb_model import mteb_model, mteb_scores, mteb_tasks
from jaxlm.eval.ranking import (
    BEIR,
    RankingResult,
    Run,
    check_trec_names,
    evaluate_run,
    group_values,
    means,
    measure_of,
    read_run,
    write_run,
)
from jaxlm.eval.stats import bootstrap_intervals, holm, paired_test
from jaxlm.retrieval.bm25 import bm25_index, bm25_search
from jaxlm.retrieval.embed import Pooling
from jaxlm.retrieval.faiss_index import IndexConfig
from jaxlm.retrieval.index import as_run
from jaxlm.retrieval.representations import Vectors
from jaxlm.retrieval.searcher import open_searcher
from jaxlm.retrieval.towers import TowersConfig, find_towers, load_towers, open_towers

PROG = "recipes.evaluate_retrieval"
OURS = ("data", "measures", "depth", "group", "ignore_identical_ids", "index")  # what mteb decides itself
OF_ENCODERS = ("query_model", "vectors", "pooling", "query_prompt", "passage_prompt", "index")  # what bm25 lacks
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
    query_prompt: str | None = None      # before every query; None: as the folders say
    passage_prompt: str | None = None
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
        if not self.measures:
            raise ValueError("--measures names at least one, as in ndcg@10")
        if len(set(map(same, self.models))) < len(self.models):
            raise ValueError("--models names a model twice")


def same(name: str) -> str:
    """A model by whatever path it is named."""
    return name if name == "bm25" else os.path.realpath(name)


def short(name: str) -> str:
    """A model in the names of files and as the tag of its run."""
    return "_".join(Path(os.path.abspath(name)).name.split())


def is_encoder(name: str) -> bool:
    """Whether a model is the folder of one."""
    return name != "bm25" and not Path(name).is_file()


def check(config: Config) -> None:
    """ValueError for models that are missing or of the wrong kind for the settings."""
    if not (config.data or config.mteb) or not config.models:
        raise ValueError("--data names a BEIR folder or --mteb tasks, and --models what is measured on them")
    encoders = [name for name in config.models if is_encoder(name)]
    given = [name for name in (*OURS, *OF_ENCODERS) if getattr(config, name) != getattr(Config(), name)]
    if config.mteb and (odd := [name for name in given if name in OURS]):
        raise ValueError(f"--{odd[0].replace('_', '-')} has no effect on tasks of mteb; leave it out")
    if config.mteb and len(encoders) < len(config.models):
        raise ValueError("tasks of mteb are encoded: --models may name folders of models only")
    if not encoders and (odd := [name for name in given if name in OF_ENCODERS]):
        raise ValueError(f"--{odd[0].replace('_', '-')} has no effect on bm25 and run files; leave it out")
    if config.index.file and len(encoders) > 1:
        raise ValueError("--index.file keeps the index of one model; name one, or leave it out")
    check_depth(config)
    check_encoders(config, encoders)


def check_depth(config: Config) -> None:
    """ValueError for a measure that looks further than what is searched. Run files have the depth they have."""
    cuts = {name: measure_of(name)[1] for name in config.measures}
    deepest = max(cuts, key=cuts.__getitem__)
    searched = [name for name in config.models if not Path(name).is_file()]
    if not searched and config.depth != Config().depth:
        raise ValueError("--depth has no effect on run files; leave it out")
    if searched and cuts[deepest] > config.depth:
        raise ValueError(f"{deepest} needs {cuts[deepest]} documents of each query, and --depth keeps {config.depth}: "
                         "make it larger, or leave that measure out")


def check_encoders(config: Config, encoders: Sequence[str]) -> None:
    """ValueError for a model that is not there or does not fit the settings; no weights are read."""
    for name in encoders:
        if not Path(name).exists():
            raise ValueError(f"--models: {name!r} is no folder, no run file and not bm25")
    for name in encoders:
        towers = open_towers(towers_of(config, name))
        if towers.vectors != "dense" and config.index != IndexConfig():
            raise ValueError(f"{name}: --index finds dense vectors, and {towers.vectors} ones are searched exactly; "
                             "leave it out")


def towers_of(config: Config, name: str) -> TowersConfig:
    """The encoders of a model."""
    return find_towers(name, config.query_model, vectors=config.vectors, pooling=config.pooling,
                       query_prompt=config.query_prompt, passage_prompt=config.passage_prompt)


def run_of(config: Config, name: str, data: BeirSet) -> Run:
    """The ranking of one model, without documents of the query's id where these are to be ignored."""
    if Path(name).is_file():
        return read_run(name)
    deeper = config.depth + config.ignore_identical_ids  # such a document must not take the place of another
    run = search(config, name, data, deeper)
    if not config.ignore_identical_ids:
        return run
    others = {query: [(doc, score) for doc, score in found.items() if doc != query] for query, found in run.items()}
    return {query: dict(found[:config.depth]) for query, found in others.items()}


def search(config: Config, name: str, data: BeirSet, depth: int) -> Run:
    """The best documents of each query, the best first."""
    if name == "bm25":
        ids = list(data.corpus)
        hits = bm25_search(bm25_index(list(data.corpus.values())), list(data.queries.values()), depth, ids=ids)
        return as_run(hits, list(data.queries), ids)
    mesh = make_mesh(config.mesh)
    searcher = open_searcher(towers_of(config, name), mesh, list(data.corpus.values()), ids=list(data.corpus),
                             index=config.index, batch_tokens=config.batch_tokens, keep=False)
    with jax.set_mesh(mesh):
        hits = searcher.search(searcher.encode(list(data.queries.values())), depth)
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


def summary(values: Mapping[str, np.ndarray]) -> dict:
    """Means and 95 % intervals of the measures of some queries."""
    intervals = dict(zip(values, bootstrap_intervals(list(values.values())), strict=True))
    return {"queries": len(next(iter(values.values()))), "mean": {name: one.mean for name, one in intervals.items()},
            "intervals": {name: [one.low, one.high] for name, one in intervals.items()}}


def numbers_of(result: RankingResult, groups: Mapping[str, str]) -> dict:
    """A model over all queries, and over those of each group."""
    numbers = summary(result.values)
    if groups:
        numbers["groups"] = {group: summary(values) for group, values in group_values(result, groups).items()}
    return numbers


def report(config: Config, results: dict[str, RankingResult], groups: dict[str, str]) -> dict[str, dict]:
    """Prints what was found; returns the numbers."""
    numbers = {name: numbers_of(result, groups) for name, result in results.items()}
    print("| model | " + " | ".join(config.measures) + " |\n| --- |" + " --- |" * len(config.measures))
    for name, own in numbers.items():
        print(f"| {name} | " + " | ".join(f"{own['mean'][key]:.4f}" for key in config.measures) + " |")
    lead = config.measures[0]
    for name, own in numbers.items():
        low, high = own["intervals"][lead]
        print(f"{lead} of {name}: {own['mean'][lead]:.4f}, 95 % from {low:.4f} to {high:.4f}, {own['queries']} queries")
        for group, part in own.get("groups", {}).items():
            print(f"  {group}: " + "  ".join(f"{key} {value:.4f}" for key, value in part["mean"].items()))
    for line in compare(results, lead):
        print(line)
    return numbers


def evaluate_on_mteb(config: Config) -> None:
    """The main score of every model in every task, by mteb."""
    mesh, scores = make_mesh(config.mesh), {}
    tasks = mteb_tasks(config.mteb)
    for name in config.models:
        towers = load_towers(towers_of(config, name), mesh)
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


def keep_queries(path: Path, results: dict[str, RankingResult], groups: Mapping[str, str]) -> None:
    """The values of each query by each model, a line of JSON for both."""
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for name, result in results.items():
            for row, query in enumerate(result.queries):
                about = {"model": name, "query": query} | ({"group": groups[query]} if groups else {})
                values = {measure: float(own[row]) for measure, own in result.values.items()}
                file.write(json.dumps(about | values) + "\n")


def measured(config: Config, name: str, data: BeirSet) -> RankingResult:
    """Ranks by one model, keeps its run, and measures it."""
    run = run_of(config, name, data)
    longest, deepest = max(map(len, run.values()), default=0), max(measure_of(one)[1] for one in config.measures)
    if Path(name).is_file() and longest < min(deepest, len(data.corpus)):
        log.warning("%s has %d documents of a query at most; measures that look further count none after them", name,
                    longest)
    if config.output:
        write_run(config.output / f"{config.models.index(name)}_{short(name)}.trec", run, short(name))
    result = evaluate_run(run, data.qrels, config.measures, ignore_identical_ids=config.ignore_identical_ids)
    log.info("%s: %s", name, "  ".join(f"{key} {value:.4f}" for key, value in means(result).items()))
    return result


def evaluate(config: Config) -> None:
    """Ranks, measures, compares, keeps."""
    check(config)
    if config.mteb:
        return evaluate_on_mteb(config)
    data = read_beir(*split_of(config.data, "test"))
    groups = groups_of(config, data) if config.group else {}
    if len(config.models) > 1 and len(data.qrels) < 2:
        raise ValueError(f"{config.data}: models are compared on at least 2 judged queries, and there is one")
    if config.ignore_identical_ids and not data.queries.keys() & data.corpus.keys():
        log.warning("%s: no query has the id of a document, so --ignore-identical-ids has no effect", config.data)
    if config.output:
        for kind, ids in (("query", data.queries), ("document", data.corpus)):
            check_trec_names(config.data, kind, ids)
        config.output.mkdir(parents=True, exist_ok=True)
    # What is wrong with a run file or BM25 is found before anything is encoded.
    found = {name: measured(config, name, data) for name in sorted(config.models, key=is_encoder)}
    results = {name: found[name] for name in config.models}
    numbers = report(config, results, groups)
    if config.output:
        keep_queries(config.output / "per_query.jsonl", results, groups)
        keep(config.output / "measures.json", numbers)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(evaluate, {"default": Config()}, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
