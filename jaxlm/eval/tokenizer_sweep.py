"""Tokenizers of several sizes and language ratios side by side: rows, their means over seeds, a table and a plot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

from jaxlm.data.parallel_text import SIDES, Pair
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_report import measure, overlap, premium
from jaxlm.data.tokenizer_text import Pool, draw_texts

Train = Callable[[Sequence[str], int], Tokenizer]  # texts and vocabulary size to a tokenizer


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which tokenizers to compare; both lists, or none."""

    sizes: tuple[int, ...] = ()    # of the vocabulary
    ratios: tuple[float, ...] = ()  # share of Korean bytes in the training text
    seeds: int = 3                 # samples of the training text

    def __post_init__(self) -> None:
        if bool(self.sizes) != bool(self.ratios):
            raise ValueError("sweep.sizes and sweep.ratios come together: give both, or neither")
        for name in ("sizes", "ratios"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"sweep.{name} names a value twice: {getattr(self, name)}")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"sweep.ratios must lie between 0 and 1, got {ratio}")
        if self.seeds < 1:
            raise ValueError(f"sweep.seeds must be at least 1, got {self.seeds}")


class Row(NamedTuple):
    """One tokenizer, measured on the two sides of the parallel text."""

    vocab_size: int
    korean_share: float
    seed: int
    premium: float
    korean_tokens: float   # a segment
    english_tokens: float
    korean_bytes_per_token: float
    english_bytes_per_token: float
    korean_fertility: float
    english_fertility: float
    korean_cut_rate: float
    unused_share: float    # of the vocabulary, on both sides
    jaccard: float


FIGURES = Row._fields[3:]


class Summary(NamedTuple):
    """The seeds of one size and ratio."""

    vocab_size: int
    korean_share: float
    mean: dict[str, float]
    spread: dict[str, float]  # standard deviation over seeds (n - 1); 0 of one seed


def run_sweep(config: SweepConfig, train: Train, pools: Sequence[Pool], pairs: Sequence[Pair], *, num_bytes: int,
              seed: int, progress: Callable[[str], None]) -> list[Row]:
    """A row for every size, ratio and seed. All sizes of a ratio and seed learn from the same text.

    ValueError says which tokenizer could not be trained.
    """
    rows = []
    for ratio in sorted(config.ratios):
        for own_seed in range(seed, seed + config.seeds):
            texts = draw_texts(pools, num_bytes=num_bytes, seed=own_seed, shares={"ko": ratio, "en": 1 - ratio})
            for size in sorted(config.sizes):
                try:
                    tokenizer = train(texts, size)
                except ValueError as error:
                    raise ValueError(f"sweep, {size} tokens with a Korean share of {ratio:g}: {error}") from None
                rows.append(measure_row(tokenizer, pairs, korean_share=ratio, seed=own_seed))
            progress(f"Korean share {ratio:g}, seed {own_seed}: "
                     + ", ".join(f"{row.vocab_size} tokens premium {row.premium:.3f}"
                                 for row in rows[-len(config.sizes):]))
    return rows


def measure_row(tokenizer: Tokenizer, pairs: Sequence[Pair], *, korean_share: float, seed: int) -> Row:
    """The figures of one tokenizer."""
    korean, english = (measure(tokenizer, [pair[i] for pair in pairs]) for i, _ in enumerate(SIDES))
    return Row(
        tokenizer.vocab_size, korean_share, seed, premium(tokenizer, pairs, resamples=1).ratio,
        korean.tokens / korean.texts, english.tokens / english.texts, korean.bytes / korean.tokens,
        english.bytes / english.tokens, korean.tokens / korean.words, english.tokens / english.words,
        korean.cut / korean.tokens, 1 - len(korean.used | english.used) / tokenizer.vocab_size,
        overlap(korean, english).jaccard)


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Mean and spread over the seeds of each size and ratio, by size, then ratio."""
    cells: dict[tuple[int, float], list[Row]] = {}
    for row in sorted(rows):
        cells.setdefault((row.vocab_size, row.korean_share), []).append(row)
    values = lambda found, name: [getattr(row, name) for row in found]
    return [Summary(*cell, {name: mean(values(found, name)) for name in FIGURES},
                    {name: stdev(values(found, name)) if len(found) > 1 else 0.0 for name in FIGURES})
            for cell, found in cells.items()]


def sweep_table(summaries: Sequence[Summary]) -> str:
    """Markdown, a line a size and ratio: mean ± standard deviation over seeds."""
    columns = {"premium": ("premium", 3), "korean_tokens": ("ko tokens a segment", 1),
               "english_tokens": ("en tokens a segment", 1), "korean_bytes_per_token": ("ko bytes/token", 2),
               "english_bytes_per_token": ("en bytes/token", 2), "korean_cut_rate": ("ko cut", 3),
               "unused_share": ("unused", 3), "jaccard": ("overlap (Jaccard)", 3)}
    lines = ["| tokens | Korean share | " + " | ".join(title for title, _ in columns.values()) + " |",
             "| --- " * (2 + len(columns)) + "|"]
    for one in summaries:
        cells = [f"{one.mean[name]:.{digits}f} ± {one.spread[name]:.{digits}f}"
                 for name, (_, digits) in columns.items()]
        lines.append(f"| {one.vocab_size:,} | {one.korean_share:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_sweep(summaries: Sequence[Summary], path: Path) -> None:
    """Left: the premium over the Korean share. Right: Korean cost against English cost. Bars: spread over seeds."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left = figure.add_subplot(1, 2, 1, xlabel="share of Korean bytes in the training text",
                              ylabel="Korean tokens / English tokens", title="premium over parallel text")
    right = figure.add_subplot(1, 2, 2, xlabel="English tokens a segment", ylabel="Korean tokens a segment",
                               title="cost of the same content (each point: its Korean share)")
    for size in sorted({one.vocab_size for one in summaries}):
        own = [one for one in summaries if one.vocab_size == size]
        of = lambda part, name, own=own: [getattr(one, part)[name] for one in own]
        left.errorbar([one.korean_share for one in own], of("mean", "premium"), yerr=of("spread", "premium"),
                      marker=".", capsize=2, label=f"{size:,} tokens")
        right.errorbar(of("mean", "english_tokens"), of("mean", "korean_tokens"),
                       xerr=of("spread", "english_tokens"), yerr=of("spread", "korean_tokens"), marker=".", capsize=2,
                       label=f"{size:,} tokens")
        for one in own:
            right.annotate(f"{one.korean_share:g}", (one.mean["english_tokens"], one.mean["korean_tokens"]),
                           textcoords="offset points", xytext=(4, 3), fontsize=7)
    left.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110, format="png")
