"""Held-out likelihood: bits per byte, which compares models across tokenizers and with compressors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core.masked import Mean
from jaxlm.core.mesh import put_whole


def bits_per_byte(
    nll: Callable[[Any, Any], Mean], params: Any, batches: Iterable[Any], num_bytes: int, mesh: Mesh
) -> float:
    """Total negative log-likelihood in bits over the number of UTF-8 bytes of the text.

    Args:
      nll: jitted `params, batch -> Mean(sum of nats, tokens)`.
      batches: host batches that hold every token of the text as a target exactly once, whole in every process.
      num_bytes: size of the text, as the same convention counts it.
    """
    totals = [nll(params, put_whole(batch, mesh)).total for batch in batches]
    return sum(float(total) for total in jax.device_get(totals)) / (num_bytes * math.log(2))
