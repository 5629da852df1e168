"""Tokens per second and MFU of the training step on this device, by attention backend, remat policy and batch size.

Run: python -m tools.bench_throughput                          every attention backend that this device has
     python -m tools.bench_throughput --sweep                  and remat policies and batch sizes
     python -m tools.bench_throughput --xla-flags h200 --json-path h200.json
     python -m tools.bench_throughput --model tiny --seq-len 128 --steps 5

What runs is `make_step` of a training run: forward, backward, clipping and AdamW on a donated float32 state, over
packed rows of several documents. First every backend is held against float64 numpy, one document at a time, forward
and gradients: a fused kernel that sees across documents is fast and wrong (maxtext#4476). Markdown on standard output,
for docs/results.md; status 1 if a backend is wrong. It has run on CPU only: no figure of a GPU or TPU exists yet.

MFU: `flops_per_token` over the peak of `peak_flops`. It counts causal attention half, the vocabulary product, and not
the look-up of embeddings, nor remat, nor what packing saves; "full" counts attention whole, as PaLM does (appendix B,
arXiv:2204.02311). Quartiles are over steps, each waited for. Memory is the compiler's count for the program and its
state on one device; the peak at the end is the device's own, over everything that ran.

H200, one device: defaults below, and `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95` in the environment for large batches.
"""

import glob
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.log import first_line, human_count
from jaxlm.core.mesh import MeshConfig, make_mesh, put_whole
from jaxlm.core.rng import derive
from jaxlm.model.attention import BACKENDS, attention, current_platform, resolve_backend
from jaxlm.model.config import ComputeConfig, ModelConfig, RematPolicy, flops_per_token, num_parameters
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import make_schedule
from jaxlm.train.measure import memory_bytes, peak_flops
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step
from recipes.pretrain import make_loss

PROG = "tools.bench_throughput"
# gpu-recipes, training/a3ultra (H200): products by cuBLAS, collectives overlapped and combined. Without effect on one
# device: all but the first.
XLA_FLAGS = {
    "h200": "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_latency_hiding_scheduler=true "
            "--xla_gpu_all_gather_combine_threshold_bytes=2147483648 "
            "--xla_gpu_all_reduce_combine_threshold_bytes=2147483648 "
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=16777216",
}
# What a field left empty becomes. kormo_1b on 141 GB: 21 GB of parameters, moments and gradients, and about 47 GB of
# products kept by dots_no_batch at 16 rows of 4096 tokens.
DEFAULTS = {
    "accelerator": {"model": "kormo_1b", "seq_len": 4096, "batch_sizes": (16,), "loss_chunks": 8},
    "cpu": {"model": "base", "seq_len": 256, "batch_sizes": (8,), "loss_chunks": 1},
}
LIMITS = {"float32": 5e-3, "bfloat16": 3e-2}  # relative error; float32 products may be TF32. A leak gives about 1.


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured. Empty or 0: chosen by the device, see `DEFAULTS`."""

    model: str = ""
    seq_len: int = 0
    batch_sizes: tuple[int, ...] = ()         # rows a step, on each device that the mesh gives rows
    backends: tuple[str, ...] = ()            # of attention; empty: all, with the reason for each one left out
    remat: tuple[RematPolicy, ...] = ("dots_no_batch",)
    sweep: bool = False                       # also remat none and full, and half and twice the batch size
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    documents: int = 6                        # mean number in a row
    loss_chunks: int = 0
    scan_unroll: int = 1
    steps: int = 20
    warmup: int = 3
    top: int = 12                             # operations of the profile; 0: no profile
    mesh: MeshConfig = field(default_factory=MeshConfig)
    xla_flags: str = ""                       # h200, or flags of XLA
    json_path: Path | None = None             # everything printed, as values


def choose(config: Config) -> Config:
    """Fills what the device decides, and says so on standard error. ValueError: an unknown model, too long a row."""
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    chosen = {name: value for name, value in DEFAULTS[kind].items() if not getattr(config, name)}
    if chosen:
        print(f"{PROG}: on {jax.devices()[0].device_kind}, this chooses "
              + ", ".join(f"{name} {value}" for name, value in chosen.items()), file=sys.stderr)
    config = replace(config, **chosen)
    if config.model not in MODELS:
        raise ValueError(f"unknown model '{config.model}'{flags.nearest(config.model, MODELS)}")
    if config.seq_len > MODELS[config.model].max_positions or config.seq_len % config.loss_chunks:
        raise ValueError(f"seq_len {config.seq_len} must be at most {MODELS[config.model].max_positions}, and a "
                         f"multiple of loss_chunks {config.loss_chunks}")
    if config.sweep:
        sizes = sorted({max(1, int(size * f)) for size in config.batch_sizes for f in (0.5, 1, 2)})
        config = replace(config, remat=("none", "dots_no_batch", "full"), batch_sizes=tuple(sizes))
    return config


def packed_batch(num_rows: int, seq_len: int, documents: int, vocab_size: int) -> LMBatch:
    """Random tokens in documents of geometric lengths, seq_len / `documents` on average; some rows end in padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (num_rows, seq_len + 1)).astype(np.int32)
    segments, positions = np.zeros((2, num_rows, seq_len + 1), np.int32)
    for row in range(num_rows):
        start, number, end = 0, 1, seq_len + 1 - (row % 2) * rng.integers(1, seq_len // 8 + 2)
        while start < end:
            stop = min(end, start + rng.geometric(documents / seq_len))
            segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
            start, number = stop, number + 1
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return LMBatch(tokens[:, :-1], tokens[:, 1:], same.astype(np.float32), segments[:, :-1], positions[:, :-1])


def by_document(q, k, v, g, segments) -> tuple[list[np.ndarray], list[list[tuple[int, slice]]]]:
    """Causal attention and its gradients in float64, document by document: [y, dq, dk, dv], and where documents lie."""
    results = [np.zeros(x.shape) for x in (q, q, k, v)]
    repeat, scale, places = q.shape[2] // k.shape[2], q.shape[3] ** -0.5, []
    for row in range(len(q)):
        cuts = [0, *(np.flatnonzero(np.diff(segments[row])) + 1), segments.shape[1]]
        for part in map(slice, cuts, cuts[1:]):
            places.append((row, part))
            unseen = ~np.tri(part.stop - part.start, dtype=bool)
            for n in range(q.shape[2]):
                of_q, of_k = (row, part, n), (row, part, n // repeat)
                probs = np.exp(np.ma.array(scale * q[of_q] @ k[of_k].T, mask=unseen).filled(-np.inf))
                probs /= probs.sum(-1, keepdims=True)
                y = probs @ v[of_k]
                scores = probs * (g[of_q] @ v[of_k].T - (g[of_q] * y).sum(-1, keepdims=True)) * scale
                for out, index, value in zip(results, (of_q, of_q, of_k, of_k),
                                             (y, scores @ k[of_k], scores.T @ q[of_q], probs.T @ g[of_q]), strict=True):
                    out[index] += value
    return results, places


def exactness(config: Config, backend: str) -> tuple[float, float]:
    """Largest relative error of any document in two packed rows on one device: forward, and of the gradients.

    Relative: the norm of the difference over the norm, of the document or of one like the average. float64 numpy
    judges, not float32 on the device, which may multiply in TF32 and would share its mistakes.
    """
    c, rng = MODELS[config.model], np.random.default_rng(1)
    segments = packed_batch(2, config.seq_len, config.documents, 2).segments
    shapes = [(2, config.seq_len, heads, c.head_dim) for heads in (c.num_heads, *[c.num_kv_heads] * 2, c.num_heads)]
    rounded = [jnp.asarray(rng.normal(size=shape), config.dtype) for shape in shapes]

    def loss(q, k, v):
        y = attention(q, k, v, q_segments=segments, kv_segments=segments, backend=backend)
        return jnp.sum((y * rounded[3]).astype(jnp.float32)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*rounded[:3])
    exact, places = by_document(*(np.asarray(x, np.float64) for x in rounded), segments)
    errors = []
    for actual, e in zip((y, *grads), exact, strict=True):
        rms = np.linalg.norm(e) / e.size**0.5  # the measure where a document has no gradient, as one of one token
        errors.append(max(np.linalg.norm(np.asarray(actual[at], np.float64) - e[at])
                          / max(np.linalg.norm(e[at]), rms * e[at].size**0.5) for at in places))
    return float(errors[0]), float(max(errors[1:]))


def usable(config: Config) -> tuple[list[str], list[str]]:
    """Backends that compute this exactly, and a Markdown table of all: error, or the reason for leaving it out."""
    names, lines = [], ["| attention | forward error | gradient error | |", "|---|---|---|---|"]
    mesh = make_mesh(config.mesh)
    for name in config.backends or tuple(BACKENDS):
        try:
            resolve_backend(name, platform=current_platform(), dtype=config.dtype, q_len=config.seq_len,
                            head_dim=MODELS[config.model].head_dim, segments=True, positions=True,
                            window=MODELS[config.model].window, context=mesh.shape["context"])
            errors = exactness(config, name)
            right = max(errors) < LIMITS[config.dtype]  # false for NaN as well
            names += [name] * right
            verdict = "exact" if right else "**WRONG**, left out"
            lines.append(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} | {verdict} |")
        except (ValueError, NotImplementedError, RuntimeError) as error:
            lines.append(f"| {name} | | | left out: {first_line(error)} |")
    return names, lines


def measure(config: Config, backend: str, remat: RematPolicy, batch_size: int) -> dict[str, Any]:
    """One variant: seconds of every step, what the compiler says of memory, and the profile of one more step."""
    c, mesh, optim = MODELS[config.model], make_mesh(config.mesh), OptimConfig()
    variant = {"attention": backend, "remat": remat, "batch_size": batch_size}
    model = build(c, ComputeConfig(dtype=config.dtype, remat=remat, attention=backend, scan_unroll=config.scan_unroll))
    tx = make_optimizer(optim, 1000)
    step = make_step(make_loss(model, chunks=config.loss_chunks), tx, make_schedule(optim.schedule, optim.lr, 1000),
                     mesh=mesh, rules=PARAM_RULES)
    num_rows = batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    batch = put_whole(packed_batch(num_rows, config.seq_len, config.documents, c.vocab_size), mesh)
    try:
        state = init_state(model.init, tx, derive(0, "init"), mesh, PARAM_RULES)
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            compiled = step.lower(state, batch).compile()
            variant["compile_seconds"] = time.perf_counter() - start
            memory, seconds = compiled.memory_analysis(), []
            for _ in range(config.warmup + config.steps):
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(compiled(state, batch))
                seconds.append(time.perf_counter() - start)
            variant["top"] = top_operations(lambda: compiled(state, batch), config.top) if config.top else []
    except jax.errors.JaxRuntimeError as error:
        return variant | {"failed": first_line(error)[:120]}
    variant["memory_bytes"] = (memory.temp_size_in_bytes + memory.argument_size_in_bytes
                               + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    seconds = seconds[config.warmup:]
    rate = num_rows * config.seq_len / statistics.median(seconds) / mesh.size
    return variant | {"seconds": seconds, "tokens_per_second": rate, "loss": float(metrics["loss"]),
                      "skipped": float(metrics["skipped"])}


def top_operations(run: Any, count: int) -> list[tuple[str, float, float]]:
    """The operations of one step by device time: name without its number, milliseconds, share. `run` is run once."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        data = jax.profiler.ProfileData.from_file(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0])
    planes = list(data.planes)  # of an accelerator: the device's own; a CPU has its operations among the host's threads
    lines = [line for plane in [p for p in planes if p.name.startswith("/device:")] or planes for line in plane.lines]
    lines = [line for line in lines if line.name == "XLA Ops"] or lines  # a TPU shows the same time in several lines
    total: Counter[str] = Counter()
    for event in (event for line in lines for event in line.events):
        operation = dict(event.stats).get("hlo_op", event.name if lines[0].name == "XLA Ops" else None)
        name = operation and re.sub(r"[._]\d+$", "", operation)
        if name and name not in ("while", "call", "conditional"):  # their time is that of what they run
            # A library's kernel says more than the custom call that runs it.
            total[name if event.name == operation else f"{name}: {event.name[:60]}"] += event.duration_ns
    return [(name, ns / 1e6, ns / total.total()) for name, ns in total.most_common(count)]


def describe(config: Config, peak_text: str) -> list[str]:
    """What the figures hold for."""
    c, device = MODELS[config.model], jax.devices()[0]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")]
    lines = [
        f"{config.model}, {human_count(num_parameters(c))} parameters, vocabulary {c.vocab_size}, rows of "
        f"{config.seq_len} tokens in about {config.documents} documents, {config.dtype} on a float32 state, loss in "
        f"{config.loss_chunks} chunks, scan unrolled {config.scan_unroll}",
        f"{jax.device_count()} x {device.device_kind} ({device.client.platform_version.splitlines()[0]}), mesh "
        f"{dict(make_mesh(config.mesh).shape)}, peak {peak_text}",
        f"{', '.join(versions)}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; XLA_FLAGS "
        f"`{os.environ.get('XLA_FLAGS', '')}`",
        f"FLOPs a token: {flops_per_token(c, config.seq_len):.4g}, full attention {full_flops(c, config.seq_len):.4g}",
    ]
    return [f"- {line}" for line in lines]


def full_flops(c: ModelConfig, seq_len: int) -> float:
    """`flops_per_token` with every query counted against all keys."""
    return flops_per_token(replace(c, window=None), seq_len) + 6.0 * c.num_layers * c.num_heads * c.head_dim * seq_len


def row_of(config: Config, variant: dict[str, Any], peak: float) -> str:
    """One line of the table of results."""
    name = f"| {variant['attention']} | {variant['remat']} | {variant['batch_size']} |"
    if "failed" in variant:
        return f"{name} failed: {variant['failed']} | | | | | |"
    low, middle, high = statistics.quantiles(variant["seconds"], n=4, method="inclusive")
    rate, c = variant["tokens_per_second"], MODELS[config.model]
    mfu, full = (100 * rate * flops(c, config.seq_len) / peak for flops in (flops_per_token, full_flops))
    skipped = "" if not variant["skipped"] else " **not finite**"
    return (f"{name} {middle:.4g} ({low:.4g} to {high:.4g}) | {rate:.0f}{skipped} | {mfu:.1f} % | {full:.1f} % | "
            f"{variant['memory_bytes'] / 2**30:.2f} | {variant['compile_seconds']:.1f} |")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = flags.parse({"default": Config()}, argv, prog=PROG, description=__doc__)
    if config.xla_flags:  # read when the first device is asked for
        os.environ["XLA_FLAGS"] = XLA_FLAGS.get(config.xla_flags, config.xla_flags)
    try:
        config = choose(config)
        names, exact = usable(config)
    except ValueError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    peak, peak_text = peak_flops(config.dtype)
    print("\n".join([*describe(config, peak_text), "", *exact, "",
                     "| attention | remat | rows | seconds a step (quartiles) | tokens/s a device | MFU | MFU full | "
                     "GiB | compile s |", "|---|---|---|---|---|---|---|---|---|"]), flush=True)
    variants = []
    for batch_size in config.batch_sizes:
        for remat in config.remat:
            for name in names:
                variants.append(measure(config, name, remat, batch_size))
                print(row_of(config, variants[-1], peak), flush=True)
    done = [variant for variant in variants if "failed" not in variant]
    for best in sorted(done, key=lambda v: -v["tokens_per_second"])[:1]:
        print(f"\nPeak memory of device 0 over all of it: {memory_bytes() / 2**30:.2f} GiB. The fastest, "
              f"{best['attention']} with remat {best['remat']} and {best['batch_size']} rows, spends one step on:\n\n"
              "| operation | ms | share |\n|---|---|---|")
        print("\n".join(f"| {name} | {ms:.2f} | {share:.1%} |" for name, ms, share in best["top"]))
    if config.json_path:
        config.json_path.write_text(json.dumps({"config": flags.to_json(config), "about": describe(config, peak_text),
                                                "exactness": exact, "variants": variants}, indent=1) + "\n")
    if any("WRONG" in line for line in exact):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
