"""Signals that end a run in order: after the same step in every process, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ASKED = threading.Event()  # a SIGTERM came since this process joined others


@contextlib.contextmanager
def stop_on_signal(mesh: Mesh) -> Iterator[Callable[[], bool]]:
    """Yields `stop()`: whether to end the run now. Call it once before every step, in every process.

    True once SIGTERM or SIGINT came; a second signal acts as usual. With several processes, one signal to any of them
    is enough, and all get True at the same call, at most two later. There SIGTERM counts from
    `core.distributed.start` on. Only the main thread can listen.
    """
    several = jax.process_count() > 1
    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    with _listening(signals, ASKED if several else threading.Event()) as event:
        yield _Vote(event, mesh) if several else event.is_set


class _Vote:
    """Whether an event is set in any process: a reduction on the devices, started now and read at the next call.

    So no step waits for it. jax has a service for this (`multihost_utils.reached_preemption_sync_point`), which in a
    soak on a busy machine once took 104 s to pass a SIGTERM on and once never did in 138 s.
    """

    def __init__(self, event: threading.Event, mesh: Mesh) -> None:
        self._event, self._pending = event, None
        self._split = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

    def __call__(self) -> bool:
        mine = np.full(jax.local_device_count(), self._event.is_set())
        votes = jax.make_array_from_process_local_data(self._split, mine, (jax.device_count(),))
        before, self._pending = self._pending, self._any(votes)
        return bool(self._pending if before is None else before)  # a signal before the first step stops there


@contextlib.contextmanager
def _listening(signals: tuple[int, ...], event: threading.Event) -> Iterator[threading.Event]:
    """`event`, which the first of each signal sets; the next one acts as before."""
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {signum: listen(signum, event) for signum in signals}
    try:
        yield event
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def listen(signum: int, event: threading.Event) -> Any:
    """Sets `event` at the first signal, which then acts as before; returns the handler before."""
    def handle(signum: int, frame: object) -> None:
        signal.signal(signum, previous)
        event.set()

    previous = signal.signal(signum, handle)
    return previous
