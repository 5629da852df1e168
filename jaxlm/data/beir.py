"""Retrieval test sets in the layout of BEIR (Thakur et al. 2021).

    corpus.jsonl        {"_id": "d1", "title": "Emma", "text": "Emma is a novel ..."}
    queries.jsonl       {"_id": "q1", "text": "who wrote Emma"}
    qrels/test.tsv      query-id, corpus-id, score, separated by tabs, below a line that names them

The JSONL files may end in .gz or .zst.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.json_rows import field, read_rows
from jaxlm.data.retrieval_rows import Passage, RetrievalRow, titled
from jaxlm.data.text_files import numbered_lines

HEADER = ("query-id", "corpus-id", "score")
log = logging.getLogger(__name__)


class BeirSet(NamedTuple):
    corpus: dict[str, str]             # document to title and text, as it is encoded
    queries: dict[str, str]            # those that are judged in this split
    unjudged: dict[str, str]           # all others
    qrels: dict[str, dict[str, int]]   # query to document to gain
    fields: dict[str, dict[str, Any]]  # query to all its other fields, judged or not
    num_empty: int                     # documents without text, which stay: they may be judged


def read_beir(folder: str | Path, split: str = "test") -> BeirSet:
    """A split of a BEIR folder.

    ValueError names file and line: a field that is missing or no text, an id that is there twice, a query without text,
    judgements of unknown queries or documents, a gain that is no whole number, a file cut off; and a split that is not
    there, with those that are.
    """
    folder = Path(folder)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        splits = sorted(one.stem for one in (folder / "qrels").glob("*.tsv"))
        raise ValueError(f"{folder}: no split {split!r}; there are: {', '.join(splits) or 'none'}")
    documents, queries = _by_id(_file(folder, "corpus.jsonl")), _by_id(_file(folder, "queries.jsonl"))
    qrels = _read_qrels(path, queries, documents)
    corpus = {name: _document(where, row) for name, (where, row) in documents.items()}
    texts: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name, (where, row) in queries.items():
        texts[name in qrels][name] = field(row, "text", str, where)
        if name in qrels and not row["text"].strip():
            raise ValueError(f"{where}: query {name!r} is judged but has no text")
    fields = {name: {key: value for key, value in row.items() if key not in ("_id", "text")}
              for name, (_, row) in queries.items()}
    result = BeirSet(corpus, texts[True], texts[False], qrels, fields,
                     sum(not text.strip() for text in corpus.values()))
    log.info("%s: %d documents (%d without text), %d judged queries (%d others), split %s", folder, len(corpus),
             result.num_empty, len(qrels), len(result.unjudged), split)
    return result


def read_corpus(path: str | Path) -> dict[str, str]:
    """The documents of a BEIR folder or of a JSONL file of such lines: id to title and text, as they are encoded.

    ValueError names file and line: a field that is missing or no text, an id that is there twice.
    """
    path = Path(path)
    rows = _by_id(_file(path, "corpus.jsonl") if path.is_dir() else path)
    return {name: _document(where, row) for name, (where, row) in rows.items()}


def beir_rows(data: BeirSet) -> list[RetrievalRow]:
    """Rows to train on: the relevant documents of a query (a gain of 1 or more) are its positives, in their order.

    Documents that were judged not relevant are its negatives. Queries without a relevant document that has text are
    left out, with a warning that counts them.
    """
    rows = []
    for query, gains in data.qrels.items():
        positives, negatives = (tuple(Passage(name, data.corpus[name]) for name, gain in gains.items()
                                      if (gain > 0) == relevant and data.corpus[name].strip())
                                for relevant in (True, False))
        if positives:
            rows.append(RetrievalRow(data.queries[query], positives, negatives))
    if len(rows) < len(data.qrels):
        log.warning("%d of %d queries have no relevant document with text and are left out",
                    len(data.qrels) - len(rows), len(data.qrels))
    return rows


def split_of(spec: str, default: str) -> tuple[str, str]:
    """`folder?split=dev` as folder and split. ValueError for another option."""
    folder, _, option = spec.partition("?")
    name, _, split = option.partition("=")
    if option and (name != "split" or not split):
        raise ValueError(f"{spec}: the only option of a BEIR folder is split, as in {folder}?split=dev")
    return folder, split or default


def _document(where: str, row: dict[str, Any]) -> str:
    title = field(row, "title", str, where) if row.get("title") is not None else ""
    return titled(title, field(row, "text", str, where))


def _file(folder: Path, name: str) -> Path:
    found = [path for ending in ("", ".gz", ".zst") if (path := folder / (name + ending)).is_file()]
    if len(found) != 1:
        raise ValueError(f"{folder}: needs {name}, {name}.gz or {name}.zst, and one of them; there are "
                         f"{', '.join(path.name for path in found) or 'none'}")
    return found[0]


def _by_id(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        name = field(row, "_id", str, where)
        if name in rows:
            raise ValueError(f"{where}: the id {name!r} is that of {rows[name][0]}")
        rows[name] = where, row
    if not rows:
        raise ValueError(f"{path}: holds no row")
    return rows


def _read_qrels(path: Path, queries: dict[str, Any], documents: dict[str, Any]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        cells = tuple(line.decode("utf-8", "replace").split("\t"))
        if number == 1:
            if cells != HEADER:
                raise ValueError(f"{where}: the first line must name the columns {', '.join(HEADER)} (tabs between), "
                                 f"got {cells}")
            continue
        if len(cells) != len(HEADER):
            raise ValueError(f"{where}: {len(cells)} columns, the header has {len(HEADER)}")
        query, document, gain = cells
        for kind, name, known in (("query", query, queries), ("document", document, documents)):
            if name not in known:
                raise ValueError(f"{where}: judges the unknown {kind} {name!r}")
        if document in qrels.get(query, ()):
            raise ValueError(f"{where}: document {document!r} is judged twice for query {query!r}")
        try:
            qrels.setdefault(query, {})[document] = int(gain)
        except ValueError:
            raise ValueError(f"{where}: the gain must be a whole number, got {gain!r}") from None
    if not qrels:
        raise ValueError(f"{path}: holds no judgement")
    return qrels
