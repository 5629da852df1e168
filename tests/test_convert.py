"""Conversion: a run opens in transformers with the same logits, comes back bit-exact, and can be trained further."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxlm.core.log import read_metrics
from jaxlm.data.chat_template import CHATML
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import load_pretrained
from recipes import convert, generate, pretrain
from tests.tiny_chat import tiny_folder

SMALL = ["--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2", "--model.num-heads", "2",
         "--model.num-kv-heads", "1", "--model.head-dim", "16", "--model.d-ff", "48", "--model.init-std", "0.2"]
RUN = ["--pipeline.batch-size", "8", "--pipeline.seq-len", "32", "--samples.tokens", "2", "--loop.steps", "2",
       "--loop.log-every", "1", "--data.path", "sample:ko?documents=30", "--data.held-out",
       "sample:en?documents=2&split=held_out"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    pretrain.main([*SMALL, *RUN, "--tokenizer.path", "bytes", "--folder", str(folder)])
    return folder


@pytest.fixture(scope="module")
def exported(run):
    target = run.parent / "exported"
    convert.main(["--source", str(run), "--target", str(target)])
    return target


def test_transformers_opens_it(run, exported):
    source = load_pretrained(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 17))
    ours = build(source.config).apply(source.params, jax.numpy.asarray(tokens)).logits
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert json.loads((exported / "config.json").read_text())["bos_token_id"] == source.tokenizer.bos_id


def test_round_trip_is_bit_exact(run, exported):
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(run).params, load_pretrained(exported).params)


def test_the_chat_template_travels(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    convert.main(["--source", str(folder), "--target", str(tmp_path / "again")])
    assert load_pretrained(tmp_path / "again").chat.source == CHATML
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == CHATML


def test_training_goes_on_from_it(run, exported, capfd):
    """The first loss from exported weights is below the one that the run itself began with."""
    more = ["--init", str(exported), "--tokenizer.path", "bytes"]
    pretrain.main([*RUN, *more, "--folder", str(run.parent / "second")])
    losses = lambda name: [r["loss"] for r in read_metrics(run.parent / name / "metrics.jsonl") if "loss" in r]
    assert losses("second")[0] < losses("first")[0] - 0.1
    saved = json.loads((run.parent / "second/config.json").read_text())
    assert saved["model"]["vocab_size"] == 300
    pretrain.main([*RUN, *more, "--folder", str(run.parent / "second"), "--resume", "--loop.steps", "3"])


def test_sample_before_writing(run, tmp_path, capfd):
    convert.main(["--source", str(run), "--target", str(tmp_path / "x"), "--prompt", "독", "--max-new-tokens", "4"])
    assert "독 |" in (shown := capfd.readouterr().out)
    generate.main(["--source", str(run), "--prompt", "독", "--sampling.max-new-tokens", "4"])
    assert f"독 | {capfd.readouterr().out}" == shown  # both after the BOS that our runs train with
    assert load_pretrained(run).start == (load_pretrained(run).tokenizer.bos_id,)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--source", "nowhere"], "neither a .gguf file nor a run folder"),
    (["--architecture", "gema"], "gemma"),
    (["--architecture", "gemma"], "gemma"),  # what Gemma computes is not what this model computes
])
def test_errors(run, tmp_path, arguments, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        convert.main(["--source", str(run), "--target", str(tmp_path / "x"), *arguments])
    assert stopped.value.code == 2 and not (tmp_path / "x").exists()
    assert message in capfd.readouterr().err


def test_init_needs_its_own_model_and_tokenizer(run, exported, tmp_path, capfd):
    for arguments, message in ((["--model.d-ff", "64", "--tokenizer.path", "bytes"], "leave out the --model flags"),
                               ([], "has no tokenizer: name that of its weights")):
        with pytest.raises(SystemExit):
            pretrain.main([*RUN, "--init", str(exported), "--folder", str(tmp_path / "x"), *arguments])
        assert message in capfd.readouterr().err
