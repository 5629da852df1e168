"""The recipe of merging: folders of any architecture, mixed sources, a search, a card, and errors before any work."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxlm.core import config as flags
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.beir import read_beir
from jaxlm.eval.ranking import evaluate_run, means
from jaxlm.merge.search import SearchConfig, candidates
from jaxlm.merge.spec import MergeConfig
from jaxlm.model.encoder import build_encoder
from jaxlm.retrieval.folder import save_text_encoder
from jaxlm.retrieval.rank import rank_towers
from jaxlm.retrieval.towers import find_towers, load_towers, open_towers
from jaxlm.train.pretrained import export_pretrained, load_pretrained
from recipes import merge
from tests.test_embed import ENCODER, encoder_of, random_params
from tests.test_retrieval_recipes import data as beir  # noqa: F401  a fixture
from tests.test_retrieval_recipes import model as encoder  # noqa: F401
from tests.tiny_chat import tiny_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three folders of one architecture: a base, and two models near it."""
    root = tmp_path_factory.mktemp("models")
    folders = [tiny_folder(root / name) for name in ("base", "a", "b")]
    tensors = load_file(folders[0] / "model.safetensors")
    rng = np.random.default_rng(0)
    for folder in folders[1:]:
        save_file({name: (array + 0.05 * rng.standard_normal(array.shape)).astype(array.dtype)
                   for name, array in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


def read(folder):
    return load_file(folder / "model.safetensors")


def test_the_mean_of_two_opens_as_a_model_with_its_tokenizer(models, tmp_path):
    _, a, b = models
    merge.main(["--models", str(a), str(b), "--target", str(tmp_path / "m")])
    for name, array in read(tmp_path / "m").items():
        np.testing.assert_allclose(array, (read(a)[name] + read(b)[name]) / 2, atol=1e-7)
    model = load_pretrained(tmp_path / "m")
    assert model.chat is not None and model.tokenizer.encode("a") == load_pretrained(a).tokenizer.encode("a")
    card = (tmp_path / "m" / "README.md").read_text()
    assert str(a) in card and '"method": "linear"' in card


def test_the_written_settings_merge_again(models, tmp_path):
    base, a, b = models
    merge.main(["--models", str(a), str(b), "--base", str(base), "--merge.method", "dare_ties", "--merge.density",
                "0.5", "--target", str(tmp_path / "m")])
    merge.main(["--config", str(tmp_path / "m" / "merge.json"), "--target", str(tmp_path / "again")])
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "m"), read(tmp_path / "again"))
    config = flags.load_config(merge.Config, tmp_path / "again" / "merge.json")
    assert config.merge.method == "dare_ties" and config.merge.density == 0.5


def test_any_architecture_with_tensors_that_are_no_floats(tmp_path):
    """An encoder, which our decoders cannot hold, with integers among its tensors, in bfloat16 shards."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.BertModel(transformers.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
        model.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors | {"embeddings.position_ids": np.arange(512)[None]}, tmp_path / name / "model.safetensors",
                  metadata={"format": "pt"})
    merge.main(["--models", str(tmp_path / "a"), str(tmp_path / "b"), "--merge.dtype", "bfloat16", "--max-shard-gb",
                "1e-5", "--target", str(tmp_path / "m")])
    merged = transformers.BertModel.from_pretrained(tmp_path / "m", dtype=torch.float32).state_dict()
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    for name, array in read(tmp_path / "a").items():
        if name in merged:
            wanted = (array + read(tmp_path / "b")[name]) / 2
            np.testing.assert_allclose(merged[name].numpy(), wanted, rtol=1e-2, atol=1e-5)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_search_finds_the_model_that_wrote_the_text(models, tmp_path):
    """Of a broken model and a good one the weights 0 and 1 are best, and the search writes that merge."""
    _, a, b = models
    broken = tiny_folder(tmp_path / "broken")
    save_file({name: 30 * array for name, array in read(b).items()}, broken / "model.safetensors",
              metadata={"format": "pt"})
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    merge.main(["--models", str(broken), str(a), "--search.steps", "2", "--search.held-out",
                str(tmp_path / "text.jsonl"), "--search.seq-len", "16", "--search.batch-size", "1", "--target",
                str(tmp_path / "m")])
    assert flags.load_config(merge.Config, tmp_path / "m" / "merge.json").merge.weights == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "m"), read(a))


def test_retrievers_are_searched_by_a_measure_and_a_run_gives_its_export(encoder, beir, tmp_path, capsys):  # noqa: F811
    """Of a model and its noise the measured best is written; the model is given as the run that trained it."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(encoder, tmp_path / "run" / "exported")
    noise = shutil.copytree(encoder, tmp_path / "noise")
    rng = np.random.default_rng(0)
    save_file({name: rng.standard_normal(array.shape).astype(array.dtype) for name, array in read(encoder).items()},
              noise / "model.safetensors", metadata={"format": "pt"})
    merge.main(["--models", str(tmp_path / "run"), str(noise), "--search.steps", "2", "--search.data",
                f"{beir}?split=dev", "--search.measure", "mrr@10", "--target", str(tmp_path / "m")])
    values = {tuple(map(float, one[1].split())): float(one[2])
              for one in re.finditer(r"weights (.*): mrr@10 (\S+)", capsys.readouterr().err)}
    assert set(values) == {(1, 0), (0.5, 0.5), (0, 1)} and len(set(values.values())) > 1
    chosen = flags.load_config(merge.Config, tmp_path / "m" / "merge.json").merge.weights
    assert values[chosen] == max(values.values())
    merge.main(["--config", str(tmp_path / "m" / "merge.json"), "--target", str(tmp_path / "again")])
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "m"), read(tmp_path / "again"))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        [run] = rank_towers(load_towers(find_towers(tmp_path / "m"), mesh), read_beir(beir, "dev")).values()
    found = means(evaluate_run(run, read_beir(beir, "dev").qrels, ("mrr@10",)))["mrr@10"]
    assert found == pytest.approx(values[chosen], abs=5e-5)


def test_a_merge_of_sparse_retrievers_opens(tmp_path):
    sparse = replace(encoder_of(max_length=12)[0],
                     model=build_encoder(replace(ENCODER, num_layers=1, mlm_head=True)))
    for seed, name in enumerate("ab"):
        params = jax.tree.map(lambda x, seed=seed: x * (1 + seed), random_params(sparse.model))
        save_text_encoder(tmp_path / name, sparse, params, architecture="bert", vectors="sparse")
    merge.main(["--models", str(tmp_path / "a"), str(tmp_path / "b"), "--target", str(tmp_path / "m")])
    assert open_towers(find_towers(tmp_path / "m")).vectors == "sparse"


def test_weights_from_the_losses_of_the_models(models, tmp_path, capsys):
    """A model of zeros finds all tokens equally likely: its loss is log V."""
    _, a, b = models
    zeros = tiny_folder(tmp_path / "zeros")
    save_file({name: 0 * array for name, array in read(b).items()}, zeros / "model.safetensors",
              metadata={"format": "pt"})
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    merge.main(["--models", str(zeros), str(a), "--search.kind", "losses", "--search.temperature", "0.5",
                "--search.held-out", str(tmp_path / "text.jsonl"), "--search.seq-len", "16", "--target",
                str(tmp_path / "m")])
    losses = np.array([float(x) for x in re.search(r"nats a token: (\S+) (\S+);", capsys.readouterr().err).groups()])
    assert losses[0] == pytest.approx(np.log(264), abs=1e-4)
    expected = np.exp(-losses / 0.5) / np.exp(-losses / 0.5).sum()
    weights = flags.load_config(merge.Config, tmp_path / "m" / "merge.json").merge.weights
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    assert abs(weights[0] - 0.5) > 0.01
    for name, array in read(tmp_path / "m").items():
        np.testing.assert_allclose(array, weights[1] * read(a)[name] / sum(weights), atol=1e-6)


def test_candidates_are_the_simplex_grid():
    search = SearchConfig(steps=2, held_out=("x",))
    found = [one.weights for one in candidates(MergeConfig(), search, 3)]
    assert found == [(1, 0, 0), (.5, .5, 0), (.5, 0, .5), (0, 1, 0), (0, .5, .5), (0, 0, 1)]
    search = SearchConfig(steps=1, scales=(0.5, 1.0), held_out=("x",))
    assert [one.scale for one in candidates(MergeConfig(method="ties"), search, 2)] == [0.5, 0.5, 1, 1]
    with pytest.raises(ValueError, match="has no effect with method linear"):
        candidates(MergeConfig(), search, 2)
    with pytest.raises(ValueError, match="reads no weights"):
        candidates(MergeConfig(method="slerp"), SearchConfig(steps=1, held_out=("x",)), 2)
    for wrong, message in (({"steps": 1}, "needs search.steps and"), ({"kind": "losses", "data": ("x",)}, "held_out;"),
                           ({"steps": 1, "held_out": ("x",), "data": ("y",)}, "not by both"),
                           ({"steps": 1, "held_out": ("x",), "measure": "mrr@10"}, "with search.data only")):
        with pytest.raises(ValueError, match=message):
            SearchConfig(**wrong)
    with pytest.raises(ValueError, match="more than 512"):
        candidates(MergeConfig(), SearchConfig(steps=40, held_out=("x",)), 4)


def test_errors_name_what_is_wrong_and_leave_nothing(models, tmp_path, capsys):
    _, a, b = models
    other = tiny_folder(tmp_path / "other")
    tensors = read(a)
    embedding = "model.embed_tokens.weight"
    save_file(tensors | {embedding: tensors[embedding][:-1]}, other / "model.safetensors", metadata={"format": "pt"})
    renamed = tiny_folder(tmp_path / "renamed")
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(text.replace("<pad>", "<fill>"))
    full = tiny_folder(tmp_path / "full")
    cut = tiny_folder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((a / "model.safetensors").read_bytes()[:-10])
    target = ["--target", str(tmp_path / "m")]
    for arguments, message in (
        ([], "--models needs"),
        (["--models", str(a), f"{a}/"], "twice"),
        (["--models", str(a), str(b), "--base", f"{a}/../{a.name}"], "--base"),
        (["--models", str(a), str(b), "--target", str(full)], "is not empty"),
        (["--models", str(a), str(b), "--search.steps", "1", "--search.scales", "2", "--search.data", "x"],
         "search.scales has no effect"),
        (["--models", str(a), str(renamed)], "2 tokens have other ids or share theirs"),
        (["--models", str(a), str(b), "--search.steps", "1", "--search.data", "x", "--search.measure", "ndgc@10"],
         "ndgc"),
        (["--models", str(a), str(b), "--merge.method", "ties"], "base model, and none is given"),
        (["--models", str(a), str(b), "--merge.method", "tiess"], "tiess"),
        (["--models", str(a), str(other)], "different vocabulary sizes"),
        (["--models", str(a), str(cut)], "not a whole safetensors file"),
        (["--models", str(a), str(tmp_path / "none")], "neither a .gguf file nor a run folder"),
        (["--models", str(a), str(b), "--merge.density", "0.5"], "has no effect with method linear"),
    ):
        with pytest.raises(SystemExit) as end:
            merge.main([*target, *arguments])
        assert end.value.code == 2 and message in capsys.readouterr().err, message
        assert not (tmp_path / "m").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".m", "tmp"))]
    merge.main(["--models", str(a), str(renamed), "--other-tokens", *target])


def test_sigterm_leaves_nothing_behind(models, tmp_path, monkeypatch):
    """In the middle of writing; a process that was killed harder is named by the next one."""
    _, a, b = models
    (tmp_path / ".m.tmp-999999999").mkdir()

    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(merge, "write_checkpoint", killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        merge.main(["--models", str(a), str(b), "--target", str(tmp_path / "m")])
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == [".m.tmp-999999999"]


def test_what_a_killed_process_left_is_named_and_the_card_has_no_weights_that_nobody_read(models, tmp_path, capsys):
    _, a, _ = models
    (tmp_path / ".m.tmp-999999999").mkdir()
    saved = load_pretrained(a)
    export_pretrained(saved, tmp_path / "again", architecture="llama")
    merge.main(["--models", str(a), str(tmp_path / "again"), "--merge.method", "slerp", "--target",
                str(tmp_path / "m")])
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / "m"), read(a))
    assert ".m.tmp-999999999 may be left by a process that was killed" in capsys.readouterr().err
    assert "| weight |" not in (tmp_path / "m" / "README.md").read_text()
