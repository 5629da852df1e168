"""The table of docs/scaling.md: KORMo 1B and 10B from 8 to 1,024 chips, each row compiled ahead of time.

Run: python -m tools.scaling_table --out scaling.md         all rows, hours on 2 cores; a second run goes on
     python -m tools.scaling_table --only kormo_1b --most-chips 64

Two series on v5p: `batch` keeps the preset's global batch on every number of chips (strong scaling), `tokens` keeps
the tokens per chip that the batch gives 128 chips (weak scaling). Other rows show other chips, and slices joined over
the data centre. Each row is written as soon as it is compiled; rows that the file holds are not compiled again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tyro

from jaxlm.core.mesh import MeshConfig
from jaxlm.train.chips import parse_topology
from jaxlm.train.plan import Plan, TooLargeError, nearest_fit, plan_step
from recipes.pretrain import PRESETS, step_program, step_work

WHOLE = 128  # chips whose share of the preset's batch is the tokens per chip of the weak series
COLUMNS = ("model", "series", "topology", "chips", "mesh", "rows", "accumulate", "arguments GiB", "temporaries GiB",
           "peak of HBM", "PFLOP", "collectives GB", "compute s", "HBM s", "ICI s", "DCN s", "bound", "MFU at most",
           "if nothing overlaps")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


@dataclass(frozen=True)
class Row:
    """What is compiled for one line; `mesh` is data, fsdp, tensor."""

    preset: str
    series: str  # batch: the preset's; tokens: per chip constant
    topology: str
    mesh: tuple[int, int, int]
    accumulate: int

    @property
    def name(self) -> str:
        return f"| {self.preset} | {self.series} | {self.topology} |"

    @property
    def chips(self) -> int:
        return math.prod(self.mesh)


def rows() -> Iterator[Row]:
    """Every row of the table, small pods first. `accumulate` is a start: where it does not fit, more is tried."""
    shapes = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
              1024: "8x8x16"}
    for chips, shape in shapes.items():
        for preset, tokens in (("kormo_1b", 2**15), ("kormo_10b", 2**15)):  # per chip and micro-batch
            for series in ("batch", "tokens"):
                if series == "tokens" and chips == WHOLE:
                    continue  # the same as `batch`
                size = _batch(preset, series, chips)
                yield Row(preset, series, f"v5p:{shape}", (1, chips, 1), max(1, size * 4096 // (chips * tokens)))
    yield Row("kormo_1b", "batch", "v5e:4x4", (1, 16, 1), 64)
    yield Row("kormo_1b", "batch", "v5e:8x8", (1, 64, 1), 16)
    yield Row("kormo_1b", "batch", "v6e:4x4", (1, 16, 1), 16)
    yield Row("kormo_10b", "batch", "v6e:16x16", (1, 256, 1), 8)
    yield Row("kormo_10b", "batch", "v5p:4x4x8*2", (2, 128, 1), 4)
    yield Row("kormo_10b", "batch", "v6e:16x16*2", (2, 256, 1), 4)


def _batch(preset: str, series: str, chips: int) -> int:
    size = PRESETS[preset].pipeline.batch_size
    return size if series == "batch" else size * chips // WHOLE


def make_row(row: Row) -> str:
    """One line of the table; a row that nothing fits says so."""
    config, topology = PRESETS[row.preset], parse_topology(row.topology)
    size = _batch(row.preset, row.series, row.chips)
    config = replace(config, pipeline=replace(config.pipeline, batch_size=size))
    mesh = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), row.mesh, strict=True)))
    arguments = partial(step_program, config), topology, mesh, row.accumulate, step_work(config)
    try:
        plan = plan_step(*arguments)
    except TooLargeError as error:
        plan = nearest_fit(*arguments, error, print)
    if plan is None:
        return f"{row.name} {row.chips} | nothing near fits |" + " |" * (len(COLUMNS) - 5) + "\n"
    return _line(row, plan, size)


def _line(row: Row, plan: Plan, size: int) -> str:
    cells = [
        str(row.chips), ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1), str(size),
        str(plan.accumulate), f"{plan.arguments / 2**30:.1f}", f"{plan.temporaries / 2**30:.1f}",
        f"{plan.peak / plan.topology.chip.hbm:.0%}", f"{plan.flops / 1e15:.2f}",
        f"{sum(row.bytes for row in plan.exchanges) / 1e9:.0f}",
        *(f"{seconds:.2f}" if seconds else "" for seconds in plan.seconds.values()), plan.bound, f"{plan.mfu:.0%}",
        f"{plan.mfu * plan.step_seconds / sum(plan.seconds.values()):.0%}"]
    return f"{row.name} {' | '.join(cells)} |\n"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is made."""

    out: Path = Path("scaling.md")
    only: str = ""          # rows whose text holds this, such as a preset, a series or a chip
    most_chips: int = 1024


def main(config: Config) -> None:
    """Appends the rows that the file does not hold yet."""
    if not config.out.exists():
        config.out.write_text(HEAD, encoding="utf-8")
    for row in rows():
        done = config.out.read_text(encoding="utf-8")
        if row.name in done or config.only not in row.name or row.chips > config.most_chips:
            continue
        line = make_row(row)
        with config.out.open("a", encoding="utf-8") as file:
            file.write(line)
        print(line, end="", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
