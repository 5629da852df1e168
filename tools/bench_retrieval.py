"""Embedding texts and a contrastive training step against sentence-transformers, on the CPU, in one process.

    python -m tools.bench_retrieval --model all-MiniLM-L6-v2 [--data scifact --texts 512 --batch-size 32]

Both read the same folder and the same texts (generated lives, or the documents of a BEIR folder) in float32; they take
turns, and a ratio is their time / ours, above 1 means ours is faster. A step is what a user waits for: token ids,
forward, backward, AdamW, on pairs of a question and a passage with negatives in the batch; `cached` is GradCache on
both sides (CachedMultipleNegativesRankingLoss), with parts of the same size. Dropout is off on both sides. The vectors
and the losses of the first step are compared before anything is timed. Needs the extra `parity`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.core import config as flags
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import read_beir, split_of
from jaxlm.data.retrieval_batches import RetrievalBatchConfig, RetrievalBatches
from jaxlm.data.retrieval_rows import Passage, RetrievalRow
from jaxlm.data.time_lines import make_time_lines
from jaxlm.model.config import ComputeConfig
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.retrieval.embed import TextEncoder, embed_texts
from jaxlm.retrieval.folder import load_text_encoder
from jaxlm.retrieval.learn import DataSet, EncodedBatches
from jaxlm.retrieval.retriever_loss import RetrievalLossConfig, make_retrieval_loss
from jaxlm.retrieval.towers import siamese
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step

PROG = "tools.bench_retrieval"
RATE = 1e-12  # of learning: the weights of both sides stay what they are, whatever was timed before
TOLERANCE = 1e-3  # of vectors and losses, relative to the largest: float32 sums in another order


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    model: str = ""         # a folder of sentence-transformers
    data: str = ""          # a BEIR folder; empty: generated lives
    texts: int = 512        # to embed
    batch_size: int = 32    # pairs of a training step
    chunks: int = 4         # of the cached step
    rounds: int = 5         # counted, after one that warms up
    scan_unroll: int = 6    # layers per iteration of the scan: all of MiniLM's

    def __post_init__(self) -> None:
        if min(self.texts, self.batch_size, self.chunks, self.rounds) < 1 or self.batch_size % self.chunks:
            raise ValueError("--texts, --batch-size, --chunks and --rounds must be at least 1, and chunks divide the "
                             "batch")


def rows_of(config: Config) -> tuple[list[str], list[RetrievalRow]]:
    """Texts to embed and pairs to train on."""
    if config.data:
        folder, split = split_of(config.data, "train")
        data = read_beir(folder, split)
        corpus = data.corpus
        pairs = [(text, next(iter(data.qrels[name]))) for name, text in data.queries.items()]
    else:
        lives = make_time_lines(max(50, config.texts // 4), 0)
        corpus = lives.corpus
        pairs = [(f"{one.before}in {one.interval.start.year}{one.after}", one.positives[0])
                 for one in lives.facts["train"]]
    texts = list(corpus.values())[:config.texts]
    if len(texts) < config.texts or len(pairs) < config.batch_size:
        raise ValueError(f"{config.data or 'the generated lives'}: {len(texts)} documents and {len(pairs)} pairs, but "
                         f"--texts {config.texts} and --batch-size {config.batch_size} are asked for")
    # A document once: we would leave its other questions out of the comparison, sentence-transformers would not.
    pairs = {doc: text for text, doc in pairs}
    return texts, [RetrievalRow(text, (Passage(doc, corpus[doc]),)) for doc, text in pairs.items()]


def our_step(config: Config, encoder: TextEncoder, params: Any, rows: Sequence[RetrievalRow], chunks: int
             ) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    mesh, tx = make_mesh(MeshConfig(data=1), jax.devices()[:1]), optax.adamw(RATE)
    towers = siamese(encoder)
    state = [init_state(lambda key: jax.tree.map(jnp.array, params), tx, jax.random.key(0), mesh, ENCODER_RULES)]
    batches = EncodedBatches(towers, [DataSet("bench", rows, "")],
                             RetrievalBatchConfig(batch_size=config.batch_size, num_negatives=0), groups=chunks)
    loss = make_retrieval_loss(towers, RetrievalLossConfig(), chunks=chunks, dropout=False)
    step = make_step(loss, tx, optax.constant_schedule(RATE), mesh=mesh, rules=ENCODER_RULES, seed=0)

    def once() -> float:
        state[0], metrics = step(state[0], next(batches))
        return float(metrics["loss"])

    return once


def their_step(config: Config, model: Any, rows: Sequence[RetrievalRow], cached: bool) -> Callable[[], float]:
    """As `our_step`, with the loss and optimizer of sentence-transformers and torch."""
    import torch
    from sentence_transformers.sentence_transformer import losses

    loss = (losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=config.batch_size // config.chunks)
            if cached else losses.MultipleNegativesRankingLoss(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    batches = RetrievalBatches([rows], RetrievalBatchConfig(batch_size=config.batch_size, num_negatives=0))

    def once() -> float:
        batch = next(batches)
        features = [model.tokenize(texts) for texts in (batch.queries, [one.text for one in batch.positives])]
        optimizer.zero_grad()
        value = loss(features, None)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return once


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for run, seconds in zip((ours, theirs), found, strict=True):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return found[0][1:], found[1][1:]


def report(name: str, unit: str, count: int, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """A line: rates and the ratio of each round's times."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(f"{name}: ours {count / statistics.median(ours):.1f} {unit}/s, sentence-transformers "
          f"{count / statistics.median(theirs):.1f}; ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def same(name: str, ours: np.ndarray | float, theirs: np.ndarray | float) -> None:
    """ValueError if they are not."""
    error = float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs))) / np.max(np.abs(theirs)))
    if not error <= TOLERANCE:
        raise ValueError(f"{name} differ by {error:.1e}, so the comparison would mean nothing")


def run(config: Config) -> None:
    """Everything in turns."""
    from sentence_transformers import SentenceTransformer

    if not config.model:
        raise ValueError("--model names a folder of sentence-transformers")
    texts, rows = rows_of(config)
    encoder, params = load_text_encoder(config.model, compute=ComputeConfig(scan_unroll=config.scan_unroll),
                                        put=lambda path, leaf: jnp.asarray(leaf))
    model = SentenceTransformer(config.model, device="cpu")
    model.eval()  # without dropout, so that the losses can be compared
    embed, encode = partial(embed_texts, encoder, params, texts, "passage"), partial(model.encode, texts)
    same("vectors", embed(), encode())
    report("embedding", "texts", len(texts), *in_turns(embed, encode, config.rounds))
    for name, chunks in (("step", 1), ("cached step", config.chunks)):
        ours, theirs = our_step(config, encoder, params, rows, chunks), their_step(config, model, rows, chunks > 1)
        same(f"losses of the first {name}", ours(), theirs())
        report(name, "pairs", config.batch_size, *in_turns(ours, theirs, config.rounds))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        run(flags.parse({"default": Config()}, argv, prog=PROG, description=__doc__))
    except ValueError as error:
        flags.fail(error, PROG)


if __name__ == "__main__":
    main()
