"""Adapters in an RL run: only they learn, the sampler merges them, and the base is the reference of the KL."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config as flags
from jaxlm.core.mesh import MeshConfig, make_mesh, tree_shardings
from jaxlm.core.tree import named_leaves, select
from jaxlm.data.tokenizer import save_tokenizer
from jaxlm.model import lora
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf
from jaxlm.model.lora import LoraConfig
from jaxlm.rl.learner import PolicyLearner
from jaxlm.rl.pack import Rows
from jaxlm.rl.policy_params import RULES, Additions, base_params, merged_params
from jaxlm.rl.update import VALUE, Policy, score_rows
from jaxlm.train.checkpoint import saved_params
from jaxlm.train.pretrained import load_pretrained
from recipes import convert, rl_distill
from tests.test_rl_distill import SMALL, student  # noqa: F401
from tests.tiny_chat import MODEL, json_tokenizer

CONFIG = dataclasses.replace(MODEL, max_positions=512)
ADDITIONS = Additions(LoraConfig(rank=4, kind="dora"), seed=42)
# A teacher gives every token an advantage, and the KL holds the student where it began.
LEARN = [*SMALL, "--objective.teacher.coefficient", "1", "--objective.teacher.place", "advantage",
         "--objective.teacher.estimator", "k1", "--objective.kl.coefficient", "0.01", "--batch.samples", "8",
         "--loop.iterations", "3", "--loop.eval-every", "3", "--checkpoint.every", "2", "--optim.lr", "3e-2",
         "--optim.schedule.warmup", "0", "--lora.rank", "4", "--lora.kind", "dora"]


def moved(params, seed=3):
    """The parameters with adapters that have learnt something."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        if lora.is_adapter(path[-1].key) else leaf, params)


def records(folder):
    return [one for one in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "reward" in one]


@pytest.fixture(scope="module")
def flags_of(student, tmp_path_factory):  # noqa: F811
    teacher = tmp_path_factory.mktemp("teacher")
    save_hf(teacher, CONFIG, jax.jit(build(CONFIG).init)(jax.random.key(7)), architecture="llama", overwrite=True)
    save_tokenizer(json_tokenizer(), teacher)
    return lambda folder: ["--init", str(student), "--teacher", str(teacher), "--folder", str(folder), *LEARN]


@pytest.fixture(scope="module")
def whole(flags_of, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rl_distill.main(flags_of(folder))
    return folder


def trained(folder):
    """The parameters in a run's newest checkpoint, adapters apart."""
    init = lambda key: ADDITIONS.to(build(CONFIG).init(key))
    return saved_params(folder, jax.eval_shape(init, jax.random.key(0)))


def test_adapters_learn_and_the_base_stays(whole, student):  # noqa: F811
    found = records(whole)
    assert len(found) == 3 and all(one["skipped"] == 0 and one["updates"] == 1 for one in found)
    assert all(one["ratio_min"] == one["ratio_max"] == 1 for one in found)  # scored and learnt by one function
    assert abs(found[0]["kl_k1"]) < 1e-6 and found[-1]["kl_k3"] > 1e-3
    assert found[-1]["teacher_k1"] < 0.9 * found[0]["teacher_k1"], [one["teacher_k1"] for one in found]
    assert all(one["sampler_logp_difference"] < 1e-4 for one in found)  # merged and unmerged agree
    params, before = trained(whole), load_pretrained(student).params
    for path, leaf in named_leaves(base_params(params)).items():
        np.testing.assert_array_equal(leaf, named_leaves(before)[path], err_msg=path)
    fresh = named_leaves(ADDITIONS.to(before))
    assert all(np.any(np.asarray(leaf) != fresh[path]) for path, leaf in named_leaves(lora.adapters(params)).items())


def test_a_killed_run_goes_on_bit_for_bit(flags_of, whole, tmp_path, monkeypatch):
    """In the last iteration, after a checkpoint; the reference comes from the checkpoint as well."""
    folder, real, calls = tmp_path / "killed", PolicyLearner.score, []

    def score(self, params, episodes):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, params, episodes)

    monkeypatch.setattr(PolicyLearner, "score", score)
    with pytest.raises(KeyboardInterrupt):
        rl_distill.main(flags_of(folder))
    rl_distill.main([*flags_of(folder), "--resume"])
    jax.tree.map(np.testing.assert_array_equal, trained(folder), trained(whole))
    assert records(folder)[-1]["kl_k3"] == records(whole)[-1]["kl_k3"]


def test_adapters_learn_the_same_on_an_fsdp_mesh(flags_of, whole, tmp_path):
    """Merging, sampling, scoring by the base and the update, with every weight spread over four devices."""
    rl_distill.main([*flags_of(tmp_path), "--loop.iterations", "2", "--loop.eval-every", "2", "--mesh.data", "2",
                     "--mesh.fsdp", "4"])
    for spread, plain in zip(records(tmp_path), records(whole)[:2], strict=True):
        assert spread["step"] == plain["step"]
        for name in ("reward", "loss", "grad_norm", "length"):
            assert spread[name] == pytest.approx(plain[name], rel=2e-3, abs=1e-5), name


def test_what_a_run_saved_is_read_merged(whole, tmp_path):
    """By `recipes.convert` and by the next run, which puts new adapters beside it and has no second copy of it."""
    plain = named_leaves(lora.merge(trained(whole)))
    convert.main(["--source", str(whole), "--target", str(tmp_path / "exported")])
    for path, leaf in named_leaves(load_pretrained(tmp_path / "exported").params).items():
        np.testing.assert_array_equal(leaf, plain[path], err_msg=path)
    config = flags.load_config(rl_distill.Config, whole / "config.json")
    run = rl_distill.prepare(dataclasses.replace(config, init=str(whole), folder=tmp_path / "next"))
    for path, leaf in named_leaves(base_params(run.params)).items():
        np.testing.assert_array_equal(leaf, plain[path], err_msg=path)
    assert lora.has_adapters(run.params) and run.learner.reference is None


def test_new_adapters_score_as_the_base_does():
    """Of LoRA bit for bit, so that a KL to the base begins at 0."""
    model = jax.jit(build(CONFIG).init)(jax.random.key(0))
    rows = Rows(*(jnp.asarray(np.random.default_rng(i).integers(0, high, (2, 12))) for i, high in enumerate(
        (264, 264, 2, 1, 12, 1, 1, 1))))._replace(segments=jnp.ones((2, 12), jnp.int32))
    scores = [jax.jit(score_rows, static_argnums=(0, 3))(Policy(build(CONFIG), 0.7), params, rows, 1)[0] for params in (
        model, Additions(LoraConfig(rank=4)).to(model), ADDITIONS.to(model), moved(ADDITIONS.to(model)))]
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-5)
    assert np.abs(scores[3] - scores[0]).max() > 0.01


def test_what_is_beside_a_model():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = jax.jit(build(dataclasses.replace(CONFIG, num_kv_heads=2)).init)(jax.random.key(0))
    additions = ADDITIONS._replace(value_head=True)
    params = moved(additions.to(model))
    assert set(named_leaves(select(params, additions.trainable()))) == {
        *named_leaves(lora.adapters(params)), f"{VALUE}/kernel"}
    assert Additions(value_head=True).trainable() is None and Additions().to(model) == model
    base = base_params(params)
    assert jax.tree.structure(base) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(select(
        params, lambda path: path in named_leaves(model))), strict=True))  # no copy
    placed = jax.device_put(params, tree_shardings(params, RULES, mesh))
    merged = merged_params(placed, mesh)
    for (path, leaf), sharding in zip(named_leaves(merged).items(), jax.tree.leaves(tree_shardings(
            model, RULES, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
    expected = lora.merge({name: part for name, part in params.items() if name != VALUE})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)
    assert jnp.any(merged["layers"]["mlp"]["up"]["kernel"] != model["layers"]["mlp"]["up"]["kernel"])
