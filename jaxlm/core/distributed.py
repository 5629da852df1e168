"""Several processes as one program: how they find each other, agree and end together.

`jax.distributed` does the work: one coordination service in process 0, and heartbeats. A process that goes silent ends
all others after `heartbeat` seconds, with a C++ message and SIGABRT; that is jax's way, and the scheduler restarts the
job. Measured on 2 CPU processes: process 0 gone, the others end at once; another one gone, after
`heartbeat` seconds (an error of gloo names the lost connection at once).
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.core.log import first_line
from jaxlm.core.signals import ASKED, listen

log = logging.getLogger(__name__)
T = TypeVar("T")

Cluster = Literal["ompi", "slurm", "tpu", "k8s"]


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Who takes part. Empty: as the cluster says (`detect`), else this process alone."""

    coordinator: str = ""              # HOST:PORT of process 0, a free port there
    num_processes: int | None = None
    process_id: int | None = None      # 0 to num_processes - 1
    timeout: int = 300                 # seconds to wait for the others at the start
    heartbeat: int = 100               # seconds without a sign of life after which a process counts as dead

    def __post_init__(self):
        given = [self.coordinator != "", self.num_processes is not None, self.process_id is not None]
        if any(given) and not all(given):
            raise ValueError("distributed.coordinator, num_processes and process_id belong together: give all three, "
                             "or none where a cluster names them")
        if all(given):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"distributed.coordinator '{self.coordinator}' must be HOST:PORT of process 0, as "
                                 "10.0.0.1:8476")
            if not 0 <= self.process_id < self.num_processes:
                raise ValueError(f"distributed.process_id {self.process_id} must be 0 to {self.num_processes - 1} "
                                 f"with num_processes {self.num_processes}")
        if self.timeout < 1 or self.heartbeat < 1:
            raise ValueError("distributed.timeout and heartbeat must be at least 1 second, got "
                             f"{self.timeout} and {self.heartbeat}")


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that a process environment names, or None for a process that stands alone.

    The order is jax's own (`jax._src.clusters`). A SLURM allocation without `srun`, a step of one task and a TPU node
    of one host are None. How many processes a Cloud TPU VM or an indexed Kubernetes job belongs to is not in the
    environment; jax asks their servers, and starts well with one.
    """
    if _count(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    if _count(environ, "SLURM_STEP_NUM_TASKS") > 1:  # SLURM_NTASKS, which jax counts, is also set without srun
        return "slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:  # Kubernetes Engine
        slices = _count(environ, "MEGASCALE_NUM_SLICES") or 1
        return "tpu" if len(hosts.split(",")) * slices > 1 else None
    # On a Cloud TPU VM, `import jax` sets the first variable; where it sees no TPU chip, the second.
    if "TPU_ML_PLATFORM" in environ and "TPU_SKIP_MDS_QUERY" not in environ:
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "k8s"
    return None


def one_per_host(cluster: Cluster, environ: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started one process on every host, which then drives all devices of its host."""
    if cluster == "slurm":
        return re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")) is not None
    return cluster == "ompi" and environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def start(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes; flags win over the environment, and a process that stands alone starts nothing.

    Must run before any device is touched. From here on SIGTERM waits for `core.signals.stop_on_signal`. With SLURM and
    Open MPI, one process a host gets all of its GPUs and several get one each (jax gives only one in both cases).

    Raises ValueError: devices already in use, a port that is taken, processes that did not come in time, a cluster
    that jax cannot read.
    """
    cluster = None if config.coordinator else detect(environ)
    if not config.coordinator and cluster is None:
        return
    options = {"initialization_timeout": config.timeout + 60,  # ours comes first; jax's ends the process
               "heartbeat_timeout_seconds": config.heartbeat, "shutdown_timeout_seconds": config.heartbeat}
    if config.coordinator:
        options |= {"coordinator_address": config.coordinator, "num_processes": config.num_processes,
                    "process_id": config.process_id, "cluster_detection_method": "deactivate"}
        where = f"process {config.process_id} of {config.num_processes} at {config.coordinator}"
        if config.process_id == 0:
            _check_port(int(config.coordinator.rpartition(":")[2]), where)
    else:
        options |= {} if cluster == "tpu" else {"cluster_detection_method": cluster}
        if one_per_host(cluster, environ):
            options["local_device_ids"] = []  # no restriction
        where = f"a process of the {cluster} cluster"
    log.info("%s: waiting up to %d s for the others", where, config.timeout)
    try:
        _initialize(options, config.timeout)
    except TimeoutError:
        raise ValueError(
            f"{where} did not meet all others within {config.timeout} s; check that every process was started, that "
            "process 0 runs at that address, and that its port is open to the other hosts") from None
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, LookupError, OSError) as error:
        cause = first_line(error)
        if "must be called before" in cause:
            cause = "jax has started its devices already; call start first"
        elif cluster is not None:
            cause = f"jax cannot read its environment ({cause}); give --distributed.coordinator, num-processes and " \
                    "process-id instead"
        raise ValueError(f"{where} could not be set up: {cause}") from error
    if threading.current_thread() is threading.main_thread():
        listen(signal.SIGTERM, ASKED)  # in place of jax's own handler, which it has just installed


def is_primary() -> bool:
    """Whether this process is the one that writes logs and small files."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has called `barrier` with the same name. It starts the devices."""
    if _several():
        with _peers():
            multihost_utils.sync_global_devices(name)


def agree(error: BaseException | None = None, **facts: str) -> None:
    """Every process reports how its own checks ended; either all go on or all raise.

    Args:
      error: what failed here. It is raised here, and as `process 1 failed: ...` in the others (ValueError).
      facts: strings that must be the same everywhere, by name: `configuration=digest`. A difference is a ValueError
        in all processes that names the fact and the processes which differ from process 0.
    """
    if not _several():
        if error is not None:
            raise error
        return
    report = {"error": None if error is None else first_line(error), "facts": facts}
    with _peers():
        reports = [json.loads(text) for text in gather(json.dumps(report))]
    if error is not None:
        raise error
    failed = {i: report["error"] for i, report in enumerate(reports) if report["error"] is not None}
    if failed:
        first = min(failed)
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ValueError(f"process {first} failed{more}: {failed[first]}")
    expected = reports[0]["facts"]
    for name in sorted({name for report in reports for name in report["facts"]}):
        differing = [i for i, report in enumerate(reports) if report["facts"].get(name) != expected.get(name)]
        if differing:
            who = f"process {differing[0]} has" if len(differing) == 1 else \
                f"processes {', '.join(map(str, differing[:8]))}{' ...' if len(differing) > 8 else ''} have"
            raise ValueError(f"{who} another {name.replace('_', ' ')} than process 0; start all processes with the "
                             "same flags, files and versions")


def together(work: Callable[[], T], facts: Callable[[T], Mapping[str, str]] = lambda result: {}) -> T:
    """`work()` in every process, without collectives; its result where all succeeded with the same facts (`agree`).

    Where one process raises, all do.
    """
    try:
        result = work()
        found = facts(result)
    except Exception as error:  # whatever it is, the others must hear of it
        agree(error)
        raise
    agree(None, **found)
    return result


def gather(text: str) -> list[str]:
    """The strings of all processes, by process. Every process must call it."""
    if not _several():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    width = 1 << int(sizes.max()).bit_length()  # few widths, few compilations
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - data.size)))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _initialize(options: dict, timeout: float) -> None:
    """`jax.distributed.initialize` with a time-out that raises: jax's own ends the process with pages of C++ log.

    In a thread of its own, so that Ctrl-C works too; after a time-out it stays behind until the process ends.
    """
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            jax.distributed.initialize(**options)
        except BaseException as error:  # raised again below
            outcome.append(error)

    thread = threading.Thread(target=work, name="jax.distributed.initialize", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    if outcome:
        raise outcome[0]


def _check_port(port: int, where: str) -> None:
    """ValueError for a port that is taken, at which jaxlib 0.10.2 dies of a segmentation fault."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just closed is free
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(f"{where} cannot open port {port} ({error.strerror}); choose another") from None


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turns jax's error about a lost connection into one sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"another process ended before this one could agree with it; see its log ({first_line(error)})"
                         ) from error


def _several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0
