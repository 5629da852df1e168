"""What a source yields (`Document`), how it is configured, and the one place that turns a row into a document."""

import json
import logging
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxlm.core.config import nearest

SAMPLE_LANGUAGES = ("ko", "en", "both")
SAMPLE_SPLITS = ("train", "held_out")
# A broken file should not fill memory with complaints; reading stops this many bad rows after the limit.
BAD_ROWS_BEYOND_LIMIT = 100

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    text: str
    language: str | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents come from and which fields of a row hold what; see `jaxlm.data.sources.open_source`."""

    path: str
    """A file, a glob, `tfds:name/config` or `sample:ko|en|both`."""
    name: str | None = None
    """Default: the file name without folder and endings."""
    weight: float = 1.0
    """Share in a mixture, relative to the other sources."""
    epochs: float | None = None
    """At most so often each document is read; None: as often as the mixture asks. See `jaxlm.data.mixture`."""
    cap: float | None = None
    """At most so many tokens are taken, in whole rows with their padding."""
    text_field: str = "text"
    text: str | None = None
    """A template such as "{ko}\\n{en}" instead of one field; literal braces are doubled."""
    language: str | None = None
    """One language for all rows, or take it from `language_field`."""
    language_field: str | None = None
    source_field: str | None = None
    include: tuple[str, ...] = ()
    """`field:value`; of each field named here, a row must have one of the values."""
    exclude: tuple[str, ...] = ()
    """`field:value`; a row with one of these values is dropped."""
    split: str | None = None
    """tfds split, or train (default) or held_out of the sample."""
    data_dir: str | None = None
    """Where tfds finds its prepared data sets (default: its own rule)."""
    documents: int | None = None
    """Length of the sample (default 1000)."""
    seed: int = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        where = f"source {self.path!r}"
        if not self.path:
            raise ValueError("a source needs a path")
        if not (self.weight > 0 and self.weight < float("inf")):
            raise ValueError(f"{where}: weight must be a positive number, got {self.weight!r}")
        for key in ("epochs", "cap"):
            value = getattr(self, key)
            if value is not None and not (value > 0 and value < float("inf")):
                raise ValueError(f"{where}: {key} must be a positive number, got {value!r}")
        if self.text is not None and self.text_field != "text":
            raise ValueError(f"{where}: text and text_field both say where the text is; give one of them")
        if self.language is not None and self.language_field is not None:
            raise ValueError(f"{where}: language and language_field both say the language; give one of them")
        for key in ("include", "exclude"):
            for rule in getattr(self, key):
                if not rule.partition(":")[0] or ":" not in rule:
                    raise ValueError(f"{where}: {key} must be 'field:value', got {rule!r}")
        try:
            template(self)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        kind = self.path.partition(":")[0] if self.path.startswith(("sample:", "tfds:")) else "file"
        without_effect = {"sample": ("data_dir", "text", "language", "language_field", "source_field"),
                          "tfds": ("documents",), "file": ("documents", "split", "data_dir")}[kind]
        for key in without_effect:
            if getattr(self, key) is not None:
                raise ValueError(f"{where}: {key} has no effect on this kind of source")
        if kind != "sample" and self.seed != 0:
            raise ValueError(f"{where}: seed has no effect on this kind of source")
        if kind == "sample":
            self._check_sample(where)

    def _check_sample(self, where: str) -> None:
        for value, valid in ((self.path.partition(":")[2], SAMPLE_LANGUAGES), (self.split or "train", SAMPLE_SPLITS)):
            if value not in valid:
                raise ValueError(f"{where}: {value!r} is unknown{nearest(value, valid)}; one of {', '.join(valid)}")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"{where}: documents must be at least 1, got {self.documents}")
        if self.include or self.exclude or self.text_field != "text":
            raise ValueError(f"{where}: include, exclude and text_field have no effect on this kind of source")


def template(config: SourceConfig) -> tuple[tuple[str, str | None], ...]:
    """`(literal, field)` pairs whose concatenation is the text of a row. ValueError for a malformed template."""
    if config.text is None:
        return (("", config.text_field),)
    try:
        parts = list(string.Formatter().parse(config.text))
    except ValueError as error:
        raise ValueError(f"template {config.text!r}: {error}; write literal braces doubled") from None
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise ValueError(f"template {config.text!r}: only plain {{field}} may stand in braces")
    if not any(name for _, name, _, _ in parts):
        raise ValueError(f"template {config.text!r} names no field")
    return tuple((literal, name) for literal, name, _, _ in parts)


class BadRow(ValueError):
    """A row that cannot become a document; the message is the reason."""


def decode_text(data: bytes) -> str:
    """UTF-8 bytes as text; BadRow names the byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid UTF-8 ({error.reason} at byte {error.start})") from None


def decode_json(data: bytes) -> Any:
    """UTF-8 bytes as a JSON value; BadRow says why they are none."""
    text = decode_text(data)  # the JSON parser alone would accept UTF-16 and UTF-32 as well
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRow("not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise BadRow(f"not JSON ({error})") from None


def missing_field(name: str, present: Iterable[str]) -> str:
    present = list(present)
    return f"no field {name!r}{nearest(name, present)}; fields: {', '.join(present)}"


@dataclass
class RowReader:
    """Turns rows into documents and counts what it drops. `bad_rows` names each bad row as `path:line: reason`."""

    config: SourceConfig
    max_bad_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    kept: int = 0
    empty: int = 0
    filtered: int = 0
    warn: bool = False  # see `name_bad_rows`

    def __post_init__(self) -> None:
        self._template = template(self.config)
        self._include, self._exclude = _rules(self.config.include), _rules(self.config.exclude)
        self._unmatched = {("include", *rule) for rule in _pairs(self._include)}
        self._unmatched |= {("exclude", *rule) for rule in _pairs(self._exclude)}

    def fields(self) -> list[str]:
        """Every field that the configuration reads, each once."""
        names = [name for _, name in self._template if name is not None]
        names += [name for name in (self.config.language_field, self.config.source_field) if name is not None]
        return list(dict.fromkeys([*names, *self._include, *self._exclude]))

    def require_fields(self, present: Iterable[str], path: str) -> None:
        """For formats with a header: ValueError at once instead of one bad row after the other."""
        present = list(present)
        for name in self.fields():
            if name not in present:
                raise ValueError(f"{path}: {missing_field(name, present)}")

    def read(self, row: Any, path: str, line: int) -> Document | None:
        """The document in a row, or None for a row that is filtered, empty or bad (all counted)."""
        try:
            if not isinstance(row, Mapping):
                raise BadRow(f"not a JSON object but {type(row).__name__}")
            if self._drops(row):
                self.filtered += 1
                return None
            document = self._document(row, path, line)
            if document is None:
                self.empty += 1
                return None
        except BadRow as error:
            self.bad(str(error), path, line)
            return None
        self.kept += 1
        return document

    def _document(self, row: Mapping[str, Any], path: str, line: int) -> Document | None:
        """What a row holds, None for nothing; BadRow says why it cannot be read."""
        texts = [_string(row, name) if name is not None else "" for _, name in self._template]
        # With a template the literals alone are no content: some field must say something.
        if not any(text and not text.isspace() for text in texts):
            return None
        filled = "".join(literal + text for (literal, _), text in zip(self._template, texts, strict=True))
        return Document(filled, self._label(row, self.config.language_field) or self.config.language,
                        self._label(row, self.config.source_field))

    def bad(self, reason: str, path: str, line: int) -> None:
        """Counts a bad row, parsed or not; stops reading when there are far too many."""
        self.bad_rows.append(f"{path}:{line}: {reason}")
        if self.warn:
            self._log_bad(len(self.bad_rows))
        if len(self.bad_rows) > self.max_bad_rows + BAD_ROWS_BEYOND_LIMIT:
            self.check("at least ")

    def check(self, bound: str = "") -> None:
        """ValueError naming the first bad rows when there are more than `max_bad_rows`."""
        if len(self.bad_rows) <= self.max_bad_rows:
            return
        if not self.kept and len(self.bad_rows) > 1 and all(": no field " in line for line in self.bad_rows):
            raise ValueError(f"{self.bad_rows[0]} (so in all {len(self.bad_rows)} rows read)")
        first = "".join(f"\n  {line}" for line in self.bad_rows[:5])
        more = "\n  ..." if len(self.bad_rows) > 5 else ""
        rows = self.kept + self.empty + self.filtered + len(self.bad_rows)
        raise ValueError(f"{self.config.path}: {bound}{len(self.bad_rows)} of {rows} rows read are bad, "
                         f"{self.max_bad_rows} allowed (max_bad_rows):{first}{more}")

    def name_bad_rows(self) -> None:
        """Logs the bad rows met so far, and from now on each one when it is met."""
        self.warn = True
        for number in range(1, len(self.bad_rows) + 1):
            self._log_bad(number)

    def check_filters(self) -> None:
        """A value that no row has is a misspelling, and a misspelt `exclude` would let held-out rows through."""
        for key, name, value in sorted(self._unmatched):
            raise ValueError(f"{self.config.path}: {key}={name}:{value} matches no row")

    def _log_bad(self, number: int) -> None:
        logger.warning("dropped a bad row (number %d of %d allowed): %s", number, self.max_bad_rows,
                       self.bad_rows[number - 1])

    def _drops(self, row: Mapping[str, Any]) -> bool:
        drop = False
        for key, rules in (("include", self._include), ("exclude", self._exclude)):
            for name, values in rules.items():
                if name not in row:
                    raise BadRow(missing_field(name, row))
                value = row[name] if isinstance(row[name], str) else json.dumps(row[name], ensure_ascii=False)
                matched = value in values
                if matched and self._unmatched:
                    self._unmatched.discard((key, name, value))
                drop |= matched == (key == "exclude")
        return drop

    def _label(self, row: Mapping[str, Any], name: str | None) -> str | None:
        if name is None:
            return None
        if name not in row:
            raise BadRow(missing_field(name, row))
        if row[name] is None:
            return None
        return str(row[name]) if isinstance(row[name], int) else _string(row, name)


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise BadRow(missing_field(name, row))
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not a string but {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"field {name!r} holds a lone surrogate, which is no character") from None
    return value


def _rules(rules: tuple[str, ...]) -> dict[str, set[str]]:
    by_field: dict[str, set[str]] = {}
    for rule in rules:
        name, _, value = rule.partition(":")
        by_field.setdefault(name, set()).add(value)
    return by_field


def _pairs(rules: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, values in rules.items() for value in values]
