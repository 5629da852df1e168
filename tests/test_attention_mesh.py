"""Attention on a mesh of 8 CPU devices against one device: every backend that a CPU can run, and what it sends."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.model import attention as module
from jaxlm.model.attention import BACKENDS, attention
from tests.test_attention import QUICK, close, draw, equal_call, packed, value_and_grads

CONTEXT = [{"context": 8}, {"context": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]


def on(sizes):
    return jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **sizes})))


@pytest.mark.parametrize("sizes", CONTEXT)
@pytest.mark.parametrize("arguments", [
    {}, {"segments": True}, {"window": 9}, {"segments": True, "positions": True, "window": 9},
    {"causal": False}, {"causal": False, "segments": True, "window": 9}, {"query_chunk": 5, "segments": True},
], ids=str)
def test_context_changes_nothing(sizes, arguments):
    """Output and all gradients in float32; 4 query heads for 2 key-value heads."""
    q, k, v, g = draw(0, 4, 64, 64, 4, 2, 8)
    segments, positions = packed(1, 4, 64)
    given = {"segments": segments, "positions": positions}
    labels = {f"{side}_{name}": x for name, x in given.items() if name in arguments for side in ("q", "kv")}
    f = functools.partial(attention, **{k: v for k, v in arguments.items() if k not in given}, **labels)
    expected = value_and_grads(f, q, k, v, g)
    with on(sizes):
        close(value_and_grads(f, q, k, v, g), expected, atol=3e-6)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, *CONTEXT[1:]])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 150), (False, None)])
def test_splash_on_a_mesh(sizes, causal, window):
    q, k, v, g = draw(2, 4, 512, 512, 4, 2, 8)
    call = equal_call(512, packed(3, 4, 512)[0], causal, window)
    expected = value_and_grads(functools.partial(BACKENDS["xla"].compute, call=call), q, k, v, g)
    call = call._replace(shards=sizes.get("context", 1))
    with on(sizes):
        splash = functools.partial(BACKENDS["splash"].compute, call=call, interpret=True)
        close(value_and_grads(splash, q, k, v, g), expected)


def test_splash_lowers_for_tpus_that_split_time(monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: "tpu")
    shape, segments = (2, 1024, 4, 128), jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(q, k, v, segments):
        y = attention(q, k, v, q_segments=segments, kv_segments=segments, backend="splash")
        return jnp.sum(y.astype(jnp.float32))

    with on({"context": 4, "tensor": 2}):
        grad = jax.jit(jax.grad(loss, (0, 1, 2)))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
        text = jax.export.export(grad, platforms=["tpu"])(*arrays, segments).mlir_module()
    assert text.count("tpu_custom_call") == 3


@pytest.mark.parametrize(("causal", "window", "segmented"), [
    (True, None, True), (True, 9, False), (True, None, False), (False, None, True), (False, None, False)])
def test_cudnn_arguments_mean_the_same_in_parts(causal, window, segmented, monkeypatch):
    """cuDNN itself needs a GPU; here jax computes the same arguments by its own definition of them."""
    reference = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *args, implementation, **kwargs: reference(*args, implementation="xla", **kwargs))
    q, k, v, g = draw(4, 2, 64, 64, 4, 2, 8)
    call = equal_call(64, packed(5, 2, 64)[0] if segmented else None, causal, window)
    expected = value_and_grads(functools.partial(BACKENDS["xla"].compute, call=call), q, k, v, g)
    with on({"context": 4, "tensor": 2}):
        cudnn = functools.partial(BACKENDS["cudnn"].compute, call=call._replace(shards=4))
        close(value_and_grads(cudnn, q, k, v, g), expected)


def test_only_keys_and_values_travel():
    """Forward: one all-gather each for k and v. Backward: one reduce-scatter each. Nothing of q or of the scores."""
    B, T, N, K, H, shards = 2, 64, 4, 2, 8, 4
    q, k, v, g = draw(6, B, T, T, N, K, H)
    segments = packed(7, B, T)[0]

    def loss(q, k, v, segments):
        return jnp.sum(attention(q, k, v, q_segments=segments, kv_segments=segments) * g)

    mesh = make_mesh(MeshConfig(data=1, context=shards, tensor=2))
    heads = jax.NamedSharding(mesh, jax.P(None, "context", "tensor", None))
    rows = jax.NamedSharding(mesh, jax.P(None, "context"))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=(heads, heads, heads, rows), out_shardings=heads,
                       compiler_options=QUICK)
        text = grad.lower(q, k, v, segments).compile().as_text()
    sent = re.findall(r"= (\(?[a-z]+\d+\[[^=]*?) (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)"
                      r"(?:-start)?\(", text)
    of_heads = sorted((kind, shape.split("{")[0]) for shape, kind in sent if shape.startswith("f32"))
    half = K // 2
    assert of_heads == [("all-gather", f"f32[{B},{T},{half},{H}]")] * 2 + [
        ("reduce-scatter", f"f32[{B},{T // shards},{half},{H}]")] * 2
    assert all(shape.startswith("s32") and kind == "all-gather" for shape, kind in sent if not shape.startswith("f32"))


def test_a_mesh_that_does_not_divide():
    q, k, v, _ = draw(8, 2, 12, 12, 4, 2, 8)
    with on({"context": 8}), pytest.raises(ValueError, match="12 tokens a row do not divide by 8"):
        jax.jit(attention)(q, k, v)
    with on({"tensor": 4, "context": 2}), pytest.raises(ValueError, match="2 key-value heads do not divide by 4"):
        jax.jit(attention)(q, k, v)


def test_decoding_is_not_split():
    """With an offset, a cache, or other keys than those of the queries, time stays whole."""
    q, k, v, _ = draw(9, 8, 3, 24, 4, 2, 8)
    f = jax.jit(lambda offset: attention(q, k, v, q_offset=offset))
    expected = f(7)
    with on({"context": 8}):
        np.testing.assert_allclose(f(7), expected, atol=1e-6)
