"""The runs that `tools.soak` makes and compares: flags of each recipe, and what a run folder holds."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlm.core.tree import named_leaves
from jaxlm.data.chat_template import TEMPLATE_FILE, TEMPLATES
from jaxlm.data.tokenizer import JsonTokenizer, save_tokenizer
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf
from jaxlm.train.checkpoint import CheckpointError, saved_steps
from jaxlm.train.checkpoint_files import read_json
from tools.bench_rl import byte_tokenizer

PRETRAIN = ["--model.vocab-size", "300", "--model.d-model", "64", "--model.num-layers", "2", "--model.num-heads", "4",
         "--model.num-kv-heads", "2", "--model.head-dim", "16", "--model.d-ff", "128", "--tokenizer.path", "bytes",
         "--pipeline.batch-size", "16", "--pipeline.seq-len", "64", "--accumulate", "2", "--samples.tokens", "3",
         "--data.path", "sample:ko?documents=300&weight=2", "sample:en?documents=300",
         "--data.held-out", "sample:ko?documents=10&split=held_out", "--loop.log-every", "1"]
RL = ["--rollout.max-prompt", "400", "--rollout.max-response", "24", "--rollout.engine.batch-size", "8",
      "--batch.prompts", "2", "--batch.samples", "4", "--batch.minibatches", "2", "--batch.seq-len", "430",
      "--batch.micro-rows", "2", "--tasks.train", "words:train?count=12&num_tools=4&max_calls=1",
      "--tasks.held-out", "words:unseen?count=2&num_tools=5&max_calls=1", "--loop.pages-every", "1"]
STUDENT = ModelConfig(vocab_size=264, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
                      max_positions=512, init_std=0.3)


class Recipe(NamedTuple):
    """What differs between the recipes."""

    moments: tuple[str, ...]
    finished: str                  # a name in the record that ends a step, and in no other
    exact: Callable[[str], bool]   # whether a number in a record, by its name, is one that must be the same


RECIPES = {
    "pretrain": Recipe(
        ("start", "training", "checkpoint"), "loss",
        lambda name: name.startswith(("loss", "accuracy", "grad_norm", "lr", "eval/"))),
    "rl_distill": Recipe(
        ("start", "rollout", "score", "step", "evaluation", "checkpoint"), "reward",
        lambda name: not name.startswith(("step", "time", "seconds/", "goodput/", "memory_gb", "tokens_per_second"))),
}


def flags(recipe: str, run: Path, steps: int, every: int, workers: int) -> list[str]:
    """Those of a run of so many steps, with so many between checkpoints; beside an RL run lies its student."""
    common = ["--folder", str(run), "--checkpoint.every", str(every)]
    if recipe == "rl_distill":  # not always evaluated where it is saved: two moments
        return [*RL, *common, "--init", str(student(run.parent / "student")), "--loop.iterations", str(steps),
                "--loop.eval-every", str(every + 1)]
    return [*PRETRAIN, *common, "--loop.steps", str(steps), "--loop.eval-every", str(4 * every),
            "--pipeline.workers", str(workers)]


def student(folder: Path) -> Path:
    """A model with a tokenizer and a template that shows tools, for an RL run to begin with."""
    if not folder.exists():
        save_hf(folder, STUDENT, jax.jit(build(STUDENT).init)(jax.random.key(0)), architecture="llama")
        save_tokenizer(JsonTokenizer(byte_tokenizer().encode()), folder)
        (folder / TEMPLATE_FILE).write_text(TEMPLATES["hermes_names"])
    return folder


def differences(whole: Path, cut: Path, exact: Callable[[str], bool]) -> list[str]:
    """What is not the same in the last checkpoints and in the records of two runs."""
    found = []
    left, right = (last_state(run) for run in (whole, cut))
    for name in left[0].keys() & right[0].keys():
        value, other = left[0][name], right[0][name]
        if value.dtype != other.dtype or value.tobytes() != other.tobytes():
            found.append(f"{name}: {int((value != other).sum())} of {value.size} numbers differ")
    if left[0].keys() != right[0].keys():
        found.append(f"arrays of one run only: {', '.join(sorted(left[0].keys() ^ right[0].keys()))}")
    if left[1] != right[1]:
        found.append("the positions in the data differ")
    numbers = lambda record: {name: value for name, value in record.items() if exact(name)}
    expected = {}
    for record in records_of(whole):
        expected |= {(record["step"], name): value for name, value in numbers(record).items()}
    seen = {}
    for record in records_of(cut):
        for name, value in numbers(record).items():
            seen[record["step"], name] = value
            if expected.get((record["step"], name)) != value:
                found.append(f"step {record['step']}: {name} {value} instead of {expected.get((record['step'], name))}")
    if seen.keys() != expected.keys():
        found.append(f"{len(expected.keys() - seen.keys())} records are missing")
    return found


def last_state(run: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays by name and the data positions of the last checkpoint, as they lie on the disk."""
    folder, handler = run.absolute() / "checkpoints" / str(latest(run)), ocp.PyTreeCheckpointHandler()
    at = epath.Path(folder) / "state"
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(at).tree)
    state = handler.restore(at, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    handler.close()
    return named_leaves(state), read_json(folder / "data")


def records_of(run: Path, start: int = 0) -> list[dict[str, Any]]:
    """Every record from a byte on, in the order of writing; a line that a kill tore is left out."""
    records, path = [], run / "metrics.jsonl"
    if not path.exists():
        return records
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def partial(run: Path) -> set[Path]:
    """Checkpoints that are being written, or were when their process died."""
    return set((run / "checkpoints").glob("*-tmp*"))


def latest(run: Path) -> int:
    """Step of the newest complete checkpoint, or 0."""
    try:
        return saved_steps(run.absolute() / "checkpoints")[0]
    except CheckpointError:
        return 0
