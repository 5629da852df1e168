"""The curves of a run as one PNG."""

from pathlib import Path

from matplotlib.figure import Figure

from jaxlm.core.log import read_metrics


def plot_curves(metrics: Path, output: Path) -> None:
    """Draws loss, held-out bits per byte, learning rate, gradient norm and throughput over steps.

    Panels without data are left out; series with one prefix (`eval/bpb_ko`, `eval/bpb_en`) share a panel.
    """
    records = read_metrics(metrics)
    named = lambda prefix: sorted({name for record in records for name in record if name.startswith(prefix)})
    panels = {
        "training loss (nats per token)": ["loss"],
        "held-out bits per byte": named("eval/bpb"),
        "learning rate": ["lr"],
        "gradient norm": ["grad_norm"],
        "tokens per second": ["tokens_per_second"],
        "epochs": named("epoch"),
    }
    series = {
        title: {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in names}
        for title, names in panels.items()
    }
    series = {title: lines for title, lines in series.items() if any(lines.values())}
    if not series:
        raise ValueError(f"{metrics} has no curve to draw")
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for i, (title, lines) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=title, xlabel="step")
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name.split("/")[-1], marker="." if len(points) < 30 else None)
        if len(lines) > 1:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)
