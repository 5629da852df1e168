"""Merging trees, stacked layers, shards and streams: the driver around the methods of `jaxlm.merge`."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.config import from_json, to_json
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.core.tree import named_leaves
from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig, Rule, check_models, depths, resolve
from jaxlm.merge.stream import BASE, merge_stream
from jaxlm.merge.tensors import Layout, check_same, merge_tensor, merge_trees, stacked_layouts


def tree(seed: int, near=None, vocab=7):
    """Two layers stacked, an embedding, a buffer of integers; around another tree if `near` is one."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (vocab, 4), "kernel": (2, 4, 7), "scale": (2, 4), "norm": (4,)}
    leaf = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made = {"embed": {"embedding": leaf["embed"]}, "final_norm": {"scale": leaf["norm"]},
            "layers": {"mlp": {"kernel": leaf["kernel"]}, "norm": {"scale": leaf["scale"]}}}
    if near is not None:
        made = jax.tree.map(lambda x, y: y + 0.2 * x, made, {k: near[k] for k in made})
    return {**made, "positions": np.arange(5)}


BASE_TREE = tree(0)
TREES = [tree(seed, BASE_TREE) for seed in (1, 2, 3)]


def files(params, layouts):
    """The tree as a checkpoint: one tensor a name, kernels transposed as torch keeps them."""
    tensors = {}
    for path, leaf in named_leaves(params).items():
        layout = layouts.get(path, Layout((path,)))
        parts = leaf if layout.layered else [leaf]
        tensors |= {name: np.asarray(layout.store(part)) for name, part in zip(layout.names, parts, strict=True)}
    return tensors


def transposed_layouts():
    layouts = stacked_layouts(BASE_TREE)
    swap = lambda x: x.T
    layouts["layers/mlp/kernel"] = layouts["layers/mlp/kernel"]._replace(store=swap, load=swap)
    return layouts


def config_of(name: str, **settings) -> MergeConfig:
    settings |= {"density": 0.5} if "density" in METHODS[name].settings else {}
    return MergeConfig(method=name, **settings)


def inputs_of(name: str):
    return (None if METHODS[name].base == "none" else BASE_TREE), TREES[: METHODS[name].models[1] or 3]


def close(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize("name", METHODS)
def test_a_tree_a_checkpoint_and_a_stream_give_the_same(name):
    base, trees = inputs_of(name)
    config = config_of(name, **({"row_wise": True} if "row_wise" in METHODS[name].settings else {}))
    layouts = transposed_layouts()
    merged = merge_trees(base, trees, config, layouts=layouts)
    assert jax.tree.structure(merged) == jax.tree.structure(trees[0])
    stored = [files(one, layouts) for one in trees]
    stored_base = None if base is None else files(base, layouts)
    by_name = merge_trees(stored_base, stored, config)                     # a flat dict: one tensor a leaf
    close(files(merged, layouts), by_name, rtol=1e-5, atol=1e-6)
    names = list(stored[0])[::-1]                                          # order does not matter
    read = lambda model, name: stored_base[name] if model == BASE else stored[model][name]
    streamed = dict(merge_stream(names, read, config, num_models=len(trees), has_base=base is not None))
    assert list(streamed) == names
    for key, tensor in streamed.items():
        np.testing.assert_allclose(tensor, by_name[key], rtol=1e-6, atol=1e-7)
        assert tensor.dtype == stored[0][key].dtype


@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear", "slerp"])
def test_one_device_and_eight_give_the_same(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    base, trees = inputs_of(name)
    config, layouts = config_of(name), transposed_layouts()
    whole = [one for one in [*trees, base] if one is not None]
    whole = [jax.tree.map(jnp.asarray, {"layers": one["layers"]}) for one in whole]
    specs = {"layers": {"mlp": {"kernel": P(None, "fsdp", None)}, "norm": {"scale": P(None, "fsdp")}}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def run(models):
        return merge_trees(None if base is None else models[-1], models[: len(trees)], config, layouts=layouts)

    shared = jax.jit(run)([jax.device_put(one, shardings) for one in whole])
    assert len(shared["layers"]["mlp"]["kernel"].sharding.device_set) == 8
    close(shared, run(whole), rtol=1e-6, atol=1e-6)
    # And a stream, where tensors of sizes that 8 does not divide lie on all devices.
    stored = [files(one, transposed_layouts()) for one in ([*trees, base] if base is not None else trees)]
    alone, split = (dict(merge_stream(list(stored[0]), lambda model, name: stored[model][name], config,
                                      num_models=len(trees), has_base=base is not None, mesh=mesh))
                    for mesh in (None, mesh))
    close(split, alone, rtol=1e-6, atol=1e-6)


def test_masks_follow_seed_and_name_alone():
    d = np.ones((20, 20), np.float32)
    mask = lambda name, seed=0: np.asarray(merge_tensor(
        name, 0 * d, [d], MergeConfig(method="dare_linear", density=0.5, seed=seed))) != 0
    np.testing.assert_array_equal(mask("a"), mask("a"))
    for other in (mask("b"), mask("a", 1)):
        assert 0.4 < (mask("a") != other).mean() < 0.6
    models = np.asarray(merge_tensor("a", 0 * d, [d, 3 * d], MergeConfig(method="dare_linear", density=0.5)))
    assert len(np.unique(models)) == 4  # neither, one, the other, both: the models draw independently


def test_layers_have_masks_of_their_own():
    leaf = {"layers": {"k": np.ones((2, 30, 30), np.float32)}}
    merged = merge_trees(jax.tree.map(np.zeros_like, leaf), [leaf], MergeConfig(method="dare_linear", density=0.5),
                         layouts=stacked_layouts(leaf))["layers"]["k"]
    assert 0.4 < np.mean((merged[0] != 0) != (merged[1] != 0)) < 0.6


def test_a_stack_of_one_layer_is_a_layer():
    leaf = {"layers": {"k": np.ones((1, 3, 5), np.float32)}}
    layouts = {"layers/k": Layout(("layers/0/k",), True, lambda x: x.T, lambda x: x.T)}
    merged = merge_trees(jax.tree.map(np.zeros_like, leaf), [leaf], MergeConfig(method="dare_linear"), layouts=layouts)
    np.testing.assert_array_equal(merged["layers"]["k"], leaf["layers"]["k"])


def test_values_over_depth_and_by_name():
    names = ["embed/embedding", *(f"layers/{i}/{part}" for i in range(9) for part in ("mlp", "attention")), "head"]
    rules = (Rule(setting="t", pattern="mlp", values=(0.0, 1.0, 1.0)), Rule(setting="t", values=(0.2, 0.4)))
    config = MergeConfig(method="slerp", t=0.5, rules=rules)
    depth = depths(names, rules)
    t = {name: resolve(config, name, depth[name], 2).numbers["t"] for name in names}
    assert [t[f"layers/{i}/mlp"] for i in (0, 2, 4, 8)] == [0, 0.5, 1, 1]
    np.testing.assert_allclose([t["embed/embedding"], t["layers/4/attention"], t["head"]], [0.2, 0.3, 0.4])
    weighted = MergeConfig(weights=(1.0, 2.0), rules=(Rule(setting="weights", model=1, pattern="head", values=(5.0,)),))
    np.testing.assert_array_equal(resolve(weighted, "head", 1.0, 2).weights, [1, 5])
    np.testing.assert_array_equal(resolve(weighted, "layers/0/mlp", 0.0, 2).weights, [1, 2])
    for name in ("encoder.layer.7.output", "h.7.mlp", "decoder.block.7.x", "model.layers.7.mlp"):
        assert depths([name, name.replace("7", "14")])[name] == 0.5


def test_rules_reach_the_layers_of_a_stacked_leaf():
    config = MergeConfig(method="slerp", rules=(Rule(setting="t", values=(0.0, 1.0)),))
    merged = merge_trees(None, TREES[:2], config, layouts=stacked_layouts(BASE_TREE))["layers"]["mlp"]["kernel"]
    np.testing.assert_array_equal(merged[0], TREES[0]["layers"]["mlp"]["kernel"][0])
    np.testing.assert_array_equal(merged[1], TREES[1]["layers"]["mlp"]["kernel"][1])


def test_a_configuration_survives_json():
    config = MergeConfig(method="della", weights=(0.5, 1.0), density=0.4, epsilon=0.1, rescale="l1", seed=3,
                         rules=(Rule(setting="density", pattern="mlp", values=(0.3, 0.6)),))
    assert from_json(MergeConfig, to_json(config)) == config
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "tie"}, "did you mean 'ties'"),
    ({"density": 0.5}, "merge.density has no effect with method linear"),
    ({"method": "slerp", "weights": (1.0,)}, "merge.weights has no effect"),
    ({"method": "slerp", "rules": (Rule(setting="weights", values=(1.0,)),)}, "merge.weights has no effect"),
    ({"method": "ties", "seed": 1}, "draws no numbers"),
    ({"method": "ties", "density": 0.0}, "(0, 1]"),
    ({"method": "ties", "rules": (Rule(setting="density", values=(0.5, 1.5)),)}, "(0, 1]"),
    ({"method": "breadcrumbs", "gamma": 1.0}, "[0, 1)"),
    ({"method": "della", "density": 0.9}, "lower epsilon"),
    ({"method": "karcher", "iterations": 0}, "positive"),
    ({"method": "ties", "scale": float("nan")}, "finite"),
    ({"weights": (float("inf"), 1.0)}, "merge.weights must be finite, got inf"),
])
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ValueError) as error:
        MergeConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Rule(setting="t", values=()), "no values"),
    (lambda: Rule(setting="t", values=(1.0,), model=0), "only weights differ by model"),
    (lambda: Rule(setting="t", values=(1.0,), pattern="("), "no regular expression"),
    (lambda: depths(["a"], [Rule(setting="t", pattern="b", values=(1.0,))]), "fits no tensor"),
    (lambda: depths(["a"], [Rule(setting="t", values=(1.0, 2.0))]), "no tensor's name has a layer"),
    (lambda: check_models(MergeConfig(method="slerp"), 3, False), "exactly 2 models"),
    (lambda: check_models(MergeConfig(method="model_stock"), 1, True), "at least 2 models"),
    (lambda: check_models(MergeConfig(method="ties"), 2, False), "base model, and none is given"),
    (lambda: check_models(MergeConfig(), 2, True), "uses no base model"),
    (lambda: check_models(MergeConfig(weights=(1.0,)), 2, False), "1 numbers for 2 models"),
    (lambda: check_models(MergeConfig(rules=(Rule(setting="weights", model=2, values=(1.0,)),)), 2, False), "model 2"),
    (lambda: resolve(MergeConfig(weights=(1.0, -1.0)), "a", 0.0, 2), "sum to 0"),
    (lambda: merge_trees(None, TREES, MergeConfig(weights=(1.0,) * 3), weights=jnp.ones(3)), "beside those"),
    (lambda: merge_trees(None, TREES, MergeConfig(), layouts={"layers/mlp/kernel": Layout(("a",) * 3, True)}),
     "3 names"),
])
def test_wrong_requests_are_explained(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_all_differences_of_models_are_named_at_once():
    other = tree(1, vocab=9)
    other["layers"]["mlp"]["kernel"] = np.zeros((3, 4, 7), np.float32)
    other["positions"] = np.arange(5) + 1
    other["extra"] = np.zeros(1, np.float32)
    other["final_norm"]["scale"] = other["final_norm"]["scale"].astype(jnp.bfloat16)
    del other["layers"]["norm"]
    with pytest.raises(ValueError) as error:
        merge_trees(None, [BASE_TREE, other], MergeConfig(), labels=["a", "b"])
    for line in ("6 difference(s)", "embed/embedding: different vocabulary sizes, 7 tokens in a, 9 tokens in b",
                 "layers/mlp/kernel: shape (2, 4, 7) in a, (3, 4, 7) in b", "extra: only in b, not in a",
                 "layers/norm/scale: only in a, not in b", "final_norm/scale: float32 in a, bfloat16 in b; merge.dtype",
                 "positions: holds no floats, so it is copied, but differs in b from a"):
        assert line in str(error.value), line


def test_float_formats_may_differ_when_the_result_has_a_named_one():
    low = jax.tree.map(lambda x: x if x.dtype.kind == "i" else x.astype(jnp.bfloat16), TREES[1])
    merged = merge_trees(None, [TREES[0], low], MergeConfig(dtype="bfloat16"))
    assert merged["embed"]["embedding"].dtype == jnp.bfloat16 and merged["positions"].dtype == np.int64
    check_same({"a": {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}, "b": {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}},
               MergeConfig())


def test_integers_cannot_be_compared_while_jax_traces():
    with pytest.raises(ValueError, match="leave it out of the traced trees"):
        jax.jit(lambda trees: merge_trees(None, trees, MergeConfig()))(TREES)


def test_a_stream_reads_ahead_in_another_thread_and_holds_two_names():
    threads, order = set(), []
    tensors = {f"t{i}": np.full((3, 5 + i), i, np.float32)[:, 1:] for i in range(6)}  # views: not contiguous

    def read(model, name):
        threads.add(threading.get_ident())
        order.append(name)
        return tensors[name] + model if model else tensors[name]

    stream = merge_stream(list(tensors), read, MergeConfig(), num_models=2, has_base=False)
    for i, (name, tensor) in enumerate(stream):
        np.testing.assert_array_equal(tensor, tensors[name] + 0.5)
        assert len(set(order)) <= i + 2
    assert threading.get_ident() not in threads and len(order) == 12


def test_results_of_a_stream_outlive_its_buffers():
    tensors = {f"t{i}": np.full(1000 + i, float(i), np.float32)[1:] for i in range(5)}
    read = lambda model, name: tensors[name]
    merged = dict(merge_stream(list(tensors), read, MergeConfig(), num_models=1, has_base=False))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(merged[name], tensor)


def test_a_stream_keeps_formats_and_passes_errors_on():
    tensors = {"f": np.ones(3), "h": np.ones(3, np.float16), "i": np.arange(3), "e": np.zeros((0, 2), np.float32)}
    read = lambda model, name: tensors[name]
    merged = dict(merge_stream(list(tensors), read, MergeConfig(), num_models=2, has_base=False))
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in tensors.items()}
    assert list(merge_stream([], read, MergeConfig(), num_models=2, has_base=False)) == []
    with pytest.raises(ValueError, match=r"w: shape \(3,\) in x, \(4,\) in y"):
        list(merge_stream(["w"], lambda i, _: np.ones(3 + i, np.float32), MergeConfig(), num_models=2, has_base=False,
                          labels=["x", "y"]))
    with pytest.raises(OSError, match="gone"):
        def broken(model, name):
            raise OSError("gone")
        list(merge_stream(["w"], broken, MergeConfig(), num_models=2, has_base=False))
