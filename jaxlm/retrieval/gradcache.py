"""GradCache: a contrastive batch of any size in the memory of one chunk (Gao et al. 2021, arXiv:2101.06983).

A contrastive loss needs the embeddings of the whole batch at once, but not the activations that led to them. So:
encode chunk by chunk and keep only embeddings; differentiate the loss by them; encode each chunk again, now with its
activations, and pull its embeddings' gradient back to the parameters. Reverse differentiation of a scan over
rematerialised chunks is exactly that, and the chunk's key, an input of the scan, draws the same dropout both times.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.masked import Metric
from jaxlm.core.mesh import ROWS, constrain, split_axes

# (params, rows, key) -> embeddings; leaves [n, ...] to leaves [n, ...] for any n; must not mix rows.
Encode = Callable[[Any, Any, jax.Array], Any]
# (params, embeddings by name, batch) -> (sum of the loss, metrics); params for what is learnt besides the encoders.
EmbeddingLoss = Callable[[Any, dict[str, Any], Any], tuple[jax.Array, dict[str, Metric]]]


def encode_chunks(
    encode: Encode, params: Any, rows: Any, key: jax.Array, num_chunks: int, cached: bool = True
) -> Any:
    """`encode` of all rows in `num_chunks` parts, with the activations of one part in memory, in both passes.

    Chunk i takes rows i, i + num_chunks, ... and the key `fold_in(key, i)`, so that each device cuts rows it holds:

        rows   0 1 2 3 4 5    2 chunks   0 2 4  and  1 3 5

    Args:
      rows: leaves [N, ...]; results are leaves [N, ...] in the same order.
      num_chunks: must divide the rows of each device.
      cached: False keeps the activations of all chunks instead of computing them again: the same value and gradient
        (dropout too), faster, in memory that grows with N.

    Raises ValueError: rows that do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else split_axes(ROWS, mesh)[1]
    for count in {leaf.shape[0] for leaf in jax.tree.leaves(rows)}:
        if num_chunks < 1 or count % (num_chunks * devices):
            raise ValueError(f"{count} rows do not divide into {num_chunks} chunks on {devices} devices; use a "
                             f"multiple of {max(num_chunks, 1) * devices} rows")

    def split(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // num_chunks, num_chunks, *leaf.shape[1:]).swapaxes(0, 1)
        return _by_rows(parts, 1)

    def join(leaf: jax.Array) -> jax.Array:
        return _by_rows(leaf.swapaxes(0, 1).reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), 0)

    def one(chunk: tuple[Any, jax.Array]) -> Any:
        part, index = chunk
        return encode(params, part, jax.random.fold_in(key, index))

    # Inside a scan nothing can be merged with its recomputation, so the barrier against that is left out.
    body = jax.checkpoint(one, prevent_cse=False) if cached else one
    return jax.tree.map(join, jax.lax.map(body, (jax.tree.map(split, rows), jnp.arange(num_chunks))))


def cached_loss(
    encoders: Mapping[str, Encode], loss: EmbeddingLoss, num_chunks: Mapping[str, int], cached: bool = True
) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Metric]]]:
    """A `Loss` for `train.step.make_step` that encodes the named parts of a batch in chunks, then applies `loss`.

    Worked example, a siamese encoder and 3 passages a query:

        cached_loss({"query": encode, "passage": encode}, loss, {"query": 2, "passage": 8})

    of a batch {"query": [B, T], "passage": [3 * B, S], "relevance": [B, 3]} gives `loss` the embeddings
    {"query": [B, D], "passage": [3 * B, D]}. For two towers each encoder reads its own part of the parameters.

    Args:
      encoders: names of batch entries, and what encodes them.
      num_chunks: of each; see `encode_chunks`, also for `cached`.

    Raises ValueError: names that differ.
    """
    if encoders.keys() != num_chunks.keys():
        raise ValueError(f"encoders are named {', '.join(encoders)}, but numbers of chunks {', '.join(num_chunks)}")

    def value(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Metric]]:
        embeddings = {
            name: encode_chunks(encode, params, batch[name], jax.random.fold_in(key, i), num_chunks[name], cached)
            for i, (name, encode) in enumerate(encoders.items())}
        return loss(params, embeddings, batch)

    return value


def _by_rows(x: jax.Array, axis: int) -> jax.Array:
    """One axis split over the devices as the rows of a batch are; of the others the compiler decides."""
    spec = [P.UNCONSTRAINED] * x.ndim
    spec[axis] = ROWS
    return constrain(x, P(*spec))
