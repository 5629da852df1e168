"""Folders of models put to work on a mesh: who encodes passages, and who queries."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.core.mesh import place_leaf
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.retrieval.embed import Pooling, TextEncoder, embed_texts
from jaxlm.retrieval.folder import load_text_encoder
from jaxlm.retrieval.index import Similarity
from jaxlm.retrieval.rank import corpus_blocks


class Retriever(NamedTuple):
    """Encoders with their parameters; both are one and the same unless there are two towers."""

    encoder: TextEncoder        # of passages
    params: Any
    query_encoder: TextEncoder
    query_params: Any

    @property
    def similarity(self) -> Similarity:
        """How queries and passages are compared."""
        return self.encoder.similarity


def open_retriever(folder: Path | str, mesh: Mesh, *, query_folder: Path | str = "", pooling: Pooling | None = None
                   ) -> Retriever:
    """The models of folders, their parameters on a mesh.

    Args:
      query_folder: of the model that encodes queries; empty: that of the passages.
      pooling: of folders without `modules.json`.

    ValueError: see `load_text_encoder`; models whose vectors cannot be compared, or that compare them differently.
    """
    put = partial(place_leaf, mesh=mesh, rules=ENCODER_RULES)
    passages = load_text_encoder(folder, pooling=pooling, put=put)
    queries = load_text_encoder(query_folder, pooling=pooling, put=put) if query_folder else passages
    for name in ("width", "similarity"):
        mine, other = getattr(queries[0], name), getattr(passages[0], name)
        if mine != other:
            raise ValueError(f"{query_folder} cannot encode queries for {folder}: the {name} of its vectors is {mine}, "
                             f"not {other}")
    return Retriever(*passages, *queries)


def passage_blocks(retriever: Retriever, texts: Sequence[str], folder: Path | None = None, *, batch_tokens: int = 4096
                   ) -> list[np.ndarray]:
    """`rank.corpus_blocks` with the tower of the passages."""
    return corpus_blocks(retriever.encoder, retriever.params, texts, folder, batch_tokens=batch_tokens)


def query_vectors(retriever: Retriever, texts: Sequence[str], *, batch_tokens: int = 4096) -> np.ndarray:
    """`embed_texts` with the tower of the queries."""
    return embed_texts(retriever.query_encoder, retriever.query_params, texts, "query", batch_tokens=batch_tokens)
