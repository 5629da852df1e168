"""What a merged model is worth: the likelihood of held-out text, or how well a retriever ranks."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.mesh import MeshConfig, make_mesh, place_leaf
from jaxlm.data.beir import read_beir, split_of
from jaxlm.data.pipeline import eval_batches
from jaxlm.data.sources import open_source, parse_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.eval.likelihood import bits_per_byte
from jaxlm.eval.ranking import evaluate_run, means, measure_of
from jaxlm.model.decoder import build
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.retrieval.folder import said_vectors
from jaxlm.retrieval.rank import rank_towers
from jaxlm.retrieval.towers import find_towers, load_params, open_towers
from jaxlm.train.pretrained import load_pretrained
from jaxlm.train.run import make_loss


class Measure(NamedTuple):
    """A number for a model folder."""

    name: str
    of: Callable[[Path], float]
    best: Callable[[Sequence[float]], int]  # which of several numbers is best


def text_measure(tokenizer: Tokenizer, held_out: Sequence[str], *, batch_size: int, seq_len: int) -> Measure:
    """Bits per byte of held-out sources of text (`path?option=value`) by a decoder folder."""
    of, _ = _text(tokenizer, held_out, batch_size, seq_len)
    return Measure("bits per byte", of, lambda values: int(np.argmin(values)))


def text_loss(tokenizer: Tokenizer, held_out: Sequence[str], *, batch_size: int, seq_len: int
              ) -> Callable[[Path], float]:
    """The mean loss of a token of held-out text in nats, as LM-Cocktail weighs models by."""
    of, per_bit = _text(tokenizer, held_out, batch_size, seq_len)
    return lambda folder: of(folder) * per_bit


def _text(tokenizer: Tokenizer, held_out: Sequence[str], batch_size: int, seq_len: int
          ) -> tuple[Callable[[Path], float], float]:
    """Bits per byte of a folder, and how many nats a token one of them is."""
    documents = [source[i] for source in map(open_source, map(parse_source, held_out)) for i in range(len(source))]
    batches, num_bytes = eval_batches(documents, tokenizer, batch_size=batch_size, seq_len=seq_len)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    compiled = {}

    def of(folder: Path) -> float:
        model = load_pretrained(folder)
        if model.config not in compiled:
            loss = make_loss(build(model.config))
            compiled[model.config] = jax.jit(lambda params, batch: loss(params, batch, None)[1]["loss"])
        with jax.set_mesh(mesh):
            params = jax.tree.map(jnp.asarray, model.params)
            return bits_per_byte(compiled[model.config], params, batches, num_bytes, mesh)

    num_targets = sum(float(batch.loss_mask.sum()) for batch in batches)
    return of, math.log(2) * num_bytes / num_targets


def retrieval_measure(data: Sequence[str], measure: str) -> Measure:
    """The mean of a measure (`ndcg@10`) over BEIR folders (`folder?split=dev`) by a retriever folder.

    ValueError for a measure that there is not, and for folders that are no data.
    """
    _, depth = measure_of(measure)
    sets = [read_beir(*split_of(one, "dev")) for one in data]
    mesh, opened = make_mesh(MeshConfig()), []

    def of(folder: Path) -> float:
        if said_vectors(folder) is None:
            raise ValueError(f"{folder} has no modules.json: a search measures folders of sentence-transformers")
        config = find_towers(folder)
        # Opened once: a tokenizer equals only itself, and programs are compiled anew for another.
        opened[:] = opened or [open_towers(config)]
        with jax.set_mesh(mesh):
            put = partial(place_leaf, mesh=mesh, rules=ENCODER_RULES)
            towers = opened[0]._replace(params=load_params(config, opened[0], put))
            runs = [(rank_towers(towers, one, max(depth, 100))[towers.passage.width], one) for one in sets]
        return float(np.mean([means(evaluate_run(run, one.qrels, (measure,)))[measure] for run, one in runs]))

    return Measure(measure, of, lambda values: int(np.argmax(values)))
