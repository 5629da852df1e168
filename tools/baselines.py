"""Bits per byte of models that need no training loop: a byte trigram and `xz`.

Run: python -m tools.baselines --train SOURCE ... --held-out SOURCE ...

Sources are those of `recipes.pretrain`; a text is its UTF-8 bytes and one newline that ends it, the convention of
`jaxlm.data.pipeline.eval_batches`, so the numbers stand beside a run's `eval/bpb_*`.
"""

import lzma
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tyro

from jaxlm.data.sources import open_source, parse_source

BLOCK = 1 << 24  # bytes whose codes are in memory together: they take eight times the text


def trigram_counts(text: bytes) -> list[np.ndarray]:
    """Counts of byte n-grams for n = 1, 2, 3 as dense arrays of shapes [256], [256, 256], [256, 256, 256]."""
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    counts = []
    for n in (1, 2, 3):
        total = np.zeros(256**n, np.int64)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK + n - 1]
            codes = sum(block[i : len(block) - n + 1 + i] << (8 * (n - 1 - i)) for i in range(n))
            total += np.bincount(codes, minlength=256**n)
        counts.append(total.reshape((256,) * n))
    return counts


def trigram_bits(counts: list[np.ndarray], text: bytes) -> float:
    """Bits of `text` under the Witten-Bell interpolated trigram.

    p_n(c | h) = (count(h c) + kinds(h) p_{n-1}(c | h')) / (count(h) + kinds(h)), where kinds(h) is the number of
    different bytes seen after h, h' drops the oldest byte, and p_0 is uniform over 256.
    Bell, Cleary and Witten, "Text Compression" (1990), method C.
    """
    # Two newlines stand before the text: every text follows the end of another one.
    data = np.frombuffer(b"\n\n" + text, np.uint8).astype(np.int64)
    c, b, a = data[2:], data[1:-1], data[:-2]
    unigram, bigram, trigram = counts
    p = (unigram[c] + np.count_nonzero(unigram) / 256) / (unigram.sum() + np.count_nonzero(unigram))
    for table, history in ((bigram, (b,)), (trigram, (a, b))):
        seen, kinds = table.sum(axis=-1)[history], np.count_nonzero(table, axis=-1)[history]
        p = np.where(seen > 0, (table[*history, c] + kinds * p) / np.maximum(seen + kinds, 1), p)
    return float(-np.log2(p).sum())


def xz_bits(text: bytes, before: bytes = b"") -> float:
    """Bits that `xz -9e` adds for `text` when it has compressed `before` in the same stream."""
    return 8.0 * (_xz_size(before + text) - _xz_size(before))


@lru_cache(maxsize=4)  # the training text, once for all languages
def _xz_size(data: bytes) -> int:
    window = 1 << max(26, min(30, len(data).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(data, filters=filters)) if data else 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Byte trigram and xz on held-out text."""

    train: tuple[str, ...]     # sources the trigram counts, and that xz has seen in the last column
    held_out: tuple[str, ...]  # sources to measure, by language
    xz_after_training: bool = False  # also xz with the training text before it: slow, minutes per 100 MB


def read(specs: tuple[str, ...]) -> dict[str, bytes]:
    """Texts of all sources joined by newlines, by language."""
    texts = defaultdict(list)
    for spec in specs:
        source = open_source(parse_source(spec))
        for document in filter(None, (source[i] for i in range(len(source)))):
            texts[document.language or "all"].append(document.text.encode() + b"\n")
    return {language: b"".join(parts) for language, parts in texts.items()}


def main(config: Config) -> None:
    """Prints one row per language."""
    train = b"".join(read(config.train).values())
    counts = trigram_counts(train)
    print(f"training text {len(train)} bytes")
    print("language  bytes  trigram  xz  xz after the training text   (bits per byte)")
    for language, text in sorted(read(config.held_out).items()):
        after = f"{xz_bits(text, train) / len(text):.4f}" if config.xz_after_training else "-"
        print(f"{language}  {len(text)}  {trigram_bits(counts, text) / len(text):.4f}  "
              f"{xz_bits(text) / len(text):.4f}  {after}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
