"""Records, curves and the words of the progress line."""

import json

import pytest

from jaxlm.core.log import MetricLog, human_count, human_seconds, read_metrics
from jaxlm.train.curves import plot_curves


def test_records_are_appended_and_the_last_of_a_step_wins(tmp_path):
    for value in (1.0, 2.0):
        metric_log = MetricLog(tmp_path)
        metric_log.write(1, {"loss": value})
        metric_log.write(1, {"eval/bpb_ko": value})
        metric_log.write(2, {"loss": float("nan")})
        metric_log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[2])["loss"] is None
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("loss", r.get("eval/bpb_ko"))) for r in records] == [(1, 2.0), (1, 2.0), (2, None)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_torn_line_is_skipped_and_does_not_swallow_the_next(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    metric_log = MetricLog(tmp_path)
    metric_log.write(3, {"loss": 1.0})
    metric_log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert "torn line" in caplog.text


def test_curves(tmp_path):
    metric_log = MetricLog(tmp_path)
    for step in range(1, 30):
        metric_log.write(step, {"loss": 5 / step, "lr": 1e-3, "epoch/ko": step / 7})
    metric_log.write(29, {"eval/bpb_ko": 2.0, "eval/bpb_en": 1.5})
    metric_log.close()
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_no_curves_without_records(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no curve"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (1234, "1.23k"), (25_170_000, "25.2M"), (3e12, "3T")])
def test_human_count(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(5, "00:05"), (65.4, "01:05"), (3725, "1:02:05")])
def test_human_seconds(value, text):
    assert human_seconds(value) == text
