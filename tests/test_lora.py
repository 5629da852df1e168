"""Adapters: their formula, what they leave alone, and what is learnt of a tree."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.core.masked import Mean
from jaxlm.core.mesh import MeshConfig, make_mesh, tree_shardings
from jaxlm.core.tree import combine, count_parameters, named_leaves, select
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig, ModelConfig
from jaxlm.model.decoder import build, unstack
from jaxlm.model.lora import LoraConfig
from jaxlm.model.partition import LORA_RULES, PARAM_RULES
from jaxlm.optim.optimizer import decay_mask
from jaxlm.train.run import make_loss
from jaxlm.train.state import init_state
from jaxlm.train.step import make_step, part_optimizer

MODEL = ModelConfig(vocab_size=40, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24,
                    max_positions=32, qkv_bias=True, init_std=0.2)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 12)).astype(np.int32)
KINDS = ("lora", "dora")


@functools.cache
def base():
    return jax.jit(build(MODEL).init)(jax.random.key(0))


def trained(config, seed=3):
    """Parameters whose adapters are no longer at their start."""
    params = jax.jit(lora.init, static_argnums=2)(jax.random.key(1), base(), config)
    rng = np.random.default_rng(seed)
    moved = {path: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32) if lora.is_adapter(path) else leaf
             for path, leaf in named_leaves(params).items()}
    return jax.tree.unflatten(jax.tree.structure(params), [moved[path] for path in named_leaves(params)])


apply = jax.jit(lambda params: build(MODEL).apply(params, TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind):
    params = base()
    adapted = jax.jit(lora.init, static_argnums=2)(jax.random.key(1), params, LoraConfig(rank=3, kind=kind))
    np.testing.assert_allclose(apply(adapted), apply(params), rtol=0, atol=1e-5 if kind == "dora" else 0)
    merged = lora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for (path, old), new in zip(named_leaves(params).items(), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6 if kind == "dora" else 0, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_unstacked(kind):
    params = trained(LoraConfig(rank=3, kind=kind, targets=("query", "value", "out", "mlp")))
    assert "lora_a" not in params["layers"]["attention"]["key"]
    plain = apply(lora.merge(params))
    assert np.abs(plain - apply(base())).max() > 0.1
    np.testing.assert_allclose(apply(params), plain, atol=2e-5)
    if kind == "lora":
        return
    np.testing.assert_allclose(apply(unstack(params)), plain, atol=2e-5)
    rounded = jax.jit(lambda params: build(MODEL, ComputeConfig(dtype="bfloat16")).apply(params, TOKENS).logits)(params)
    np.testing.assert_allclose(rounded, plain, atol=0.1 * float(np.abs(plain).max()))


@pytest.mark.parametrize(("kind", "stabilized"), [("lora", True), ("dora", False)])
def test_kernels_by_the_formula(kind, stabilized):
    """As PEFT writes it, in numpy: W + s A B, and for DoRA each column scaled to its magnitude."""
    config = LoraConfig(rank=4, alpha=6, kind=kind, rank_stabilized=stabilized)
    params = trained(config)
    merged = named_leaves(lora.merge(params))
    for name in lora.KERNELS:
        part, module = name.split("/")
        node = {key: np.asarray(leaf, np.float64) for key, leaf in params["layers"][part][module].items()}
        for layer in range(2):
            fan_in = 32 if name == "attention/out" else 24 if name == "mlp/down" else 16
            a, b = node["lora_a"][layer].reshape(fan_in, 4), node["lora_b"][layer].reshape(4, -1)
            w = node["kernel"][layer].reshape(fan_in, -1) + 6 / (2 if stabilized else 4) * a @ b
            if kind == "dora":
                w = w / np.linalg.norm(w, axis=0) * node["magnitude"][layer].reshape(-1)
            np.testing.assert_allclose(merged[f"layers/{name}/kernel"][layer].reshape(fan_in, -1), w, rtol=2e-5,
                                       atol=1e-5)


def test_dora_takes_no_gradient_through_the_norm():
    """The gradient of a magnitude is that of y = m u with a constant direction u, and B sees m / |.| as a constant."""
    rng = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 6), (6, 4), (6, 2), (2, 4)))
    m = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    loss = lambda b, m: jnp.sum(jnp.square(lora.adapt(
        x, x @ w, w, {"lora_a": a, "lora_b": b, "lora_scale": jnp.float32(0.5), "magnitude": m})))
    got = jax.grad(loss, argnums=(0, 1))(b, m)
    v = np.asarray(w + 0.5 * a @ b, np.float64)
    norm = np.linalg.norm(v, axis=0)
    y = np.asarray(x) @ v * np.asarray(m) / norm
    np.testing.assert_allclose(got[0], (np.asarray(x @ a) * 0.5).T @ (2 * y * np.asarray(m) / norm), rtol=1e-4)
    np.testing.assert_allclose(got[1], np.sum(2 * y * (np.asarray(x) @ v / norm), axis=0), rtol=1e-4)


def test_only_adapters_are_learnt_and_only_they_have_moments():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, model, rules = LoraConfig(rank=2), build(MODEL), (*PARAM_RULES, *LORA_RULES)
    init = lambda key: lora.init(jax.random.key(7), model.init(key), config)
    tx = part_optimizer(optax.adamw(1e-2, mask=decay_mask), lora.is_adapter)
    state = init_state(init, tx, jax.random.key(0), mesh, rules)
    before = jax.device_get(state.params)
    num_adapters = count_parameters(lora.adapters(before))
    hand = 2 * 2 * (48 + 32 + 32 + 48 + 3 * 40)  # rank, layers, inputs and outputs of q, k, v, o and the MLP
    assert num_adapters == hand and count_parameters(state.opt_state) == 2 * num_adapters + 1
    step = make_step(make_loss(model), tx, lambda count: 1e-2, mesh=mesh, rules=rules, accumulate=2,
                     trainable=lora.is_adapter)
    ids = TOKENS[:, :-1]
    batch = LMBatch(ids, TOKENS[:, 1:], np.ones(ids.shape, np.float32), np.ones_like(ids),
                    np.broadcast_to(np.arange(11, dtype=np.int32), ids.shape).copy())
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = step(state, batch)
    assert metrics["skipped"] == 0
    for path, leaf in named_leaves(jax.device_get(state.params)).items():
        same = np.array_equal(leaf, named_leaves(before)[path])
        assert same != lora.is_adapter(path), path


def test_freezing_is_a_zero_gradient_for_the_rest_and_the_same_for_the_others():
    """One step of SGD: what is learnt moves as if all were, the rest stays."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = {"x": {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, "y": jnp.array([4.0])}
    rules = ((".", jax.sharding.PartitionSpec()),)

    def loss(params, batch, key):
        total = jnp.sum(params["x"]["a"] ** 2) * params["y"][0] + params["x"]["b"][0] ** 2
        return total, {"loss": Mean(total, jnp.float32(1))}

    moved = {}
    for name, chosen in (("all", None), ("part", lambda path: path.startswith("x/"))):
        tx = part_optimizer(optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: 1.0)), chosen)
        step = make_step(loss, tx, lambda count: 0.1, mesh=mesh, rules=rules, trainable=chosen)
        state = init_state(lambda key: params, tx, jax.random.key(0), mesh, rules)
        with jax.set_mesh(mesh):
            moved[name] = jax.device_get(step(state, jnp.zeros((1, 1)))[0].params)
    np.testing.assert_array_equal(moved["part"]["x"]["a"], moved["all"]["x"]["a"])
    np.testing.assert_array_equal(moved["part"]["x"]["b"], moved["all"]["x"]["b"])
    assert moved["part"]["y"] == 4 and moved["all"]["y"] != 4
    with pytest.raises(ValueError, match="every parameter is frozen"):
        part_optimizer(tx, lambda path: False).init(params)


def test_select_and_combine():
    tree = {"x": {"a": 1, "b": 2}, "a": 3, "z": {"y": {"a": 4}}}
    chosen = select(tree, lambda path: path.endswith("b"))
    assert chosen == {"x": {"b": 2}}
    assert combine(chosen, select(tree, lambda path: not path.endswith("b"))) == tree
    assert select(tree, lambda path: False) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_has_one_sharding(kind):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.eval_shape(lambda key: lora.init(key, build(MODEL).init(key), LoraConfig(rank=2, kind=kind)),
                            jax.random.key(0))
    rules = (*PARAM_RULES, *LORA_RULES)
    for path, sharding in named_leaves(tree_shardings(params, rules, mesh)).items():
        assert not sharding.spec or sharding.spec[0] is None or not path.startswith("layers/"), path
        assert path.startswith("layers/") or not lora.is_adapter(path)
    assert not any(decay for path, decay in named_leaves(decay_mask(params)).items() if path.endswith("magnitude"))


def test_wrong_settings():
    for message, settings in {
        "no effect without lora.rank": {"kind": "dora"},
        r"lora.targets 'qurey' matches none of attention/query": {"rank": 2, "targets": ("qurey",)},
        "lora.targets is empty": {"rank": 2, "targets": ()},
        "lora.alpha a positive number": {"rank": 2, "alpha": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            LoraConfig(**settings)
    assert replace(LoraConfig(rank=4), targets=("(query|value)$",)).names() == ("attention/query", "attention/value")
