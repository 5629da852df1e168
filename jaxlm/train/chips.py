"""TPU chips by their data sheets, and topologies of chips that are not here, for `jaxlm.train.plan`."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.core.config import nearest
from jaxlm.core.log import first_line
from jaxlm.train.measure import PEAK_FLOPS


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. Bandwidths are bytes/s; those of links count one direction."""

    kind: str          # as JAX names the device, a key of `measure.PEAK_FLOPS`
    hbm: float         # bytes that the compiler lets a program use, from its own refusals; the sheet says a little more
    bandwidth: float   # of HBM
    link: float        # of one ICI link; a chip has two for each axis of the torus
    largest: tuple[int, ...]  # chips along each axis of the torus
    ring: int          # an axis of a multiple of this many chips closes to a ring
    dcn: float         # network between slices: the host's network cards over its chips

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


# cloud.google.com/tpu/docs/{v5e,v5p,v6e}: HBM 16 GB at 819 GB/s, 95 GiB at 2765 GB/s, 32 GB at 1600 GB/s; ICI of all
# links both ways 400, 1200 and 800 GB/s a chip, on 4, 6 and 4 ports; network cards 2 x 100 Gbps for 8 chips, 50 Gbps a
# chip, 4 x 200 Gbps for 8 chips. Wrap-around: v5p in cubes of 4x4x4, v5e and v6e along the 16 chips of a whole side.
CHIPS = {
    "v5e": Chip(kind="TPU v5 lite", hbm=15.75 * 2**30, bandwidth=819e9, link=50e9, largest=(16, 16), ring=16,
                dcn=3.125e9),
    "v5p": Chip(kind="TPU v5", hbm=95.74 * 2**30, bandwidth=2765e9, link=100e9, largest=(16, 16, 24), ring=4,
                dcn=6.25e9),
    "v6e": Chip(kind="TPU v6 lite", hbm=31.25 * 2**30, bandwidth=1600e9, link=100e9, largest=(16, 16), ring=16,
                dcn=12.5e9),
}


@dataclass(frozen=True)
class Topology:
    """Chips that a program can be compiled for."""

    text: str
    chip: Chip
    shape: tuple[int, ...]              # chips along each axis of the torus, one slice
    slices: int
    devices: tuple[jax.Device, ...]     # compile only; slice by slice


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x8`, or `v6e:16x16*2` for two slices, as devices to compile for.

    Raises ValueError: an unknown chip, a shape that its torus does not have, libtpu not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    if not match:
        raise ValueError(f"topology '{text}' must be CHIP:SHAPE or CHIP:SHAPE*SLICES, such as v5p:4x4x8 or v6e:16x16*2")
    name, shape, slices = match[1], tuple(map(int, match[2].split("x"))), int(match[3] or 1)
    if name not in CHIPS:
        raise ValueError(f"topology '{text}': unknown chip '{name}'{nearest(name, CHIPS)}; known: {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if len(shape) != len(chip.largest):
        raise ValueError(f"topology '{text}': the torus of {name} has {len(chip.largest)} axes, so a shape is like "
                         f"{name}:{'x'.join(['4'] * len(chip.largest))}")
    if slices < 1 or math.prod(shape) < 1:
        raise ValueError(f"topology '{text}': sides and slices must be positive")
    if any(side > most for side, most in zip(sorted(shape), chip.largest, strict=True)):
        raise ValueError(f"topology '{text}': a slice of {name} has at most {'x'.join(map(str, chip.largest))} chips; "
                         f"join several with {name}:SHAPE*SLICES")
    if any(side % 2 for side in shape[:2]) and math.prod(shape) > 1:
        raise ValueError(f"topology '{text}': a host of {name} holds 2x2 chips, so the first two sides must be even")
    return Topology(text, chip, shape, slices, _devices(f"{name}:{match[2]}", shape, slices))


def _devices(name: str, shape: tuple[int, ...], slices: int) -> tuple[jax.Device, ...]:
    """The compile-only devices of libtpu, slice by slice."""
    # libtpu takes this machine for a TPU host and complains at length that it cannot find its place among others. It
    # also lets one process at a time hold the chips, with a lock file; none are held here.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"num_slices": slices} if slices > 1 else {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ValueError("planning needs the TPU compiler (no TPU): pip install 'jaxlm[plan]'") from error
        raise ValueError(f"topology '{name}' is refused by libtpu: {first_line(error)}") from error
    return tuple(sorted(devices, key=lambda device: (getattr(device, "slice_index", None) or 0, device.id)))


@contextlib.contextmanager
def without_disk_cache() -> Iterator[None]:
    """Leaves the compile cache alone: JAX writes there what it compiles for absent devices, and cannot read it."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is asked once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
