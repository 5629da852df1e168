"""Training a byte-level BPE tokenizer as KORMo's (arXiv 2510.09426): the split rule of Qwen 2, NFC, KORMo's tokens.

Not reproduced: the 30 runs of newlines and spaces that KORMo keeps as whole tokens after the learned ones, whose list
is not published; the split rule keeps such runs together, so BPE learns the frequent ones. That a vocabulary is padded
to a multiple of 128 is the model's matter (`ModelConfig.vocab_size`), and no token stands for the padding.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxlm.data.tokenizer import BYTE_PIECES, JsonTokenizer

# What no token crosses; the first alternative that matches takes the text.
SPLIT_RULE = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",   # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",       # letters, with one sign or space before them
    r"\p{N}",                          # each digit alone
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",      # punctuation, with a space before and newlines after
    r"\s*[\r\n]+",                     # newlines
    r"\s+(?!\S)",                      # spaces but the last one, which belongs to the word that follows
    r"\s+",
))


class ReservedToken(NamedTuple):
    """A whole token; `control`: text that spells it out stays text, so that users cannot forge it."""

    name: str
    control: bool


# In KORMo's order, behind the learned tokens. bos, eos and pad come first.
KORMO_TOKENS = (
    ReservedToken("<|BOS|>", True), ReservedToken("<|EOS|>", True), ReservedToken("<|PAD|>", True),
    ReservedToken("<think>", False), ReservedToken("</think>", False),
    ReservedToken("<tool_call>", False), ReservedToken("</tool_call>", False),
    ReservedToken("<tool_response>", False), ReservedToken("</tool_response>", False),
    ReservedToken("<|BOT|>", True), ReservedToken("<|EOT|>", True),
)


def train_bpe(texts: Iterable[str], *, vocab_size: int, reserved: Sequence[ReservedToken] = KORMO_TOKENS,
              min_frequency: int = 2) -> JsonTokenizer:
    """A byte-level BPE model of exactly `vocab_size` tokens; the same texts give the same model.

    Ids: 256 bytes, what is learned, `reserved` in its order (its first three are bos, eos, pad). The text of decoded
    ids is the NFC form of what was encoded. transformers, reading the file, puts bos before a text; `encode` here does
    not. `min_frequency`: a pair that is rarer is not merged. ValueError for no text, or a `vocab_size` that is too
    small or too large, naming the bound.
    """
    names = [token.name for token in reserved]
    if len(names) < 3 or len(set(names)) < len(names) or "" in names:
        raise ValueError(f"reserved tokens must be distinct, not empty, and at least bos, eos and pad: {names}")
    learned = vocab_size - len(names)
    if learned < BYTE_PIECES:
        raise ValueError(f"vocab_size {vocab_size} is too small: {BYTE_PIECES} bytes and {len(names)} reserved tokens "
                         f"need at least {BYTE_PIECES + len(names)}")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(vocab_size=learned, min_frequency=min_frequency, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise ValueError("no text to train a tokenizer on")
    if (found := tokenizer.get_vocab_size()) < learned:
        raise ValueError(f"vocab_size {vocab_size} is too large for this text, which yields at most "
                         f"{found + len(names)} tokens (pairs seen at least {min_frequency} times)")
    # Added one by one: a call takes tokens of one kind, and the order of the ids is KORMo's.
    for token in reserved:
        tokenizer.add_tokens([AddedToken(token.name, special=token.control, normalized=False)])
    bos, eos, pad = names[:3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return JsonTokenizer(tokenizer.to_str().encode("utf-8"), bos=bos, eos=eos, pad=pad)


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_RULE), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class _Counted:
    """Texts on their way to a trainer, which itself would train on nothing without a word."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.characters = texts, 0

    def __iter__(self):
        for text in self._texts:
            self.characters += len(text)
            yield text
