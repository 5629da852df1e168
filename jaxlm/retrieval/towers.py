"""The encoders of queries and of passages: one for both (siamese), or a tower each with parameters of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig
from jaxlm.model.encoder import Encoder
from jaxlm.model.hf import Put
from jaxlm.model.lora import LoraConfig
from jaxlm.objective.contrastive import Similarity
from jaxlm.retrieval.embed import Kind, Pooling, TextEncoder
from jaxlm.retrieval.folder import MODULES, architecture_of, load_text_encoder, open_text_encoder, save_text_encoder
from jaxlm.retrieval.representations import REPRESENTATIONS, Representation, Vectors

KINDS: tuple[Kind, ...] = ("query", "passage")


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Which encoders, and what stands for a text."""

    init: str = ""                   # the model to start from
    query_init: str = ""             # another one for queries: two towers; the same folder gives two equal ones
    vectors: Vectors = "dense"       # see `jaxlm.retrieval.representations`
    pooling: Pooling | None = None   # of a folder without modules.json
    max_length: int | None = None    # tokens of a text; None: what the folder says

    def folder(self, kind: Kind) -> str:
        """The model of a tower."""
        return self.query_init if kind == "query" and self.query_init else self.init

    def pooling_of(self, folder: str) -> Pooling | None:
        """A representation that does not pool does not ask how; the field of the encoder holds something all the same.

        ValueError for a pooling without effect.
        """
        if REPRESENTATIONS[self.vectors].pooled:
            return self.pooling
        if self.pooling is not None:
            raise ValueError(f"--pooling has no effect on {self.vectors} vectors; leave it out")
        return None if (Path(folder) / MODULES).exists() else "mean"


class Towers(NamedTuple):
    """Siamese parameters are those of the encoder, two towers' are `{"query": ..., "passage": ...}`."""

    query: TextEncoder
    passage: TextEncoder
    shared: bool
    vectors: Vectors

    def encoder(self, kind: Kind) -> TextEncoder:
        """That of a tower."""
        return self.query if kind == "query" else self.passage

    def part(self, params: Any, kind: Kind) -> Any:
        """The parameters of a tower."""
        return params if self.shared else params[kind]

    def whole(self, make: Callable[[Kind], Any]) -> Any:
        """Parameters from those of each tower, made once where they share them."""
        return make("passage") if self.shared else {kind: make(kind) for kind in KINDS}

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""
        return self.whole(lambda kind: self.encoder(kind).model.init(jax.random.fold_in(key, KINDS.index(kind))))

    @property
    def representation(self) -> Representation:
        """How texts are encoded and compared."""
        return REPRESENTATIONS[self.vectors]


def siamese(encoder: TextEncoder, vectors: Vectors = "dense") -> Towers:
    """One encoder for queries and passages."""
    return Towers(encoder, encoder, shared=True, vectors=vectors)


def open_towers(config: TowersConfig, compute: ComputeConfig, similarity: Similarity) -> Towers:
    """The towers without their weights; they compare by `similarity`, whatever their folders say.

    ValueError for encoders that do not fit each other or the representation, and as `open_text_encoder` does.
    """
    if not config.init:
        raise ValueError("--init names the model to start from: a folder of sentence-transformers or transformers")

    def one(kind: Kind) -> TextEncoder:
        folder = config.folder(kind)
        encoder = open_text_encoder(folder, pooling=config.pooling_of(folder), compute=compute,
                                    mlm_head=REPRESENTATIONS[config.vectors].mlm_head)
        return replace(encoder, similarity=similarity, max_length=config.max_length or encoder.max_length)

    passage = one("passage")
    query = one("query") if config.query_init else passage
    if config.vectors == "sparse":
        if query.tokenizer.fingerprint() != passage.tokenizer.fingerprint():
            raise ValueError(f"{config.query_init} and {config.init} have different vocabularies, so their sparse "
                             "vectors cannot be compared")
    elif query.width != passage.width:
        raise ValueError(f"vectors of {config.query_init} have {query.width} numbers, those of {config.init} "
                         f"{passage.width}: they cannot be compared")
    return Towers(query, passage, shared=not config.query_init, vectors=config.vectors)


def load_params(config: TowersConfig, towers: Towers, put: Put) -> Any:
    """The weights of the folders, placed by `put` with their path in the whole tree."""
    def one(kind: Kind) -> Any:
        folder, before = config.folder(kind), "" if towers.shared else f"{kind}/"
        return load_text_encoder(folder, pooling=config.pooling_of(folder),
                                 mlm_head=towers.representation.mlm_head,
                                 put=lambda path, leaf: put(before + path, np.asarray(leaf)))[1]

    return towers.whole(one)


def adapted(towers: Towers, config: LoraConfig, key: jax.Array, params: Any) -> Any:
    """The parameters with adapters that change nothing yet, of each tower its own."""
    return towers.whole(lambda kind: lora.init(jax.random.fold_in(key, KINDS.index(kind)), towers.part(params, kind),
                                               config))


def has_dropout(encoder: TextEncoder) -> bool:
    """Decoders have none."""
    return isinstance(encoder.model, Encoder)


def save_towers(folder: Path, config: TowersConfig, towers: Towers, params: Any) -> None:
    """Writes the encoder to `folder`, two towers to `folder/query` and `folder/passage`; adapters are multiplied out.

    Dense vectors as a folder of sentence-transformers, sparse ones as its SparseEncoder reads them; late ones as a
    plain model, which those libraries would need a projection for.
    """
    save = partial(save_text_encoder, vectors=config.vectors, overwrite=True)
    for kind in ("passage",) if towers.shared else KINDS:
        save(folder if towers.shared else folder / kind, towers.encoder(kind),
             jax.device_get(lora.merge(towers.part(params, kind))), architecture=architecture_of(config.folder(kind)))
