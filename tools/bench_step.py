"""One training step of ours against torch's: same shape, same batch, same optimizer, on this machine.

Run: python -m tools.bench_step                     both dtypes, 25 M parameters, B8 x T256
     python -m tools.bench_step --rounds 20 --dtypes float32

Two child processes, ours and `transformers.LlamaForCausalLM` with scaled-dot-product attention and fused AdamW, are
compiled and warmed up, then make one step each in turn, so that noise of the machine hits both. A step is forward,
backward, global-norm clipping and AdamW on float32 parameters; bfloat16 means compute (torch: autocast). Printed: the
median seconds of each, the median of the ratio torch / ours (above 1: ours is faster), and the peak resident memory.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import jax
import numpy as np
import tyro

from jaxlm.core.batch import LMBatch
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch
from jaxlm.core.rng import derive
from jaxlm.model.config import ComputeConfig, flops_per_token
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import make_schedule
from jaxlm.train.measure import resident_bytes
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step
from recipes.pretrain import make_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    model: str = "base"
    batch_size: int = 8
    seq_len: int = 256
    rounds: int = 10
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    loss_chunks: int = 1
    scan_unroll: int = 1
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    compile: bool = False   # torch.compile the peer
    child: tuple[str, ...] = ()  # internal: side and dtype


def ours(config: Config, dtype: str) -> Callable[[], float]:
    """A function that makes one step and returns the loss."""
    compute = ComputeConfig(dtype=dtype, scan_unroll=config.scan_unroll, remat=config.remat)
    model, optim = build(MODELS[config.model], compute), OptimConfig()
    mesh = make_mesh(MeshConfig())
    tx = make_optimizer(optim, 1000)
    step = make_step(make_loss(model, chunks=config.loss_chunks), tx, make_schedule(optim.schedule, optim.lr, 1000),
                     mesh=mesh, rules=PARAM_RULES)
    state = init_state(model.init, tx, derive(0, "init"), mesh, PARAM_RULES)
    rows = _rows(config)
    ones = np.ones_like(rows[:, 1:])
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), ones.shape))
    batch = put_batch(LMBatch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, positions), mesh)

    def one() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return one


def peer(config: Config, dtype: str) -> Callable[[], float]:
    """The same in torch, which the `parity` extra installs."""
    import torch
    import transformers

    c = MODELS[config.model]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_positions, rms_norm_eps=c.norm_eps, use_cache=False,
        tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa"))
    o = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True)
    forward = torch.compile(model) if config.compile else model
    rows = torch.from_numpy(_rows(config).astype(np.int64))
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def one() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        return loss.item()

    return one


def _rows(config: Config) -> np.ndarray:
    vocabulary = MODELS[config.model].vocab_size
    shape = (config.batch_size, config.seq_len + 1)
    return np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32)


def serve(config: Config) -> None:
    """The child: warms up, then makes one step per line on standard input and answers with a line of JSON."""
    side, dtype = config.child
    one = SIDES[side](config, dtype)
    first = one()
    one()
    print(json.dumps({"first_loss": first}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        one()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": resident_bytes()}), flush=True)


def measure(config: Config, dtype: str) -> None:
    """Runs both children in turn and prints one row."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items()
                 if name not in ("child", "dtypes", "compile")]
    arguments += ["--compile"] if config.compile else []
    children = {side: subprocess.Popen(
        [sys.executable, "-m", "tools.bench_step", *arguments, "--child", side, dtype],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in SIDES}
    answers: dict[str, list[dict]] = {side: [] for side in SIDES}
    for child in children.values():
        _answer(child)
    for _ in range(config.rounds):
        for side, child in children.items():
            child.stdin.write("step\n")
            child.stdin.flush()
            answers[side].append(_answer(child))
            time.sleep(0.3)  # idle threads of the one may spin a while before they leave the cores to the other
    for child in children.values():
        child.communicate()
    seconds = {side: [answer["seconds"] for answer in answers[side]] for side in SIDES}
    ratios = sorted(theirs / mine for theirs, mine in zip(seconds["torch"], seconds["ours"], strict=True))
    medians = {side: statistics.median(seconds[side]) for side in SIDES}
    tokens = config.batch_size * config.seq_len
    flops = flops_per_token(MODELS[config.model], config.seq_len) * tokens
    print(f"{dtype:9}  ours {medians['ours']:.3f} s  torch {medians['torch']:.3f} s  "
          f"ratio {statistics.median(ratios):.2f} (quartiles {ratios[len(ratios) // 4]:.2f} to "
          f"{ratios[-len(ratios) // 4]:.2f})  ours {tokens / medians['ours']:.0f} tok/s, "
          f"{flops / medians['ours'] / 1e9:.0f} GFLOP/s  peak memory " +
          ", ".join(f"{side} {answers[side][-1]['peak'] / 2**30:.2f} GiB" for side in SIDES), flush=True)


def _answer(child: subprocess.Popen) -> dict:
    line = child.stdout.readline()
    if not line:
        raise RuntimeError("a child process ended; its message is above")
    return json.loads(line)


SIDES = {"ours": ours, "torch": peer}


if __name__ == "__main__":
    arguments = tyro.cli(Config, description=__doc__)
    if arguments.child:
        serve(arguments)
    else:
        for name in arguments.dtypes:
            measure(arguments, name)
