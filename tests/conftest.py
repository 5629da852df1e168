"""Strict settings for every test: 8 CPU devices, rank promotion raises, warnings are errors, compiled programs cached.

The compile cache lies in `$JAX_COMPILATION_CACHE_DIR` when the environment names one (keep it outside the clone and
it survives a fresh checkout), else in `.cache/jax` of the clone.
"""

import logging
import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiling is most of what tests do: LLVM without its optimisations takes less than half the time, and the HLO passes,
# which decide what is computed, stay as they are. Subprocesses inherit it.
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0",
                                    "--xla_cpu_use_fusion_emitters=false"))

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


# Each compiled program takes some mappings of memory, of which Linux gives a process 65,530 (vm.max_map_count).
MAPPINGS = Path("/proc/self/maps")
MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """A process that ran many modules forgets its programs before it dies of their number."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def default_logging():
    """A recipe sets up logging for its process; other tests of this one expect the default."""
    loggers = [logging.getLogger(name) for name in ("jaxlm", "recipes")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate, one.level = handlers, propagate, level
