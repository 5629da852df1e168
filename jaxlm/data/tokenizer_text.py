"""The text that a tokenizer is trained on: a number of bytes from weighted sources, by language where that is asked."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.sources import Source

log = logging.getLogger(__name__)


class Pool(NamedTuple):
    """Documents of one source, of one language or (None) of all."""

    source: Source
    language: str | None
    documents: np.ndarray  # their indices


def make_pools(sources: Sequence[Source], languages: Sequence[str] | None = None) -> list[Pool]:
    """One pool a source, or with `languages` one for each of them that a source holds.

    Documents of another language or without one are then left out, and the log says how many. ValueError for a
    language without a document.
    """
    if languages is None:
        return [Pool(source, None, np.arange(len(source))) for source in sources]
    pools, left_out = [], 0
    for source in sources:
        of = [document.language if (document := source[i]) else "" for i in range(len(source))]
        for language in languages:
            found = np.array([i for i, one in enumerate(of) if one == language], np.int64)
            pools += [Pool(source, language, found)] if len(found) else []
        left_out += sum(one != "" and one not in languages for one in of)
    if left_out:
        log.warning("left out %d documents that are labelled neither %s", left_out, " nor ".join(languages))
    for language in languages:
        if not any(pool.language == language for pool in pools):
            raise ValueError(f"no document of the training sources is labelled {language!r}; say it with "
                             "?language= or ?language_field= behind a path")
    return pools


def draw_texts(pools: Sequence[Pool], *, num_bytes: int, seed: int, shares: Mapping[str, float] | None = None,
               ) -> list[str]:
    """Random documents without repetition, `num_bytes` of UTF-8 in all; the last one of a pool is cut to its quota.

    A pool's quota is its source's weight over the weights of all, times the share of its language with `shares`, which
    add up to 1. So 1000 bytes with {"ko": 0.15, "en": 0.85} and two English sources of weight 1 and 4:

        ko 150, first en 170, second en 680

    ValueError for a pool with less text than its quota.
    """
    assert shares is None or abs(sum(shares.values()) - 1) < 1e-9
    texts = []
    for number, pool in enumerate(pools):
        weights = sum(other.source.config.weight for other in pools if other.language == pool.language)
        share = 1.0 if shares is None else shares[pool.language]
        quota = round(num_bytes * share * pool.source.config.weight / weights)
        # Sources of one length, and languages of one source, get orders of their own.
        own_seed = zlib.crc32(f"{seed} {number} {pool.source.name} {pool.language}".encode())
        texts += _take(pool, quota, np.random.default_rng(own_seed))
    return texts


def _take(pool: Pool, quota: int, rng: np.random.Generator) -> list[str]:
    texts, held = [], 0
    for i in rng.permutation(pool.documents):
        if held >= quota:
            return texts
        document = pool.source[i]
        if document is None:
            continue
        # A cut inside a character loses the character.
        text = document.text.encode("utf-8")[:quota - held]
        held += len(text)
        texts.append(text.decode("utf-8", errors="ignore"))
    if held < quota:
        kind = f"{pool.language} " if pool.language else ""
        raise ValueError(f"{pool.source.config.path}: {held:,} bytes of {kind}text, but {quota:,} are asked for: train "
                         "on fewer bytes, or give this source a smaller weight or its language a smaller share")
    return texts
