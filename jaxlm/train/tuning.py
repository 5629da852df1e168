"""What recipes share that go on from a model: the model itself, its language, its weights with adapters or moments."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.core.mesh import place_leaf, tree_shardings
from jaxlm.core.rng import derive
from jaxlm.data.chat_examples import check_symbols, train_chat_tokenizer, with_bos
from jaxlm.data.chat_template import TEMPLATES, ChatTemplate, named_template
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.data.tokenizer_training import TokenizerConfig
from jaxlm.model import lora
from jaxlm.model.config import ModelConfig
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import LORA_RULES, PARAM_RULES
from jaxlm.train.checkpoint import Saved, saved_arrays
from jaxlm.train.pretrained import Pretrained, load_weights, open_pretrained
from jaxlm.train.state import TrainState

log = logging.getLogger(__name__)

RULES = (*PARAM_RULES, *LORA_RULES)
TOKENIZER_DOCUMENTS = 50_000  # that a tokenizer is trained on, unless its configuration says how many


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What a run changes of the model in its `init`, and what it takes over beside the weights."""

    keep_optimizer: bool = False        # go on with the optimizer's moments of the run in `init`
    max_positions: int | None = None    # in place of the model's; like rope_theta, no parameter depends on it
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_positions", "rope_theta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"stage.{name} must be positive, got {value}")

    def model(self, model: ModelConfig) -> ModelConfig:
        """The model of this stage, given that of the one before."""
        given = {"max_positions": self.max_positions, "rope_theta": self.rope_theta}
        return replace(model, **{name: value for name, value in given.items() if value is not None})


class Language(NamedTuple):
    """The language side of a run."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def files(self) -> dict[str, bytes]:
        """Of both, as checkpoints keep them."""
        return self.tokenizer.files() | self.template.files()


def open_init(init: str, model: ModelConfig, tokenizer: TokenizerConfig, presets: Iterable[ModelConfig],
              stage: StageConfig = StageConfig()) -> Pretrained:
    """What `init` names, without its weights; ValueError for flags that say otherwise.

    Args:
      model, tokenizer: of the configuration. presets: models that a configuration has without being asked for.
      stage: what changes; the changed model is that of a saved configuration.
    """
    opened = open_pretrained(Path(init))
    if model not in (opened.config, stage.model(opened.config), *presets):
        raise ValueError("--init brings its own model configuration; leave out the --model flags")
    if opened.tokenizer is None and tokenizer.path == "train":
        raise ValueError(f"--init {init} has no tokenizer: name that of its weights with --tokenizer.path")
    if opened.tokenizer is not None and tokenizer != TokenizerConfig():
        raise ValueError("--init brings its own tokenizer; leave out the --tokenizer flags")
    return opened


def open_language(opened: Pretrained | None, template: str, config: TokenizerConfig, vocab_size: int,
                  conversations: Iterable[Mapping[str, Any]]) -> Language:
    """The tokenizer and template of `init`, or those that flags name, or a tokenizer trained on the conversations."""
    chat = named_template(template) or (opened and opened.chat) or ChatTemplate(TEMPLATES["chatml"])
    if opened is not None and opened.tokenizer is not None:
        tokenizer = opened.tokenizer
    elif config.path != "train":
        tokenizer = load_tokenizer(config.path)
    else:
        tokenizer = train_chat_tokenizer(conversations, chat, vocab_size, symbols=config.symbols or ())
    check_symbols(chat, tokenizer)
    # Hugging Face models begin as their template says; every text of our own runs begins with BOS.
    ours = opened is None or opened.start or opened.chat is None
    return Language(tokenizer, with_bos(chat, tokenizer) if ours else chat)


def spread_rows(sources: Sequence[Source], count: int | None) -> Iterator[dict[str, Any]]:
    """About so many rows (default `TOKENIZER_DOCUMENTS`), evenly from the sources, for `open_language`."""
    share = -(-(count or TOKENIZER_DOCUMENTS) // len(sources))
    documents = (source[i] for source in sources for i in range(0, len(source), -(-len(source) // share)))
    return (json.loads(one.text) for one in documents if one)


def starting_state(init: str, opened: Pretrained, abstract: TrainState, *, keep_optimizer: bool, mesh: Mesh) -> Saved:
    """The weights of `init` on the mesh and, if asked for, the optimizer's state that belongs to them.

    Arrays of a run folder go straight to where `abstract` wants them; others pass through the host. Weights that were
    not saved as they are used (files, adapters) come without a digest.

    ValueError: an optimizer's state asked for that `init` has not, or that has another structure.
    """
    is_run = (Path(init) / "checkpoints").is_dir()
    if keep_optimizer and not is_run:
        raise ValueError(f"stage.keep_optimizer goes on with the optimizer of a run folder, and --init {init} has "
                         "weights only")
    if not is_run or (opened.lora.rank and not keep_optimizer):  # not stored as they are used
        return Saved({"params": starting_params(init, opened, LoraConfig(), 0, mesh)}, {})
    if opened.mtp_depth and not keep_optimizer:
        log.info("%s: multi-token prediction of depth %d is left out", init, opened.mtp_depth)
    fields = ("params", "opt_state") if keep_optimizer else ("params",)
    return saved_arrays(Path(init), {name: getattr(abstract, name) for name in fields})


def starting_params(init: str, opened: Pretrained, config: LoraConfig, seed: int, mesh: Mesh) -> Any:
    """The weights of `init` on the mesh, with adapters that change nothing yet."""
    put = lambda path, leaf: place_leaf(path, np.asarray(leaf), mesh=mesh, rules=RULES)
    params = load_weights(Path(init), opened, put=put).params
    adapted = lambda params: lora.init(derive(seed, "lora"), params, config)
    shardings = tree_shardings(jax.eval_shape(adapted, params), RULES, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(adapted, out_shardings=shardings, donate_argnums=0)(params)
