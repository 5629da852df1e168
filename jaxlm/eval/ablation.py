"""Variants of a training run over several seeds: what each measures, how it differs from the first, a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from jaxlm.core.files import replacing

# Variant to seed to measure to value; every variant has the same seeds, every run the same measures.
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]


class Difference(NamedTuple):
    """A variant minus the first one, paired by seed."""

    mean: float
    margin: float  # half the width of the 95 % interval of Student's t; NaN for one seed


def difference(scores: Scores, variant: str, measure: str) -> Difference:
    """How a variant differs from the first. The interval is of means over seeds that could have been drawn.

    With differences 0.1, 0.2 and 0.3: mean 0.2, margin t(0.975, 2) * 0.1 / sqrt(3) = 0.248.
    """
    first = next(iter(scores.values()))
    found = np.array([scores[variant][seed][measure] - first[seed][measure] for seed in first])
    if len(found) < 2:
        return Difference(float(found.mean()), float("nan"))
    margin = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return Difference(float(found.mean()), float(margin))


def ablation_table(scores: Scores, measures: Sequence[str]) -> str:
    """Markdown: a variant a row; mean ± standard deviation over seeds, and below the first its paired difference."""
    first = next(iter(scores))
    lines = [f"| variant | {' | '.join(measures)} |", "| --- |" + " --- |" * len(measures)]
    for variant, runs in scores.items():
        cells = []
        for measure in measures:
            values = [run[measure] for run in runs.values()]
            cell = f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
            if variant != first:
                found = difference(scores, variant, measure)
                cell += f" ({found.mean:+.4f}" + (f" ± {found.margin:.4f})" if len(values) > 1 else ")")
            cells.append(cell)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, scores[first]))
    lines += ["", f"Seeds {seeds}. Mean ± standard deviation over seeds; in brackets the difference to {first}, paired "
              "by seed, ± half its 95 % interval (Student's t)."]
    return "\n".join(lines)


def ablation_figure(path: Path, scores: Scores, measures: Sequence[str]) -> None:
    """A panel a measure: every run is a point, the mean of a variant a bar, the mean of the first a dashed line."""
    figure = Figure(figsize=(3.4 * len(measures), 1.2 + 0.4 * len(scores)), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    names = list(scores)
    for axes, measure in zip(panels, measures, strict=True):
        for place, name in enumerate(names):
            values = [run[measure] for run in scores[name].values()]
            axes.plot(values, [place] * len(values), "o", markersize=4, alpha=0.6, color="tab:blue")
            axes.plot([np.mean(values)], [place], "|", markersize=16, markeredgewidth=2, color="tab:red")
        axes.axvline(np.mean([run[measure] for run in scores[names[0]].values()]), color="grey", linestyle="--",
                     linewidth=0.7)
        axes.set(title=measure, yticks=range(len(names)), yticklabels=names if axes is panels[0] else [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(labelsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
