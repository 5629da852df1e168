"""Throughput, model FLOPs utilisation, memory, and where the time goes."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import monitoring

# Dense bf16 peak per chip, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one device and where the number comes from.

    Known accelerators use the data sheet, for bfloat16 whatever the dtype. Anything else, a CPU above all, is measured
    by one square matrix product in `dtype`; utilisation is then relative to what XLA's own product reaches here, and
    the text says so.
    """
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if kind.startswith(name):
            return peak, f"{peak / 1e12:.0f} TFLOP/s, bf16 data sheet of {kind}"
    shared = len(jax.local_devices()) if jax.default_backend() == "cpu" else 1  # CPU devices share the cores
    measured = _measure_matmul(1024, jnp.dtype(dtype)) / shared
    return measured, f"{measured / 1e9:.0f} GFLOP/s, measured {dtype} matrix product on {kind}"


def _measure_matmul(size: int, dtype: jnp.dtype, repeats: int = 5) -> float:
    x = jnp.full((size, size), 1 / size, dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes() -> int:
    """Peak bytes of the first device; of this process where the device does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resident_bytes()


def resident_bytes() -> int:
    """Peak resident memory of this process; asks no device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Ledger:
    """Where the wall time of a run goes, from here to the end of the loop. Time that nothing else claims is `step`.

    `data` is an upper bound: a step that ended while its successor's batch was loaded counts the whole loading.

    Compilation is subtracted from whatever asked for it, as jax reports it, and booked as `compile`; a persistent
    compile cache that answers is booked there too, with the little time that it takes.
    """

    def __init__(self, *more: str) -> None:
        """`more`: names besides those of every loop."""
        names = ("step", "compile", "data", "checkpoint", "evaluation", "start", *more)
        self.seconds = dict.fromkeys(names, 0.0)
        self.training = 0.0  # seconds of steps and of waiting for their data, the compilation of the step included
        self._since = time.time()
        self._compiled: list[tuple[float, float]] = []
        monitoring.register_event_time_span_listener(self._listen)

    def _listen(self, event: str, start: float, end: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compiled.append((start, end))

    def book(self, name: str = "step") -> None:
        """Books the time since the last booking."""
        now, until = time.time(), self._since
        compiled = 0.0
        for start, end in sorted(self._compiled):  # they nest: tracing one function traces those that it calls
            compiled += max(0.0, end - max(start, until))
            until = max(until, end)
        self._compiled = []
        self.seconds["compile"] += compiled
        self.seconds[name] += max(0.0, now - self._since - compiled)
        self.training += now - self._since if name in ("step", "data") else 0.0
        self._since = now

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """What happens inside is booked under `name`."""
        self.book()
        try:
            yield
        finally:
            self.book(name)

    def shares(self) -> dict[str, float]:
        """Shares of the whole time, by name; that of `step` is the goodput."""
        total = max(sum(self.seconds.values()), 1e-9)
        return {name: seconds / total for name, seconds in self.seconds.items()}

    def close(self) -> None:
        """Stops listening."""
        monitoring.unregister_event_time_span_listener(self._listen)
