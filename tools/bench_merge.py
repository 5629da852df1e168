"""Merging against mergekit on the same checkpoints, in turns: seconds, GB/s, peak memory.

    pip install --no-deps mergekit pydantic immutables click accelerate peft   # no dependency of ours
    python -m tools.bench_merge [--gigabytes 1 --models 3 --repeat 3]

Random Llama checkpoints of the size asked for; each merge is a process of its own from the command line to the written
folder, as a user runs it: `recipes.merge`, and `mergekit-yaml` with `--lazy-unpickle` on the CPU. The two results are
compared tensor by tensor where no numbers are drawn. GB/s counts what is read and written. The page cache is warm for
both: the first merge of each is not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from jaxlm.core import config as flags
from jaxlm.model.config import ModelConfig
from jaxlm.model.hf_config import to_hf_config
from jaxlm.model.safetensors_io import open_checkpoint, write_checkpoint, write_json

PROG = "tools.bench_merge"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Our flags and mergekit's parameters: the same arithmetic, but for DARE's rescaling, which theirs does by the L1 norm.
METHODS = {
    "linear": ([], {"merge_method": "linear"}),
    "slerp": (["--merge.t", "0.4"], {"merge_method": "slerp", "parameters": {"t": 0.4}}),
    "ties": (["--merge.density", "0.2"], {"merge_method": "ties", "parameters": {"density": 0.2, "normalize": True}}),
    "dare_linear": (["--merge.density", "0.2", "--merge.rescale", "l1"],
                    {"merge_method": "dare_linear", "parameters": {"density": 0.2}}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is merged, and how often."""

    gigabytes: float = 1.0      # of each checkpoint
    models: int = 3             # besides the base; SLERP takes two
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    methods: tuple[str, ...] = tuple(METHODS)
    repeat: int = 3             # counted merges of each method and side
    mergekit_path: str = ""     # a folder that `pip install --target` filled with mergekit, if it is not installed

    def __post_init__(self) -> None:
        if self.models < 2 or self.repeat < 1 or not self.gigabytes > 0:
            raise ValueError("a benchmark takes at least 2 models, 1 repetition and some gigabytes")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods {name} is unknown{flags.nearest(name, METHODS)}; {', '.join(METHODS)}")


def make_models(config: Config, folder: Path) -> list[Path]:
    """A base and models near it, of one Llama architecture and the number of bytes asked for."""
    layer = 2048 * (2048 * 2 + 512 * 2) + 3 * 2048 * 5632
    layers = max(1, round(config.gigabytes * 1e9 / DTYPES[config.dtype].itemsize / layer))
    model = ModelConfig(vocab_size=1000, d_model=2048, num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=64,
                        d_ff=5632, max_positions=2048)
    shapes = {"model.embed_tokens.weight": (1000, 2048), "model.norm.weight": (2048,), "lm_head.weight": (1000, 2048)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in (
            ("q", (2048, 2048)), ("k", (512, 2048)), ("v", (512, 2048)), ("o", (2048, 2048)))}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": shape for name, shape in (
            ("gate", (5632, 2048)), ("up", (5632, 2048)), ("down", (2048, 5632)))}
        shapes |= {f"{prefix}{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
    dtype, names = DTYPES[config.dtype], ["base", *(f"m{i}" for i in range(config.models))]
    folders = [folder / name for name in names]

    def tensors(number: int):
        for i, (name, shape) in enumerate(shapes.items()):
            base = np.random.default_rng(i).standard_normal(shape, np.float32)
            more = 0.1 * np.random.default_rng([number, i]).standard_normal(shape, np.float32) if number else 0
            yield name, (base + more).astype(dtype)

    for number, path in enumerate(folders):
        path.mkdir()
        write_checkpoint(path, {name: (shape, dtype) for name, shape in shapes.items()}, tensors(number),
                         max_shard_bytes=10**9)
        write_json(to_hf_config(model, "llama", dtype=config.dtype), path / "config.json")
    return folders


def command(side: str, method: str, folders: Sequence[Path], out: Path, config: Config) -> list[str]:
    """The command line of one merge."""
    own, theirs = METHODS[method]
    base, *models = folders
    models = models[:2] if method == "slerp" else models
    has_base = method in ("ties", "dare_linear")
    if side == "ours":
        return [sys.executable, "-m", "recipes.merge", "--models", *map(str, models), "--target", str(out),
                "--merge.method", method, *(["--base", str(base)] if has_base else []), *own]
    weight = {} if method == "slerp" else {"parameters": {"weight": 1 / len(models)}}
    values = theirs | {"dtype": "float32", "out_dtype": config.dtype,
                       "models": [{"model": str(path), **weight} for path in models]}
    if has_base or method == "slerp":
        values["base_model"] = str(base if has_base else models[0])
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(values))  # JSON is YAML
    return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), "--lazy-unpickle",
            "--no-copy-tokenizer"]


def timed(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and the largest resident set in GB of a process that must succeed."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise ValueError(f"{' '.join(arguments)} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def largest_difference(a: Path, b: Path) -> float:
    """Of two merged folders, over all tensors of both."""
    with open_checkpoint(a) as (left, read_a), open_checkpoint(b) as (right, read_b):
        if left.keys() != right.keys():
            raise ValueError(f"the merges have different tensors: {sorted(left.keys() ^ right.keys())[:5]}")
        return max(float(np.abs(read_a(name).astype(np.float32) - read_b(name).astype(np.float32)).max())
                   for name in left)


def measure(config: Config, folder: Path) -> None:
    """Every method on both sides in turns, a row of the table each."""
    folders = make_models(config, folder)
    size = sum(path.stat().st_size for path in folders[0].glob("*.safetensors")) / 1e9
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), config.mergekit_path)))}
    print(f"{config.models} models and a base of {size:.2f} GB each, {config.dtype}; median of {config.repeat}\n")
    print("| method | ours, s (GB/s, peak GB) | mergekit, s (GB/s, peak GB) | ratio mergekit / ours | largest "
          "difference |\n| --- | --- | --- | --- | --- |")
    for method in config.methods:
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "mergekit": []}
        for _ in range(config.repeat + 1):
            for side, values in found.items():
                out = folder / side
                subprocess.run(["rm", "-rf", str(out)], check=True)
                values.append(timed(command(side, method, folders, out, config), environment))
        moved = size * ((2 if method == "slerp" else config.models) + 1 + (method in ("ties", "dare_linear")))
        seconds = {side: statistics.median(value for value, _ in values[1:]) for side, values in found.items()}
        cells = [f"{seconds[side]:.1f} ({moved / seconds[side]:.2f}, {max(peak for _, peak in values):.2f})"
                 for side, values in found.items()]
        same = "drawn" if method == "dare_linear" else f"{largest_difference(folder / 'ours', folder / 'mergekit'):.1e}"
        print(f"| {method} | {' | '.join(cells)} | {seconds['mergekit'] / seconds['ours']:.2f} | {same} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = flags.parse({"default": Config()}, argv, prog=PROG, description=__doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(config, Path(folder))
    except ValueError as error:
        flags.fail(error, PROG)


if __name__ == "__main__":
    main()
