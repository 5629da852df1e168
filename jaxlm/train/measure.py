"""Throughput, model FLOPs utilisation and memory."""

import resource
import sys
import time

import jax
import jax.numpy as jnp

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
    measured = _measure_matmul(1024, jnp.dtype(dtype)) / len(jax.local_devices())
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


class Stopwatch:
    """Seconds spent training since the last reading; time inside `with stopwatch:` does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused_at: float | None = None

    def read(self) -> float:
        """Seconds since the last `read`, and starts anew."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    def __enter__(self) -> None:
        self._paused_at = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._start += time.perf_counter() - self._paused_at
