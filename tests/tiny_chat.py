"""A tiny model with a ChatML tokenizer in a Hugging Face folder, for tests of what needs a whole model on disk."""

import functools
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxlm.data.chat_template import CHATML, TEMPLATE_FILE
from jaxlm.data.tokenizer import JsonTokenizer, save_tokenizer
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf

MODEL = ModelConfig(vocab_size=264, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
                    max_positions=256, init_std=0.3)
SPECIALS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")


@functools.cache
def json_tokenizer(specials=SPECIALS) -> JsonTokenizer:
    """Bytes and special tokens."""
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return JsonTokenizer(tokenizer.to_str().encode())


def tiny_folder(folder: Path, seed: int = 0, specials=SPECIALS, template: str | None = CHATML) -> Path:
    """Writes the model with random weights; returns the folder."""
    tokenizer = json_tokenizer(specials)
    save_hf(folder, MODEL, jax.jit(build(MODEL).init)(jax.random.key(seed)), architecture="llama", overwrite=True)
    save_tokenizer(tokenizer, folder)
    if template:
        (folder / TEMPLATE_FILE).write_text(template)
    return folder
