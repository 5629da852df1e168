"""Training a tokenizer: byte-fallback BPE by sentencepiece, or the one that a configuration names."""

import io
import logging
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sentencepiece

from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import BYTE_PIECES, SentencePieceTokenizer, Tokenizer, load_tokenizer

KORMO_SYMBOLS = ("<think>", "</think>", "<|BOT|>", "<|EOT|>")  # thought and chat turns
# Longer lines are cut: sentencepiece drops a training sentence beyond its limit in bytes without a word.
_TRAIN_LINE = 4096
# No learned token spans a line; the space sign and NUL would be taken for something else.
_TRAIN_BREAKS = re.compile(r"[\n\r\0\u2581]+")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    path: str = "train"           # train: sentencepiece on the sources; bytes; or a folder or file
    documents: int | None = None  # train only: at most this many documents, evenly from the sources; None is 50 000
    symbols: tuple[str, ...] | None = None  # train only: whole tokens; None is KORMo's for thought and chat

    def __post_init__(self):
        if self.path != "train" and (self.documents, self.symbols) != (None, None):
            raise ValueError("tokenizer.documents and symbols have an effect with tokenizer.path train only")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"tokenizer.documents must be positive, got {self.documents}")


def make_tokenizer(config: TokenizerConfig, sources: Sequence[Source], vocab_size: int) -> Tokenizer:
    """Loads the tokenizer that `config` names, or trains one of `vocab_size` tokens on documents of all sources."""
    if config.path != "train":
        return load_tokenizer(config.path)
    share = -(-(config.documents or 50_000) // len(sources))
    texts = (source[i] for source in sources for i in range(0, len(source), -(-len(source) // share)))
    symbols = KORMO_SYMBOLS if config.symbols is None else config.symbols
    return train_sentencepiece((document.text for document in texts if document), vocab_size=vocab_size,
                               user_symbols=symbols)


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, user_symbols: Sequence[str] = (),
                        control_symbols: Sequence[str] = (), character_coverage: float = 0.9995,
                        max_chars: int = 100_000_000, seed: int = 0, eos: str = "</s>") -> SentencePieceTokenizer:
    """A byte-fallback BPE model whose round trip is exact for any string; the same texts give the same model.

    Ids: unk 0, bos 1, eos 2, pad 3, `control_symbols` (never matched in text), `user_symbols` (always), bytes, rest.
    Each digit is a token, a newline is its byte. Of more than `max_chars` characters a random sample is used, and the
    log says so. `eos` names id 2. ValueError for an empty text or a `vocab_size` that is too small or too large, naming
    the bound.
    """
    symbols = [*user_symbols, *control_symbols]
    if len(set(symbols)) != len(symbols) or {"", "<unk>", "<s>", eos, "<pad>"} & set(symbols):
        raise ValueError(f"symbols must be distinct, not empty and none of <unk> <s> {eos} <pad>: {symbols}")
    lines = _sample_lines(texts, max_chars, random.Random(seed))
    if not lines:
        raise ValueError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=character_coverage,
            max_sentence_length=8 * _TRAIN_LINE, user_defined_symbols=list(user_symbols),
            control_symbols=list(control_symbols), unk_id=0, bos_id=1, eos_id=2, pad_id=3, eos_piece=eos, num_threads=1,
            minloglevel=2)
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _sample_lines(texts: Iterable[str], max_chars: int, rng: random.Random) -> list[str]:
    """Training lines; when they pass `max_chars`, a line stays with a probability that halves each time."""
    kept: list[tuple[float, str]] = []
    held = seen = 0
    share = 1.0
    for text in texts:
        for line in _TRAIN_BREAKS.split(text):
            for start in range(0, len(line), _TRAIN_LINE):
                piece = line[start:start + _TRAIN_LINE]
                seen += len(piece)
                draw = rng.random()
                if draw >= share:
                    continue
                kept.append((draw, piece))
                held += len(piece)
                while held > max_chars and len(kept) > 1:
                    share /= 2
                    kept = [(draw, piece) for draw, piece in kept if draw < share]
                    held = sum(len(piece) for _, piece in kept)
    if held < seen:
        logger.warning("tokenizer trained on a random sample: %.1f M of %.1f M characters", held / 1e6, seen / 1e6)
    return [piece for _, piece in kept]


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (f"vocab_size {vocab_size} is too small: special tokens, {BYTE_PIECES} bytes and the characters of the "
                f"text need at least {found[1]}; raise it or lower character_coverage")
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text, which yields at most {found[1]} tokens"
    return f"sentencepiece cannot train on this: {message}"
