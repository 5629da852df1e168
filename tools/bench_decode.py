"""Plain and speculative decoding of one model on real prompts, all methods in turn on every prompt of one run.

    python -m tools.bench_decode --source MODEL --data question.jsonl --model-database DB --corpus-database DB
    ... --methods "" --orders c,m,s,cm,cms       # ablation of Hierarchy Drafting
    ... --methods "" --peer                      # plain decoding against transformers
    python -m tools.bench_decode --random base   # the same, 25 M random parameters

Data: Spec-Bench's `question.jsonl` ({category, turns}); the first turn is asked with the model's chat template
(`--per-category 8` makes 104 prompts). Every prompt is prefilled once; each method continues from a copy of that
state at batch 1, greedy, end of text ignored, so that all write the same number of tokens. Times are of decoding
alone. `exact` counts texts equal to plain decoding's; where one differs the margin between the two best logits there
says whether it was a tie of rounding. Printed first: what a step costs on this device by the number of guesses it
verifies, relative to plain decoding; methods choose the width of each step by it, up to the widest measured
(`--fixed-width`: always all guesses, as in the papers; a Lookahead window always does). Speed-up is the ratio of mean
tokens/s over prompts, as in Spec-Bench; the ratio of total times stands beside it.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config as flags
from jaxlm.generate.costs import step_costs
from jaxlm.generate.databases import load_database
from jaxlm.generate.decode import complete, decode, pad, step_width
from jaxlm.generate.draft import propose
from jaxlm.generate.draft_sources import Databases
from jaxlm.generate.engine import Engine, generate
from jaxlm.generate.methods import METHODS, adapted, missing_database
from jaxlm.generate.prompts import Prompt, Reader
from jaxlm.generate.requests import Report
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.generate.speculative import Guessing, Sources, start_guessing
from jaxlm.generate.state import DecodeState, init_state, prefill
from jaxlm.model.decoder import Model, build, unstack
from jaxlm.model.hf import save_hf
from jaxlm.model.presets import MODELS
from jaxlm.train.pretrained import Pretrained, load_pretrained

PROG = "tools.bench_decode"
MULTI_TURN = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
LETTERS = {"c": "context", "m": "model", "s": "corpus", "p": "prompt", "r": "recycling"}
WIDTHS = (0, 4, 8, 16, 28)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    source: Path = Path("runs/demo")
    data: Path = Path("question.jsonl")
    model_database: Path | None = None
    corpus_database: Path | None = None
    methods: str = "pld,lookahead,rest,recycling,hierarchy"  # of jaxlm.generate.methods
    orders: str = ""               # orders of Hierarchy Drafting's databases: c context, m model, s corpus; "cms,cm,c"
    per_category: int = 3          # prompts of each of the 13 categories
    skip: int = 0                  # prompts of each category that are left out first
    max_new_tokens: int = 96
    slots: int = 1024              # of the cache; longer prompts are left out, and counted
    check: bool = False            # only whether texts are those of plain decoding: batches of 8, 8 guesses a step
    fixed_width: bool = False
    unstack: bool = False          # layers one by one, see jaxlm.model.decoder.unstack
    peer: bool = False             # plain decoding of transformers beside ours, at batch 1 and 8
    random: str = ""               # only that, for a preset of jaxlm.model.presets with random weights
    json_path: Path | None = None  # every measurement


@dataclass
class Measured:
    """One method on all prompts."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accepted: list[dict[str, int]] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)


class Bench:
    """A model with compiled methods."""

    def __init__(self, config: Config, loaded: Pretrained, databases: Databases) -> None:
        self.config, self.loaded = config, loaded
        self.model: Model = build(loaded.config)
        params = jax.tree.map(jnp.asarray, loaded.params)
        self.params = unstack(params) if config.unstack else params
        self.sources = Sources(jax.tree.map(jnp.asarray, databases))
        self._decode = jax.jit(decode, static_argnames=("model", "guessing", "num_tokens"))
        self._guess = jax.jit(start_guessing, static_argnames=("guessing", "model"))
        self._prefill = jax.jit(prefill, static_argnames="model")

    def start(self, ids: list[int]) -> DecodeState:
        """The state behind a prompt."""
        limit, slots = len(ids) + self.config.max_new_tokens, self.config.slots
        greedy = make_settings([SamplingConfig()], self.model.config.vocab_size)
        state = init_state(self.model, greedy, limit=jnp.array([limit]), stop_ids=jnp.full((1, 1), -1), slots=slots,
                           num_sources=len(LETTERS))
        tokens, mask = pad([ids], 1 << (len(ids) - 1).bit_length())
        return jax.block_until_ready(self._prefill(self.model, self.params, state, tokens, mask.sum(axis=1)))

    def run(self, state: DecodeState, guessing: Guessing | None) -> tuple[DecodeState, float]:
        """The state at the end of the text, and the seconds of decoding it."""
        if guessing:
            state = self._guess(guessing, state, self.model, self.sources)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state = self._decode(self.model, self.params, state, self.sources, guessing=guessing,
                             max_steps=np.int32(2**30), max_done=np.int32(1),
                             num_tokens=self.loaded.tokenizer.vocab_size)
        jax.block_until_ready(state)
        return state, time.perf_counter() - began

    def draft_seconds(self, state: DecodeState, guessing: Guessing) -> float:
        """Of one look-up and merge, without the model; the smallest of several."""
        if guessing.model is not None:
            return float("nan")
        state = self._guess(guessing, state, self.model, self.sources)
        databases = self.sources.databases._replace(pool=state.drafting.pool, recycling=state.learned.successors)
        program = jax.jit(propose, static_argnums=0)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            jax.block_until_ready(program(guessing.draft, databases, state.tokens, state.length))
            times.append(time.perf_counter() - began)
        return min(times)


def read_prompts(config: Config, loaded: Pretrained) -> tuple[list[tuple[str, list[int]]], int]:
    """(category, ids) of the chosen prompts, and how many were too long."""
    found, count, long = [], defaultdict(int), 0
    reader = Reader(loaded.tokenizer, loaded.start, loaded.chat, chat=True)
    widest = max((step_width(one) for one in METHODS.values()), default=1)
    for line in config.data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = reader.ids(Prompt(row["turns"][0]))
        if len(ids) + config.max_new_tokens + widest > config.slots:
            long += 1
            continue
        count[row["category"]] += 1
        if config.skip < count[row["category"]] <= config.skip + config.per_category:
            found.append(("multi-turn" if row["category"] in MULTI_TURN else row["category"], ids))
    if not found:
        raise ValueError(f"{config.data} has no prompt that fits {config.slots} slots behind --skip {config.skip}")
    return found, long


def compare(
    bench: Bench, prompts: list[tuple[str, list[int]]], methods: dict[str, Guessing | None],
) -> dict[str, Measured]:
    """Every method on every prompt, in turn; the first prompt once more before, to compile and warm up."""
    measured: dict[str, Measured] = {name: Measured() for name in methods}
    for guessing in methods.values():
        bench.run(bench.start(prompts[0][1]), guessing)
    for number, (_, ids) in enumerate(prompts):
        start, plain = bench.start(ids), None
        for name, guessing in methods.items():
            state, seconds = bench.run(start, guessing)
            text = np.asarray(state.tokens[0, len(ids):int(state.length[0])]).tolist()
            plain = text if plain is None else plain
            one = measured[name]
            one.seconds.append(seconds)
            one.tokens.append(len(text))
            one.steps.append(int(state.steps[0]))
            names = guessing.source_names() if guessing else ()
            one.accepted.append(dict(zip(names, np.asarray(state.accepted[0]).tolist(), strict=False)))
            one.exact.append(text == plain)
            if text != plain:
                print(f"  {name}: prompt {number} differs, margin {margin(bench, ids, plain, text):.1e}", flush=True)
    return measured


def check(bench: Bench, prompts: list[list[int]], methods: dict[str, Guessing | None]) -> None:
    """Prints for every method how many texts are those of plain decoding."""
    engine = Engine(model=bench.model, params=bench.params, eos_id=None, sources=bench.sources,
                    num_tokens=bench.loaded.tokenizer.vocab_size)
    sampling, plain = SamplingConfig(max_new_tokens=bench.config.max_new_tokens), None
    for name, guessing in methods.items():
        narrow = guessing and replace(guessing, draft=replace(guessing.draft, num_nodes=8))
        report = Report()
        found = [one.tokens for one in generate(replace(engine, guessing=narrow), prompts, sampling, report=report)]
        plain = found if plain is None else plain
        different = [i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b]
        print(f"{name}: {len(found) - len(different)} of {len(found)} texts equal, "
              f"{report.tokens / report.steps:.2f} tokens a forward pass", flush=True)
        for i in different:
            print(f"  prompt {i}, margin {margin(bench, prompts[i], plain[i], found[i]):.1e}", flush=True)


def margin(bench: Bench, ids: list[int], plain: list[int], text: list[int]) -> float:
    """Difference of the two best logits where the texts part, from a full forward pass."""
    same = next((i for i, (a, b) in enumerate(zip(plain, text, strict=False)) if a != b), 0)
    logits = bench.model.apply(bench.params, jnp.array([ids + plain[:same]])).logits[0, -1]
    best = jax.lax.top_k(logits, 2)[0]
    return float(best[0] - best[1])


def show(measured: dict[str, Measured], groups: list[str], draft: dict[str, float]) -> None:
    """A table: speed-up over plain decoding by group, then what explains it."""
    order = [*dict.fromkeys(groups), "all"]
    plain = next(iter(measured.values()))
    rate = lambda one, group: statistics.mean(
        n / s for n, s, g in zip(one.tokens, one.seconds, groups, strict=True) if group in (g, "all"))
    columns = ["method", *order, "by total time", "tokens a step", "draft ms", "exact", "right guesses by source"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, one in measured.items():
        ratios = " | ".join(f"{rate(one, group) / rate(plain, group):.2f}" for group in order)
        total = sum(plain.seconds) / sum(one.seconds) * sum(one.tokens) / sum(plain.tokens)
        names = one.accepted[0]
        shares = ", ".join(f"{key} {sum(a[key] for a in one.accepted) / sum(one.tokens):.0%}" for key in names)
        print(f"| {name} | {ratios} | {total:.2f} | {sum(one.tokens) / sum(one.steps):.2f} | "
              f"{draft.get(name, 0) * 1e3:.2f} | {sum(one.exact)}/{len(one.exact)} | {shares} |")
    print(f"\nplain: {rate(plain, 'all'):.1f} tokens/s")


def show_costs(bench: Bench, widths: tuple[int, ...]) -> tuple[float, ...]:
    """Prints the cost curve."""
    costs = step_costs(bench.model, bench.params, widths, slots=bench.config.slots)
    print("cost of a step by its guesses (plain = 1): " + ", ".join(
        f"{width}: {cost / costs[0]:.2f}" for width, cost in zip(widths, costs, strict=True))
          + f"; plain {costs[0] * 1e3:.1f} ms", flush=True)
    return costs


def peer(model: Model, params: Any, single: bool, count: int = 64, width: int = 32) -> None:
    """Plain greedy decoding of ours and of transformers in turn, prompts of random tokens, at batch 1 and 8."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", model.config, params, architecture="llama", dtype="float32")
        other = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    params = unstack(params) if single else params
    for batch in (1, 8):
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch, width)).astype(np.int32)
        long, ones = torch.tensor(ids, dtype=torch.long), torch.ones(ids.shape, dtype=torch.long)
        settings = make_settings([SamplingConfig()] * batch, model.config.vocab_size)
        run = partial(complete, model, params, ids, np.ones_like(ids), settings, max_new_tokens=count, eos_id=-1)
        ours, theirs = [], []
        for turn in range(6):
            began = time.perf_counter()
            mine = np.asarray(run())
            middle = time.perf_counter()
            with torch.no_grad():
                out = other.generate(long, attention_mask=ones, max_new_tokens=count, min_new_tokens=count,
                                     do_sample=False, pad_token_id=0).numpy()[:, width:]
            if turn:
                ours.append(middle - began)
                theirs.append(time.perf_counter() - middle)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"batch {batch}: ours {batch * count / min(ours):.1f} tokens/s, transformers "
              f"{batch * count / min(theirs):.1f}; median ratio {ratio:.2f}; same tokens {(mine == out).mean():.1%}",
              flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = flags.parse({"default": Config()}, argv, prog=PROG, description=__doc__)
    if config.random:
        if config.random not in MODELS:
            flags.fail(ValueError(f"--random {config.random} is unknown{flags.nearest(config.random, MODELS)}"), PROG)
        model = build(MODELS[config.random])
        return peer(model, jax.jit(model.init)(jax.random.key(0)), config.unstack)
    try:
        loaded = load_pretrained(config.source)
        if loaded.chat is None:
            raise ValueError(f"--source {config.source} has no chat template, and the prompts are questions")
        mark = loaded.tokenizer.fingerprint()
        databases = Databases(
            model=config.model_database and load_database(config.model_database, mark, "model_table"),
            corpus=config.corpus_database and load_database(config.corpus_database, mark, "corpus"))
        methods = chosen_methods(config, databases)
        prompts, long = read_prompts(config, loaded)
    except (ValueError, OSError) as error:
        flags.fail(error, PROG)
    print(f"{len(prompts)} prompts ({long} too long for {config.slots} slots left out), {config.max_new_tokens} tokens "
          f"each; {jax.devices()[0].device_kind}", flush=True)
    bench = Bench(config, loaded, databases)
    if config.check:
        return check(bench, [ids for _, ids in prompts], methods)
    if config.peer:
        peer(bench.model, jax.tree.map(jnp.asarray, loaded.params), config.unstack)
    if len(methods) == 1:
        return
    costs = show_costs(bench, WIDTHS)
    if not config.fixed_width:
        methods = {name: adapted(one, WIDTHS, costs) if one else None for name, one in methods.items()}
    measured = compare(bench, prompts, methods)
    state = bench.start(prompts[0][1])
    draft = {name: bench.draft_seconds(state, one) for name, one in methods.items() if one}
    show(measured, [group for group, _ in prompts], draft)
    if config.json_path:
        rows: dict[str, Any] = {name: asdict(one) for name, one in measured.items()}
        config.json_path.write_text(json.dumps({"groups": [group for group, _ in prompts], "costs": costs,
                                                "widths": WIDTHS, "draft_seconds": draft, "methods": rows}))


def chosen_methods(config: Config, databases: Databases) -> dict[str, Guessing | None]:
    """Plain decoding first, then what the flags name; ValueError for an unknown name or a database that is missing."""
    chosen: dict[str, Guessing | None] = {"none": None}
    for name in filter(None, config.methods.split(",")):
        if name not in METHODS:
            raise ValueError(f"--methods: '{name}' is unknown{flags.nearest(name, METHODS)}; "
                             f"methods: {', '.join(METHODS)}")
        chosen[name] = METHODS[name]
    for order in filter(None, config.orders.split(",")):
        if unknown := set(order) - set(LETTERS):
            raise ValueError(f"--orders: '{order}' has unknown letters {sorted(unknown)}; letters: {LETTERS}")
        draft = METHODS["hierarchy"].draft
        chosen[order.upper()] = replace(METHODS["hierarchy"],
                                        draft=replace(draft, order=tuple(LETTERS[letter] for letter in order)))
    for name, one in chosen.items():
        if one and (kind := missing_database(one, databases)):
            raise ValueError(f"{name} reads a {kind} database: give --{kind}-database (recipes.draft_database)")
    return chosen


if __name__ == "__main__":
    main()
