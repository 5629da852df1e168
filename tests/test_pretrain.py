"""The pretraining recipe as its users meet it: flags, files, faults, kills."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.core.config import from_json, to_json
from jaxlm.core.log import read_metrics
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch
from jaxlm.core.rng import derive
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import make_schedule
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step
from recipes.pretrain import PRESETS, Config, check, main, make_loss

TINY = ["--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2", "--model.num-heads", "2",
        "--model.num-kv-heads", "1", "--model.head-dim", "16", "--model.d-ff", "48", "--tokenizer.path", "bytes",
        "--pipeline.batch-size", "16", "--pipeline.seq-len", "48", "--accumulate", "2", "--samples.tokens", "3",
        "--loop.log-every", "1"]


@pytest.fixture
def corpus(tmp_path):
    """Two sources of unlike documents, one of them compressed."""
    rng = np.random.default_rng(0)
    lines = lambda word, count: "".join(
        json.dumps({"text": f"{word} {i} " * int(rng.integers(1, 9)), "lang": "ko"}, ensure_ascii=False) + "\n"
        for i in range(count))
    (tmp_path / "a.jsonl").write_text(lines("문서", 60), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("text", 30).encode()))
    return [f"{tmp_path}/a.jsonl?language=ko&weight=2", f"{tmp_path}/b.jsonl.gz?language=en"]


def flags(folder, corpus, steps=9, *extra):
    return [*TINY, "--folder", str(folder), "--data.path", *corpus,
            "--data.held-out", *(spec.replace("&weight=2", "") for spec in corpus),
            "--loop.steps", str(steps), "--loop.eval-every", "100", "--checkpoint.every", "2", *extra]


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "recipes.pretrain", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8", **options)


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def refused(capfd, *arguments):
    """The error of a command that must fail before it trains."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "step 1/" not in out and "Traceback" not in err
    return re.sub(r"[│\s]+", " ", err)  # long messages come wrapped in a box


def test_one_run_and_the_same_again_from_its_config(tmp_path, corpus, capfd):
    main(flags(tmp_path / "a", corpus, 30, "--optim.lr", "1e-2"))
    out, err = capfd.readouterr()
    assert "xla attention in float32" in err and "a.jsonl: 60 documents, weight 2, dropped: 0 bad" in err
    assert "epoch/a" in err and "held out at step 30, bits per byte: en" in out and "In Korean, Germany |" in out
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "checkpoints", "metrics.jsonl", "tensorboard", "curves.png", "tokenizer"}
    first = losses(tmp_path / "a")
    assert first[30] < 0.6 * first[1]
    evaluated = [r for r in read_metrics(tmp_path / "a/metrics.jsonl") if "eval/bpb_ko" in r]
    assert [r["step"] for r in evaluated] == [30] and 0 < evaluated[0]["eval/bpb_en"] < 6
    main(["--config", str(tmp_path / "a/config.json"), "--folder", str(tmp_path / "b")])
    assert losses(tmp_path / "b") == first


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_kill_9_and_resume_is_bit_identical(tmp_path, corpus, packing):
    """Mixture, packing and accumulation; killed once at the first step after a checkpoint, wherever the writer is."""
    more = ["--pipeline.packing", packing, *(["--pipeline.num-bins", "4"] if packing == "first_fit" else [])]
    main(flags(tmp_path / "whole", corpus, 9, *more))
    cut = flags(tmp_path / "cut", corpus, 9, *more)
    process = start(*cut)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert max(losses(tmp_path / "cut")) < 9
    main([*cut, "--resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_sigterm_saves_and_asks_to_be_started_again(tmp_path, corpus):
    arguments = flags(tmp_path / "run", corpus, 5000, "--checkpoint.every", "4000")
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate()
    assert process.returncode == 75, err
    stopped = int(re.search(r"stopped by a signal at step (\d+)", err)[1])
    assert (tmp_path / f"run/checkpoints/{stopped}").is_dir()
    main([*arguments, "--loop.steps", str(stopped + 1), "--resume"])
    assert max(losses(tmp_path / "run")) == stopped + 1


def test_full_disk_ends_with_one_sentence(tmp_path, corpus):
    """The kernel refuses large files, as a full disk would; the checkpoint before stays whole."""
    main(flags(tmp_path / "run", corpus, 4))
    limited = "import resource, sys; from recipes.pretrain import main; " \
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", limited, *flags(tmp_path / "run", corpus, 40), "--resume"],
                          check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"recipes\.pretrain: checkpoint.* could not be written.*last complete one is step 4", done.stderr)
    # Callbacks of tensorstore may find orbax's event loop closed and say so; ours is no traceback.
    assert "recipes/pretrain.py" not in done.stderr
    main([*flags(tmp_path / "run", corpus, 6), "--resume"])
    assert max(losses(tmp_path / "run")) >= 6


def test_wrong_flags_and_data(tmp_path, corpus, capfd):
    folder = tmp_path / "new"
    ok = flags(folder, corpus)
    cases = {
        r"Perhaps you meant:.*--optim\.lr": ["--optim.lrr", "1"],
        r"--preset smok is unknown \(did you mean 'smoke'\?\)": ["--preset", "smok"],
        "unknown option 'wieght'.*'weight'": ["--data.path", corpus[0] + "&wieght=2"],
        "no such file": ["--data.path", str(tmp_path / "missing.jsonl")],
        "vocabulary": ["--model.vocab-size", "100"],
        "seq_len 4096 exceeds model.max_positions 2048": ["--pipeline.seq-len", "4096"],
        "loss_chunks 5 times mesh.context 1 does not divide pipeline.seq_len 48": ["--loss-chunks", "5"],
        "batch size 12 does not divide into 2 micro-batches on 8 devices; use a multiple of 16": [
            "--pipeline.batch-size", "12"],
        "need 24 devices, but 8 are here; set one axis to -1": ["--mesh.data", "3", "--mesh.tensor", "8"],
        "attention backend 'splash'": ["--compute.attention", "splash"],
        "num_heads 2 is not divisible by num_kv_heads 3": ["--model.num-kv-heads", "3"],
        r"layers/attention/key/kernel' .* cannot be split: dimension 2 of size 1 does not divide by 2 "
        r"\(mesh axes tensor\); 1 would": ["--mesh.tensor", "2"],
        "mesh axes fsdp 3, context 1, tensor 1 take 3 devices, which do not divide the 8": ["--mesh.fsdp", "3"],
        "loss_chunks 8 times mesh.context 4 does not divide": ["--mesh.context", "4", "--loss-chunks", "8"],
        "batch_size 16 does not divide over pipeline.shards 3": ["--pipeline.shards", "3"],
        "saves nothing when scan_unroll 2": ["--compute.remat", "full", "--compute.scan-unroll", "2"],
        "symbols have an effect with tokenizer.path train only": ["--tokenizer.symbols", "<x>"],
        "num_bins has no effect with packing concat": ["--pipeline.num-bins", "4"],
        "min_ratio has no effect with kind wsd and decay 0": [
            "--optim.schedule.min-ratio", "0.1", "--optim.schedule.decay", "0"],
        "keep_every 3 is not a multiple of checkpoint.every 2": ["--checkpoint.keep-every", "3"],
        "weight has an effect on mixtures of training data only": ["--data.held-out", corpus[0]],
        "holds no run": ["--resume"],
        "give one of them": ["--resume", "--overwrite"],
        "--plan writes nothing: leave out --resume": ["--resume", "--plan", "v5e:2x2"],
        r"unknown chip 'v5q' \(did you mean 'v5": ["--plan", "v5q:2x2"],
        "fsdp 3, context 1, tensor 1 take 3 devices, which do not divide the 4 here": [
            "--plan", "v5e:2x2", "--mesh.fsdp", "3"],
    }
    for message, arguments in cases.items():
        assert re.search(message, refused(capfd, *ok, *arguments)), (message, arguments)
        assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz"]


def test_wrong_files(tmp_path, capfd):
    content = gzip.compress(b'{"text": "a document"}\n' * 500)
    rows = {"cut.jsonl.gz": content[: len(content) // 2], "field.jsonl": b'{"text": "x"}\n{"txt": "y"}\n',
            "utf8.jsonl": b'{"text": "x"}\n{"text": "\xff"}\n', "empty.jsonl": b""}
    messages = {"cut.jsonl.gz": "gzip", "field.jsonl": r"field\.jsonl:2: .*text",
                "utf8.jsonl": r"utf8\.jsonl:2: .*UTF-8", "empty.jsonl": "empty corpus"}
    for name, data in rows.items():
        (tmp_path / name).write_bytes(data)
        err = refused(capfd, *flags(tmp_path / "new", [str(tmp_path / name)]))
        assert re.search(messages[name], err) and not (tmp_path / "new").exists()
    main(flags(tmp_path / "new", [f"{tmp_path}/field.jsonl"], 1, "--data.max-bad-rows", "1"))
    assert "1 bad" in capfd.readouterr().err


def test_run_folders_are_not_mixed_up(tmp_path, corpus, capfd):
    run = flags(tmp_path / "run", corpus, 2)
    main(run)
    assert "holds a run already" in refused(capfd, *run)
    assert "model.d_ff: 48 -> 64" in refused(capfd, *run, "--resume", "--model.d-ff", "64")
    assert "seed: 42 -> 1" in refused(capfd, *run, "--resume", "--seed", "1")
    assert "the checkpoint is at step 2, beyond loop.steps 1" in refused(
        capfd, *run, "--resume", "--loop.steps", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "cannot be split" in refused(capfd, *run, "--overwrite", "--mesh.tensor", "2")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "run/config.json").write_text('{"modle": {}}')
    assert "unknown field 'modle' (did you mean 'model'?)" in refused(
        capfd, "--config", str(tmp_path / "run/config.json"))
    (tmp_path / "run/note.txt").write_text("mine")
    main([*run, "--overwrite", "--loop.steps", "1"])
    assert (tmp_path / "run/note.txt").exists() and sorted(losses(tmp_path / "run")) == [1]


def test_data_that_changed_is_noticed_on_resume(tmp_path, corpus, capfd):
    run = flags(tmp_path / "run", corpus, 2)
    main(run)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("문서", "서류"), encoding="utf-8")
    assert "a.jsonl is not the data that this run began with" in refused(
        capfd, *run, "--resume", "--loop.steps", "4")


def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_serves(tmp_path, corpus, capfd):
    run = flags(tmp_path / "run", corpus, 4)
    main(run)
    whole = losses(tmp_path / "run")
    (tmp_path / "run/checkpoints/4/data/shard_0.json").write_text("{")
    capfd.readouterr()
    main([*run, "--resume", "--loop.steps", "5"])
    err = capfd.readouterr().err
    assert re.search(r"WARNING checkpoint .*checkpoints/4 cannot be used: .*now called 4\.unusable.* from step 2", err)
    assert {name for name in os.listdir(tmp_path / "run/checkpoints") if name[0].isdigit()} == {
        "4", "5", "4.unusable"}
    assert losses(tmp_path / "run") == whole | {5: losses(tmp_path / "run")[5]}


def test_no_usable_checkpoint(tmp_path, corpus, capfd):
    run = flags(tmp_path / "run", corpus, 4)
    main(run)
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/{step}/digest/digest.json").write_text("{}")
    err = refused(capfd, *run, "--resume", "--loop.steps", "5")
    assert "checkpoints/4 cannot be used" in err and "nor can 2" in err
    assert {"2", "4"} <= set(os.listdir(tmp_path / "run/checkpoints"))  # nothing was renamed


def test_presets_are_complete():
    for name, config in PRESETS.items():
        assert from_json(Config, to_json(config)) == config, name
        check(config, make_mesh(config.mesh))
    assert PRESETS["kormo_10b"].model.vocab_size == 125_184


# --- the step of the recipe on a real model ---------------------------------------------------------------------

MODEL = ModelConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
                    max_positions=64)


def train_steps(mesh, accumulate=1, compute=None, chunks=1, z_loss=0.0, steps=3):
    """Losses and final parameters of a few steps on random packed rows with uneven loss masks."""
    model, optim = build(MODEL, compute or ComputeConfig()), OptimConfig(lr=1e-3)
    tx, schedule = make_optimizer(optim, steps), make_schedule(optim.schedule, optim.lr, steps)
    step = make_step(make_loss(model, chunks=chunks, z_loss=z_loss), tx, schedule, mesh=mesh, rules=PARAM_RULES,
                     accumulate=accumulate)
    state = init_state(model.init, tx, derive(0, "init"), mesh, PARAM_RULES)
    history = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            rng = np.random.default_rng(i)
            tokens = rng.integers(0, 50, (32, 17)).astype(np.int32)
            segments = np.sort(rng.integers(1, 4, (32, 16)), axis=1).astype(np.int32)
            mask = (rng.random((32, 16)) < np.linspace(0.05, 1, 32)[:, None]).astype(np.float32)
            positions = np.broadcast_to(np.arange(16, dtype=np.int32), (32, 16)).copy()
            batch = LMBatch(tokens[:, :-1], tokens[:, 1:], mask, segments, positions)
            state, metrics = step(state, put_batch(batch, mesh))
            history.append(float(metrics["loss"]))
    return history, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return train_steps(make_mesh(MeshConfig(), jax.devices()[:1]))


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(a[0], b[0], rtol=tolerance)
    # Adam divides a gradient by its own size: where that is near 0, rounding moves a parameter by parts of lr=1e-3.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a[1], b[1])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing(one_device, accumulate):
    close(train_steps(make_mesh(MeshConfig(), jax.devices()[:1]), accumulate), one_device)


@pytest.mark.parametrize("sizes", [
    {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 4}])
def test_devices_change_nothing(one_device, sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    close(train_steps(mesh, accumulate=2, chunks=2), one_device)


def test_chunks_and_remat_change_nothing(one_device):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    close(train_steps(mesh, chunks=4, compute=ComputeConfig(remat="dots_no_batch")), one_device)
    close(train_steps(mesh, compute=ComputeConfig(scan_unroll=2)), one_device)


def test_z_loss_pulls_the_partition_function_to_one():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain, pulled = train_steps(mesh, steps=1), train_steps(mesh, steps=1, z_loss=1.0)
    assert plain[0] == pytest.approx(pulled[0], rel=1e-6)  # the reported loss is the cross-entropy
    changed = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), plain[1], pulled[1])
    assert max(jax.tree.leaves(changed)) > 1e-5
