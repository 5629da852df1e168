"""One GRPO step against TRL's, on the CPU, in one process: same weights, same prompts, same numbers of tokens.

    python -m tools.bench_rl [--prompts 8 --samples 8 --new-tokens 64 --model base]

A step is what a user waits for: attempts, rewards, log-probabilities, gradients, AdamW. Both sides sample at
temperature 1 from random weights (bytes as the vocabulary, so no attempt ends early but by chance), reward the share of
even ids, keep to no reference, and make one update an iteration; they take turns, and the ratio is TRL's time / ours,
above 1 means ours is faster. Needs the extra `parity`.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxlm.core import config as flags
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.chat_template import chatml
from jaxlm.data.tokenizer import JsonTokenizer
from jaxlm.generate.engine import Engine, EngineConfig
from jaxlm.model.config import ComputeConfig
from jaxlm.model.decoder import Model, build
from jaxlm.model.hf import save_hf
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.objective.algorithm import ALGORITHMS
from jaxlm.reward.compose import Reward
from jaxlm.reward.trajectory import Trajectory
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv
from jaxlm.rl.learner import BatchConfig, PolicyLearner, Scene
from jaxlm.rl.rollout import RolloutConfig, make_prompts
from jaxlm.rl.task import Task
from jaxlm.rl.update import Policy
from jaxlm.train.state import init_state

PROG = "tools.bench_rl"
SPECIALS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    model: str = "base"      # of jaxlm.model.presets; its vocabulary becomes bytes
    prompts: int = 8
    samples: int = 8
    new_tokens: int = 64
    micro_rows: int = 16     # rows whose gradients are computed at once: what a CPU's caches hold
    scan_unroll: int = 8     # layers per iteration of the scan; all of them spares the copies that a scan makes
    steps: int = 4           # counted, after one that warms up

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"--model {self.model} is unknown{flags.nearest(self.model, MODELS)}")


def byte_tokenizer() -> str:
    """A `tokenizer.json` of bytes and special tokens."""
    names = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer.to_str()


class Ours:
    """An iteration of `rl.learner.PolicyLearner`."""

    def __init__(self, config: Config, model: Model, params: Any, tokenizer: JsonTokenizer, questions: Sequence[str]):
        tasks = [Task(id=f"t{i}", question=text, tools=(), answers=(0,), judge="exact", domain="bench")
                 for i, text in enumerate(questions)]
        dialogue = Dialogue((), chatml(tokenizer), tokenizer)
        self.prompt, self.stop_ids = dialogue.prompt_ids(tasks[0]), [*dialogue.stop_ids]
        width = max(len(dialogue.prompt_ids(task)) for task in tasks)
        def reward(t: Trajectory) -> Reward:
            share = jnp.mean(t.tokens % 2 == 0, axis=1, where=t.sampled)
            return Reward(share, {"even": share}, {}, {"even": jnp.zeros((), jnp.int32)})

        mesh, tx = make_mesh(MeshConfig(data=1), jax.devices()[:1]), optax.adamw(1e-6)
        rows = config.prompts * config.samples
        self.learner = PolicyLearner(
            Policy(model, 1.0, 1, tokenizer.vocab_size),
            Engine(model=model, params=None, eos_id=tokenizer.eos_id, tokenizer=tokenizer,
                   config=EngineConfig(batch_size=rows)),
            Scene(tasks, make_prompts(dialogue, tasks, width), ToolEnv((), EnvConfig()), dialogue,
                  jax.jit(reward), (1.0,)),
            ALGORITHMS["dapo"], rollouts=RolloutConfig(max_prompt=width, max_response=config.new_tokens),
            batch=BatchConfig(prompts=config.prompts, samples=config.samples,
                              micro_rows=min(config.micro_rows, rows)), tx=tx,
            schedule=optax.constant_schedule(1e-6), mesh=mesh, rules=PARAM_RULES, seed=0)
        self.state = init_state(lambda key: params, tx, jax.random.key(0), mesh, PARAM_RULES)
        self.mesh, self.count = mesh, 0

    def step(self) -> dict[str, float]:
        """Seconds of the phases of one iteration."""
        marks = [time.perf_counter()]
        with jax.set_mesh(self.mesh):
            episodes, self.count = self.learner.rollout(self.state.params, 0, self.count)
            marks.append(time.perf_counter())
            ready, _ = self.learner.score(self.state.params, episodes)
            jax.block_until_ready(ready.batches)
            marks.append(time.perf_counter())
            for update in self.learner.updates(ready, 0):
                self.state, metrics = update(self.state)
            jax.block_until_ready((self.state, metrics))
            marks.append(time.perf_counter())
        tokens = sum(one.num_sampled() for one in episodes)
        return {name: b - a for name, a, b in zip(("rollout", "score", "update"), marks, marks[1:], strict=False)} | {
            "tokens": tokens}


def trl_steps(
    config: Config, folder: Path, tokenizer_json: str, prompts: Sequence[str], stop_ids: list[int], turn: Any,
) -> list[float]:
    """Seconds of TRL's steps; `turn` is called between two of them."""
    import datasets
    import torch
    import transformers
    import trl

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]

    args = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=config.prompts * config.samples,
        num_generations=config.samples, max_completion_length=config.new_tokens, max_steps=config.steps + 1, beta=0.0,
        learning_rate=1e-6, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", gradient_checkpointing=False, generation_kwargs={"eos_token_id": stop_ids})
    trl.GRPOTrainer(model=model, reward_funcs=reward, args=args, processing_class=tokenizer, callbacks=[Clock()],
                    train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in prompts])).train()
    return seconds


def run(config: Config) -> None:
    """Both, in turns."""
    tokenizer_json = byte_tokenizer()
    tokenizer = JsonTokenizer(tokenizer_json.encode())
    model = build(replace(MODELS[config.model], vocab_size=tokenizer.vocab_size, tie_embeddings=False),
                  ComputeConfig(scan_unroll=config.scan_unroll))
    params = jax.jit(model.init)(jax.random.key(0))
    questions = [f"question {i:04d}" for i in range(config.prompts)]
    ours = Ours(config, model, params, tokenizer, questions)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", model.config, params, architecture="llama", dtype="float32")
        prompts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions]
        theirs = trl_steps(config, Path(folder) / "model", tokenizer_json, prompts, ours.stop_ids,
                           lambda: found.append(ours.step()))
    found, theirs = found[1:], theirs[1:]
    total = [sum(one[name] for name in ("rollout", "score", "update")) for one in found]
    print(f"{config.prompts} prompts of {len(ours.prompt)} tokens x {config.samples} attempts of {config.new_tokens}; "
          f"{np.mean([one['tokens'] for one in found]):.0f} tokens sampled an iteration; float32")
    for name in ("rollout", "score", "update"):
        print(f"ours, {name}: {statistics.median(one[name] for one in found):.2f} s")
    rate = statistics.median(one["tokens"] / one["rollout"] for one in found)
    print(f"ours: {statistics.median(total):.2f} s a step, {rate:.0f} tokens/s in rollouts")
    print(f"TRL: {statistics.median(theirs):.2f} s a step")
    print(f"ratio TRL / ours: {statistics.median(b / a for a, b in zip(total, theirs, strict=True)):.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        run(flags.parse({"default": Config()}, argv, prog=PROG, description=__doc__))
    except ValueError as error:
        flags.fail(error, PROG)


if __name__ == "__main__":
    main()
