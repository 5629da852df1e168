"""The evaluation of a language model while it trains: bits per byte of held-out text, and greedy samples."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core.masked import Mean
from jaxlm.data.pipeline import eval_batches
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.eval.likelihood import bits_per_byte
from jaxlm.generate.decode import complete, pad
from jaxlm.generate.settings import SamplingConfig, make_settings
from jaxlm.model.decoder import Model

Evaluation = Callable[[Any, int], tuple[dict[str, float], str]]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the model writes at every evaluation."""

    prompts: tuple[str, ...] = ("일본의 통화는", "독일어는", "The currency of Japan is", "In Korean, Germany")
    tokens: int = 32           # greedy tokens after each prompt

    def __post_init__(self):
        if self.tokens < 1 or not self.prompts:
            raise ValueError("evaluation needs samples.prompts and samples.tokens, at least one of each")


def make_evaluation(
    nll: Callable[[Any, Any], Mean], model: Model, tokenizer: Tokenizer, sources: Sequence[Source], *,
    samples: SampleConfig, batch_size: int, seq_len: int, mesh: Mesh,
) -> Evaluation:
    """`params, step -> ({"eval/bpb_LANGUAGE": bits per byte}, a report with the samples)`.

    Documents without a language count under the name of their source. Everything is tokenized here, once.

    Args:
      nll: jitted `params, batch -> Mean(sum of nats, tokens)`.
    """
    texts = defaultdict(list)
    for source in sources:
        for document in filter(None, (source[i] for i in range(len(source)))):
            texts[document.language or source.name].append(document)
    loaded = {language: eval_batches(documents, tokenizer, batch_size=batch_size, seq_len=seq_len)
              for language, documents in sorted(texts.items())}
    # The prompts, again and again until they fill the devices; decoding splits rows over every axis but `tensor`.
    count = mesh.size // mesh.shape["tensor"]
    repeated = [samples.prompts[i % len(samples.prompts)] for i in range(-(-len(samples.prompts) // count) * count)]
    tokens, mask = pad([[tokenizer.bos_id, *tokenizer.encode(text)] for text in repeated])
    greedy = make_settings([SamplingConfig()] * len(repeated), model.config.vocab_size)

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values = {f"eval/bpb_{language}": bits_per_byte(nll, params, batches, num_bytes, mesh)
                  for language, (batches, num_bytes) in loaded.items()}
        out = complete(model, params, tokens, mask, greedy, max_new_tokens=samples.tokens, eos_id=tokenizer.eos_id,
                       num_tokens=tokenizer.vocab_size)
        lines = [f"  {prompt} | {tokenizer.decode(row).strip()}".replace("\n", " ⏎ ")
                 for prompt, row in zip(samples.prompts, jax.device_get(out).tolist(), strict=False)]
        numbers = "  ".join(f"{name.removeprefix('eval/bpb_')} {value:.4f}" for name, value in values.items())
        return values, "\n".join([f"held out at step {step}, bits per byte: {numbers}", *lines])

    return evaluate
