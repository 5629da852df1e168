"""What int8 weights and smaller key-value caches cost in quality, for one checkpoint on one text.

    python -m tools.check_quantized --source SmolLM2-135M-Instruct.Q4_1.gguf
    python -m tools.check_quantized --source exported --data.path wikipedia.jsonl.gz --tokens 20000

`source` is what `load_pretrained` reads. Documents are joined, cut into rows of `seq_len` tokens, and fed through the
cache `piece` tokens at a time, all variants in turn on every piece. Printed, against float32 weights and cache: bits
per byte and their difference with its standard error over rows, mean negative log-likelihood, the share of positions
with the same most likely token, the mean divergence KL(float32 || variant) in nats, and the bytes of weights and cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config as flags
from jaxlm.core.log import setup_logging
from jaxlm.data.rows import SourceConfig
from jaxlm.data.sources import open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.model.cache import CacheDtype, init_cache
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import Model, build
from jaxlm.model.quantize import quantize
from jaxlm.train.pretrained import load_pretrained

PROG = "tools.check_quantized"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured on what."""

    source: Path                                       # a run folder, a Hugging Face folder or a .gguf file
    data: SourceConfig = field(default_factory=lambda: SourceConfig(path="sample:en"))
    tokens: int = 20_000                               # of the text, rounded up to whole batches
    batch_size: int = 8
    seq_len: int = 512
    piece: int = 64                                    # tokens at a time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the activations of the variants

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_size, self.seq_len, self.piece) < 1 or self.seq_len % self.piece:
            raise ValueError("tokens, batch_size, seq_len and piece must be positive, and seq_len a multiple of piece")


PRESETS = {"sample": Config(source=Path("exported"))}


class Variant(NamedTuple):
    """How weights and cache are stored."""

    weights: Literal["float32", "int8"]
    cache: CacheDtype


REFERENCE = Variant("float32", "float32")
VARIANTS = (Variant("int8", "float32"), Variant("float32", "bfloat16"), Variant("float32", "int8"),
            Variant("int8", "int8"))


class Scores(NamedTuple):
    """Sums over the tokens of each row, [B] or, stacked, [rows]."""

    nll: np.ndarray
    same: np.ndarray  # positions whose most likely token is that of the reference
    kl: np.ndarray


def text_rows(config: Config, tokenizer: Tokenizer, start: Sequence[int]) -> tuple[np.ndarray, float]:
    """Rows [rows, seq_len + 1] in whole batches, each with the first target of the next one, and bytes per token."""
    batch = config.batch_size * config.seq_len
    wanted, ids, num_bytes, source = -(-config.tokens // batch) * batch, [], 0, open_source(config.data)
    for document in (source[i] for i in range(len(source))):
        if document is not None:
            ids += [*start, *tokenizer.encode(document.text + "\n")]
            num_bytes += len(document.text.encode()) + 1
        if len(ids) > wanted:
            break
    if len(ids) <= batch:
        raise ValueError(f"{config.data.path} has {len(ids)} tokens, less than one batch of {config.batch_size} rows "
                         f"of {config.seq_len}")
    count = min(len(ids) - 1, wanted) // batch * config.batch_size
    at = np.arange(count)[:, None] * config.seq_len + np.arange(config.seq_len + 1)[None]
    return np.asarray(ids, np.int32)[at], num_bytes / len(ids)


def measure(models: dict[Variant, Model], trees: dict[str, Any], rows: np.ndarray, config: Config) \
        -> dict[Variant, Scores]:
    """The scores of every variant, the reference first."""
    step = jax.jit(_step, static_argnums=0)
    found: dict[Variant, list[Scores]] = {variant: [] for variant in models}
    for batch in rows.reshape(-1, config.batch_size, config.seq_len + 1):
        caches = {variant: init_cache(model.config, config.batch_size, config.seq_len, variant.cache)
                  for variant, model in models.items()}
        for i in range(0, config.seq_len, config.piece):
            tokens, targets = (jnp.asarray(batch[:, at:at + config.piece]) for at in (i, i + 1))
            expected = None
            for variant, model in models.items():
                logits, caches[variant] = step(model, trees[variant.weights], caches[variant], tokens)
                expected = logits if expected is None else expected
                found[variant].append(jax.device_get(_compare(expected, logits, targets)))
    pieces = config.seq_len // config.piece

    def stack(*parts: np.ndarray) -> np.ndarray:
        return np.stack(parts).reshape(-1, pieces, config.batch_size).sum(axis=1, dtype=np.float64).reshape(-1)

    return {variant: jax.tree.map(stack, *scores) for variant, scores in found.items()}


def _step(model: Model, params: Any, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    out = model.apply(params, tokens, cache=cache)
    return out.logits, out.cache


@jax.jit
def _compare(expected: jax.Array, actual: jax.Array, targets: jax.Array) -> Scores:
    p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(actual)
    nll = -jnp.take_along_axis(q, targets[..., None], axis=-1)[..., 0]
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return Scores(nll.sum(axis=1), same.sum(axis=1), jnp.sum(jnp.exp(p) * (p - q), axis=(1, 2)))


def table(scores: dict[Variant, Scores], sizes: dict[Variant, tuple[int, int]], config: Config,
          bytes_per_token: float) -> str:
    """One line a variant, in Markdown."""
    lines = ["| weights | cache | bits/byte | difference | nll | same argmax | KL | weights MB | cache MB |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    to_bpb = 1 / (config.seq_len * math.log(2) * bytes_per_token)
    for variant, one in scores.items():
        change = (one.nll - scores[REFERENCE].nll) * to_bpb
        error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        difference = "" if variant == REFERENCE else f"{change.mean():+.5f} ± {error:.5f}"
        weights, cache = (size / 1e6 for size in sizes[variant])
        lines.append(f"| {variant.weights} | {variant.cache} | {one.nll.mean() * to_bpb:.5f} | {difference} | "
                     f"{one.nll.mean() / config.seq_len:.5f} | {one.same.mean() / config.seq_len:.4f} | "
                     f"{one.kl.mean() / config.seq_len:.2e} | {weights:.1f} | {cache:.1f} |")
    return "\n".join(lines)


def check(config: Config) -> str:
    """Loads, measures, and returns the table under one line on the text."""
    loaded = load_pretrained(config.source)
    if loaded.tokenizer is None:
        raise ValueError(f"{config.source} has no tokenizer, and the text needs one")
    if config.seq_len > loaded.config.max_positions:
        raise ValueError(f"seq_len {config.seq_len} is more than max_positions {loaded.config.max_positions}")
    rows, bytes_per_token = text_rows(config, loaded.tokenizer, loaded.start)
    params = jax.tree.map(jnp.asarray, loaded.params)
    trees = {"float32": params, "int8": quantize(params)}
    compute = ComputeConfig(dtype=config.dtype)
    models = {REFERENCE: build(loaded.config)} | {one: build(loaded.config, compute) for one in VARIANTS}
    scores = measure(models, trees, rows, config)
    sizes = {one: (_bytes(trees[one.weights]),
                   _bytes(jax.eval_shape(lambda one=one: init_cache(
                       loaded.config, config.batch_size, config.seq_len, one.cache)))) for one in models}
    return (f"{config.source.name} on {config.data.path}: {rows[:, 1:].size} tokens, {bytes_per_token:.2f} bytes each, "
            f"rows of {config.seq_len}, pieces of {config.piece}, {config.dtype} activations\n\n"
            + table(scores, sizes, config, bytes_per_token))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    setup_logging()
    config = flags.parse(PRESETS, argv, prog=PROG, description=__doc__)
    try:
        print(check(config))
    except (ValueError, OSError) as error:
        flags.fail(error, PROG)


if __name__ == "__main__":
    main()
