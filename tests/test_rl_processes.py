"""recipes.rl_distill on 2 processes x 4 CPU devices: the same attempts and updates as one process with 8 devices."""

import json
import os
import socket
import subprocess
import sys

import pytest

from recipes import rl_distill
from tests.test_rl_distill import SMALL, student  # noqa: F401

FLAGS = [*SMALL, "--reward.terms.0.weight", "0.7", "--objective.kl.coefficient", "0.01"]


def start(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen(
        [sys.executable, "-m", "recipes.rl_distill", *arguments, "--distributed.coordinator", f"127.0.0.1:{port}",
         "--distributed.num-processes", "2", "--distributed.process-id", str(i), "--distributed.timeout", "120",
         "--distributed.heartbeat", "10"],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8") for i in range(2)]


def rewards(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [one for one in records if "reward" in one]


def test_two_processes_make_the_same_run(student, tmp_path):  # noqa: F811
    both, one = tmp_path / "both", tmp_path / "one"
    processes = start(["--init", str(student), "--folder", str(both), *FLAGS])
    texts = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [text[1][-2000:] for text in texts]
    assert "iteration" not in texts[1][0]  # one process speaks for both
    rl_distill.main(["--init", str(student), "--folder", str(one), *FLAGS])
    assert len(rewards(both)) == len(rewards(one)) == 2
    for ours, theirs in zip(rewards(both), rewards(one), strict=True):
        for name in ("reward", "length", "prompts", "tokens/sampled", "rows"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    attempts = []
    for folder in (both, one):
        newest = sorted((folder / "rollouts").glob("*.jsonl"))[-1]
        attempts.append([json.loads(line)["ids"] for line in newest.read_text().splitlines()[1:]])
    assert attempts[0] == attempts[1]
