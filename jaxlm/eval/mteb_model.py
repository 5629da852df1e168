"""Our encoders as `mteb` evaluates models (Muennighoff et al. 2023, arXiv:2210.07316); the extra `mteb`."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.extras import extra
from jaxlm.core.tree import count_parameters
from jaxlm.objective.contrastive import Similarity
from jaxlm.retrieval.corpus_vectors import fingerprint
from jaxlm.retrieval.embed import Kind, TextEncoder, embed_texts, tokenize
from jaxlm.retrieval.rank import encoded_blocks
from jaxlm.retrieval.representations import REPRESENTATIONS, Encoded
from jaxlm.retrieval.searcher import memory
from jaxlm.retrieval.towers import Towers

ROWS = 64  # queries, and documents, whose tokens are compared at once
IGNORED = ("batch_size", "show_progress_bar")  # of `encode`; batches are made here, by tokens


@dataclass(frozen=True)
class MtebModel:
    """The protocol of encoders in mteb: `mteb.evaluate(MtebModel(...), tasks)`, on the mesh of the context."""

    towers: Towers
    mteb_model_meta: Any     # `mteb.models.ModelMeta`, see `mteb_model`
    batch_tokens: int = 8192

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_split: str, hf_subset: str,
               prompt_type: str | None = None, **kwargs: Any) -> np.ndarray:
        """What stands for all texts in the batches of a loader, [n, D], [n, V] or [n, T, D] float32; no token is 0.

        Queries get the query's prompt and tower, documents the passage's; texts of tasks without these two kinds
        (similarity, classification, clustering) get no prompt and the tower of passages, as mteb treats a
        SentenceTransformer. ValueError for inputs that are no text, for settings with which the vectors would be
        others (`precision`), and for late vectors in tasks without queries and documents.
        """
        if odd := [name for name, value in kwargs.items() if name not in IGNORED and value is not None]:
            raise ValueError(f"encode_kwargs {', '.join(odd)} cannot be given to a model of jaxlm")
        towers, kind = self.towers, "query" if prompt_type == "query" else "passage"
        if prompt_type is None:
            if towers.vectors == "late":
                raise ValueError(f"task {task_metadata.name} asks for one vector a text; late vectors serve retrieval "
                                 "only")
            towers = towers._replace(passage=replace(towers.passage, passage_prompt=""))
        texts = []
        for batch in inputs:
            if "text" not in batch:
                raise ValueError(f"task {task_metadata.name} has inputs of {', '.join(batch)}; only text is encoded")
            texts += batch["text"]
        if towers.vectors == "dense":
            return embed_texts(*towers.at_work(kind), texts, kind, batch_tokens=self.batch_tokens)
        return _whole(towers, texts, kind, self.batch_tokens)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Each of n texts with each of m, [n, m], as the encoder compares."""
        if self.towers.vectors == "late":
            return _max_sims(*(np.asarray(x, np.float32) for x in (embeddings1, embeddings2)), self.towers.similarity)
        return self._comparable(embeddings1) @ self._comparable(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """n texts with n others one by one, [n]."""
        if self.towers.vectors == "late":
            return np.array([self.similarity(one[None], other[None])[0, 0] for one, other in zip(
                np.asarray(embeddings1), np.asarray(embeddings2), strict=True)], np.float32)
        return np.sum(self._comparable(embeddings1) * self._comparable(embeddings2), axis=1)

    def _comparable(self, x: Any) -> np.ndarray:
        x = np.atleast_2d(np.asarray(x, np.float32))
        if self.towers.similarity == "dot":
            return x
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _whole(towers: Towers, texts: Sequence[str], kind: Kind, batch_tokens: int) -> np.ndarray:
    """What stands for texts as one array in their order, tokens filled up with vectors of 0.

    ValueError for an array that does not fit into memory.
    """
    config, width = towers.passage.model.config, towers.passage.width
    most = max((len(one) for one in tokenize(towers.encoder(kind), texts, kind).ids), default=0)
    shape = (len(texts), config.vocab_size) if towers.vectors == "sparse" else (len(texts), most, width)
    if (needed := 4 * math.prod(shape)) > memory():
        raise ValueError(f"the {towers.vectors} vectors of {len(texts)} texts take {needed / 2**30:.1f} GiB, more than "
                         f"the {memory() / 2**30:.1f} GiB of this machine, and mteb wants them at once: measure with "
                         "--data instead")
    result = np.zeros(shape, np.float32)
    for chosen, found in encoded_blocks(towers, texts, kind, batch_tokens=batch_tokens):
        x = np.asarray(found.x if found.mask is None else jnp.where(found.mask[..., None] > 0, found.x, 0))
        x = x[:len(chosen), :shape[1]]
        result[(chosen, *(slice(size) for size in x.shape[1:]))] = x
    return result


def _max_sims(queries: np.ndarray, documents: np.ndarray, similarity: Similarity) -> np.ndarray:
    """[n, T, D] with [m, S, D], a few at a time."""
    scores = np.empty((len(queries), len(documents)), np.float32)
    for i in range(0, len(queries), ROWS):
        for j in range(0, len(documents), ROWS):
            found = _late_scores(queries[i:i + ROWS], documents[j:j + ROWS], similarity)
            scores[i:i + ROWS, j:j + ROWS] = found
    return scores


@partial(jax.jit, static_argnums=2)
def _late_scores(queries: jax.Array, documents: jax.Array, similarity: Similarity) -> jax.Array:
    pair = [Encoded(x, jnp.any(x != 0, axis=-1).astype(jnp.int32)) for x in (queries, documents)]
    return REPRESENTATIONS["late"].scores(*pair, similarity, 1)


def mteb_model(towers: Towers, name: str, *, batch_tokens: int = 8192) -> MtebModel:
    """The model with its description, whose revision changes with the weights and with all else that decides vectors.

    ValueError: `mteb` is not installed.
    """
    both = [towers.at_work(kind) for kind in ("passage", "query")]
    facts = [[fingerprint(params), _settings(encoder)] for encoder, params in both]
    revision = json.dumps(facts if towers.vectors == "dense" else [*facts, towers.vectors], sort_keys=True)
    passage = towers.passage
    meta = extra("mteb", "mteb").models.ModelMeta(
        loader=None, name=f"jaxlm/{name}", revision=hashlib.sha256(revision.encode()).hexdigest()[:16],
        release_date=None, languages=None, n_parameters=count_parameters(towers.params), memory_usage_mb=None,
        max_tokens=passage.max_length,
        embed_dim=passage.model.config.vocab_size if towers.vectors == "sparse" else passage.width, license=None,
        open_weights=None, public_training_code=None, public_training_data=None, framework=["JAX"],
        similarity_fn_name=towers.similarity, training_datasets=None,
        use_instructions=bool(towers.query.query_prompt or passage.passage_prompt))
    return MtebModel(towers, meta, batch_tokens)


def mteb_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks of mteb by name, such as `SciFact`. ValueError for one that there is not, with mteb's guess."""
    mteb = extra("mteb", "mteb")
    try:
        return [mteb.get_task(name) for name in names]
    except KeyError as error:
        raise ValueError(str(error.args[0]).removeprefix("KeyError: ")) from None


def mteb_scores(model: MtebModel, tasks: Sequence[Any], folder: Path | None = None) -> dict[str, float]:
    """The main score of each task, as mteb computes and rounds it.

    Args:
      folder: keeps mteb's result files; tasks that are there for this revision of the model are not run again.
    """
    mteb = extra("mteb", "mteb")
    cache = None if folder is None else mteb.ResultCache(folder)
    result = mteb.evaluate(model, tasks, cache=cache, show_progress_bar=False, co2_tracker=False,
                           encode_kwargs={"show_progress_bar": False})
    return {one.task_name: float(one.get_score()) for one in result.task_results}


def _settings(encoder: TextEncoder) -> dict[str, Any]:
    plain = {name: value for name, value in vars(encoder).items() if name not in ("model", "tokenizer")}
    return plain | {"tokenizer": encoder.tokenizer.fingerprint(), "config": repr(encoder.model.config)}
