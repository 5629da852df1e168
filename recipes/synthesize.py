"""Synthetic text: seed documents rewritten, translated, told as a textbook or asked about, by several generators.

    python -m recipes.synthesize                                        embedded seeds, two tiny random models, seconds
    python -m recipes.synthesize --preset kormo --seeds web.jsonl.gz --count 10000 \\
        --generators a=runs/teacher b=http://host:8000/v1#Qwen3-30B-A3B --styles rewrite=0.5 textbook=0.5
    python -m recipes.synthesize --preset kormo --seeds proofs.jsonl --generators b=http://host:8000/v1#M \\
        --quotas b:reasoning-translate=500 --served.key-variable MY_KEY --output translated.jsonl
    python -m recipes.pretrain --data.path synthetic.jsonl
    python -m recipes.sft --data.path "synthetic.jsonl?include=style:instruction"

After KORMo's synthetic corpora (arXiv 2510.09426): its proxies collapse on the text of one generator and are stable on
that of two or three in several styles. A generator is a run folder, a Hugging Face folder, a .gguf file, a server with
the OpenAI interface, or `preset:NAME`, a random model of bytes to try the pipeline. Each generator writes its share of
each style exactly; a seed is asked for a style by a generator once at most. What rules on the text refuse is counted
and left out (`jaxlm.curate.translation_filter`); translated reasoning must keep the answer in its box, and what has
none is shown to the `--judge`, if there is one.

Attempts are kept in OUTPUT.attempts.jsonl as they come, refused ones too. A run that was killed goes on there, and asks
again for what a server failed to give. Left out: KORMo's prompts and limits, which are not published.
"""

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.curate.translation_filter import FilterConfig, first_failure, judge_prompt, read_verdict, same_answer
from jaxlm.data.prompt_styles import (
    Language,
    Style,
    Wanted,
    assign,
    fill,
    load_styles,
    parse_quotas,
    parse_shares,
    quotas,
    read_turns,
)
from jaxlm.data.rows import Document
from jaxlm.data.sources import MIXED, open_source, parse_source
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.generate.engine import Engine, EngineConfig, serve
from jaxlm.generate.prompts import Prompt, Reader, make_asks
from jaxlm.generate.results import Pace, Results
from jaxlm.generate.served import Reply, ServedConfig, Server, ask_all, check_served
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build
from jaxlm.model.presets import MODELS
from jaxlm.reward.math_answer import check_math_verify
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained

PROG = "recipes.synthesize"
RANDOM = "preset:"
RANDOM_POSITIONS = 4096  # of a random model: prompts in bytes are long
CHUNK = 1024             # prompts that are made at a time
GIVE_UP = 20             # failures in a row after which a server is taken for dead
VERDICT = SamplingConfig(max_new_tokens=256)  # room for the thoughts of a model that shows them
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Who writes what of which seeds."""

    generators: tuple[str, ...] = ()         # NAME=FOLDER, NAME=file.gguf, NAME=http://HOST:PORT/v1#MODEL
    generator_shares: tuple[str, ...] = ()   # NAME=SHARE; default: all equal
    styles: tuple[str, ...] = ("rewrite", "textbook", "instruction")  # NAME or NAME=SHARE
    quotas: tuple[str, ...] = ()             # GENERATOR:STYLE=COUNT, in place of shares and count
    style_file: Path | None = None           # further templates, see jaxlm.data.prompt_styles.load_styles
    seeds: tuple[str, ...] = ("sample:en?documents=64",)  # sources, see README, "Data"
    max_bad_rows: int = 0                    # rows of one source that may be unreadable
    count: int | None = None                 # texts in all; default: one of each seed
    language: Language = "ko"                # of the texts
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(max_new_tokens=1024, temperature=0.7, top_p=0.95))
    served: ServedConfig = field(default_factory=ServedConfig)
    filters: Literal["all", "none"] = "all"  # none: keep whatever was written
    filter: FilterConfig = field(default_factory=FilterConfig)
    answers: Literal["numeric", "math"] = "numeric"  # how boxed answers are compared; math needs jaxlm[rl]
    judge: str = ""                          # the generator that judges translations without a boxed answer
    batch_size: int = 8                      # texts that a local model writes together
    dtype: Literal["float32", "bfloat16"] = "float32"  # of local models
    seed: int = 42
    output: Path = Path("synthetic.jsonl")
    overwrite: bool = False

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.output.suffix != ".jsonl", f"output {self.output} must end in .jsonl"),
            (self.batch_size < 1, f"batch_size must be positive, got {self.batch_size}"),
            (self.count is not None and self.count < 1, f"count must be at least 1, got {self.count}"),
            (self.quotas and self.count is not None, "quotas and count both say how many texts; give one of them"),
            (self.quotas and self.generator_shares, "generator_shares has no effect on quotas"),
            (self.judge and self.filters == "none", "judge has no effect with filters none"),
        ):
            if wrong:
                raise ValueError(message)


PRESETS = {
    "smoke": Config(generators=("first=preset:tiny", "second=preset:tiny"), filters="none",
                    seeds=("sample:en?documents=12",), sampling=SamplingConfig(max_new_tokens=32, temperature=1.0)),
    "kormo": Config(),
}


class Local(NamedTuple):
    """A generator on this machine; weights are read when its turn comes."""

    spec: str
    opened: Pretrained
    reader: Reader


class Work(NamedTuple):
    """All that is to be done, checked."""

    seeds: list[tuple[str, Document]]  # by id
    styles: Mapping[str, Style]
    generators: Mapping[str, Local | Server]
    wanted: list[Wanted]


def open_generator(name: str, spec: str, config: Config) -> Local | Server:
    """A generator without its weights; ValueError if it cannot be what it says."""
    try:
        if spec.startswith(("http://", "https://")):
            url, _, model = spec.partition("#")
            check_served(config.served, config.sampling)
            return Server(url, model, config.served)
        if spec.startswith(RANDOM):
            preset = spec.removeprefix(RANDOM)
            if preset not in MODELS:
                raise ValueError(f"no preset {preset!r}{flags.nearest(preset, MODELS)}")
            tokenizer = ByteTokenizer()
            model = replace(MODELS[preset], vocab_size=tokenizer.vocab_size, max_positions=RANDOM_POSITIONS)
            opened = Pretrained(model, None, tokenizer, (tokenizer.bos_id,))
        else:
            opened = open_pretrained(spec)
        if opened.tokenizer is None:
            raise ValueError(f"{spec} has no tokenizer")
        return Local(spec, opened, Reader(opened.tokenizer, opened.start, opened.chat, chat=opened.chat is not None))
    except ValueError as error:
        raise ValueError(f"generator {name}: {error}") from None


def plan(config: Config) -> Work:
    """Reads seeds and templates, opens generators, and says who writes what. ValueError for all that is wrong."""
    specs: dict[str, str] = {}
    for one in config.generators:
        name, _, spec = one.partition("=")
        if not name or not spec or ":" in name or name in specs:
            raise ValueError(f"generator {one!r}: write NAME=WHERE, each name once and without a colon")
        specs[name] = spec
    if not specs:
        raise ValueError("name --generators: NAME=FOLDER or NAME=http://HOST:PORT/v1#MODEL")
    if config.judge and config.judge not in specs:
        raise ValueError(f"judge {config.judge!r} is none of the generators{flags.nearest(config.judge, specs)}")
    styles, seeds = load_styles(config.style_file), read_seeds(config)
    if config.quotas:
        cells = parse_quotas(config.quotas, specs, styles)
    else:
        shares = parse_shares(config.generator_shares or tuple(specs), specs, "generator")
        cells = quotas(shares, parse_shares(config.styles, styles, "style"), config.count or len(seeds))
    wanted = assign(cells, len(seeds), config.seed)
    for one in wanted:
        style, (seed_id, document) = styles[one.style], seeds[one.seed]
        if config.language not in style.templates:
            raise ValueError(f"style {one.style} has no template for language {config.language!r}")
        if style.translates and document.language == config.language:
            raise ValueError(f"style {one.style} translates to {config.language!r}, and seed {seed_id} is in this "
                             "language already; take other seeds, another language or another style")
    if config.answers == "math" and any(styles[one.style].translates for one in wanted):
        check_math_verify()
    used = {one.generator for one in wanted} | {config.judge} - {""}
    if idle := [name for name in specs if name not in used]:
        raise ValueError(f"generator {idle[0]} writes nothing: give it a share or a quota, or leave it out")
    return Work(seeds, styles, {name: open_generator(name, specs[name], config) for name in specs}, wanted)


def read_seeds(config: Config) -> list[tuple[str, Document]]:
    """The documents of all sources with an id each, `NAME:INDEX`."""
    found: list[tuple[str, Document]] = []
    names: set[str] = set()
    for spec in config.seeds:
        source = open_source(parse_source(spec, unread=MIXED), max_bad_rows=config.max_bad_rows)
        if source.name in names:
            raise ValueError(f"seeds: two sources are called {source.name}; give one another name by ?name=")
        names.add(source.name)
        found += [(f"{source.name}:{i}", one) for i in range(len(source)) if (one := source[i]) is not None]
    if not found:
        raise ValueError("seeds: name at least one source with documents")
    return found


class Writer:
    """A generator at work: prompts to replies, each as it is ready."""

    def __init__(self, name: str, generator: Local | Server, config: Config) -> None:
        self._generator = generator
        if isinstance(generator, Server):
            return
        model = build(generator.opened.config, ComputeConfig(dtype=config.dtype))
        if generator.spec.startswith(RANDOM):
            params = jax.jit(model.init)(jax.random.key(zlib.crc32(f"{config.seed} {name}".encode())))
        else:
            params = load_weights(generator.spec, generator.opened, dtype=config.dtype).params
        tokenizer = generator.opened.tokenizer
        self._engine = Engine(model=model, params=jax.tree.map(jnp.asarray, params), eos_id=tokenizer.eos_id,
                              tokenizer=tokenizer, config=EngineConfig(batch_size=config.batch_size))

    def __call__(self, prompts: Sequence[str], sampling: Sequence[SamplingConfig]) -> Iterator[tuple[int, Reply]]:
        """The number of each prompt and its reply."""
        if isinstance(self._generator, Server):
            yield from ask_all(self._generator, prompts, sampling)
            return
        asks, numbers = [], []
        positions = self._engine.model.config.max_positions
        for number, (prompt, one) in enumerate(zip(prompts, sampling, strict=True)):
            [made] = make_asks(self._generator.reader, [Prompt(prompt)], one)
            if len(made.ids) + one.max_new_tokens > positions:
                yield number, Reply("", "", 0, 0, f"the prompt has {len(made.ids)} tokens: with "
                                    f"{one.max_new_tokens} to write more than the {positions} positions of the model")
                continue
            asks.append(made)
            numbers.append(number)
        for one in serve(self._engine, [one.ids for one in asks], [one.sampling for one in asks]):
            finish = "length" if one.reason == "length" else "stop"
            yield numbers[one.prompt], Reply(one.text, finish, len(one.tokens), 1)


def sampling_of(config: Config, seed_id: str, one: Wanted) -> SamplingConfig:
    """The settings of a text, with a seed of its own where it is sampled."""
    if config.sampling.temperature == 0:
        return config.sampling
    own = zlib.crc32(f"{config.seed} {config.sampling.seed} {seed_id} {one.generator} {one.style}".encode())
    return replace(config.sampling, seed=own)


def judge_text(config: Config, style: Style, seed: Document, reply: Reply) -> tuple[str, str]:
    """The outcome of a text, and why: kept, filtered by a rule, or left to the judge."""
    if config.filters == "none":
        return "kept", ""
    if reply.finish == "length":
        return "filtered:unfinished", f"it was not at its end after {reply.tokens} tokens"
    if style.asks and read_turns(reply.text, config.language) is None:
        return "filtered:turns", "question and answer are not marked as asked"
    failed = first_failure(seed.text, reply.text, config.language, config.filter, translation=style.translates)
    if failed:
        return f"filtered:{failed[0]}", failed[1]
    if style.translates:
        same = same_answer(seed.text, reply.text, symbolic=config.answers == "math")
        if same is False:
            return "filtered:answer", "the boxed answer is another"
        if same is None and config.judge:
            return "open", ""
    return "kept", ""


def make_record(config: Config, work: Work, one: Wanted, prompt: str, reply: Reply) -> dict[str, Any]:
    """What is kept of an attempt: its outcome, and the row with where it comes from."""
    seed_id, seed = work.seeds[one.seed]
    key = {"seed_id": seed_id, "generator": one.generator, "style": one.style}
    if reply.error:
        return key | {"outcome": "failed", "reason": reply.error, "attempts": reply.attempts}
    outcome, reason = judge_text(config, work.styles[one.style], seed, reply)
    generator = work.generators[one.generator]
    served = isinstance(generator, Server)
    row = {"text": reply.text.strip(), **key, "model": generator.model if served else generator.spec,
           "language": config.language, "seed_source": seed.source, "seed_language": seed.language, "prompt": prompt,
           "sampling": flags.to_json(sampling_of(config, seed_id, one)), "finish": reply.finish,
           "tokens": reply.tokens, "attempts": reply.attempts}
    turns = read_turns(reply.text, config.language) if work.styles[one.style].asks else None
    return key | {"outcome": outcome, "reason": reason, "row": row | ({"messages": turns} if turns else {})}


def write_all(config: Config, work: Work, results: Results, records: dict[Wanted, dict[str, Any]]) -> None:
    """Generator by generator, what is missing; then what is left to the judge."""
    missing = [one for one in work.wanted if records.get(one, {"outcome": "failed"})["outcome"] == "failed"]
    log.info("%d of %d texts are there already", len(work.wanted) - len(missing), len(work.wanted))
    pace = Pace(len(work.wanted), len(work.wanted) - len(missing))
    try:
        for name, generator in work.generators.items():
            own = [one for one in missing if one.generator == name]
            if own:
                _write(config, work, own, Writer(name, generator, config), results, records, pace)
    finally:
        pace.close()
    left = [one for one in work.wanted if records[one]["outcome"] == "open"]
    if left:
        _judge(config, work, left, results, records)


def _write(config, work, own, writer: Writer, results: Results, records, pace: Pace) -> None:
    failures = 0
    for start in range(0, len(own), CHUNK):
        chunk = own[start:start + CHUNK]
        prompts = [fill(work.styles[one.style].templates[config.language], work.seeds[one.seed][1].text)
                   for one in chunk]
        settings = [sampling_of(config, work.seeds[one.seed][0], one) for one in chunk]
        for number, reply in writer(prompts, settings):
            one = chunk[number]
            records[one] = make_record(config, work, one, prompts[number], reply)
            results.append(records[one])
            pace.done(reply.tokens)
            failures = failures + 1 if reply.error and reply.attempts else 0
            if failures == GIVE_UP:
                raise ValueError(f"generator {one.generator} failed {GIVE_UP} times in a row, the last time: "
                                 f"{reply.error}; the same command goes on when it is well again")


def _judge(config: Config, work: Work, left: Sequence[Wanted], results: Results, records) -> None:
    """Asks the judge about the texts that are left; without a verdict a text is refused."""
    writer = Writer(config.judge, work.generators[config.judge], config)
    prompts = [judge_prompt(work.seeds[one.seed][1].text, records[one]["row"]["text"]) for one in left]
    for number, reply in writer(prompts, [VERDICT] * len(left)):
        verdict = None if reply.error else read_verdict(reply.text)
        outcome = "kept" if verdict else "filtered:judge" if verdict is False else "filtered:no_verdict"
        reason = reply.error or ("" if verdict else f"the judge wrote {reply.text[:60]!r}")
        if reply.error:  # stays open: the next run asks again
            outcome = "open"
        records[left[number]] = records[left[number]] | {"outcome": outcome, "reason": reason}
        results.append(records[left[number]])


def settings_of(config: Config, work: Work) -> dict[str, Any]:
    """What decides the records. Paths of generators by name: the weights behind them are the caller's word."""
    digest = lambda value: hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
    plain = {name: value for name, value in flags.to_json(config).items()
             if name not in ("output", "overwrite", "served", "batch_size", "style_file", "max_bad_rows")}
    return plain | {"templates": digest({name: one.templates for name, one in work.styles.items()}),
                    "documents": digest([(seed_id, one.text) for seed_id, one in work.seeds])}


def report_of(work: Work, records: Mapping[Wanted, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each generator and style: how many texts had which outcome."""
    cells: dict[tuple[str, str], Counter] = {}
    for one in work.wanted:
        cells.setdefault((one.generator, one.style), Counter())[records[one]["outcome"]] += 1
    return [{"generator": generator, "style": style, "wanted": counts.total(), **dict(sorted(counts.items()))}
            for (generator, style), counts in cells.items()]


def run(config: Config) -> None:
    """Checks everything, writes what is missing, and puts what is kept into the output."""
    work = plan(config)
    attempts = config.output.with_suffix(".attempts.jsonl")
    if config.output.exists() and not attempts.exists() and not config.overwrite:
        raise ValueError(f"{config.output} exists; --overwrite replaces it")
    if config.output in [Path(parse_source(spec).path) for spec in config.seeds]:
        raise ValueError(f"--output {config.output} is read as seeds; name another")
    if config.filters == "none":
        log.warning("filters none: whatever was written is kept")
    results = Results(attempts, settings_of(config, work), overwrite=config.overwrite)
    numbers = {seed_id: i for i, (seed_id, _) in enumerate(work.seeds)}
    records = {Wanted(numbers[one["seed_id"]], one["generator"], one["style"]): one for one in results.records}
    try:
        write_all(config, work, results, records)
    finally:
        results.close()
    kept = [records[one]["row"] for one in work.wanted if records[one]["outcome"] == "kept"]
    report = report_of(work, records)
    for path, content in (
            (config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)),
            (config.output.with_suffix(".report.json"), json.dumps(report, ensure_ascii=False, indent=2) + "\n")):
        with replacing(path) as scratch:
            scratch.write_text(content, encoding="utf-8")
    for cell in report:
        outcomes = ", ".join(f"{name} {count}" for name, count in list(cell.items())[3:])
        log.info("%s, %s: %d asked for, %s", cell["generator"], cell["style"], cell["wanted"], outcomes)
    failed = [records[one] for one in work.wanted if records[one]["outcome"] in ("failed", "open")]
    for one in failed[:5]:
        log.warning("%s, %s, seed %s: %s", one["generator"], one["style"], one["seed_id"], one["reason"])
    log.info("%d of %d texts kept in %s%s", len(kept), len(work.wanted), config.output,
             f"; {len(failed)} failed, for which the same command asks again" if failed else "")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
