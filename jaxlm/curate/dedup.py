"""Duplicates: exact ones by a hash of the words, near ones through the four MinHash stages of datatrove."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.curate.config import DedupConfig
from jaxlm.curate.extras import extra
from jaxlm.curate.filters import word_tokenizer

HASH_BYTES = 16


def content_hash(text: str) -> bytes:
    """BLAKE2b of the text with each run of white space as one space: among 10^12 texts two
    different ones have the same 16 bytes with probability 10^-15."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=HASH_BYTES).digest()


def first_of_each(hashes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Marks the first of equal hashes, over all arrays in order: `[[a, b], [b, a, c]]` is `[[1, 1], [0, 0, 1]]`.

    Args:
      hashes: of each file [n] of numpy type `S16` or void; all are in memory, 16 bytes a document.
    """
    lengths = [len(one) for one in hashes]
    joined = np.concatenate([*hashes]) if hashes else np.zeros(0, f"V{HASH_BYTES}")
    # `unique` with the index gives the first place of each value: it sorts stably.
    _, first = np.unique(joined, return_index=True)
    keep = np.zeros(len(joined), bool)
    keep[first] = True
    return np.split(keep, np.cumsum(lengths)[:-1]) if lengths else []


def minhash_config(config: DedupConfig) -> Any:
    """datatrove's configuration: lower case, no punctuation, every number the same, 64 bit hashes."""
    return extra("datatrove.pipeline.dedup.minhash").MinhashConfig(
        n_grams=config.ngram, num_buckets=config.buckets, hashes_per_bucket=config.hashes, seed=config.seed,
        # Its default, xxhash, breaks with version 4 of that package, which others in the environment need.
        hash_config=extra("datatrove.utils.hashing").HashConfig(hash_fc="sha1"))


def minhash_signatures(config: DedupConfig, folder: Path) -> Any:
    """Stage 1 of 4, per task: the signatures of its documents. Texts shorter than an n-gram have none and stay."""
    return extra("datatrove.pipeline.dedup.minhash").MinhashDedupSignature(
        str(folder / "signatures"), minhash_config(config), language=word_tokenizer())


def minhash_buckets(config: DedupConfig, folder: Path) -> Any:
    """Stage 2, one task per bucket: pairs of documents that share a bucket."""
    return extra("datatrove.pipeline.dedup.minhash").MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "buckets"), config=minhash_config(config))


def minhash_clusters(config: DedupConfig, folder: Path) -> Any:
    """Stage 3, one task: pairs to clusters, of which one document stays."""
    return extra("datatrove.pipeline.dedup.minhash").MinhashDedupCluster(
        str(folder / "buckets"), str(folder / "clusters"), config=minhash_config(config))


def minhash_filter(folder: Path) -> Any:
    """Stage 4, per task: drops the other documents of each cluster. Tasks must see the documents of stage 1."""
    return extra("datatrove.pipeline.dedup.minhash").MinhashDedupFilter(str(folder / "clusters"))
