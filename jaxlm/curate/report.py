"""What every step dropped: counts, bytes, reasons and a few examples, written by each task and added at the end."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.files import replacing

EXAMPLE_CHARS = 300
COUNTS = ("documents_in", "documents_out", "bytes_in", "bytes_out")


class Tally:
    """Counts what goes into a step, comes out of it and is dropped; datatrove's filters see a writer in it."""

    def __init__(self, examples: int) -> None:
        self.counts, self.reasons, self.notes = Counter(dict.fromkeys(COUNTS, 0)), Counter(), Counter()
        self.languages, self.examples, self._limit = Counter(), {}, examples

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *_: object) -> None:
        """datatrove closes its writers; the counts are saved by `save`."""

    def incoming(self, documents: Iterable[Any]) -> Iterator[Any]:
        """The documents as they are, counted before the step."""
        for document in documents:
            self._count("in", document)
            yield document

    def outgoing(self, documents: Iterable[Any]) -> Iterator[Any]:
        """The documents as they are, counted after the step."""
        for document in documents:
            self._count("out", document)
            self.languages[document.metadata.get("language", "unknown")] += 1
            yield document

    def write(self, document: Any, rank: int = 0) -> None:
        """A dropped document, with the `filter_reason` of datatrove; only its MinHash filter gives none."""
        found = document.metadata
        self.drop(found.get("filter_reason", "near-duplicate"), document.id, document.text, found.get("detail"))

    def drop(self, reason: str, id: str, text: str, detail: Any = None) -> None:
        """Counts a drop; the first ones of each reason are kept as examples."""
        self.reasons[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < self._limit:
            cut = text if len(text) <= EXAMPLE_CHARS else text[:EXAMPLE_CHARS] + "…"
            kept.append({"id": id, "text": cut} | ({} if detail is None else {"detail": detail}))

    def save(self, path: Path) -> None:
        """Writes the counts whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**self.counts, "reasons": self.reasons, "notes": self.notes, "languages": self.languages,
                  "examples": self.examples}
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    def _count(self, side: str, document: Any) -> None:
        self.counts[f"documents_{side}"] += 1
        self.counts[f"bytes_{side}"] += len(document.text.encode("utf-8"))


@dataclass(frozen=True)
class Recorded:
    """A datatrove filter that is made where it runs, so that nothing but this description is sent to a worker."""

    name: str
    build: Callable[[], Any]
    records: Path
    examples: int

    def __call__(self, documents: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        tally, step = Tally(self.examples), self.build()
        step.exclusion_writer = tally
        yield from tally.outgoing(step.run(tally.incoming(documents), rank, world_size))
        tally.save(self.records / self.name / f"{rank:05d}.json")


def merged(records: Path, steps: Sequence[str], examples: int) -> list[dict[str, Any]]:
    """The records of all tasks, added, in the order of the steps."""
    found = []
    for name in steps:
        total: dict[str, Any] = {"step": name, **dict.fromkeys(COUNTS, 0), "reasons": Counter(), "notes": Counter(),
                                 "languages": Counter(), "examples": {}}
        for path in sorted((records / name).glob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            for key in COUNTS:
                total[key] += values[key]
            for key in ("reasons", "notes", "languages"):
                total[key].update(values[key])
            for reason, texts in values["examples"].items():
                total["examples"][reason] = (total["examples"].get(reason, []) + texts)[:examples]
        total["dropped"] = total["documents_in"] - total["documents_out"]
        assert total["dropped"] == sum(total["reasons"].values()), f"{name}: not every drop has a reason"
        found.append(total | {key: dict(sorted(total[key].items())) for key in ("reasons", "notes", "languages")})
    for before, after in itertools.pairwise(found):
        assert before["documents_out"] == after["documents_in"], f"documents were lost before {after['step']}"
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables: steps, reasons, notes, and the examples."""
    lines = ["# Curation", "", "| step | in | kept | dropped | kept share | MB in | MB out |",
             "| --- | --: | --: | --: | --: | --: | --: |"]
    for one in report["steps"]:
        share = one["documents_out"] / one["documents_in"] if one["documents_in"] else 0.0
        lines.append(f"| {one['step']} | {one['documents_in']:,} | {one['documents_out']:,} | {one['dropped']:,} | "
                     f"{share:.1%} | {one['bytes_in'] / 1e6:.3f} | {one['bytes_out'] / 1e6:.3f} |")
    lines += [f"\nWarning: {text}" for text in report["warnings"]]
    for key, value in report["facts"].items():
        lines.append(f"\n{key}: `{json.dumps(value, ensure_ascii=False)}`")
    for one in report["steps"]:
        if one["reasons"] or one["notes"]:
            lines += ["", f"## {one['step']}", ""]
            lines += [f"- {count:,} {name} (changed, not dropped)" for name, count in one["notes"].items()]
            lines += [f"- {count:,} dropped: {name}" for name, count in one["reasons"].items()]
        for reason, texts in one["examples"].items():
            for text in texts:
                detail = f" {json.dumps(text['detail'], ensure_ascii=False)}" if "detail" in text else ""
                lines += ["", f"`{text['id']}` {reason}{detail}", "",
                          *(f"    {line}" for line in text["text"].splitlines())]
    return "\n".join(lines) + "\n"
