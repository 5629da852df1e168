"""Preference learning from rows to runs: what the batch, the devices and the kind of reference must not change."""

import json
import re

import jax
import numpy as np
import optax
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.core.config import from_json, to_json
from jaxlm.core.log import read_metrics
from jaxlm.core.mesh import MeshConfig, make_mesh, place_leaf, put_batch
from jaxlm.core.tree import named_leaves, path_name
from jaxlm.data.chat_examples import ChatFormat
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.data.preference_batches import PreferenceBatchConfig, make_batch
from jaxlm.data.preference_examples import encode_preferences
from jaxlm.data.preference_rows import open_preference_rows
from jaxlm.model import lora
from jaxlm.model.decoder import build
from jaxlm.model.lora import LoraConfig
from jaxlm.objective.preference import PreferenceConfig
from jaxlm.train.preference import (
    REFERENCE,
    completion_logp,
    make_preference_loss,
    make_preference_step,
    reference_part,
)
from jaxlm.train.pretrained import load_pretrained
from jaxlm.train.state import state_of
from jaxlm.train.tuning import RULES
from recipes.preference import PRESETS, Config, check, main
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder

MODEL_ = build(MODEL)
FORM = ChatFormat(ChatTemplate(CHATML), json_tokenizer())
SHAPE = PreferenceBatchConfig(batch_size=8, seq_len=64)


def rows(count, start=0):
    return [{"prompt": f"{i}?", "chosen": "yes" + "!" * (i % 3), "rejected": "no" + "." * (i % 4)}
            for i in range(start, start + count)]


def batch_of(paired):
    found = encode_preferences(open_preference_rows(rows(8)), FORM, seq_len=64, paired=paired)
    return make_batch(found.examples, list(range(8)), SHAPE)


@pytest.fixture(scope="module")
def params():
    """Of the policy and of another model of its shape."""
    return [jax.device_get(jax.jit(MODEL_.init)(jax.random.key(seed))) for seed in range(2)]


def test_log_probabilities_of_completions_on_either_side_of_the_padding(params):
    batch = batch_of(True).first
    logp = jax.jit(lambda batch: completion_logp(MODEL_, params[0], batch))
    found = logp(batch)
    logits = MODEL_.apply(params[0], batch.tokens, positions=batch.positions, segments=batch.segments).logits
    exact = jax.nn.log_softmax(np.asarray(logits, np.float64))
    picked = np.take_along_axis(np.asarray(exact), batch.targets[..., None], -1)[..., 0] * batch.loss_mask
    np.testing.assert_allclose(found.logp, picked.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found.length, batch.loss_mask.sum(1))
    shift = lambda row, count: np.roll(row, len(row) - count)
    left = LMBatch(*(np.stack([shift(row, count) for row, count in zip(leaf, batch.segments.sum(1), strict=True)])
                     for leaf in batch))
    assert left.segments[0, 0] == 0 == left.tokens[0, 0]
    np.testing.assert_allclose(logp(left).logp, found.logp, rtol=1e-5)


def test_the_base_beneath_adapters_is_the_reference(params):
    adapted = lora.init(jax.random.key(5), params[0], LoraConfig(rank=2, kind="dora"))
    adapted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if "lora_b" in jax.tree_util.keystr(path) else leaf, adapted)
    loss = jax.jit(make_preference_loss(MODEL_, PreferenceConfig()))
    base = loss(adapted, batch_of(True), jax.random.key(0))[1]
    copy = loss({**adapted, REFERENCE: params[0]}, batch_of(True), jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, base, copy)
    assert abs(base["margin"].value()) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, reference_part(adapted), params[0])


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_micro_batches_and_devices_change_nothing(params, method):
    """KTO's reference point is one of the whole batch."""
    batch, found = batch_of(method == "dpo"), []
    for config, devices, accumulate in ((MeshConfig(), 1, 1), (MeshConfig(data=2, fsdp=2, context=2), 8, 2)):
        mesh = make_mesh(config, jax.devices()[:devices])
        tx = optax.sgd(lambda _: 0.1)
        step = make_preference_step(MODEL_, PreferenceConfig(method=method), tx, lambda _: 0.1, mesh=mesh, rules=RULES,
                                    accumulate=accumulate)
        # Far from the reference, so that no term is at its starting point.
        policy, reference = (jax.tree_util.tree_map_with_path(
            lambda path, leaf, mesh=mesh: place_leaf(path_name(path), leaf, mesh=mesh, rules=RULES), one)
            for one in params[::-1])
        with jax.set_mesh(mesh):
            state, metrics = step(state_of(policy, tx, mesh, RULES), reference, put_batch(batch, mesh))
        found.append(jax.device_get((state.params, metrics)))
    (one, one_metrics), (many, many_metrics) = found
    assert one_metrics.keys() == many_metrics.keys() and not one_metrics["skipped"]
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert one_metrics["grad_norm"] > 1e-3 and (method == "dpo" or one_metrics["kl"] > 0)
    for path, leaf in named_leaves(one).items():
        np.testing.assert_allclose(named_leaves(many)[path], leaf, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for name, part in (("train", rows(24)), ("held_out", rows(10, 24))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tiny_folder(folder / "model")
    tiny_folder(folder / "other", seed=1)
    return folder


def flags(files, folder, *extra, preset="dpo", init="model", steps=6):
    return ["--preset", preset, "--folder", str(folder), "--data.path", f"{files}/train.jsonl", "--data.held-out",
            f"{files}/held_out.jsonl", "--init", str(files / init), "--batch.batch-size", "8", "--batch.seq-len", "64",
            "--batch.least-width", "64", "--compute.dtype", "float32", "--compute.remat", "none", "--accumulate", "1",
            "--loss-chunks", "1", "--mesh.fsdp", "1", "--mesh.data", "-1", "--loop.steps", str(steps),
            "--loop.log-every", "1", "--loop.eval-every", "100", "--checkpoint.every", "2", "--optim.lr", "3e-3",
            "--optim.schedule.kind", "constant", "--optim.schedule.warmup", "0", "--optim.schedule.decay", "0", *extra]


def records(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def evaluated(folder, name="accuracy"):
    return next(r[f"eval/{name}_held_out"] for r in read_metrics(folder / "metrics.jsonl") if
                f"eval/{name}_held_out" in r)


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    main(flags(files, folder))
    return folder


def test_it_learns_what_is_preferred(files, trained):
    found = records(trained)
    np.testing.assert_allclose(found[1], np.log(2), rtol=1e-6)
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < 0.9 * found[1]
    assert evaluated(trained) == 1 and evaluated(trained, "margin") > 0.1  # at the start no margin is above 0
    after = load_pretrained(trained)
    assert after.chat.source == CHATML
    assert not np.array_equal(after.params["embed"]["embedding"], load_pretrained(files / "model").params["embed"][
        "embedding"])


def test_a_resumed_run_is_bit_identical(files, trained, tmp_path, capfd):
    """The reference is read again, and must be the one that the run began with."""
    cut = flags(files, tmp_path / "cut", steps=2)
    main(cut)
    main([*cut, "--resume", "--loop.steps", "6"])
    assert records(tmp_path / "cut") == records(trained)
    both = [load_pretrained(folder).params for folder in (tmp_path / "cut", trained)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert "has not the weights that this run began with" in refused(
        capfd, *cut, "--resume", "--loop.steps", "8", "--reference", str(files / "other"))
    assert "beta: None -> 0.3" in refused(capfd, *cut, "--resume", "--loss.beta", "0.3")


def test_adapters(files, tmp_path, capfd):
    """Only they move, and the base stays the reference."""
    main(flags(files, tmp_path / "run", "--lora.rank", "2", "--lora.kind", "dora", "--loop.steps", "3"))
    assert "of them trained" in capfd.readouterr().err
    found = records(tmp_path / "run")
    np.testing.assert_allclose(found[1], np.log(2), rtol=1e-5)
    assert found[3] < found[1]
    before, after = load_pretrained(files / "model").params, load_pretrained(tmp_path / "run").params
    for path, leaf in named_leaves(after).items():
        moved = not np.allclose(leaf, named_leaves(before)[path], rtol=0, atol=1e-6)
        assert moved == (path.startswith("layers/") and path.endswith("kernel")), path


def test_judged_rows(files, tmp_path):
    """They are measured on pairs here, two rows each."""
    judged = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
              for row in rows(24) for side in ("chosen", "rejected")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    main([*flags(files, tmp_path / "run", preset="kto"), "--data.path", f"{tmp_path}/train.jsonl"])
    found = records(tmp_path / "run")
    np.testing.assert_allclose(found[1], 0.5, rtol=1e-6)
    assert found[6] < 0.49 and evaluated(tmp_path / "run", "reward_chosen") > evaluated(
        tmp_path / "run", "reward_rejected")


def test_from_scratch_without_a_reference(files, tmp_path):
    run = flags(files, tmp_path / "run", preset="smoke", steps=4)
    at = run.index("--init")
    main([*run[:at], *run[at + 2:], "--tokenizer.path", str(files / "model"), "--model.d-model", "16",
          "--model.num-layers", "1", "--model.d-ff", "16"])
    found = records(tmp_path / "run")
    assert found[4] < found[1] and load_pretrained(tmp_path / "run").tokenizer.fingerprint() == json_tokenizer(
        ).fingerprint()


def refused(capfd, *arguments):
    """The error of a command that must fail before it trains."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "step 1/" not in out and "Traceback" not in err
    return re.sub(r"[│\s]+", " ", err)


def test_wrong_flags(files, tmp_path, capfd):
    folder = tmp_path / "new"
    ok, nothing = flags(files, folder), flags(files, folder, preset="smoke")
    at = nothing.index("--init")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    (tmp_path / "judged.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    cases = {
        r"no field 'rejected'": [*ok, "--data.path", f"{tmp_path}/bad.jsonl"],
        "is judged alone": [*ok, "--data.path", f"{tmp_path}/judged.jsonl"],
        r"no such file": [*ok, "--data.path", f"{tmp_path}/nothing.jsonl"],
        "gamma has no effect with ipo": [*flags(files, folder, preset="ipo"), "--loss.gamma", "0.1"],
        "--reference has no effect with simpo": [*flags(files, folder, preset="simpo"), "--reference", "x"],
        "has another tokenizer|has another shape": [*ok, "--reference", str(tiny_folder(
            tmp_path / "foreign", specials=("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<x>")))],
        "dpo compares with the weights that it starts from": [
            *nothing[:at], *nothing[at + 2:], "--loss.method", "dpo", "--loss.beta", "0.1"],
        "invalid choice|is unknown": [*ok, "--loss.method", "dop"],
        "24 rows give no batch of 32": [*ok, "--batch.batch-size", "32"],
        "no row left of 24: dropped 24 too long": [*ok, "--batch.seq-len", "8", "--batch.least-width", "8"],
        "does not divide": [*ok, "--accumulate", "3"],
        "holds no run": [*ok, "--resume"],
    }
    for message, arguments in cases.items():
        assert re.search(message, refused(capfd, *arguments)), message
        assert not folder.exists()


def test_presets_are_complete():
    for name, config in PRESETS.items():
        assert from_json(Config, to_json(config)) == config, name
        check(config, make_mesh(config.mesh))
