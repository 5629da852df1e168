"""The soak tool: a killed run is bit for bit the undisturbed one, and it says so when it is not."""

import json
import random
import re
from itertools import islice
from typing import get_args, get_type_hints

import numpy as np
import pytest

from tools.soak import KINDS, Config, _plan, main
from tools.soak_runs import RECIPES, differences, last_state


def test_every_kind_at_every_moment():
    plan = list(islice(_plan(random.Random(0), RECIPES["pretrain"].moments, KINDS), 24))
    assert len(set(plan[:12])) == len(set(plan[12:])) == len(RECIPES["pretrain"].moments) * len(KINDS) == 12
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
    found = differences(folder / "whole", folder / "cut", RECIPES["pretrain"].exact)
    assert len(found) == 1 and found[0].startswith("step 8: loss")
    arrays, positions = last_state(folder / "whole")
    assert int(arrays["step"]) == 8 and any("mu" in name for name in arrays) and positions.keys() == {"shard_0"}
    assert all(np.isfinite(value).all() for value in arrays.values())


def test_a_killed_rl_run_is_bit_identical(tmp_path, capfd):
    """Killed while it judges attempts, then while it writes a checkpoint; every phase takes minutes."""
    folder = tmp_path / "soak"
    with pytest.raises(SystemExit) as ended:
        main(["--recipe", "rl_distill", "--folder", str(folder), "--processes", "1", "--devices", "1", "--steps", "8",
              "--kills", "2", "--kinds", "SIGKILL all", "--moments", "score", "checkpoint", "--seed", "1"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, out + err
    rows = dict(re.findall(r"\| ([a-z ]+) \| ([^|]+) \|", out))
    assert rows["verdict"] == "bit for bit the same" and rows["resumes"] == "2" and int(rows["steps lost"]) > 0
    assert "| score | 0 | 1 | 0 | 0 |" in out and "| checkpoint | 0 | 1 | 0 | 0 |" in out
    resumed = "".join(path.read_text() for path in (folder / "logs").glob("cut_*"))
    assert "attempts taken from" in resumed and not list((folder / "cut").rglob("*.tmp"))

    records = folder / "cut/metrics.jsonl"  # now a reward that is not the same
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    next(line for line in lines if "reward" in line and line["step"] == 5)["reward"] += 1e-6
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(folder / "whole", folder / "cut", RECIPES["rl_distill"].exact)
    assert len(found) == 1 and found[0].startswith("step 5: reward")
    assert last_state(folder / "cut")[1] == {"rl": {"iteration": 8, "drawn": 16}}


@pytest.mark.parametrize(("flags", "message"), [
    (["--processes", "0"], "must be positive"), (["--minutes", "-1"], "must be positive"),
    (["--moments", "rollout"], "recipe pretrain has no moment rollout, only start, training, checkpoint")])
def test_wrong_flags(flags, message, capfd):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and message in re.sub(r"[│\s]+", " ", capfd.readouterr().err)


def test_a_folder_of_something_else_is_kept(tmp_path, capfd):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path)])
    assert ended.value.code == 2 and (tmp_path / "note.txt").exists()
    assert "holds something else" in capfd.readouterr().err


def test_defaults_are_valid():
    assert Config().processes == 2
    assert tuple(RECIPES) == get_args(get_type_hints(Config)["recipe"])
