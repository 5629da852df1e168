"""Tables, tests and the figure over models, sets and seeds."""

import numpy as np
import pytest

from jaxlm.eval.gain_report import gain_figure, mean_and_spread, paired_lines, table
from jaxlm.eval.ranking import RankingResult


def results(shift: float):
    values = np.linspace(0, 0.5, 40)
    model = lambda plus: RankingResult([f"q{i}" for i in range(40)], {"ndcg@5": values + plus}, 0, 0, 0)
    return {"hard": {"base": model(0), "merged": model(0.3 + shift), "joint": model(0.2)},
            "easy": {"base": model(0), "merged": model(0.0), "joint": model(-0.1)}}


SEEDS = [results(0.0), results(0.1)]


def test_tables_have_mean_and_spread_over_seeds():
    assert mean_and_spread(SEEDS, "hard", "merged", "ndcg@5") == pytest.approx((0.6, 0.1 / np.sqrt(2)))
    assert "| merged | 0.6000 ± 0.0707 |" in table(SEEDS, "hard", ["ndcg@5"])
    assert "| merged | 0.5500 |" in table(SEEDS[:1], "hard", ["ndcg@5"])


def test_paired_lines_count_every_test():
    lines = paired_lines(SEEDS, "merged", ("base", "joint"), "ndcg@5")
    assert len(lines) == 4
    # 8 tests, each drawing 10,000 times: the least p is 1e-4 (counting both signs 2e-4), times 8 at most.
    assert lines[0].startswith("- hard, merged - base: +30.00 (p 0.00")
    assert lines[0].endswith("mean +35.00 points of ndcg@5")
    assert lines[2].startswith("- easy, merged - base: +0.00 (p 1.0000), +0.00 (p 1.0000)")


def test_the_figure_is_a_picture(tmp_path):
    gain_figure(tmp_path / "gains.png", SEEDS, across=["easy"], up=["hard"], base="base", measure="ndcg@5",
                labels=("x", "y"), marked="merged")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
