"""What a run reads: weighted sources to train on, others to measure on."""

import logging
from dataclasses import dataclass

from jaxlm.data.sources import MIXED, Source, open_source, parse_source

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Sources, `path?option=value&...` each; see README, "Data"."""

    path: tuple[str, ...] = ("sample:ko?documents=20000", "sample:en?documents=20000")
    held_out: tuple[str, ...] = (  # bits per byte are measured on these, by language
        "sample:ko?documents=100&split=held_out", "sample:en?documents=100&split=held_out")
    max_bad_rows: int = 0                # rows of one source that may be unreadable
    never_predict: tuple[str, ...] = ()  # symbols that are input but no target; KORMo: <think>

    def __post_init__(self):
        if not self.path or not self.held_out:
            raise ValueError("data.path and data.held_out need at least one source each")


def open_corpus(config: CorpusConfig) -> tuple[list[Source], list[Source]]:
    """The sources to train on and those held out, with what was dropped from each in the log.

    Raises ValueError: what `parse_source` and `open_source` say, and an option of mixtures at a held-out source.
    """
    paths, held_out = ([parse_source(spec, unread=unread) for spec in specs]
                       for specs, unread in ((config.path, ()), (config.held_out, MIXED)))
    opened = [[open_source(path, max_bad_rows=config.max_bad_rows) for path in part] for part in (paths, held_out)]
    for source in (*opened[0], *opened[1]):
        limits = "".join(f", {name} {value:g}" for name in ("epochs", "cap") if (value := getattr(source.config, name)))
        log.info("%s: %d documents, weight %g%s, dropped: %s", source.config.path, len(source), source.config.weight,
                 limits, ", ".join(f"{count} {reason}" for reason, count in source.dropped.items()))
    return opened[0], opened[1]
