"""Our decoders as lm-evaluation-harness evaluates models (Gao et al., github.com/EleutherAI/lm-evaluation-harness); the
extra `eval`.

What its own `hf` backend does is done here: a context and its continuation are tokenised together and then cut, texts
that are too long lose tokens on the left, and special tokens that a text spells out are special tokens. So a model in
both gets the same log-likelihoods, up to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import power_of_two
from jaxlm.core.config import nearest
from jaxlm.core.extras import extra
from jaxlm.core.matmul import matmul
from jaxlm.data.chat import encode_symbols, find_symbols
from jaxlm.data.chat_template import ChatTemplate
from jaxlm.generate.engine import Engine, generate
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.decoder import Model
from jaxlm.objective.chunks import map_chunks

Pair = tuple[list[int], list[int]]  # the ids of a context, and those of the continuation that is scored
LEAST_WIDTH = 32
LOGIT_BYTES = 2**28  # of logits at a time
MAX_GEN_TOKENS = 256  # of a task that does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # same names here and there
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class HarnessModel:
    """The interface `lm_eval.api.model.LM` over an engine; `harness_scores` makes it known there as one.

    Args:
      engine: with its tokenizer; `engine.config.batch_size` rows are scored together, too.
      start: ids before every text, as the tokenizer's own file asks for them.
      prefix_id: what a text without context stands behind: bos, or eos of a model that knows none.
      max_length: positions that a text may use.
      chat: for tasks as conversations. stop_ids: what ends a turn, besides eos.
      seed: of sampled texts; request i adds i.
    """

    engine: Engine
    start: tuple[int, ...]
    prefix_id: int
    max_length: int
    chat: ChatTemplate | None = None
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    rank: int = field(default=0, init=False)        # of the protocol: one process
    world_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        limit = self.engine.model.config.max_positions
        if not 2 <= self.max_length <= limit:
            raise ValueError(f"max_length must be from 2 to the {limit} positions of the model, got {self.max_length}")

    def with_params(self, params: Any) -> "HarnessModel":
        """The same with weights."""
        return replace(self, engine=replace(self.engine, params=params))

    @property
    def tokenizer_name(self) -> str:
        """What tells caches of requests apart."""
        return self.engine.tokenizer.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the template, "" without; there is one only, so it has no name."""
        return self.chat.source if chat_template and self.chat else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt the last message is left open at its end."""
        if self.chat is None:
            raise ValueError("the model brings no chat template, so tasks cannot be put as conversations")
        tokenizer = self.engine.tokenizer
        names = {symbol.id: name for name, symbol in tokenizer.symbols.items()}
        special = {f"{kind}_token": names.get(getattr(tokenizer, f"{kind}_id"), "") for kind in ("bos", "eos", "pad")}
        text = self.chat.render(chat_history, add_generation_prompt=add_generation_prompt, **special)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        found = text.rfind(last) if text.rfind(last) >= 0 else text.rfind(last.strip())
        if found < 0:
            raise ValueError("the chat template does not show the last message as it is, so it cannot be continued")
        return text[:found + len(last)] if text.startswith(last, found) else text[:found + len(last.strip())]

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of a text with the special tokens it names, behind `start` unless it begins so itself."""
        tokenizer = self.engine.tokenizer
        ids = encode_symbols(tokenizer, text, find_symbols(tokenizer.symbols, text))[0]
        begun = self.start and tuple(ids[:len(self.start)]) == self.start
        return ids if begun or not start else [*self.start, *ids]

    def pair(self, context: str, continuation: str) -> Pair:
        """The ids of both. Spaces at the end of a context go to the continuation; they are tokenised together, and the
        continuation is what is behind as many ids as the context has alone.

        With tokens "a", "b", "ab" and " b": ("a ", "b") is [a], [␣b]; ("a", "b") is [a] and nothing of [ab], an error.
        """
        if not context:
            ids = self.encode(continuation, start=False)
            if ids[:1] == [self.prefix_id]:
                return ids[:1], ids[1:]
            return [self.prefix_id], ids
        kept = context.rstrip()
        whole, ids = self.encode(context + continuation), self.encode(kept)
        return ids, whole[len(ids):]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each `(context, continuation)`: ln p(continuation | context), and whether greedy decoding writes it."""
        pairs = []
        for one in requests:
            pairs.append(self.pair(*one.args))
            if not pairs[-1][0] or not pairs[-1][1]:
                raise ValueError(f"the continuation {one.args[1]!r:.60} has no token of its own behind the context "
                                 f"{one.args[0][-60:]!r}")
        return self._scores(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each `(text,)`: ln p(text), every token once, behind as many tokens as fit (`rolling_windows`)."""
        owners, pairs = [], []
        for number, one in enumerate(requests):
            windows = rolling_windows(self.encode(one.args[0]), self.prefix_id, self.max_length)
            owners += [number] * len(windows)
            pairs += windows
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each `(context, settings)`: the text up to a stop string, without it."""
        prompts, settings = [], []
        for number, one in enumerate(requests):
            sampling = self.sampling(one.args[1], number)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(f"a task asks for {sampling.max_new_tokens} tokens, which leaves no room for a prompt "
                                 f"within max_length {self.max_length}")
            prompts.append((self.encode(one.args[0]) or [self.prefix_id])[-room:])
            settings.append(sampling)
        # The longest first: what does not fit in memory shows at once, and rows of one length share a program.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found = generate(self.engine, [prompts[i] for i in order], [settings[i] for i in order])
        texts = {i: self._text(one.tokens, settings[i].stop_strings) for i, one in zip(order, found, strict=True)}
        return [texts[i] for i in range(len(prompts))]

    def _text(self, tokens: Sequence[int], stop_strings: Sequence[str]) -> str:
        """What the harness sees of a text: no special token, and nothing from a stop string on."""
        tokenizer = self.engine.tokenizer
        special = {symbol.id for symbol in tokenizer.symbols.values()}
        text = tokenizer.decode([i for i in tokens if i not in special])
        for one in stop_strings:
            text = text.partition(one)[0]
        return text

    def sampling(self, asked: Mapping[str, Any], number: int = 0) -> SamplingConfig:
        """The settings of a request of a task. ValueError for one that the engine does not have."""
        known = {"until", "do_sample", *SAMPLING, *LENGTHS}
        if odd := [name for name in asked if name not in known]:
            raise ValueError(f"generation_kwargs {odd[0]!r} cannot be followed{nearest(odd[0], known)}; known: "
                             f"{', '.join(sorted(known))}")
        temperature = float(asked.get("temperature") or 0.0)
        greedy = not asked.get("do_sample", temperature > 0)
        if not greedy and temperature == 0:
            temperature = 1.0
        given = {name: asked[name] for name in SAMPLING if asked.get(name) is not None} | {"temperature": temperature}
        if greedy:  # a task may leave sampling settings in place when it switches sampling off
            given = {name: value for name, value in given.items() if name == "repetition_penalty"}
        until = asked.get("until") or ()
        length = next((asked[name] for name in LENGTHS if asked.get(name) is not None), MAX_GEN_TOKENS)
        return SamplingConfig(
            max_new_tokens=int(length), stop_ids=self.stop_ids, seed=0 if greedy else (self.seed + number) % 2**32,
            stop_strings=tuple(one for one in ([until] if isinstance(until, str) else until) if one), **given)

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, the longest texts first, in batches of one width each."""
        rows = [clip(context, ids, self.max_length) for context, ids in pairs]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        size, found = self.engine.config.batch_size, {}
        for first in range(0, len(order), size):
            numbers = order[first:first + size]
            width = min(power_of_two(len(rows[numbers[0]][0]), LEAST_WIDTH), self.max_length)
            tokens, targets, mask = fill([rows[i] for i in numbers], size, width)
            logit_bytes = 4 * size * width * self.engine.model.config.vocab_size
            chunks = math.gcd(width, power_of_two(logit_bytes // LOGIT_BYTES))
            total, greedy = jax.device_get(_score(self.engine.model, self.engine.params, tokens, targets, mask,
                                                  self.engine.vocab_size(), chunks))
            for row, i in enumerate(numbers):
                found[i] = float(total[row]), bool(greedy[row])
        return [found[i] for i in range(len(rows))]


def clip(context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[list[int], int]:
    """The ids of a text of which `max_length` are read, and how many at its end are scored; the left is cut.

    `clip([1, 2, 3], [4, 5], 3)` is `([2, 3, 4, 5], 2)`: 2, 3, 4 are read, and 4 and 5 are predicted from 3 and 4.
    ValueError for a continuation that is longer than the model reads.
    """
    if len(continuation) > max_length:
        raise ValueError(f"a continuation has {len(continuation)} tokens, more than max_length {max_length}")
    return [*context, *continuation][-(max_length + 1):], len(continuation)


def rolling_windows(ids: Sequence[int], prefix_id: int, size: int) -> list[Pair]:
    """Contexts and continuations that score each id once, none of them longer than `size + 1` together.

    All but the last read `size` new ids; the last one fills up with context. For ids 0 to 9 and size 4, P the prefix:

        P | 0 1 2 3      3 | 4 5 6 7      5 6 7 | 8 9
    """
    found = [([prefix_id], list(ids[:size]))] if ids else []
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        found.append((list(ids[end - size - 1:start]), list(ids[start:end])))
    return found


def fill(rows: Sequence[tuple[list[int], int]], size: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets [size, width] int32 and the mask of targets that count, from `clip`ped rows.

    The row ([2, 3, 4, 5], 2) in width 4: tokens 2 3 4 0, targets 3 4 5 0, mask 0 1 1 0.
    """
    tokens, targets = np.zeros((2, size, width), np.int32)
    mask = np.zeros((size, width), bool)
    for row, (ids, count) in enumerate(rows):
        tokens[row, :len(ids) - 1], targets[row, :len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, len(ids) - 1 - count:len(ids) - 1] = True
    return tokens, targets, mask


@partial(jax.jit, static_argnums=(0, 5, 6))
def _score(model: Model, params: Any, tokens: jax.Array, targets: jax.Array, mask: jax.Array, num_tokens: int,
           num_chunks: int) -> tuple[jax.Array, jax.Array]:
    """Sums of log-probabilities [B], and whether all targets that count are the likeliest tokens [B]."""
    hidden = model.apply(params, tokens, logits=False).hidden

    def one(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = matmul(hidden, head, jnp.float32)
        # A padded vocabulary has ids that are no token, with weights that nothing trained; its softmax is over all, as
        # that of transformers is.
        logp = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return picked, jnp.argmax(logits[..., :num_tokens], axis=-1) == targets

    logp, likeliest = map_chunks(one, (hidden, targets), (model.head(params),), num_chunks)
    return jnp.sum(jnp.where(mask, logp, 0), axis=1), jnp.all(likeliest | ~mask, axis=1)


def open_tasks(names: Sequence[str], *folders: Path) -> Any:
    """The `lm_eval.tasks.TaskManager` that knows all these tasks, groups and tags; its own only where they are needed.

    Args:
      folders: with task files (YAML), which win over those of the package.

    ValueError: a name that there is not, with the nearest, a folder that is none, or `lm_eval` is not installed.
    """
    tasks = _lm_eval().tasks
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"tasks_path {folder} is no folder")
    paths = {"include_path": [str(folder) for folder in folders]} if folders else {}
    if folders:
        manager = tasks.TaskManager(include_defaults=False, **paths)
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = tasks.TaskManager(**paths)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        listed = "; ".join(f"{name}{nearest(name, manager.all_tasks)}" for name in unknown)
        raise ValueError(f"unknown tasks: {listed}. There are {len(manager.all_tasks)}: lm-eval ls tasks lists them")
    return manager


def harness_scores(model: HarnessModel, tasks: Sequence[str], manager: Any, *, limit: int | None = None,
                   num_fewshot: int | None = None, chat: bool = False, system: str = "", samples: bool = False,
                   bootstraps: int = 1000) -> tuple[dict[str, Any], str]:
    """What the harness measures, as it reports it, and its table for people.

    Args:
      limit: documents of each task. num_fewshot: examples before each; None: what the task says.
      chat: tasks are conversations by the model's template. system: the message before. samples: keep each document's
        requests and answers. bootstraps: for standard errors of what has no formula; 0: no standard errors.
    """
    lm_eval = _lm_eval()
    lm_eval.api.model.LM.register(HarnessModel)
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot, log_samples=samples,
        apply_chat_template=chat, system_instruction=system or None, bootstrap_iters=bootstraps)
    table = lm_eval.utils.make_table(found)
    return found, table + ("\n" + lm_eval.utils.make_table(found, "groups") if found.get("groups") else "")


def _lm_eval() -> ModuleType:
    for module in ("lm_eval.api.model", "lm_eval.tasks", "lm_eval.utils"):
        extra(module, "eval")
    return extra("lm_eval", "eval")
