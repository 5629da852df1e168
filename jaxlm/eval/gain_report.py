"""What several models gain over a base on several test sets, over several seeds: tables, paired tests, a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxlm.core.files import replacing
from jaxlm.eval.ranking import RankingResult
from jaxlm.eval.stats import holm, paired_test

# Test set to model to what it did there, for one seed.
Results = Mapping[str, Mapping[str, RankingResult]]


def mean_and_spread(seeds: Sequence[Results], name: str, model: str, measure: str) -> tuple[float, float]:
    """Mean over seeds of the mean over queries, and the standard deviation over seeds (0 for one seed)."""
    values = [float(np.mean(results[name][model].values[measure])) for results in seeds]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(seeds: Sequence[Results], name: str, measures: Sequence[str]) -> str:
    """Markdown: a model a row, each measure as mean ± spread over seeds."""
    rows = [f"| model | {' | '.join(measures)} |", "| --- |" + " --- |" * len(measures)]
    for model in seeds[0][name]:
        found = [mean_and_spread(seeds, name, model, measure) for measure in measures]
        cells = [f"{mean:.4f} ± {spread:.4f}" if len(seeds) > 1 else f"{mean:.4f}" for mean, spread in found]
        rows.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(rows)


def paired_lines(seeds: Sequence[Results], model: str, others: Sequence[str], measure: str) -> list[str]:
    """`model` against each other model on the same queries, a line a set: differences by seed, p-values by Holm.

    The permutation tests are corrected for their number, over all sets, models and seeds.
    """
    of = lambda results, name, which: results[name][which].values[measure]
    tests = {(name, other, seed): paired_test(of(results, name, model), of(results, name, other))
             for seed, results in enumerate(seeds) for name in results for other in others}
    corrected = holm({str(key): test.p_permutation for key, test in tests.items()})
    lines = []
    for name in seeds[0]:
        for other in others:
            found = [(tests[name, other, seed].difference, corrected[str((name, other, seed))])
                     for seed in range(len(seeds))]
            lines.append(f"- {name}, {model} - {other}: " + ", ".join(
                f"{100 * difference:+.2f} (p {p:.4f})" for difference, p in found)
                + f"; mean {100 * np.mean([difference for difference, _ in found]):+.2f} points of {measure}")
    return lines


def gain_figure(
    path: Path, seeds: Sequence[Results], *, across: Sequence[str], up: Sequence[str], base: str, measure: str,
    labels: tuple[str, str], marked: str,
) -> None:
    """A point for each model: its gain over `base` on the sets `across` against that on the sets `up`.

    A gain is in points (hundredths), the mean of a group of sets counts each set once; bars are standard deviations
    over seeds. `marked` is drawn in red.
    """
    def gains(names: Sequence[str], model: str) -> np.ndarray:
        of = lambda results, name, which: np.mean(results[name][which].values[measure])
        return np.array([100 * np.mean([of(results, name, model) - of(results, name, base) for name in names])
                         for results in seeds])

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for model in seeds[0][across[0]]:
        x, y = gains(across, model), gains(up, model)
        spread = [float(np.std(z, ddof=1)) if len(seeds) > 1 else 0.0 for z in (x, y)]
        color = "tab:red" if model == marked else "tab:blue"
        axes.errorbar(x.mean(), y.mean(), xerr=spread[0], yerr=spread[1], fmt="o", color=color, elinewidth=0.7)
        axes.annotate(model, (x.mean(), y.mean()), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
