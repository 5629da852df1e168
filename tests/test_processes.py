"""The pretraining recipe on 2 processes x 4 CPU devices over loopback: as users start it, and as schedulers kill it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.core.log import read_metrics
from jaxlm.train.checkpoint import saved_steps
from recipes.pretrain import main

TINY = ["--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2", "--model.num-heads", "2",
        "--model.num-kv-heads", "2", "--model.head-dim", "16", "--model.d-ff", "48", "--tokenizer.path", "bytes",
        "--pipeline.batch-size", "16", "--pipeline.seq-len", "48", "--pipeline.shards", "2", "--samples.tokens", "3",
        "--loop.log-every", "1", "--loop.steps", "6", "--checkpoint.every", "2", "--checkpoint.keep-last", "9",
        "--data.path", "sample:ko?documents=200", "sample:en?documents=200",
        "--data.held-out", "sample:ko?documents=10&split=held_out", "--optim.schedule.kind", "constant",
        "--optim.schedule.decay", "0", "--optim.schedule.warmup", "0"]  # the same rate whatever the number of steps
STEP = re.compile(r"step (\d+)/")


def start(folder, *extra, of_first=(), of_second=()):
    """Both processes of a run; `of_first` are flags of process 0 alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes", "2",
              "--distributed.timeout", "120", "--distributed.heartbeat", "10"]
    return [subprocess.Popen(
        [sys.executable, "-m", "recipes.pretrain", *TINY, "--folder", str(folder), *joined,
         "--distributed.process-id", str(i), *extra, *(of_second if i else of_first)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8") for i in range(2)]


def finish(processes):
    """Exit codes, outputs and errors of both."""
    texts = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], *zip(*texts, strict=True)


def reach(process, step):
    """Reads the log of a process up to this step."""
    for line in process.stdout:
        if (match := STEP.match(line)) and int(match[1]) >= step:
            return


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run on two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    codes, outs, errors = finish(start(folder))
    assert codes == [0, 0], errors
    assert "2 processes, 2 data shards" in errors[0] and "held out at step 6" in outs[0]
    assert not STEP.search(outs[1]) and "INFO" not in errors[1]  # one process speaks for both
    assert sorted(losses(folder)) == list(range(1, 7))
    return folder


def close(folder, expected):
    found, wanted = losses(folder), losses(expected)
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-6), step


def test_one_process_sees_the_same_batches(tmp_path, whole):
    """1 x 8 devices from scratch: the same rows in every batch, so the same losses up to rounding."""
    main([*TINY, "--folder", str(tmp_path / "one")])
    close(tmp_path / "one", whole)


def test_every_process_writes_its_part_of_a_checkpoint(whole):
    newest = whole / "checkpoints/6"
    assert {path.name for path in (newest / "data").glob("shard_*")} == {"shard_0.json", "shard_1.json"}
    assert {path.name for path in (newest / "state").glob("ocdbt*")} == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.parametrize("mesh", [["--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.context", "2"],
                                  ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]])
def test_one_process_continues_what_two_began(tmp_path, whole, mesh):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoints/{step}")
    main([*TINY, "--folder", str(folder), "--resume", *mesh])
    close(folder, whole)


def test_a_killed_process_ends_the_other_and_two_continue_on_another_mesh(tmp_path, whole):
    """Killed after step 3: the checkpoint of step 2 may or may not be complete yet."""
    folder = tmp_path / "run"
    processes = start(folder)
    reach(processes[0], 3)
    processes[1].send_signal(signal.SIGKILL)
    codes, _, _ = finish(processes)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0  # it did not wait for ever
    assert max(losses(folder)) < 6
    # Two processes again, the same mesh: bit-identical. A SIGTERM to one of them then stops both after one step.
    begun = [] if not any(path.name.isdigit() for path in (folder / "checkpoints").iterdir()) else ["--resume"]
    processes = start(folder, *(begun or ["--overwrite"]), "--loop.steps", "5000")
    reach(processes[0], 6)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = finish(processes)
    assert codes == [75, 75], errors
    found = losses(folder)
    assert {step: found[step] for step in range(1, 6)} == {step: losses(whole)[step] for step in range(1, 6)}
    stopped = saved_steps(folder / "checkpoints")[0]
    assert f"stopped by a signal at step {stopped}" in errors[0] and stopped >= 6
    # And on another mesh, 3 steps more.
    codes, _, errors = finish(start(folder, "--resume", "--loop.steps", str(stopped + 3), "--mesh.data", "2",
                                    "--mesh.fsdp", "2", "--mesh.tensor", "2"))
    assert codes == [0, 0], errors
    assert f"resumed at step {stopped}" in errors[0] and max(losses(folder)) == stopped + 3
    assert np.isfinite([*losses(folder).values()]).all()


def test_processes_that_differ_or_fail_end_together(tmp_path):
    folder = tmp_path / "run"
    codes, _, errors = finish(start(folder, of_second=["--seed", "1"]))
    assert codes == [2, 2] and all("process 1 has another configuration than process 0" in e for e in errors)
    codes, _, errors = finish(start(folder, of_second=["--data.path", "missing.jsonl"]))
    assert codes == [2, 2]
    assert "process 1 failed: " in errors[0] and "missing.jsonl" in errors[0] and "no such file" in errors[1]
    assert not folder.exists()


def test_processes_that_would_delete_and_continue_do_neither(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    processes = start(folder, of_first=["--overwrite"], of_second=["--resume"])
    codes, _, errors = finish(processes)
    assert codes == [2, 2] and all("process 1 has another mode than process 0" in e for e in errors), errors
    assert saved_steps(folder / "checkpoints") == [6, 4, 2]


def test_a_folder_that_cannot_be_made_ends_both():
    codes, _, errors = finish(start("/proc/nothing/run"))
    assert codes == [2, 2] and "--folder /proc/nothing/run cannot be created" in errors[0]
    assert "process 0 failed: --folder /proc/nothing/run cannot be created" in errors[1]
