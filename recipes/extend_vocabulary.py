"""Give a model that exists another tokenizer, or more tokens, and start the new rows from what it knows.

Tokens of both tokenizers keep their rows of embedding and head. A new one starts as the mean of the old tokens that
spell it (or at random, N(mean, std) of the old rows), so training goes on from the model instead of from noise. Korean
for an English model, for example:

    python -m recipes.train_tokenizer --vocab-size 4096 --korean-share 0.5 --folder runs/tokenizer
    python -m recipes.extend_vocabulary --source runs/demo --tokenizer runs/tokenizer/tokenizer --target extended
    python -m recipes.extend_vocabulary --source smollm2 --add-tokens "<think>" "</think>" --target thinking
    python -m recipes.pretrain --init extended --data.path more.jsonl.gz

The source is a run folder, a Hugging Face folder or a GGUF file; the target a Hugging Face folder, which appears whole
or not at all. Seconds on a laptop for models that fit into its memory. Expected: the same logits of shared tokens for
a text of shared tokens; other texts are worse than before until the model is trained further. Left out: that training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxlm.core.command import run_command
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.train.pretrained import Pretrained, export_pretrained, load_weights, open_pretrained
from jaxlm.train.vocabulary import RowInit, change_vocabulary, with_tokens

PROG = "recipes.extend_vocabulary"
log = logging.getLogger(PROG)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One change of vocabulary: a tokenizer, or tokens to add to the model's own."""

    source: Path = Path("runs/demo")   # a run folder, a Hugging Face folder or a .gguf file
    target: Path = Path("extended")    # a new Hugging Face folder
    tokenizer: str = ""                # a folder or file with the new tokenizer, or the word bytes
    add_tokens: tuple[str, ...] = ()   # whole tokens behind those of the model's own tokenizer.json
    control: bool = True               # text that spells out an added token stays text; chat templates write them
    init: RowInit = "mean"             # new rows: mean of the old tokens that spell them, or random
    multiple: int = 1                  # rows are rounded up to a multiple of it; KORMo: 128
    seed: int = 0                      # of random rows
    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "kormo"] = "llama"  # under whose names
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the written weights
    overwrite: bool = False            # replace an earlier export in `target`


PRESETS = {"demo": Config()}


def check(config: Config) -> None:
    """ValueError for flags that do not fit together."""
    if bool(config.tokenizer) == bool(config.add_tokens):
        raise ValueError("give either --tokenizer with another tokenizer, or --add-tokens")
    if config.multiple < 1:
        raise ValueError(f"--multiple must be positive, got {config.multiple}")
    if config.seed and config.init != "random":
        raise ValueError("--seed has an effect with --init random only")
    if config.tokenizer and not config.control:
        raise ValueError("--no-control has an effect with --add-tokens only")


def new_tokenizer(config: Config, model: Pretrained) -> Tokenizer:
    """The tokenizer that the model gets."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{config.source} has no tokenizer that tokens could be added to")
    return with_tokens(model.tokenizer, config.add_tokens, control=config.control)


def extend(config: Config) -> None:
    """Loads, changes, writes."""
    check(config)
    opened = open_pretrained(config.source)
    tokenizer = new_tokenizer(config, opened)
    model, found = change_vocabulary(load_weights(config.source, opened), tokenizer, init=config.init,
                                     multiple=config.multiple, seed=config.seed)
    new = tokenizer.vocab_size - len(found.shared)
    spelled = sum(bool(pieces) for i, pieces in enumerate(found.pieces) if i not in found.shared)
    print(f"{tokenizer.vocab_size} tokens: {len(found.shared)} shared, {new} new ({spelled} of them spelled by old "
          f"ones), {found.dropped} dropped; {model.config.vocab_size} rows")
    lost = [name for name in opened.tokenizer.symbols if name not in tokenizer.symbols]
    if model.chat and (marks := [name for name in lost if name in model.chat.source]):
        log.warning("the chat template writes %s, no control token of the new tokenizer", ", ".join(marks))
    export_pretrained(model, config.target, architecture=config.architecture, dtype=config.dtype,
                      overwrite=config.overwrite)
    log.info("written to %s", config.target)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(extend, PRESETS, argv, prog=PROG, description=__doc__)


if __name__ == "__main__":
    main()
