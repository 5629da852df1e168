"""An encoder put to work on a corpus: its vectors, kept in a folder or not, and test sets ranked by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.beir import BeirSet
from jaxlm.retrieval.corpus_vectors import encode_corpus, fingerprint
from jaxlm.retrieval.embed import TextEncoder, embed_texts
from jaxlm.retrieval.index import as_run, search


def corpus_blocks(
    encoder: TextEncoder, params: Any, texts: Sequence[str], folder: Path | None, *, batch_tokens: int = 4096,
    rows_per_shard: int = 16384,
) -> list[np.ndarray]:
    """The vectors of passages as blocks for `index.search`; with a folder kept there, and read from there next time.

    An interrupted call goes on where it was. ValueError for a folder with vectors of another encoder or other texts.
    """
    encode = lambda part: embed_texts(encoder, params, part, "passage", batch_tokens=batch_tokens)
    if folder is None:
        return [encode(texts)]
    facts = {"params": fingerprint(params), "tokenizer": encoder.tokenizer.fingerprint(), "pooling": encoder.pooling,
             "normalize": encoder.normalize, "dimension": encoder.dimension, "prompt": encoder.passage_prompt,
             "max_length": encoder.max_length, "frame": [*encoder.before, -1, *encoder.after]}
    return encode_corpus(encode, texts, folder, encoder=facts, rows_per_shard=rows_per_shard)


def rank(encoder: TextEncoder, params: Any, data: BeirSet, k: int = 100, *, batch_tokens: int = 4096
         ) -> dict[str, dict[str, float]]:
    """The run of `eval.ranking`: the k best documents of every query with their scores, by exact search.

    The similarity is that of the encoder; documents without text are ranked too. On the mesh of the context all devices
    share the work.
    """
    ids = list(data.corpus)
    documents = embed_texts(encoder, params, list(data.corpus.values()), "passage", batch_tokens=batch_tokens)
    queries = embed_texts(encoder, params, list(data.queries.values()), "query", batch_tokens=batch_tokens)
    return as_run(search(queries, [documents], k, similarity=encoder.similarity, ids=ids), list(data.queries), ids)
