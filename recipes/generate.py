"""Let a model write: one prompt, a file of prompts, or a conversation; sampled or greedy, plain or speculative.

    python -m recipes.generate --source runs/demo --prompt "The currency of Japan is"       streamed as it comes
    python -m recipes.generate --source model.gguf --chat --sampling.max-new-tokens 256     a conversation
    python -m recipes.generate --source M --file prompts.jsonl --output out.jsonl --batch-size 32
    python -m recipes.generate --source M --drafting rest --corpus-database c.safetensors   see recipes.draft_database

Prompts: `--prompt`; `--file`, a prompt a line, or JSONL with `prompt` or `messages` and perhaps `id` and settings such
as `temperature`; else standard input. With `--output` each line holds one text, and a run that was killed goes on where
it stopped. Sample s of prompt p draws with seed `sampling.seed + p * num_samples + s`, so batches do not matter.

Where the template has tags of thinking, `</think>` stands between reasoning and answer, and lines of the output hold
them apart, in `reasoning` and `text`; `--thinking on|off` asks for reasoning or for none.

`--drafting` guesses tokens and verifies several in one forward pass: `pld` (Saxena 2023), `lookahead` (arXiv
2402.02057), `rest` (2311.08252), `recycling` (2408.08696), `hierarchy` (2502.05609), or a small model with
`--draft-source`. It changes the speed and not the text, up to rounding. SmolLM2-135M on 2 cores writes 17 to 24
tokens/s alone and 115 in a batch of 8; what guesses gain is in docs/results.md. Left out: several devices.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.data.thinking import Thought
from jaxlm.generate.console import converse, show, typed
from jaxlm.generate.costs import step_costs
from jaxlm.generate.databases import load_database
from jaxlm.generate.draft import DraftConfig
from jaxlm.generate.draft_sources import Databases
from jaxlm.generate.engine import Engine, EngineConfig, serve
from jaxlm.generate.methods import METHODS, adapted, missing_database
from jaxlm.generate.prompts import Ask, Prompt, Reader, make_asks, read_lines, read_prompts
from jaxlm.generate.requests import Completion, Report
from jaxlm.generate.results import Pace, Results, check_settings, weights_mark
from jaxlm.generate.settings import SamplingConfig
from jaxlm.generate.speculative import Guessing, Sources
from jaxlm.model.cache import CacheDtype
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build, unstack
from jaxlm.model.quantize import quantize_leaf
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained

PROG = "recipes.generate"
WIDTHS = (0, 4, 8, 16, 28, 40)  # guesses a step may verify, below all of a method
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is written, and how."""

    source: Path = Path("runs/demo")     # a run folder, a Hugging Face folder or a .gguf file
    prompt: str | None = None
    file: Path | None = None             # a prompt a line, or .jsonl
    chat: bool = False                   # prompts are what a user says, by the chat template of the model
    system: str = ""                     # the system message of a chat
    thinking: Literal["", "on", "off"] = ""  # ask for reasoning before answers, or for none; empty: as the template is
    output: Path | None = None           # .jsonl, a line a text
    logprobs: bool = False               # output: with token ids, their log-probabilities, and the mass kept
    overwrite: bool = False              # replace an output of other settings
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_samples: int = 1                 # texts for each prompt
    batch_size: int = 8                  # texts written together
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations
    cache_dtype: CacheDtype = "float32"
    quantize: bool = False               # weights in int8
    unstack: bool = False                # layers compiled one by one: faster single tokens on CPU, slower start
    drafting: str = "none"               # see jaxlm.generate.methods
    model_database: Path | None = None   # for hierarchy
    corpus_database: Path | None = None  # for hierarchy and rest
    draft_source: Path | None = None     # a small model with the same tokenizer that guesses
    fixed_width: bool = False            # drafting: verify all guesses always; do not measure first what pays here

    def __post_init__(self) -> None:
        if self.drafting not in METHODS:
            raise ValueError(f"drafting {self.drafting} is unknown{flags.nearest(self.drafting, METHODS)}; methods: "
                             f"{', '.join(METHODS)}")
        for wrong, message in (
            (self.prompt is not None and self.file, "prompt and file both say what to continue; give one of them"),
            (self.prompt is not None and not self.prompt.strip(), "prompt is empty"),
            (self.system and not self.chat, "system has no effect without chat"),
            (self.thinking and not self.chat, "thinking has no effect without chat"),
            (self.output and self.output.suffix != ".jsonl", f"output {self.output} must end in .jsonl"),
            (self.logprobs and not self.output, "logprobs has no effect without output"),
            (self.overwrite and not self.output, "overwrite has no effect without output"),
            (min(self.num_samples, self.batch_size) < 1, "num_samples and batch_size must be positive"),
            (self.draft_source and self.drafting != "none", "draft_source and drafting both say who guesses; give one"),
            (self.fixed_width and self.drafting == "none", "fixed_width has no effect without drafting"),
        ):
            if wrong:
                raise ValueError(message)


PRESETS = {"default": Config()}


def read_asked(config: Config) -> list[Prompt]:
    """The prompts that flags, a file or standard input name."""
    if config.prompt is not None:
        return [Prompt(config.prompt, where="--prompt")]
    if config.file is None:
        return read_lines(sys.stdin, "standard input")
    if config.file.suffix == ".jsonl":
        return read_prompts(config.file)
    with config.file.open(encoding="utf-8-sig") as lines:
        return read_lines(lines, str(config.file))


def open_databases(config: Config, opened: Pretrained) -> Databases:
    """The databases that the flags name; ValueError if one is of another tokenizer, useless or missing."""
    guessing, mark = METHODS[config.drafting], opened.tokenizer.fingerprint()
    for name in ("model", "corpus"):
        if getattr(config, f"{name}_database") and not (guessing and name in guessing.draft.order):
            users = ", ".join(method for method, one in METHODS.items() if one and name in one.draft.order)
            raise ValueError(f"--{name}-database has no effect on --drafting {config.drafting}; it is for {users}")
    databases = Databases(
        model=config.model_database and load_database(config.model_database, mark, "model_table"),
        corpus=config.corpus_database and load_database(config.corpus_database, mark, "corpus"))
    if guessing and (name := missing_database(guessing, databases)):
        raise ValueError(f"--drafting {config.drafting} needs --{name}-database; recipes.draft_database --kind {name} "
                         "builds one")
    return databases


def open_draft(config: Config, opened: Pretrained) -> Pretrained | None:
    """The small model of `draft_source`, without its weights."""
    if config.draft_source is None:
        return None
    try:
        small = open_pretrained(config.draft_source)
    except ValueError as error:
        raise ValueError(f"--draft-source: {error}") from None
    if small.tokenizer is None or small.tokenizer.fingerprint() != opened.tokenizer.fingerprint():
        raise ValueError(f"--draft-source {config.draft_source} has another tokenizer than {config.source}, so its "
                         "guesses would be other texts")
    return small


def make_engine(config: Config, opened: Pretrained, databases: Databases, small: Pretrained | None,
                rows: int) -> Engine:
    """Weights on the device, and how to guess. `rows`: texts at a time, for the cost of a step."""
    compute = ComputeConfig(dtype=config.dtype)
    loaded = load_weights(config.source, opened, dtype="float32" if config.quantize else config.dtype,
                          put=quantize_leaf if config.quantize else None)
    arrange = unstack if config.unstack else lambda params: params
    model, params = build(opened.config, compute), arrange(jax.tree.map(jnp.asarray, loaded.params))
    guessing, sources = METHODS[config.drafting], Sources(jax.tree.map(jnp.asarray, databases))
    if small is not None:
        weights = load_weights(config.draft_source, small, dtype=config.dtype).params
        guessing = Guessing(model=build(small.config, compute), draft=DraftConfig(order=("context",)))
        sources = Sources(params=arrange(jax.tree.map(jnp.asarray, weights)))
    elif guessing and not config.fixed_width and not guessing.window:
        nodes = guessing.draft.num_nodes
        widths = (*(width for width in WIDTHS if width < nodes), nodes)
        log.info("measuring what a step costs here (--fixed-width: not)")
        costs = step_costs(model, params, widths, batch=rows, slots=max(512, 8 * (nodes + 1)), rounds=3,
                           cache_dtype=config.cache_dtype)
        guessing = adapted(guessing, widths, costs)
        log.info("%s", ", ".join(f"{cost / costs[0]:.2f} with {width} guesses"
                                 for width, cost in zip(widths, costs, strict=True)))
    return Engine(model=model, params=params, eos_id=opened.tokenizer.eos_id, tokenizer=opened.tokenizer,
                  guessing=guessing, sources=sources,
                  config=EngineConfig(batch_size=config.batch_size, cache_dtype=config.cache_dtype))


def check_asks(opened: Pretrained, asks: Sequence[Ask]) -> None:
    """What the engine would refuse, before any weights are read."""
    idle = Engine(model=build(opened.config), params=None, eos_id=opened.tokenizer.eos_id, tokenizer=opened.tokenizer)
    serve(idle, [ask.ids for ask in asks], [ask.sampling for ask in asks])  # runs when it is iterated over


def settings_of(config: Config, opened: Pretrained, asks: Sequence[Ask]) -> dict[str, Any]:
    """What decides the lines of an output, by the names of the flags."""
    prompts = json.dumps([(ask.number, ask.sample, ask.prompt.id, ask.ids, flags.to_json(ask.sampling))
                          for ask in asks])
    return {  # the prompts last: they change with the settings, whose names say more
        "tokenizer": opened.tokenizer.fingerprint()[:16],
        **{name: getattr(config, name) for name in ("num_samples", "logprobs", "dtype", "cache_dtype", "quantize")},
        **{f"sampling.{name}": value for name, value in flags.to_json(config.sampling).items()},
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]}


def line_of(ask: Ask, one: Completion, logprobs: bool, reader: Reader) -> dict[str, Any]:
    """A line of the output."""
    named = {} if ask.prompt.id is None else {"id": ask.prompt.id}
    reasoning, text = reader.parts(one.text) if reader.chat or ask.prompt.messages else Thought(None, one.text)
    named |= {} if reasoning is None else {"reasoning": reasoning}
    more = {"tokens": one.tokens, "logprobs": one.logprobs, "kept": one.kept} if logprobs else {}
    return named | {"prompt": ask.number, "sample": ask.sample, "text": text, "num_tokens": len(one.tokens),
                    "reason": one.reason, "steps": one.steps, "accepted": one.accepted} | more


def write(config: Config, engine: Engine, asks: Sequence[Ask], settings: Mapping[str, Any], report: Report,
          reader: Reader) -> None:
    """Fills the output with the texts that it lacks."""
    mark = {"weights": weights_mark(engine.params), "unstack": config.unstack}  # which names the weights anew
    results = Results(config.output, {**settings, **mark}, overwrite=config.overwrite)
    there = {(record["prompt"], record["sample"]) for record in results.records}
    missing = [ask for ask in asks if (ask.number, ask.sample) not in there]
    if there:
        log.info("%d of %d texts are in %s already", len(asks) - len(missing), len(asks), config.output)
    pace = Pace(len(asks), len(asks) - len(missing))
    try:
        for one in serve(engine, [ask.ids for ask in missing], [ask.sampling for ask in missing], report=report):
            results.append(line_of(missing[one.prompt], one, config.logprobs, reader))
            pace.done(len(one.tokens), one.steps)
    finally:
        pace.close()
        results.close()


def run(config: Config) -> None:
    """Checks everything, loads, writes."""
    opened, live = open_pretrained(config.source), config.prompt is None and config.file is None and sys.stdin.isatty()
    if opened.tokenizer is None:
        raise ValueError(f"--source {config.source} has no tokenizer")
    if live and (config.output or config.num_samples > 1):
        raise ValueError("output and num_samples have no effect on what is typed: give --prompt, --file or a file as "
                         "standard input")
    reader = Reader(opened.tokenizer, opened.start, opened.chat, config.chat, config.system,
                    {"": None, "on": True, "off": False}[config.thinking])
    if config.chat:
        reader.chat_template()
    asks = make_asks(reader, [Prompt("a")] if live else read_asked(config), config.sampling, config.num_samples)
    check_asks(opened, asks)
    if opened.chat is None and (config.chat or any(ask.prompt.messages for ask in asks)):
        log.warning("%s brings no chat template: ChatML is used", config.source)
    settings = settings_of(config, opened, asks)
    if config.output and not config.overwrite:
        check_settings(config.output, settings)
    databases, small = open_databases(config, opened), open_draft(config, opened)
    engine = make_engine(config, opened, databases, small, min(config.batch_size, len(asks)))
    report = Report()
    if live:
        converse(engine, reader, config.sampling, typed(), report)
    elif config.output:
        write(config, engine, asks, settings, report, reader)
    else:
        show(engine, asks, report)
    if report.tokens:
        log.info("%s", report.line())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(run, PRESETS, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
