"""Several processes: what they agree on, how they stop, what a wrong start says. Real processes on this machine."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxlm.core.config import parse
from jaxlm.core.distributed import (
    Cluster,
    DistributedConfig,
    agree,
    barrier,
    detect,
    gather,
    is_primary,
    one_per_host,
    start,
)
from jaxlm.core.signals import stop_on_signal
from recipes.pretrain import PRESETS

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
       "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(("environ", "cluster"), [
    ({}, None),                                                                           # a laptop
    ({"TPU_SKIP_MDS_QUERY": "1"}, None),                                                  # `import jax` without TPUs
    (STEP, "slurm"),
    ({name: value for name, value in STEP.items() if "STEP" not in name}, None),          # sbatch or salloc, no srun
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),                                         # srun --pty bash in a job
    (MPI, "ompi"),
    (MPI | STEP, "ompi"),                                                                 # mpirun inside a SLURM step
    (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"TPU_ML_PLATFORM": "JAX"}, "tpu"),                                                  # a Cloud TPU VM
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),                        # its image without its chips
    (POD | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "tpu"),                 # Kubernetes Engine
    (POD | {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_ML_PLATFORM": "JAX"}, "tpu"),
    (POD | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"}, None),        # a node of one host
    (POD | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "4"}, "tpu"),            # four slices of one host
    (POD, None),                                                                          # any pod
    (POD | {"JOB_COMPLETION_INDEX": "0"}, "k8s"),                                         # indexed Job, JobSet
])
def test_detect(environ, cluster):
    assert detect(environ) == cluster


def test_one_per_host():
    assert one_per_host("slurm", STEP) and one_per_host("slurm", {"SLURM_STEP_TASKS_PER_NODE": "1"})
    assert not one_per_host("slurm", {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"})
    assert not one_per_host("slurm", {"SLURM_STEP_TASKS_PER_NODE": "1,2"})
    assert not one_per_host("ompi", MPI) and one_per_host("ompi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert not one_per_host("tpu", {})


@pytest.mark.parametrize(("fields", "message"), [
    ({"coordinator": "a:1"}, "give all three"),
    ({"num_processes": 2, "process_id": 0}, "give all three"),
    ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "'host' must be HOST:PORT"),
    ({"coordinator": "host:99999", "num_processes": 2, "process_id": 0}, "'host:99999' must be HOST:PORT"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id 2 must be 0 to 1"),
    ({"heartbeat": 0}, "at least 1 second"),
])
def test_wrong_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_one_process_needs_nothing():
    start(DistributedConfig(), {})
    assert not jax.distributed.is_initialized() and is_primary()
    barrier("alone")
    agree(configuration="a")
    assert gather("text") == ["text"]
    with pytest.raises(KeyError, match="mine"):
        agree(KeyError("mine"))


def test_start_after_the_devices():
    jax.devices()
    with pytest.raises(ValueError, match="jax has started its devices already; call start first"):
        start(DistributedConfig(coordinator="127.0.0.1:9", num_processes=2, process_id=1))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_one_process_and_a_second_acts_as_usual(signum):
    seen = []
    before = signal.signal(signum, lambda *_: seen.append("usual"))
    try:
        with stop_on_signal(Mesh(np.array(jax.devices()), "all")) as stop:
            assert not stop()
            signal.raise_signal(signum)
            assert stop() and stop() and not seen
            signal.raise_signal(signum)
            assert seen == ["usual"]
        signal.raise_signal(signum)
        assert seen == ["usual"] * 2
    finally:
        signal.signal(signum, before)


# --- docs/scaling.md --------------------------------------------------------------------------------------------

SCALING = (Path(__file__).parent.parent / "docs/scaling.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```(?:bash|yaml)\n(.*?)```", SCALING, re.DOTALL)
TRAIN = next(script for script in SCRIPTS if script.startswith("#!/bin/bash\n# train.sh"))
VALUES = {"RUN": "/run", "MODE": "--resume", "JOB_COMPLETION_INDEX": "3", "PROJECT": "p"}


def documented_flags():
    """The flags of every command in the document that starts a recipe, those behind `train.sh` after its own."""
    lines = [line.split(" #")[0] for script in SCRIPTS for line in script.replace("\\\n", " ").splitlines()
             if not line.startswith("#")]
    fill = lambda text: shlex.split(re.sub(r"\$(\w+)", lambda name: VALUES[name[1]], text.replace('"$@"', "")))
    own = fill(next(line for line in lines if "-m recipes.pretrain" in line).split("-m recipes.pretrain")[1])
    for line in lines:
        if "-m recipes.pretrain" in line:
            yield fill(line.split("-m recipes.pretrain")[1])
        elif "bash train.sh" in line:
            yield own + fill(re.split(r"[&>\"']", line.split("bash train.sh")[1].replace('"$JOB', "$JOB"))[0])


def test_documented_commands_parse():
    commands = list(documented_flags())
    assert len(commands) >= 8
    configs = [parse(PRESETS, command, prog="recipes.pretrain", description="") for command in commands]
    assert {config.distributed.process_id for config in configs} == {None, 2, 3}
    assert {config.mesh.data for config in configs} >= {1, 2} and {config.resume for config in configs} == {True, False}


def test_documented_script_starts_and_goes_on(tmp_path):
    """Run with a stand-in for Python that prints its arguments."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "train.sh").write_text(TRAIN)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    run = lambda: subprocess.run(["bash", tmp_path / "train.sh", "--mesh.fsdp", "4"], env={
        "PATH": os.environ["PATH"], "RUN": str(tmp_path / "run")}, check=True, capture_output=True, text=True).stdout
    assert "--overwrite" in run() and "--mesh.fsdp 4" in run()
    (tmp_path / "run/checkpoints/100.orbax-checkpoint-tmp").mkdir(parents=True)
    assert "--overwrite" in run()
    (tmp_path / "run/checkpoints/100").mkdir()
    assert "--resume" in run() and "--overwrite" not in run()


def test_documented_environments_are_detected():
    rows = re.findall(r"^\| (slurm|ompi|tpu|k8s|none) \| (`.*?`) \|", SCALING, re.MULTILINE)
    assert {name for name, _ in rows} == {*get_args(Cluster), "none"}
    for name, variables in rows:
        environ = dict(part.split("=") for part in re.findall("`(.*?)`", variables))
        assert detect(environ) == (None if name == "none" else name), variables


# --- real processes ---------------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys, time
import jax
import numpy as np
from jax.sharding import Mesh
from jax._src import xla_bridge
from jaxlm.core.distributed import *
from jaxlm.core.signals import stop_on_signal
arguments = json.loads(sys.argv[1])
start(DistributedConfig(**arguments["config"]))
if arguments["early"]:  # before the loop, as while it compiles
    signal.raise_signal(signal.SIGTERM)
    time.sleep(2)
out = {"visible": xla_bridge.CUDA_VISIBLE_DEVICES.value, "devices": [jax.local_device_count(), jax.device_count()],
       "primary": is_primary()}
me = jax.process_index()

def outcome(error=None, **facts):
    try:
        agree(error, **facts)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

barrier("all here")
out["gathered"] = gather("한국" * (1 + 500 * me))
out["same"] = outcome(configuration="a", tokenizer="b")
out["error"] = outcome(OSError("disk full\\nand more") if me else None, configuration="a")
out["facts"] = outcome(configuration="a", source_fingerprints=str(me))
calls = 0
with stop_on_signal(Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "tensor"))) as stop:
    while calls < 400:
        if me == 1 and calls == 3 and arguments["signal"]:
            os.kill(os.getpid(), arguments["signal"])
        stopping = stop()
        calls += 1
        if stopping:
            break
        time.sleep(0.01 * (1 + 2 * me))
        if calls % 5 == 0:
            barrier("a step")
out["calls"], out["still"] = calls, stop()
barrier("all stopped")
print("\\n" + json.dumps(out), flush=True)
if arguments["die"]:
    if me:
        os.kill(os.getpid(), signal.SIGKILL)
    print("\\n" + json.dumps(outcome()), flush=True)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spawn(config, environ=None, **arguments):
    arguments = {"early": False, "signal": 0, "die": False} | arguments | {"config": config}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(arguments)], text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"} | (environ or {}))


def finish(processes):
    """What each process printed as JSON, its exit status and its log."""
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    values = [[json.loads(line) for line in out.splitlines() if line[:1] in "{\"n" and line] for out, _ in outputs]
    return values, [process.returncode for process in processes], [err for _, err in outputs]


def flags(port, **more):
    return [{"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": i, "timeout": 60, **more}
            for i in range(2)]


def check_agreement(first, second):
    assert first["devices"] == second["devices"] == [4, 8]
    assert (first["primary"], second["primary"]) == (True, False)
    assert first["gathered"] == second["gathered"] == ["한국", "한국" * 501]
    assert first["same"] is None and second["same"] is None
    assert first["error"] == "ValueError: process 1 failed: disk full"
    assert second["error"] == "OSError: disk full\nand more"
    assert first["facts"] == second["facts"]
    assert "process 1 has another source fingerprints than process 0" in first["facts"]


def test_two_processes_by_flags_stop_together_on_the_sigterm_of_one():
    values, codes, errors = finish([spawn(config, signal=signal.SIGTERM) for config in flags(free_port())])
    assert codes == [0, 0], errors
    (first,), (second,) = values
    check_agreement(first, second)
    assert first["calls"] == second["calls"] < 400 and first["still"] and second["still"]


@pytest.mark.parametrize("local_size", [1, 2])
def test_two_slurm_tasks_and_a_signal_before_the_first_step(local_size):
    port = free_port()
    environ = STEP | {"SLURM_STEP_NODELIST": "127.0.0.1", "JAX_COORDINATOR_PORT": str(port),
                      "SLURM_STEP_TASKS_PER_NODE": "1(x2)" if local_size == 1 else "2"}
    tasks = [spawn({"timeout": 60}, environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i * (local_size == 2))},
                   early=i == 1) for i in range(2)]
    values, codes, errors = finish(tasks)
    assert codes == [0, 0], errors
    (first,), (second,) = values
    check_agreement(first, second)
    assert [first["visible"], second["visible"]] == (["all", "all"] if local_size == 1 else ["0", "1"])
    assert first["calls"] == second["calls"] == 1


def test_two_mpi_ranks_a_ctrl_c_and_a_death():
    environ = MPI | {"JAX_COORDINATOR_PORT": str(free_port())}
    ranks = [spawn({"timeout": 60, "heartbeat": 3},
                   environ | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)},
                   signal=signal.SIGINT, die=True) for i in range(2)]
    began = time.monotonic()
    values, codes, errors = finish(ranks)
    assert time.monotonic() - began < 40
    (first, lost), (second,) = values
    assert first["calls"] == second["calls"] < 400
    assert "another process ended before this one could agree with it" in lost
    assert codes == [-signal.SIGABRT, -signal.SIGKILL], errors  # jax ends the survivor after the heartbeat


def test_processes_that_do_not_come_and_a_taken_port():
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        first = spawn(flags(taken)[0])
        alone = spawn(flags(free_port(), timeout=1)[1])
        no_cluster = spawn({"timeout": 60}, POD | {"JOB_COMPLETION_INDEX": "0"})
        _, codes, errors = finish([first, alone, no_cluster])
    assert codes == [1, 1, 1]
    assert "ValueError: process 0 of 2 at 127.0.0.1:" in errors[0] and "cannot open port" in errors[0]
    assert "did not meet all others within 1 s; check that every process was started" in errors[1]
    assert "a process of the k8s cluster could not be set up: jax cannot read its environment" in errors[2]
