"""The soak tool: a killed run is bit for bit the undisturbed one, and it says so when it is not."""

import json
import random
import re
from itertools import islice

import numpy as np
import pytest

from tools.soak import KINDS, MOMENTS, Config, _differences, _last_state, _plan, main


def test_every_kind_at_every_moment():
    plan = list(islice(_plan(random.Random(0)), 24))
    assert len(set(plan[:12])) == len(set(plan[12:])) == len(MOMENTS) * len(KINDS) == 12
    assert plan[:12] != plan[12:]


def test_a_killed_run_is_bit_identical(tmp_path, capfd):
    """Killed while it starts, then while it writes a checkpoint; several processes take minutes."""
    folder = tmp_path / "soak"
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(folder), "--processes", "1", "--devices", "2", "--steps", "8", "--kills", "2", "--seed",
              "139"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, out + err
    rows = dict(re.findall(r"\| ([a-z ]+) \| ([^|]+) \|", out))
    assert rows["verdict"] == "bit for bit the same" and rows["kills"] == "2" and rows["attempts"] == "3"
    assert "| start | 1 | 0 | 0 | 0 |" in out and "| checkpoint | 0 | 1 | 0 | 0 |" in out

    records = folder / "cut/metrics.jsonl"  # now a loss that is not the same
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    next(line for line in reversed(lines) if "loss" in line)["loss"] += 1e-6
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _differences(folder / "whole", folder / "cut", 8)
    assert len(found) == 1 and found[0].startswith("step 8: loss")
    arrays, positions = _last_state(folder / "whole", 8)
    assert int(arrays["step"]) == 8 and any("mu" in name for name in arrays) and positions.keys() == {"shard_0"}
    assert all(np.isfinite(value).all() for value in arrays.values())


@pytest.mark.parametrize("flags", [["--processes", "0"], ["--minutes", "-1"]])
def test_wrong_flags(flags, capfd):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and "must be positive" in re.sub(r"[│\s]+", " ", capfd.readouterr().err)


def test_a_folder_of_something_else_is_kept(tmp_path, capfd):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path)])
    assert ended.value.code == 2 and (tmp_path / "note.txt").exists()
    assert "holds something else" in capfd.readouterr().err


def test_defaults_are_valid():
    assert Config().processes == 2
