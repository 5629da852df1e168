"""Random keys derived from `(seed, step, name)`: nothing to store, so a resumed run draws the same numbers."""

import zlib

import jax


def derive(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """A typed PRNG key for one purpose at one step.

    `name` is hashed with CRC-32 because Python's `hash` changes between processes. `step` may be traced.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)
