"""Texts to vectors: pooling, prompts, and batches of texts of about one length."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core.batch import power_of_two
from jaxlm.core.masked import safe_divide
from jaxlm.core.mesh import BATCH, constrain, put_whole, split_axes
from jaxlm.data.tokenizer import Tokenizer, check_vocabulary
from jaxlm.model.decoder import Model
from jaxlm.model.encoder import Encoder, text_positions

Pooling = Literal["mean", "cls", "last", "weighted"]
Kind = Literal["query", "passage"]
# Parts of a power of two, for widths and rows. A program takes about as long to compile as many batches to compute, so
# that few texts get few shapes, and many texts little padding.
COARSE, FINE, MANY = 8, 16, 32
log = logging.getLogger(__name__)


def mean_pooling(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of a text's hidden states, its special tokens included, [B, D] float32; 0 for a row without tokens."""
    return _average(hidden_BTD, mask_BT, (mask_BT > 0).astype(jnp.float32))


def weighted_pooling(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """`sum_i i h_i / sum_i i` over a text's tokens i = 1, 2, ... (SGPT, Muennighoff 2022, arXiv:2202.08904).

    A causal model has read more of the text at later tokens, which therefore weigh more. [B, D] float32.
    """
    return _average(hidden_BTD, mask_BT, jnp.cumsum(mask_BT > 0, axis=1).astype(jnp.float32))


def cls_pooling(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The hidden state of a text's first token, [B, D] float32."""
    chex.assert_equal_shape_prefix((hidden_BTD, mask_BT), 2)
    return _pick(hidden_BTD, mask_BT, jnp.argmax(mask_BT > 0, axis=1))


def last_pooling(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The hidden state of a text's last token, [B, D] float32."""
    chex.assert_equal_shape_prefix((hidden_BTD, mask_BT), 2)
    return _pick(hidden_BTD, mask_BT, mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1] > 0, axis=1))


def _average(hidden_BTD: jax.Array, mask_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Chosen, not multiplied by 0: whatever stands in the padding, infinity too, it has no part in the result."""
    chex.assert_equal_shape_prefix((hidden_BTD, mask_BT), 2)
    seen_BTD = jnp.where(mask_BT[:, :, None] > 0, hidden_BTD.astype(jnp.float32), 0)
    weights_BT = jnp.where(mask_BT > 0, weights_BT, 0)
    total_BD = jnp.sum(seen_BTD * weights_BT[:, :, None], axis=1)
    return safe_divide(total_BD, jnp.sum(weights_BT, axis=1)[:, None])


def _pick(hidden_BTD: jax.Array, mask_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    picked_BD = jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.where(jnp.any(mask_BT > 0, axis=1)[:, None], picked_BD, 0)


def unit_length(x: jax.Array) -> jax.Array:
    """`x / |x|` over the last axis, and 0 with a zero gradient where x is 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A model with all that decides which vector a text gets. Two towers are two of them."""

    model: Encoder | Model           # a decoder stays causal: pool its last token, or weighted
    tokenizer: Tokenizer
    max_length: int                  # tokens of a text with its frame; longer texts lose their end, never the frame
    pooling: Pooling = "mean"
    normalize: bool = False          # vectors have length 1
    dimension: int | None = None     # the first so many numbers, before normalisation (Matryoshka); None: all
    similarity: Literal["cosine", "dot"] = "dot"  # how its vectors are meant to be compared
    query_prompt: str = ""           # before every query, "query: " for E5
    passage_prompt: str = ""
    before: tuple[int, ...] = ()     # ids before every text, [CLS] for example
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}; known: {', '.join(POOLINGS)}")
        check_vocabulary(self.tokenizer, self.model.config.vocab_size)
        least, most = len(self.before) + len(self.after) + 1, self.model.config.max_positions
        if not least <= self.max_length <= most:
            raise ValueError(f"max_length must be {least} to {most} (a token with its frame, and the positions of the "
                             f"model), got {self.max_length}")
        if self.dimension is not None and not 1 <= self.dimension <= self.model.config.d_model:
            raise ValueError(f"dimension must be 1 to {self.model.config.d_model}, got {self.dimension}")

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.dimension or self.model.config.d_model

    def hidden(self, params: Any, tokens: jax.Array, segments: jax.Array, dropout_key: jax.Array | None = None
               ) -> jax.Array:
        """The hidden states of tokens [B, T], [B, T, D] in the compute dtype.

        `segments` [B, T] is the number of the text within its row, 0 padding; so a mask of ones is one text a row.

        ValueError for a dropout key with a decoder, which has no dropout.
        """
        if isinstance(self.model, Encoder):
            return self.model.apply(params, tokens, segments=segments, dropout_key=dropout_key)
        if dropout_key is not None:
            raise ValueError("decoders have no dropout: give no dropout_key")
        positions = text_positions(segments)
        return self.model.apply(params, tokens, segments=segments, positions=positions, logits=False).hidden

    def vectors(self, params: Any, tokens: jax.Array, mask: jax.Array, dropout_key: jax.Array | None = None
                ) -> jax.Array:
        """The vectors of tokens [B, T] under a mask [B, T] (1 is a token), [B, width] float32; pure, for training too.

        On a mesh each device computes its rows; the result is split like them. ValueError: see `hidden`.
        """
        return self.pooled(self.hidden(params, tokens, mask, dropout_key), mask)

    def pooled(self, hidden_BTD: jax.Array, mask: jax.Array) -> jax.Array:
        """The vectors of hidden states [B, T, D] under a mask [B, T], [B, width] float32."""
        x_BD = POOLINGS[self.pooling](hidden_BTD, mask)[:, :self.width]
        return unit_length(x_BD) if self.normalize else x_BD


class Tokenized(NamedTuple):
    """Texts as ids with their frame."""

    ids: list[list[int]]
    num_cut: int  # texts that were longer than `max_length`


def tokenize(encoder: TextEncoder, texts: Sequence[str], kind: Kind, *, first: int = 0) -> Tokenized:
    """The ids of prompt and text, cut to `max_length`, in their frame.

    With [CLS] and [SEP] around and max_length 4: `a b c` is `[CLS] a b [SEP]`, and the empty text `[CLS] [SEP]`.

    Raises ValueError for a kind that is none, and for texts without any token, by their indices, counted from `first`.
    """
    if kind not in ("query", "passage"):
        raise ValueError(f"a text is a query or a passage, not {kind!r}")
    prompt = encoder.query_prompt if kind == "query" else encoder.passage_prompt
    room = encoder.max_length - len(encoder.before) - len(encoder.after)
    inner = encoder.tokenizer.encode_batch([prompt + text for text in texts])
    ids = [[*encoder.before, *one[:room], *encoder.after] for one in inner]
    if empty := [i for i, one in enumerate(ids, first) if not one]:
        raise ValueError(f"{len(empty)} text(s) have no token, and this encoder puts none around a text: "
                         f"{', '.join(map(str, empty[:5]))}{' ...' if len(empty) > 5 else ''}; leave them out")
    return Tokenized(ids, sum(len(one) > room for one in inner))


def to_batch(ids: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids as tokens and mask [rows, width] int32, filled up with 0 on the right and with empty rows."""
    assert len(ids) <= rows and max(map(len, ids), default=0) <= width
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, one in enumerate(ids):
        tokens[row, :len(one)], mask[row, :len(one)] = one, 1
    return tokens, mask


def embed_texts(
    encoder: TextEncoder, params: Any, texts: Sequence[str], kind: Kind, *, batch_tokens: int = 4096,
    block_texts: int = 50_000,
) -> np.ndarray:
    """The vectors of texts, [len(texts), width] float32, in their order.

    Texts of about one length share a batch, so that little padding is computed, and there is one compiled program for
    each of a few widths (`bucket`). On the mesh of the context (`jax.set_mesh`) the rows of a batch are split over its
    data axes, and every process gets all vectors.

    Args:
      params: where `jax.set_mesh` put them. kind: which prompt stands before the texts.
      texts: read in slices, once; they may lie on disk.
      batch_tokens: of a batch over all devices, padding included; bounds memory.
      block_texts: texts that are tokenized and sorted by length at once.

    Texts that are cut are counted in a warning. ValueError: see `tokenize`.
    """
    mesh = jax.sharding.get_mesh()
    row_parts, time_parts = (1, 1) if mesh.empty else (split_axes(axes, mesh)[1] for axes in BATCH)
    result, waiting, num_cut = np.empty((len(texts), encoder.width), np.float32), deque(), 0

    def collect() -> None:
        chosen, vectors = waiting.popleft()
        result[chosen] = np.asarray(vectors)[:len(chosen)]

    for start in range(0, len(texts), block_texts):
        # The devices compute the last batches of a block while the next one is tokenized.
        ids, cut = tokenize(encoder, texts[start:start + block_texts], kind, first=start)
        num_cut += cut
        for chosen, rows, width in plan_batches([len(one) for one in ids], batch_tokens, row_parts, time_parts,
                                                encoder.max_length):
            batch = to_batch([ids[i] for i in chosen], rows, width)
            batch = batch if mesh.empty else put_whole(batch, mesh)
            waiting.append((start + chosen, _vectors(encoder, params, *batch)))
            if len(waiting) > 2:  # the next batch is made while the last ones are computed
                collect()
    while waiting:
        collect()
    if num_cut:
        log.warning("%d of %d texts are longer than %d tokens; their ends were cut off", num_cut, len(texts),
                    encoder.max_length)
    return result


@partial(jax.jit, static_argnums=0)
def _vectors(encoder: TextEncoder, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return constrain(encoder.vectors(params, tokens, mask), P())


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, row_parts: int = 1, time_parts: int = 1, max_length: int = 2**30,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Batches as (indices of texts, rows, width): texts by length, those of one `bucket` together.

    Where they fill fewer than `MANY` batches, shapes are few: what does not fill a batch of its bucket joins the next
    wider one unless that costs half a batch, and rows are filled up to a power of two. Else buckets and rows are finer
    and little is padding. `row_parts` divides the rows, `time_parts` the width.
    """
    many = sum(lengths) > MANY * batch_tokens
    parts, spare = (FINE, 128) if many else (COARSE, batch_tokens // 2)

    def batch(start: int, stop: int, width: int) -> tuple[np.ndarray, int, int]:
        count, most = -(-(stop - start) // row_parts), capacity(width) // row_parts
        step = max(1, most // parts)
        rows = -(-count // step) * step if many and count > step else min(power_of_two(count), most)
        return order[start:stop], rows * row_parts, width

    def capacity(width: int) -> int:
        return max(row_parts, batch_tokens // width // row_parts * row_parts)

    order, start, width = np.argsort(lengths, kind="stable"), 0, 0
    for stop, length in enumerate(np.asarray(lengths, int)[order].tolist()):
        own = max(length, min(bucket(length, parts), max_length))  # max_length need not be the width of a bucket
        own = -(-own // time_parts) * time_parts
        waiting = stop - start
        if waiting and (waiting >= capacity(own) or waiting * (own - width) > max(spare, waiting * width // parts)):
            yield batch(start, stop, width)
            start = stop
        width = own
    if len(order):
        yield batch(start, len(order), width)


def bucket(length: int, parts: int = COARSE) -> int:
    """The width in which a text is computed: padding is less than 2 / `parts` of it, or less than 8 tokens.

    8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ... with 8 parts of a power of two
    """
    step = max(8, power_of_two(length) // parts)
    return -(-length // step) * step


POOLINGS = {"mean": mean_pooling, "cls": cls_pooling, "last": last_pooling, "weighted": weighted_pooling}
