"""Train a tokenizer from weighted sources, and say what it costs each language.

The tokenizer of KORMo (arXiv 2510.09426) at any scale: byte-level BPE with its split rule and reserved tokens, or
sentencepiece as `recipes.pretrain` trains it. The report has bytes per token, fertility, single digits, cut characters
and vocabulary in use by language, and the premium: tokens of Korean over tokens of English for the same content.

    python -m recipes.train_tokenizer                               embedded data, seconds
    python -m recipes.train_tokenizer --kind sentencepiece --vocab-size 4096 --korean-share 0.3
    python -m recipes.train_tokenizer --data.path "ko.jsonl.gz?language=ko" "en.jsonl.gz?language=en&weight=4" \
      --data.held-out "dev.jsonl?language_field=lang" --parallel "pairs.jsonl.gz?include=src:dev" --vocab-size 32000 \
      --num-bytes 50000000 --sweep.sizes 8000 16000 32000 --sweep.ratios 0.05 0.15 0.5
    python -m recipes.pretrain --preset smoke --tokenizer.path runs/tokenizer/tokenizer

`--folder` gets tokenizer/ (transformers opens it), report.json, report.md and, with a sweep, sweep.png. Minutes on one
core for some MB and a dozen tokenizers. Results: docs/results.md. Left out: KORMo's corpus of 10 to 50 GB (the text is
held in memory here), its 30 whitespace tokens, and its comparison by what models learn with each tokenizer.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from jaxlm.core import config as flags
from jaxlm.core.command import run_command
from jaxlm.core.files import replacing
from jaxlm.data.bpe_training import train_bpe
from jaxlm.data.corpus import CorpusConfig, open_corpus
from jaxlm.data.parallel_text import Pair, open_parallel
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import JSON_FILE, JSON_NAMES_FILE, SENTENCEPIECE_FILE, Tokenizer, save_tokenizer
from jaxlm.data.tokenizer_report import Coverage, measure, overlap, premium, rates
from jaxlm.data.tokenizer_text import Pool, draw_texts, make_pools
from jaxlm.data.tokenizer_training import KORMO_SYMBOLS, train_sentencepiece
from jaxlm.eval.tokenizer_sweep import SweepConfig, plot_sweep, run_sweep, summarise, sweep_table

PROG = "recipes.train_tokenizer"
log = logging.getLogger(PROG)
WRITTEN = ("tokenizer", "report.json", "report.md", "sweep.png")
TOKENIZER_FILES = (SENTENCEPIECE_FILE, JSON_FILE, JSON_NAMES_FILE)
LANGUAGES = ("ko", "en")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One tokenizer, its report, and perhaps others to compare with."""

    data: CorpusConfig = field(default_factory=lambda: CorpusConfig(
        path=("sample:ko?documents=4000", "sample:en?documents=4000")))
    parallel: str = "sample"        # rows {ko, en} the premium is measured on; sample: generated ones
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    vocab_size: int = 2048          # all tokens, reserved ones included
    num_bytes: int = 400_000        # of training text
    korean_share: float | None = None  # of these bytes; None: as the weights of the sources say
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 0                   # of the training text; a sweep counts on from it
    folder: Path = Path("runs/tokenizer")
    overwrite: bool = False         # replace what an earlier start wrote into `folder`

    def __post_init__(self) -> None:
        if self.num_bytes < 1:
            raise ValueError(f"num_bytes must be positive, got {self.num_bytes}")
        if self.korean_share is not None and not 0 < self.korean_share < 1:
            raise ValueError(f"korean_share must lie between 0 and 1, got {self.korean_share}")


PRESETS = {"smoke": Config()}


def train(config: Config, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of the kind asked for."""
    if config.kind == "bpe":
        return train_bpe(texts, vocab_size=vocab_size)
    return train_sentencepiece(texts, vocab_size=vocab_size, user_symbols=KORMO_SYMBOLS,
                               max_chars=config.num_bytes)  # never more characters than bytes: no second sampling


def chosen_text(config: Config, sources: Sequence[Source], by_language: Sequence[Pool]) -> list[str]:
    """What the tokenizer that is kept learns from."""
    if config.korean_share is None:
        return draw_texts(make_pools(sources), num_bytes=config.num_bytes, seed=config.seed)
    return draw_texts(by_language, num_bytes=config.num_bytes, seed=config.seed,
                      shares={"ko": config.korean_share, "en": 1 - config.korean_share})


def measure_all(tokenizer: Tokenizer, held_out: Sequence[Source], pairs: Sequence[Pair]) -> dict[str, Any]:
    """The report on one tokenizer: by source, by language, each two languages, parallel text."""
    by_source, by_language = {}, {}
    for source in held_out:
        documents = [document for i in range(len(source)) if (document := source[i])]
        by_source[source.name] = [document.text for document in documents]
        for document in documents:
            if document.language is None:
                raise ValueError(f"held-out source {source.config.path}: a document is labelled with no language; say "
                                 "it with ?language= or ?language_field=")
            by_language.setdefault(document.language, []).append(document.text)
    measured: dict[str, Coverage] = {name: measure(tokenizer, texts) for name, texts in sorted(by_language.items())}
    figures = lambda coverage: rates(coverage, tokenizer.vocab_size)
    return {
        "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint(),
        "languages": {name: figures(coverage) for name, coverage in measured.items()},
        "sources": {name: figures(measure(tokenizer, texts)) for name, texts in by_source.items()},
        "overlap": {f"{a}-{b}": overlap(measured[a], measured[b])._asdict() for a, b in combinations(measured, 2)},
        "premium": premium(tokenizer, pairs)._asdict(),
    }


def markdown(config: Config, report: Mapping[str, Any]) -> str:
    """The report as tables."""
    show = lambda value: "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    names = list(next(iter(report["languages"].values())))
    lines = [f"# Tokenizer: {config.kind}, {report['vocab_size']:,} tokens", "", "Held-out text.", "",
             "| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- " * (1 + len(names)) + "|"]
    for part in ("languages", "sources"):
        lines += [f"| {name} | " + " | ".join(show(values[key]) for key in names) + " |"
                  for name, values in report[part].items()]
    lines += ["", *(f"Tokens in use by both of {pair}: {one['shared']:,} of {one['either']:,} (Jaccard "
                    f"{one['jaccard']:.3f})." for pair, one in report["overlap"].items())]
    one = report["premium"]
    lines += ["", f"Premium: Korean takes {one['ratio']:.3f} times the tokens of English (95 % interval "
              f"{one['low']:.3f} to {one['high']:.3f} over {one['segments']:,} parallel segments; "
              f"{one['korean_tokens']:,} and {one['english_tokens']:,} tokens; in bytes {one['bytes_ratio']:.3f} "
              "times).", ""]
    return "\n".join(lines)


def check_folder(config: Config) -> None:
    """ValueError if files are in the way."""
    if config.folder.exists() and not config.folder.is_dir():
        raise ValueError(f"--folder {config.folder} is a file")
    taken = [name for name in WRITTEN if (config.folder / name).exists()]
    if taken and not config.overwrite:
        raise ValueError(f"{config.folder} holds {', '.join(taken)} already; --overwrite replaces them, another "
                         "--folder keeps both")


def write(config: Config, tokenizer: Tokenizer, report: Mapping[str, Any], page: str) -> None:
    """All files; what an earlier start left beside them goes."""
    folder = config.folder / "tokenizer"
    # One of another kind would win over the new one.
    for path in (*(folder / name for name in TOKENIZER_FILES), config.folder / "sweep.png"):
        path.unlink(missing_ok=True)
    save_tokenizer(tokenizer, folder)
    for name, content in (("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n"),
                          ("report.md", page)):
        with replacing(config.folder / name) as scratch:
            scratch.write_text(content, encoding="utf-8")


def build(config: Config) -> None:
    """Trains, measures, compares, writes."""
    check_folder(config)
    sources, held_out = open_corpus(config.data)
    names = [source.name for source in held_out]
    if len(set(names)) < len(names):
        raise ValueError(f"two held-out sources have the same name: {', '.join(names)}; give them a name=")
    if limited := [source.name for source in sources if source.config.epochs or source.config.cap]:
        raise ValueError(f"source {limited[0]}: epochs and cap have no effect on a tokenizer's text; --num-bytes is "
                         "how much of it there is")
    if config.data.never_predict:
        raise ValueError("data.never_predict has no effect on a tokenizer")
    pairs = open_parallel(config.parallel, max_bad_rows=config.data.max_bad_rows)
    pools = make_pools(sources, LANGUAGES) if config.sweep.sizes or config.korean_share is not None else []
    tokenizer = train(config, chosen_text(config, sources, pools), config.vocab_size)
    report = {"config": flags.to_json(config), **measure_all(tokenizer, held_out, pairs)}
    page = markdown(config, report)
    summaries = []
    if config.sweep.sizes:
        rows = run_sweep(config.sweep, lambda texts, size: train(config, texts, size), pools, pairs,
                         num_bytes=config.num_bytes, seed=config.seed, progress=log.info)
        summaries = summarise(rows)
        report["sweep"] = [row._asdict() for row in rows]
        page += (f"\n## Sizes and ratios\n\nMean ± standard deviation over {config.sweep.seeds} samples of the "
                 f"training text ({config.num_bytes:,} bytes each).\n\n{sweep_table(summaries)}")
    write(config, tokenizer, report, page)
    if summaries:
        plot_sweep(summaries, config.folder / "sweep.png")
    print(page)
    log.info("written to %s", config.folder)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(build, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
