"""The encoders of queries and of passages: one for both (siamese), or a tower each with parameters of its own.

    exported/                             a model: siamese
    exported/query, exported/passage      a model each: two towers
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.core.mesh import place_leaf
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig
from jaxlm.model.encoder import Encoder
from jaxlm.model.hf import Put
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import ENCODER_RULES
from jaxlm.model.safetensors_io import INDEX, SINGLE
from jaxlm.objective.contrastive import Similarity
from jaxlm.retrieval.embed import Kind, Pooling, TextEncoder
from jaxlm.retrieval.folder import (
    architecture_of,
    load_weights,
    open_text_encoder,
    said_vectors,
    save_text_encoder,
)
from jaxlm.retrieval.representations import REPRESENTATIONS, Representation, Vectors

KINDS: tuple[Kind, ...] = ("query", "passage")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Which encoders, and what stands for a text."""

    init: str = ""                   # the model to start from
    query_init: str = ""             # another one for queries: two towers; the same folder gives two equal ones
    vectors: Vectors = "dense"       # see `jaxlm.retrieval.representations`
    pooling: Pooling | None = None   # of a folder without modules.json
    query_prompt: str | None = None  # before every query, "query: " for E5; None: what the folder says
    passage_prompt: str | None = None
    max_length: int | None = None    # tokens of a text; None: what the folder says

    def folder(self, kind: Kind) -> str:
        """The model of a tower."""
        return self.query_init if kind == "query" and self.query_init else self.init

    def prompts(self) -> dict[str, str]:
        """Those that are given, by the fields of a `TextEncoder`."""
        given = {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}
        return {name: prompt for name, prompt in given.items() if prompt is not None}


class Towers(NamedTuple):
    """Siamese parameters are those of the encoder, two towers' are `{"query": ..., "passage": ...}`.

    A training step gets them as an argument, all else works with those that are held here.
    """

    query: TextEncoder
    passage: TextEncoder
    shared: bool
    vectors: Vectors
    params: Any = None

    def encoder(self, kind: Kind) -> TextEncoder:
        """That of a tower."""
        return self.query if kind == "query" else self.passage

    def part(self, params: Any, kind: Kind) -> Any:
        """The parameters of a tower."""
        return params if self.shared else params[kind]

    def at_work(self, kind: Kind) -> tuple[TextEncoder, Any]:
        """A tower with its own parameters."""
        assert self.params is not None
        return self.encoder(kind), self.part(self.params, kind)

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

    @property
    def prompts(self) -> str:
        """What stands before texts, in words."""
        said = {"query": self.query.query_prompt, "passage": self.passage.passage_prompt}
        return " and ".join(f"{text!r} before every {kind}" for kind, text in said.items() if text) or "no prompts"

    @property
    def similarity(self) -> Similarity:
        """How queries and passages are compared."""
        return self.passage.similarity


def siamese(encoder: TextEncoder, vectors: Vectors = "dense", params: Any = None) -> Towers:
    """One encoder for queries and passages."""
    return Towers(encoder, encoder, shared=True, vectors=vectors, params=params)


def find_towers(folder: Path | str, query_folder: Path | str = "", *, vectors: Vectors | None = None,
                pooling: Pooling | None = None, query_prompt: str | None = None, passage_prompt: str | None = None
                ) -> TowersConfig:
    """The configuration of towers that lie in folders, as `save_towers` and others leave them.

    Args:
      folder: of one model, or of two with the names query and passage.
      query_folder: of another model that encodes the queries.
      vectors: None: sparse where the folder is a SparseEncoder, else dense; late ones no folder says.
      query_prompt, passage_prompt: None: what the folders say.

    ValueError: half of two towers, a folder that is both, towers of different vectors.
    """
    folder, query_folder = str(folder), str(query_folder or "")
    if _is_pair(folder):
        if query_folder:
            raise ValueError(f"{folder} has a tower of queries already: leave out {query_folder}, or name "
                             f"{folder}/passage")
        folder, query_folder = f"{folder}/passage", f"{folder}/query"
    elif query_folder and _is_pair(query_folder):
        raise ValueError(f"{query_folder} holds two towers: name {query_folder}/query")
    said = said_vectors(folder)
    if query_folder and (other := said_vectors(query_folder)) != said and None not in (said, other):
        raise ValueError(f"{query_folder} is made for {other} vectors and {folder} for {said} ones: they cannot be "
                         "compared")
    return TowersConfig(init=folder, query_init=query_folder, vectors=vectors or said or "dense", pooling=pooling,
                        query_prompt=query_prompt, passage_prompt=passage_prompt)


def _is_pair(folder: str) -> bool:
    """Whether a folder holds two towers."""
    here = [kind for kind in KINDS if (Path(folder) / kind).is_dir()]
    if here and (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} is a model and holds the folder {here[0]} of a tower too: name the one that is "
                         f"meant as {folder}/{here[0]}, or move the other away")
    for kind in KINDS if here else ():
        tower = Path(folder) / kind
        if not (tower / "config.json").is_file() or not any((tower / name).is_file() for name in (SINGLE, INDEX)):
            raise ValueError(f"{tower} holds no model, but {folder} has a folder {here[0]}: two towers are complete as "
                             "query and passage, each with config.json and model.safetensors")
    return bool(here)


def open_towers(config: TowersConfig, compute: ComputeConfig | None = None, similarity: Similarity | None = None
                ) -> Towers:
    """The towers without their weights.

    Args:
      similarity: by which they compare, whatever their folders say; None: as these say.

    ValueError for encoders that do not fit each other or the representation, for a prompt that leaves no room for a
    text, and as `open_text_encoder` does.
    """
    if not config.init:
        raise ValueError("--init names the model to start from: a folder of sentence-transformers or transformers")

    def one(kind: Kind) -> TextEncoder:
        encoder = open_text_encoder(config.folder(kind), pooling=config.pooling, compute=compute,
                                    vectors=config.vectors)
        return replace(encoder, similarity=similarity or encoder.similarity,
                       max_length=config.max_length or encoder.max_length, **config.prompts())

    passage = one("passage")
    query = one("query") if config.query_init else passage
    if config.vectors == "sparse" and query.tokenizer.fingerprint() != passage.tokenizer.fingerprint():
        raise ValueError(f"{config.query_init} and {config.init} have different vocabularies, so their sparse vectors "
                         "cannot be compared")
    for name in ("similarity",) if config.vectors == "sparse" else ("width", "similarity"):
        mine, other = getattr(query, name), getattr(passage, name)
        if mine != other:
            raise ValueError(f"{config.query_init} cannot encode queries for {config.init}: the {name} of its vectors "
                             f"is {mine}, not {other}")
    _check_room(query, "query", query.query_prompt)
    _check_room(passage, "passage", passage.passage_prompt)
    return Towers(query, passage, shared=not config.query_init, vectors=config.vectors)


def _check_room(encoder: TextEncoder, kind: Kind, prompt: str) -> None:
    """ValueError for a prompt after which nothing of a text is read."""
    room = encoder.max_length - len(encoder.before) - len(encoder.after)
    taken = len(encoder.tokenizer.encode(prompt))
    if taken >= room:
        raise ValueError(f"the {kind} prompt {prompt!r} has {taken} tokens, and no more than {room} of a text with its "
                         "prompt are read: give a shorter prompt or a larger max_length")


def load_params(config: TowersConfig, towers: Towers, put: Put) -> Any:
    """The weights of the folders, placed by `put` with their path in the whole tree."""
    def one(kind: Kind) -> Any:
        before = "" if towers.shared else f"{kind}/"
        return load_weights(config.folder(kind), towers.encoder(kind),
                            put=lambda path, leaf: put(before + path, np.asarray(leaf)))

    return towers.whole(one)


def load_towers(config: TowersConfig, mesh: Mesh, *, check: Callable[[Towers], None] | None = None) -> Towers:
    """Towers put to work, their parameters on a mesh.

    Args:
      check: raises what speaks against them before any weights are read.

    ValueError: see `open_towers`.
    """
    towers = open_towers(config)
    if check is not None:
        check(towers)
    log.info("%s: %s", config.init, towers.prompts)
    return towers._replace(params=load_params(config, towers, partial(place_leaf, mesh=mesh, rules=ENCODER_RULES)))


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
