"""Build a token database for speculative decoding: what a model often says, or a corpus with its suffix array.

Reproduces the databases of Hierarchy Drafting (arXiv 2502.05609): Dm counts in how many of the model's own greedy
answers a 5-gram stands and keeps the 100,000 most common, seven continuations a token; Ds is REST's datastore (arXiv
2311.08252).

    python -m recipes.draft_database --source M --chat --data prompts.jsonl --target m.safetensors
    python -m recipes.draft_database --source M --kind corpus --data docs.jsonl.gz --target c.safetensors
    python -m recipes.generate --source M --drafting hierarchy --model-database m.safetensors ...

Prompts come from sources (`PATH?text_field=question`, as in recipes.pretrain) or from JSONL with strings or messages.
The answers are kept beside a model database in NAME.texts.jsonl as they come: a run that was killed goes on there, and
with all of them written the database is built again in seconds. SmolLM2-135M answers 219 prompts with 38.5 k tokens in
26 minutes on 2 cores that also ran tests; a corpus of 9.25 M tokens takes 53 s and 74 MB. Left out: sampled answers; a
corpus beyond memory.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.command import run_command
from jaxlm.data.sources import MIXED, find_files, open_source, parse_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.databases import build_corpus, build_model_table, save_database
from jaxlm.generate.engine import Engine, EngineConfig, serve
from jaxlm.generate.prompts import Prompt, Reader, read_prompts
from jaxlm.generate.requests import Report
from jaxlm.generate.results import Pace, Results, check_settings, weights_mark
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained

PROG = "recipes.draft_database"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One database."""

    source: Path = Path("runs/demo")          # a run folder, a Hugging Face folder or a .gguf file
    data: tuple[str, ...] = ("sample:both",)  # prompts of the model, or documents of the corpus
    target: Path = Path("draft.safetensors")
    kind: Literal["model", "corpus"] = "model"
    chat: bool = False                        # model: ask with the chat template
    max_new_tokens: int = 256                 # model: of an answer
    batch_size: int = 8                       # model: answers written together
    dtype: Literal["float32", "bfloat16"] = "float32"  # model: of weights and activations
    max_prompts: int | None = None            # model: the first ones that are not too long
    max_prompt_tokens: int = 512              # model: longer prompts are left out, and counted
    max_tokens: int | None = None             # corpus: the first ones
    overwrite: bool = False                   # replace the database; answers stay if they are of the same settings

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "max_prompts", "max_prompt_tokens", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        other = {"model": ("max_tokens",), "corpus": ("chat", "max_new_tokens", "batch_size", "dtype", "max_prompts",
                                                      "max_prompt_tokens")}[self.kind]
        for name in other:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no effect on a database of kind {self.kind}: leave it out")
        if not self.data:
            raise ValueError("data needs at least one source")


PRESETS = {"demo": Config()}


def prompts_of(spec: str) -> Iterator[Prompt]:
    """Prompts of a source, or of a JSONL file whose first row is a string or has `prompt` or `messages`."""
    if spec.endswith(".jsonl"):
        for path in find_files(spec):
            with path.open("rb") as file:
                first = next((line for line in file if line.strip()), b"")
            row = json.loads(first) if first[:1] in (b'"', b"{") else None
            if not isinstance(row, str) and not (isinstance(row, Mapping) and {"prompt", "messages"} & {*row}):
                break
        else:
            for path in find_files(spec):
                yield from read_prompts(path)
            return
    for number, document in enumerate(open_source(parse_source(spec, unread=MIXED))):
        if document is not None:
            yield Prompt(document.text, where=f"{spec}, document {number}")


def chosen_prompts(config: Config, opened: Pretrained) -> dict[str, tuple[Prompt, list[int]]]:
    """The prompts to answer by a hash of their ids, each once, in order."""
    reader = Reader(opened.tokenizer, opened.start, opened.chat, config.chat)
    longest = min(opened.config.max_positions - config.max_new_tokens, config.max_prompt_tokens)
    chosen, long, again = {}, 0, 0
    if longest < 1:
        raise ValueError(f"max_new_tokens {config.max_new_tokens} leave no room for a prompt within the model's "
                         f"{opened.config.max_positions} positions")
    for prompt in (prompt for spec in config.data for prompt in prompts_of(spec)):
        if len(chosen) == config.max_prompts:
            break
        ids = reader.ids(prompt)
        key = hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16]
        if len(ids) > longest:
            long += 1
        elif key in chosen:
            again += 1
        else:
            chosen[key] = prompt, ids
    log.info("%d prompts; left out: %d of more than %d tokens, %d that came before", len(chosen), long, longest, again)
    if not chosen:
        raise ValueError(f"no prompt of at most {longest} tokens in {', '.join(config.data)}")
    return chosen


def answers(config: Config, opened: Pretrained) -> list[list[int]]:
    """What the model says to every prompt, from the file beside the target as far as it is there."""
    prompts = chosen_prompts(config, opened)
    if config.chat and opened.chat is None:
        log.warning("%s brings no chat template: ChatML is used", config.source)
    path = config.target.with_suffix(".texts.jsonl")
    template = opened.chat.source if opened.chat else None
    settings: dict[str, Any] = {
        "tokenizer": opened.tokenizer.fingerprint(), "chat": config.chat, "template": template,
        "max_new_tokens": config.max_new_tokens, "dtype": config.dtype}
    if not config.overwrite:
        check_settings(path, settings)
    loaded = load_weights(config.source, opened, dtype=config.dtype)
    results = Results(path, settings | {"weights": weights_mark(loaded.params)}, overwrite=config.overwrite)
    try:
        found = {record["key"]: record["tokens"] for record in results.records if record["key"] in prompts}
        if found:
            log.info("%d of %d answers are in %s already", len(found), len(prompts), path)
        missing = [key for key in prompts if key not in found]
        if missing:
            found |= write_answers(config, loaded, {key: prompts[key] for key in missing}, results, len(prompts))
    finally:
        results.close()
    return [found[key] for key in prompts]


def write_answers(config: Config, loaded: Pretrained, prompts: Mapping[str, tuple[Prompt, list[int]]],
                  results: Results, total: int) -> dict[str, list[int]]:
    """Greedy answers, each written to the file when it is there."""
    keys, found, report = list(prompts), {}, Report()
    plain = SamplingConfig(max_new_tokens=config.max_new_tokens)
    turns = [config.chat or prompts[key][0].messages is not None for key in keys]
    ends = Reader(loaded.tokenizer, template=loaded.chat).turn_end() if any(turns) else ()
    sampling = [replace(plain, stop_ids=ends) if turn else plain for turn in turns]
    model = build(loaded.config, ComputeConfig(dtype=config.dtype))
    engine = Engine(model=model, params=jax.tree.map(jnp.asarray, loaded.params), eos_id=loaded.tokenizer.eos_id,
                    tokenizer=loaded.tokenizer, config=EngineConfig(batch_size=config.batch_size,
                                                                    cache_dtype=config.dtype))
    pace = Pace(total, total - len(keys))
    try:
        for one in serve(engine, [prompts[key][1] for key in keys], sampling, report=report):
            key = keys[one.prompt]
            prompt = prompts[key][0]
            found[key] = one.tokens
            results.append({"key": key, "prompt": prompt.messages if prompt.text is None else prompt.text,
                            "text": one.text, "tokens": one.tokens, "reason": one.reason})
            pace.done(len(one.tokens))
    finally:
        pace.close()
    log.info("%s", report.line())
    return found


def documents(config: Config, tokenizer: Tokenizer, facts: dict[str, int]) -> Iterator[np.ndarray]:
    """The ids of documents up to the limit; counts them in `facts`."""
    sources = [open_source(parse_source(spec, unread=MIXED)) for spec in config.data]
    pace, left = Pace(sum(map(len, sources))), config.max_tokens
    try:
        for document in (document for source in sources for document in source):
            ids = np.asarray(tokenizer.encode(document.text) if document else [], np.int32)[:left]
            facts["texts"], facts["text_tokens"] = facts["texts"] + (len(ids) > 0), facts["text_tokens"] + len(ids)
            left = None if left is None else left - len(ids)
            pace.done(len(ids))
            yield ids
            if left == 0:
                log.info("--max-tokens: the last document read is number %d of %d", facts["texts"],
                         sum(map(len, sources)))
                return
    finally:
        pace.close()


def make_database(config: Config) -> None:
    """Builds, saves, says what it is."""
    if config.target.suffix != ".safetensors":
        raise ValueError(f"--target {config.target}: a database is a .safetensors file")
    if config.target.exists() and not config.overwrite:
        raise ValueError(f"--target {config.target} exists; --overwrite replaces it")
    began, opened = time.perf_counter(), open_pretrained(config.source)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise ValueError(f"--source {config.source} has no tokenizer")
    facts = {"texts": 0, "text_tokens": 0}
    if config.kind == "model":
        texts = answers(config, opened)
        facts = {"texts": len(texts), "text_tokens": sum(map(len, texts))}
        database: Any = build_model_table(texts, tokenizer.vocab_size)
        facts["ngrams"] = int(np.count_nonzero(database.lengths))
    else:
        database = build_corpus(documents(config, tokenizer, facts), tokenizer.vocab_size)
        if not facts["text_tokens"]:
            raise ValueError(f"no text in {', '.join(config.data)}")
    save_database(config.target, database, tokenizer.fingerprint(), facts)
    found = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts.items())
    print(f"{config.target}: {found}; {config.target.stat().st_size / 1e6:.1f} MB, "
          f"{time.perf_counter() - began:.1f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(make_database, PRESETS, argv, prog=PROG, description=__doc__)



if __name__ == "__main__":
    main()
