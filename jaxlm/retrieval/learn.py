"""Batches to train text encoders on: tokens from rows of texts, and what their data says about each pair."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.data.beir import beir_rows, read_beir, split_of
from jaxlm.data.retrieval_batches import RetrievalBatch, RetrievalBatchConfig, RetrievalBatches
from jaxlm.data.retrieval_rows import Passage, RetrievalRow, read_retrieval_rows
from jaxlm.objective.contrastive_masks import GuideConfig
from jaxlm.retrieval.embed import Kind, TextEncoder, embed_texts, tokenize
from jaxlm.retrieval.packed_texts import Texts, pack
from jaxlm.retrieval.towers import KINDS, Towers

log = logging.getLogger(__name__)


class DataSet(NamedTuple):
    """Rows with what names them: `fingerprint` says whether a position in them still means the same."""

    name: str
    rows: Sequence[RetrievalRow]
    digest: str

    def fingerprint(self) -> str:
        """Of the content."""
        return self.digest


def open_data_sets(specs: Sequence[str]) -> list[DataSet]:
    """JSONL files of rows, and BEIR folders, of which the split train is taken unless another is named.

    ValueError as `read_retrieval_rows` and `read_beir`, and without any.
    """
    if not specs:
        raise ValueError("--data.train names the rows to learn from: JSONL files or BEIR folders")
    found = []
    for spec in specs:
        folder, split = split_of(spec, "train")
        rows = beir_rows(read_beir(folder, split)) if Path(folder).is_dir() else read_retrieval_rows(spec).rows
        found.append(DataSet(spec, rows, hashlib.sha256(repr(rows).encode()).hexdigest()))
        log.info("%s: %d rows", spec, len(rows))
    return found


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(GuideConfig):
    """A frozen model whose scores say which passages answer a query though nobody labelled them (GISTEmbed)."""

    model: str = ""  # a folder of sentence-transformers; none: labels alone decide
    query_prompt: str | None = None    # before every query of the guide; None: what its folder says
    passage_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.margin, self.kind, self.query_prompt, self.passage_prompt)
        if not self.model and given != (0.0, "absolute", None, None):
            raise ValueError("guide settings have no effect without guide.model")


class Guide(NamedTuple):
    """The vectors of a guide, of length 1: it is frozen, so that each text is encoded once, before training."""

    rows: Mapping[Kind, Mapping[str, int]]  # of each text
    vectors: Mapping[Kind, np.ndarray]      # [texts, D] float32

    def of(self, kind: Kind, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), D]."""
        return self.vectors[kind][[self.rows[kind][text] for text in texts]]


def make_guide(encoder: TextEncoder, params: Any, sources: Sequence["DataSet"]) -> Guide:
    """The vectors of all queries and passages, by the devices of the context's mesh, in host memory."""
    rows = [row for source in sources for row in source.rows]
    texts = {"query": dict.fromkeys(row.query for row in rows),
             "passage": dict.fromkeys(one.text for row in rows for one in (*row.positives, *row.negatives))}
    log.info("the guide encodes %d queries and %d passages", *map(len, texts.values()))
    vectors = {kind: embed_texts(encoder, params, list(texts[kind]), kind) for kind in KINDS}
    return Guide({kind: {text: i for i, text in enumerate(texts[kind])} for kind in KINDS},
                 {kind: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
                  for kind, x in vectors.items()})


class EncodedBatches:
    """An endless iterator of dicts of arrays, for `train.loop.fit`: this process's part of every batch.

        query      Texts, B of them in groups
        passage    Texts, B * P of them in groups: row by row the positive, then the negatives
        relevance  [B, P] int32: 1 the positive, 0 a negative (`objective.contrastive_masks`)
        excluded   [B, K] bool: keys that answer the query too, but are not its positive in this batch
        step       [B] int32: the number of the batch, which a schedule needs
        scores     [B, P] float32 of the teacher, if asked for
        guide      {"query": [B, D], "passage": [B, P, D]} float32, with a guide

    Texts share rows (`pack`) with others of their group: there are `groups`, a multiple of the devices and of the
    parts of GradCache. Every process makes the whole batch and keeps its part; the K keys are always those of the whole
    batch.

    ValueError for data without the scores that are asked for, and as `RetrievalBatches`.
    """

    def __init__(self, towers: Towers, sources: Sequence[DataSet], config: RetrievalBatchConfig, *,
                 teacher: bool = False, groups: int = 1, loader: int = 0, loaders: int = 1) -> None:
        if config.batch_size % groups or groups % loaders:
            raise ValueError(f"batch.batch_size {config.batch_size} does not divide into {groups} groups, or these "
                             f"among {loaders} data shards")
        self.sources, self._towers, self._teacher = sources, towers, teacher
        self.guide: Guide | None = None  # set after these checks, since making one takes long
        self._batches = RetrievalBatches([source.rows for source in sources], config)
        if teacher:
            check_scores(sources, config.num_negatives)
        self._groups, self._loader, self._loaders = groups, loader, loaders
        self._places = self._tokens = self._cut = self._excluded = 0

    def __iter__(self) -> "EncodedBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        step = self._batches.get_state()["drawn"]
        batch = next(self._batches)
        passages = [one.text for one in keys_of(batch)]
        count, each = len(batch.queries), len(passages) // len(batch.queries)
        own = lambda x: x.reshape(count, each, -1)
        relevance = np.zeros((count, each), np.int32)
        relevance[:, 0] = 1
        excluded = other_answers(batch, each)
        self._excluded += int(excluded.sum())
        whole = {"query": self._encode(batch.queries, "query"),
                 "passage": self._encode(passages, "passage"),
                 "relevance": relevance, "excluded": excluded, "step": np.full(count, step, np.int32)}
        if self._teacher:
            whole["scores"] = batch.scores
        if self.guide is not None:
            whole["guide"] = {"query": self.guide.of("query", batch.queries),
                              "passage": own(self.guide.of("passage", passages))}
        return jax.tree.map(lambda x: np.split(x, self._loaders)[self._loader], whole)

    def _encode(self, texts: Sequence[str], kind: Kind) -> Texts:
        encoder = self._towers.encoder(kind)
        ids, num_cut = tokenize(encoder, texts, kind)
        texts = pack(ids, encoder.max_length, self._groups)
        self._places, self._tokens = self._places + texts.tokens.size, self._tokens + sum(map(len, ids))
        self._cut += num_cut
        return texts

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state() | {"sources": [source.fingerprint() for source in self.sources]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a state, and counts from there; ValueError if it is of other data."""
        for source, then in zip(self.sources, state["sources"], strict=True):
            if then != source.fingerprint():
                raise ValueError(f"{source.name} is not the data that this run began with; a position in it means "
                                 "nothing now")
        self._batches.set_state({"drawn": state["drawn"]})
        self._places = self._tokens = self._cut = self._excluded = 0

    def stats(self) -> dict[str, float]:
        """Shares and counts since this process began, or since `set_state`."""
        return {"data/padding": 1 - self._tokens / max(self._places, 1), "data/cut_texts": self._cut,
                "data/excluded_keys": self._excluded}

    def close(self) -> None:
        """Nothing is open."""


def check_scores(sources: Sequence[DataSet], num_negatives: int) -> None:
    """ValueError unless every row can be compared with what a teacher says of it."""
    if num_negatives < 1:
        raise ValueError("a teacher's scores compare a positive with negatives: set batch.num_negatives to 1 or more")
    for source in sources:
        if any(row.positive_scores is None or row.negative_scores is None for row in source.rows):
            raise ValueError(f"{source.name} has no scores of a teacher to learn from: its rows need pos_scores and "
                             "neg_scores, or take loss.kind contrastive")


def keys_of(batch: RetrievalBatch) -> list[Passage]:
    """All passages of a batch, row by row: the positive, then the negatives."""
    return [one for positive, negatives in zip(batch.positives, batch.negatives, strict=True)
            for one in (positive, *negatives)]


def other_answers(batch: RetrievalBatch, each: int) -> np.ndarray:
    """Keys that answer a query and are not its own positive of this batch, [B, B * each] bool.

    Facts of one entity often share a passage: then the positive of one row would be a negative of another.
    """
    excluded = np.array([[one.id in answers for one in keys_of(batch)] for answers in batch.positive_ids])
    own = np.arange(len(batch.queries))
    excluded[own, own * each] = False
    return excluded
