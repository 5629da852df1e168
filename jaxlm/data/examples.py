"""From a document to the arrays that packing takes.

An example is a dict of equally long 1-D arrays:

    tokens  int32    BOS, the ids of the text, EOS
    loss    uint8    1 where the token counts as a target
    draw    int32    how many documents of this source were drawn before this one, over all epochs
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import Tokenizer

Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class ToExample:
    """`index, document -> example`. A class, because loader workers receive it by pickle."""

    tokenizer: Tokenizer
    excluded: tuple[int, ...] = ()  # ids that are never a target

    def __call__(self, index: int, document: Document) -> Example:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(document.text), self.tokenizer.eos_id]
        tokens = np.array(ids, np.int32)
        loss = np.ones(len(tokens), np.uint8)
        if self.excluded:
            loss[np.isin(tokens, self.excluded)] = 0
        return {"tokens": tokens, "loss": loss, "draw": np.full(len(tokens), index, np.int32)}


def excluded_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of symbols that are read but never predicted, as KORMo does with `<think>`; ValueError if unknown."""
    return tuple(tokenizer.token_id(name) for name in names)


def windows(example: Example, seq_len: int) -> list[Example]:
    """Cuts an example longer than T+1 tokens into pieces that overlap by one token, so that each token after the
    first is a target exactly once.

    T=3, tokens a b c d e f:  [a b c d] and [d e f], whose targets are b c d and e f.
    """
    starts = range(0, max(1, len(example["tokens"]) - 1), seq_len)
    return [{name: array[start : start + seq_len + 1] for name, array in example.items()} for start in starts]
