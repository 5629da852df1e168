"""Our encoders as `mteb` evaluates models (Muennighoff et al. 2023, arXiv:2210.07316); the extra `mteb`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxlm.core.tree import count_parameters
from jaxlm.retrieval.corpus_vectors import fingerprint
from jaxlm.retrieval.embed import TextEncoder, embed_texts
from jaxlm.retrieval.retriever import Retriever

IGNORED = ("batch_size", "show_progress_bar")  # of `encode`; batches are made here, by tokens


@dataclass(frozen=True)
class MtebModel:
    """The protocol of encoders in mteb: `mteb.evaluate(MtebModel(...), tasks)`, on the mesh of the context."""

    retriever: Retriever
    mteb_model_meta: Any     # `mteb.models.ModelMeta`, see `mteb_model`
    batch_tokens: int = 8192

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_split: str, hf_subset: str,
               prompt_type: str | None = None, **kwargs: Any) -> np.ndarray:
        """The vectors of all texts in the batches of a loader, [n, D] float32.

        Queries get the query's prompt and tower, documents the passage's; texts of tasks without these two kinds
        (similarity, classification, clustering) get no prompt and the tower of passages, as mteb treats a
        SentenceTransformer. ValueError for inputs that are no text, and for settings with which the vectors would be
        others (`precision`).
        """
        if odd := [name for name, value in kwargs.items() if name not in IGNORED and value is not None]:
            raise ValueError(f"encode_kwargs {', '.join(odd)} cannot be given to a model of jaxlm")
        texts = []
        for batch in inputs:
            if "text" not in batch:
                raise ValueError(f"task {task_metadata.name} has inputs of {', '.join(batch)}; only text is encoded")
            texts += batch["text"]
        tower, kind = self.retriever, "query" if prompt_type == "query" else "passage"
        encoder, params = ((tower.query_encoder, tower.query_params) if kind == "query" else
                           (tower.encoder, tower.params))
        if prompt_type is None:
            encoder = replace(encoder, passage_prompt="")
        return embed_texts(encoder, params, texts, kind, batch_tokens=self.batch_tokens)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Each of [n, D] with each of [m, D], [n, m], as the encoder compares."""
        return self._comparable(embeddings1) @ self._comparable(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """[n, D] with [n, D] row by row, [n]."""
        return np.sum(self._comparable(embeddings1) * self._comparable(embeddings2), axis=1)

    def _comparable(self, x: Any) -> np.ndarray:
        x = np.atleast_2d(np.asarray(x, np.float32))
        if self.retriever.similarity == "dot":
            return x
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def mteb_model(retriever: Retriever, name: str, *, batch_tokens: int = 8192) -> MtebModel:
    """The model with its description, whose revision changes with the weights and with all else that decides vectors.

    ValueError: `mteb` is not installed.
    """
    towers = [(retriever.encoder, retriever.params), (retriever.query_encoder, retriever.query_params)]
    facts = json.dumps([[fingerprint(params), _settings(encoder)] for encoder, params in towers], sort_keys=True)
    encoder = retriever.encoder
    own = [params for i, (_, params) in enumerate(towers) if i == 0 or params is not retriever.params]
    meta = _mteb().models.ModelMeta(
        loader=None, name=f"jaxlm/{name}", revision=hashlib.sha256(facts.encode()).hexdigest()[:16], release_date=None,
        languages=None, n_parameters=sum(map(count_parameters, own)), memory_usage_mb=None,
        max_tokens=encoder.max_length, embed_dim=encoder.width, license=None, open_weights=None,
        public_training_code=None, public_training_data=None, framework=["JAX"],
        similarity_fn_name=retriever.similarity, training_datasets=None,
        use_instructions=bool(retriever.query_encoder.query_prompt or encoder.passage_prompt))
    return MtebModel(retriever, meta, batch_tokens)


def mteb_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks of mteb by name, such as `SciFact`. ValueError for one that there is not, with mteb's guess."""
    mteb = _mteb()
    try:
        return [mteb.get_task(name) for name in names]
    except KeyError as error:
        raise ValueError(str(error.args[0]).removeprefix("KeyError: ")) from None


def mteb_scores(model: MtebModel, tasks: Sequence[Any], folder: Path | None = None) -> dict[str, float]:
    """The main score of each task, as mteb computes and rounds it.

    Args:
      folder: keeps mteb's result files; tasks that are there for this revision of the model are not run again.
    """
    mteb = _mteb()
    cache = None if folder is None else mteb.ResultCache(folder)
    result = mteb.evaluate(model, tasks, cache=cache, show_progress_bar=False, co2_tracker=False,
                           encode_kwargs={"show_progress_bar": False})
    return {one.task_name: float(one.get_score()) for one in result.task_results}


def _settings(encoder: TextEncoder) -> dict[str, Any]:
    plain = {name: value for name, value in vars(encoder).items() if name not in ("model", "tokenizer")}
    return plain | {"tokenizer": encoder.tokenizer.fingerprint(), "config": repr(encoder.model.config)}


def _mteb() -> ModuleType:
    try:
        import mteb
    except ImportError:
        raise ValueError("evaluation with mteb needs the package: pip install jaxlm[mteb]") from None
    return mteb
