"""Writing retrieval test sets in the layout of BEIR, and smaller ones than they came."""

import json
import logging
import random
from pathlib import Path

from jaxlm.core.files import replacing
from jaxlm.data.beir import HEADER, BeirSet

log = logging.getLogger(__name__)


def write_beir(folder: Path, data: BeirSet, split: str) -> None:
    """A folder that `read_beir` reads as `data`. The judgements come last: they say that it is whole."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    queries = data.queries | data.unjudged
    rows = {"corpus.jsonl": [{"_id": name, "title": "", "text": text} for name, text in data.corpus.items()],
            "queries.jsonl": [{"_id": name, "text": text, **data.fields.get(name, {})}
                              for name, text in queries.items()]}
    for name, values in rows.items():
        with replacing(folder / name) as scratch:
            scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values), encoding="utf-8")
    judged = "".join(f"{query}\t{document}\t{gain}\n" for query, gains in data.qrels.items()
                     for document, gain in gains.items())
    with replacing(folder / "qrels" / f"{split}.tsv") as scratch:
        scratch.write_text("\t".join(HEADER) + "\n" + judged, encoding="utf-8")


def shorten(data: BeirSet, *, documents: int | None = None, queries: int | None = None, seed: int = 0) -> BeirSet:
    """At most so many judged queries and documents, drawn by the seed; None keeps all.

    Every document that a kept query judges relevant stays, and others fill the corpus up: a search in it is easier than
    in the whole one. Queries that nobody judged, and judgements of documents that are gone, are left out. Raises
    ValueError when the relevant documents alone are more than `documents`.
    """
    drawn = random.Random(seed)
    kept = set(_some(list(data.queries), queries, drawn))
    qrels = {name: gains for name, gains in data.qrels.items() if name in kept}
    needed = {document for gains in qrels.values() for document, gain in gains.items() if gain > 0}
    if documents is not None and len(needed) > documents:
        raise ValueError(f"{len(kept)} queries have {len(needed)} relevant documents, more than the {documents} to "
                         "keep; keep more documents or fewer queries")
    others = [name for name in data.corpus if name not in needed]
    chosen = needed | set(_some(others, None if documents is None else documents - len(needed), drawn))
    corpus = {name: text for name, text in data.corpus.items() if name in chosen}
    qrels = {name: {document: gain for document, gain in gains.items() if document in chosen}
             for name, gains in qrels.items()}
    if len(corpus) < len(data.corpus) or len(kept) < len(data.queries):
        log.info("kept %d of %d documents and %d of %d judged queries", len(corpus), len(data.corpus), len(kept),
                 len(data.queries))
    return BeirSet(corpus, {name: text for name, text in data.queries.items() if name in kept}, {}, qrels,
                   {name: fields for name, fields in data.fields.items() if name in kept},
                   sum(not text.strip() for text in corpus.values()))


def _some(names: list[str], count: int | None, drawn: random.Random) -> list[str]:
    return names if count is None or count >= len(names) else drawn.sample(names, count)
