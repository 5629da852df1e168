"""Sampling that is balanced by difficulty: every bucket of rows becomes a source of the mixture.

So weights are shares of packed rows, that is of tokens; each bucket is shuffled and repeated by itself, and resuming,
epochs and fingerprints are those of any source. KORMo samples so for its fine-tuning (how is not published).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxlm.data.chat_examples import Chats
from jaxlm.data.difficulty import bucket_rows, parse_balance
from jaxlm.data.sources import Source


def balance_chats(sources: Sequence[Source], encoded: Sequence[Chats], balance: Sequence[str]) -> list[Chats]:
    """The conversations of sources, in buckets of their difficulty: `SOURCE/BUCKET`, weighted.

    A bucket b has the share W_b / sum W of all rows. The sources that have rows of it share it by their own weights,
    and quantiles are those of all sources together.
    """
    if capped := [source.config.path for source in sources if source.config.cap is not None]:
        raise ValueError(f"source {capped[0]!r}: cap= would hold for each bucket of data.balance; leave it out")
    weights = parse_balance(balance)
    values = [json.loads(source[int(row)].text)["difficulty"] for source, chats in zip(sources, encoded, strict=True)
              for row in chats.rows]
    buckets, weights = bucket_rows(values, weights)
    start, found = 0, []
    for chats in encoded:
        own, start = np.array(buckets[start:start + len(chats)]), start + len(chats)
        found += [(chats, name, np.flatnonzero(own == name)) for name in weights if name in own]
    total = sum(weights.values())
    within = Counter()
    for chats, name, _ in found:
        within[name] += chats.config.weight
    return [Chats(f"{chats.name}/{name}", replace(chats.config, weight=float(
        weights[name] / total * chats.config.weight / within[name])), [chats[i] for i in where], chats.rows[where])
        for chats, name, where in found]


def report_buckets(buckets: Sequence[Chats], num_tokens: int) -> str:
    """A line for each bucket: its rows, tokens, share, and epochs in `num_tokens` places of training."""
    total = sum(one.config.weight for one in buckets)
    lines = ["difficulty: rows, tokens, share of batches, epochs in this run if nothing were padded"]
    for one in buckets:
        share = one.config.weight / total
        lines.append(f"  {one.name}: {len(one)}, {one.num_tokens}, {share:.1%}, "
                     f"{num_tokens * share / one.num_tokens:.2f}")
    return "\n".join(lines)
