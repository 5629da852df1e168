"""The throughput benchmark runs, and finds an attention that sees across documents."""

import json

import jax
import numpy as np
import pytest

from jaxlm.model.attention import BACKENDS, Backend
from jaxlm.model.config import flops_per_token, num_parameters
from jaxlm.model.presets import MODELS
from tools.bench_throughput import Config, exactness, full_flops, main, packed_batch

TINY = ["--model", "tiny", "--seq-len", "64", "--batch-sizes", "1", "--dtype", "float32", "--loss-chunks", "2",
        "--mesh.data", "2", "--mesh.fsdp", "4"]


def careless(q, k, v, call):
    """What maxtext#4476 did: documents forgotten."""
    forgotten = call._replace(q=call.q._replace(segments=None), kv=call.kv._replace(segments=None))
    return BACKENDS["xla"].compute(q, k, v, forgotten)


def test_runs_and_leaves_out_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS, "careless", Backend(careless, lambda case: None))
    with pytest.raises(SystemExit, match="1"):
        main([*TINY, "--steps", "3", "--warmup", "1", "--top", "5", "--json-path", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "| careless |" in out and "**WRONG**, left out" in out
    assert "| cudnn | | | left out: attention backend 'cudnn' runs on NVIDIA GPUs, not on cpu" in out
    values = json.loads((tmp_path / "out.json").read_text())
    [variant] = values["variants"]
    assert variant["attention"] == "xla" and len(variant["seconds"]) == 3 and not variant["skipped"]
    assert 0 < sum(share for _, _, share in variant["top"]) <= 1.001
    assert abs(variant["loss"] - np.log(MODELS["tiny"].vocab_size)) < 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exactness_tells_rounding_from_a_leak(dtype, monkeypatch):
    monkeypatch.setitem(BACKENDS, "careless", Backend(careless, lambda case: None))
    config = Config(model="tiny", seq_len=96, dtype=dtype, documents=12)  # some of one token
    limit = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    assert max(exactness(config, "xla")) < limit
    assert min(exactness(config, "careless")) > 0.5


def test_batches_are_packed():
    batch = packed_batch(64, 256, 6, 100)
    counts = [len(set(row) - {0}) for row in batch.segments]
    assert 4 < np.mean(counts) < 9 and np.any(batch.segments == 0)
    for segments, positions, weights in zip(batch.segments, batch.positions, batch.loss_mask, strict=True):
        begins = np.flatnonzero(np.diff(segments, prepend=-1))
        assert not positions[begins].any()
        assert not weights[segments == 0].any()
        assert not weights[begins[1:] - 1].any()


def test_full_attention_counts_twice_the_causal_pairs():
    c = MODELS["base"]
    products = 6.0 * (num_parameters(c) - c.vocab_size * c.d_model)
    assert full_flops(c, 256) - products == pytest.approx(2 * (flops_per_token(c, 256) - products))


@pytest.mark.parametrize(("argv", "message"), [
    (["--model", "tinny"], "unknown model 'tinny' (did you mean 'tiny'?)"),
    (["--model", "tiny", "--seq-len", "4096"], "seq_len 4096 must be at most 2048"),
])
def test_wrong_settings(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err
    assert jax.default_backend() == "cpu"
