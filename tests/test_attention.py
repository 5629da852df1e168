"""Attention against its definition, its backends against each other, and every refusal."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import attention as module
from jaxlm.model.attention import BACKENDS, attention, current_platform, resolve_backend
from jaxlm.model.attention_call import Call, Labels
from jaxlm.model.config import Backend

# XLA's own passes run as ever; LLVM's are left out, which halves the time that these many small programs compile.
QUICK = {"xla_backend_optimization_level": 0}


def draw(seed, B, T, S, N, K, H, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(seed, B, T):
    """Segments that ascend within each row and end in padding, and the position of each token in its segment."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, B, T), np.int32)
    for row in range(B):
        cuts = [0, *sorted(rng.choice(np.arange(1, T), 3, replace=False)), T]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            segments[row, start:stop] = (number + 1) % 4
            positions[row, start:stop] = np.arange(stop - start)
    return jnp.asarray(segments), jnp.asarray(positions)


def seen(B, T, S, *, segments=None, positions=None, offset=0, causal=True, window=None):
    """The mask by its definition, one pair at a time."""
    q_segments, kv_segments = (np.ones((B, n)) for n in (T, S)) if segments is None else map(np.asarray, segments)
    if positions is None:
        positions = np.tile(offset + np.arange(T), (B, 1)), np.tile(np.arange(S), (B, 1))
    q_positions, kv_positions = map(np.asarray, positions)
    mask = np.zeros((B, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        distance = int(q_positions[b, t]) - int(kv_positions[b, s])
        near = window is None or (distance if causal else abs(distance)) < window
        mask[b, t, s] = near and q_segments[b, t] == kv_segments[b, s] and (not causal or s <= offset + t)
    return mask


def by_definition(q, k, v, mask, scale=None):
    """Every query head on its own, with its repeated key-value head."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", probs, v)


def compiled(q, k, v, **arguments):
    return jax.jit(functools.partial(attention, **arguments), compiler_options=QUICK)(q, k, v)


def value_and_grads(f, q, k, v, g):
    def loss(q, k, v):
        y = f(q, k, v)
        return jnp.sum((y * g).astype(jnp.float32)), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK)
    (_, y), grads = run(q, k, v)
    return y, *grads


def close(actual, expected, atol=1e-5):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e, np.float32), atol=atol, rtol=0)


def equal_call(length, segments, causal, window, scale=0.3):
    labels = Labels(jnp.arange(length)[None], segments, None)
    return Call(labels, labels, 0, causal, window, scale, None)


MASKS = list(itertools.product((True, False), (True, False), (None, 5)))


# Multi-head, grouped, multi-query; 131 queries are taken in blocks, the last one short.
@pytest.mark.parametrize(("T", "N", "K"), [(9, 4, 4), (9, 4, 1), (131, 4, 2)])
def test_equals_definition(T, N, K):
    q, k, v, g = draw(0, 2, T, T, N, K, 8)
    segments, positions = packed(1, 2, T)
    for causal, with_segments, window in MASKS if T > 9 else [(True, True, 5), (False, False, None)]:
        pairs = {"segments": (segments,) * 2, "positions": (positions,) * 2} if with_segments else {}
        mask = seen(2, T, T, causal=causal, window=window, **pairs)
        arguments = {f"{side}_{name}": x for name, (x, _) in pairs.items() for side in ("q", "kv")}
        actual = value_and_grads(functools.partial(attention, causal=causal, window=window, **arguments), q, k, v, g)
        close(actual, value_and_grads(lambda q, k, v, mask=mask: by_definition(q, k, v, mask), q, k, v, g))


def test_window_without_positions_goes_by_index_within_segments():
    q, k, v, g = draw(2, 2, 131, 131, 4, 2, 8)
    segments, positions = packed(3, 2, 131)
    same = {"q_segments": segments, "kv_segments": segments, "window": 7}
    with_positions = functools.partial(attention, q_positions=positions, kv_positions=positions, **same)
    close(value_and_grads(functools.partial(attention, **same), q, k, v, g),
          value_and_grads(with_positions, q, k, v, g), atol=2e-6)


def test_window_goes_by_given_positions():
    q, k, v, g = draw(18, 1, 131, 131, 4, 2, 8)
    positions = jnp.arange(131, dtype=jnp.int32)[None] // 9  # a window of 3 positions is up to 27 keys
    mask = seen(1, 131, 131, positions=(positions,) * 2, window=3)
    f = functools.partial(attention, q_positions=positions, kv_positions=positions, window=3)
    close(value_and_grads(f, q, k, v, g), value_and_grads(lambda *x: by_definition(*x, mask), q, k, v, g))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("window", [None, 40])
def test_offset_of_queries(traced, window):
    q, k, v, _ = draw(4, 2, 130, 170, 4, 2, 8)
    whole = by_definition(q, k, v, seen(2, 130, 170, offset=33, window=window), scale=0.2)
    if traced:
        actual = jax.jit(lambda q, k, v, offset: attention(q, k, v, q_offset=offset, window=window, scale=0.2))(
            q, k, v, 33)
    else:
        actual = compiled(q, k, v, q_offset=33, window=window, scale=0.2)
    close([actual], [whole])


def test_more_queries_than_keys():
    q, k, v, _ = draw(5, 1, 140, 20, 2, 1, 8)
    actual = compiled(q, k, v, window=30)
    close([actual[:, :49]], [by_definition(q[:, :49], k, v, seen(1, 49, 20, window=30))])
    assert not np.any(actual[:, 49:])  # the last key, 19, is 30 away from query 49


def test_causal_gradients_are_exactly_zero():
    q, k, v, _ = draw(6, 1, 130, 130, 2, 1, 4)
    grad_of = jax.jit(jax.grad(lambda k, v, t: jnp.sum(attention(q, k, v)[:, t]), (0, 1)))
    for t in (0, 40, 129):
        grads = grad_of(k, v, t)
        for grad in grads:
            assert not np.any(grad[:, t + 1:])
        assert np.all(np.any(grads[1][:, :t + 1], axis=(0, 2, 3)))


@pytest.mark.parametrize("chunk", [None, 3])
def test_queries_that_see_nothing(chunk):
    q, k, v, g = draw(7, 2, 8, 8, 4, 2, 8)
    q_segments = jnp.asarray([[1] * 4 + [7] * 4, [7] * 8], jnp.int32)  # no key is of segment 7
    kv_segments = jnp.ones((2, 8), jnp.int32)
    for scale in (1.0, 1e4):
        y, *grads = value_and_grads(functools.partial(
            attention, q_segments=q_segments, kv_segments=kv_segments, query_chunk=chunk, scale=scale), q, k, v, g)
        assert not np.any(y[0, 4:]) and not np.any(y[1])
        assert all(np.all(np.isfinite(grad)) for grad in grads)
        assert all(not np.any(grad[1]) for grad in grads) and not np.any(grads[0][0, 4:])


@pytest.mark.parametrize(("causal", "with_segments", "window"), [
    (True, True, 5), (True, False, None), (False, True, None),
])
def test_query_chunk_changes_nothing(causal, with_segments, window):
    q, k, v, g = draw(8, 2, 131, 131, 4, 2, 8)
    segments, positions = packed(9, 2, 131)
    arguments = {"q_segments": segments, "kv_segments": segments, "q_positions": positions,
                 "kv_positions": positions} if with_segments else {}
    f = functools.partial(attention, causal=causal, window=window, **arguments)
    whole = value_and_grads(f, q, k, v, g)
    for chunk in (1, 48, 130, 131, 500):
        close(value_and_grads(functools.partial(f, query_chunk=chunk), q, k, v, g), whole, atol=3e-6)


def test_query_chunk_needs_the_memory_of_one_chunk():
    B, T, N, chunk = 2, 512, 4, 32
    q, k, v, g = draw(10, B, T, T, N, 2, 8)

    def temporary(query_chunk):
        f = functools.partial(attention, query_chunk=query_chunk)
        grad = jax.jit(jax.grad(lambda q, k, v: jnp.sum(f(q, k, v) * g), (0, 1, 2)))
        return grad.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * B * N * T * T
    assert temporary(None) > scores // 2
    assert temporary(chunk) < 6 * scores * chunk // T


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    q, k, v, g = draw(11, 2, 131, 131, 4, 2, 16)
    half = [x.astype(dtype) for x in (q, k, v, g)]
    actual = value_and_grads(attention, *half)
    assert all(x.dtype == dtype for x in actual)
    close(actual, value_and_grads(attention, *(x.astype(jnp.float32) for x in half)), atol=0.06)
    large = jnp.full((1, 3, 1, 2), 200, dtype)  # scores over the largest float16
    assert np.all(np.isfinite(compiled(large, large, large)))


@pytest.mark.parametrize(("causal", "window", "with_segments", "N", "K"), [
    (True, None, True, 4, 2), (True, 50, True, 4, 2), (False, None, True, 4, 2), (False, 50, True, 4, 2),
    (True, 50, False, 2, 1), (False, None, False, 2, 2),
])
def test_splash_equals_xla(causal, window, with_segments, N, K):
    length = 384
    q, k, v, g = draw(12, 2, length, length, N, K, 16)
    call = equal_call(length, packed(13, 2, length)[0] if with_segments else None, causal, window)
    splash = functools.partial(BACKENDS["splash"].compute, call=call, interpret=True)
    xla = functools.partial(BACKENDS["xla"].compute, call=call)
    close(value_and_grads(splash, q, k, v, g), value_and_grads(xla, q, k, v, g))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_splash_lowers_for_tpu(head_dim, monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: "tpu")

    def loss(q, k, v, segments):
        y = attention(q, k, v, q_segments=segments, kv_segments=segments, backend="splash")
        return jnp.sum(y.astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((2, 512, heads, head_dim), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    kernels = jax.export.export(grad, platforms=["tpu"])(q, k, k, segments).mlir_module().count("tpu_custom_call")
    assert kernels == 3  # forward, and the gradients of queries and of keys with values


def test_names_equal_the_config():
    assert set(get_args(Backend)) == {"auto", *BACKENDS}


TPU = {"platform": "tpu", "dtype": "bfloat16", "head_dim": 128, "q_len": 4096}
GPU = {**TPU, "platform": "gpu"}


@pytest.mark.parametrize(("case", "expected"), [
    (TPU, "splash"),
    ({**TPU, "dtype": "float32"}, "splash"),
    ({**TPU, "segments": True, "positions": True}, "splash"),
    ({**TPU, "segments": True, "window": 1024}, "splash"),
    ({**TPU, "positions": True, "window": 1024}, "xla"),
    ({**TPU, "query_chunk": 512}, "xla"),
    ({**TPU, "q_len": 1, "kv_len": 4096, "decoding": True}, "xla"),
    ({**TPU, "decoding": True}, "xla"),
    ({**TPU, "q_len": 100}, "xla"),
    ({**TPU, "context": 32}, "splash"),
    ({**TPU, "context": 64}, "xla"),
    (GPU, "cudnn"),
    ({**GPU, "dtype": "float16", "segments": True, "positions": True, "window": 1024}, "cudnn"),
    ({**GPU, "dtype": "float32"}, "xla"),
    ({**GPU, "head_dim": 256}, "xla"),
    ({**GPU, "head_dim": 20}, "xla"),
    ({**GPU, "q_len": 101}, "cudnn"),
    ({**GPU, "q_len": 101, "segments": True}, "xla"),
    ({**GPU, "query_chunk": 512}, "xla"),
    ({**GPU, "q_len": 102, "context": 2}, "xla"),
    ({**GPU, "context": 4}, "cudnn"),
    ({**GPU, "q_len": 1, "kv_len": 4096, "decoding": True}, "xla"),
    ({**TPU, "platform": "cpu"}, "xla"),
])
def test_auto_chooses_what_is_exact(case, expected):
    assert resolve_backend("auto", **case) == expected
    assert resolve_backend("xla", **case) == "xla"
    for name in ("splash", "cudnn"):  # the two that auto considers
        if name == expected:
            assert resolve_backend(name, **case) == name
        else:  # a choice is kept or refused, never replaced
            with pytest.raises(ValueError, match=f"attention backend '{name}' .*'auto' and 'xla' compute this case"):
                resolve_backend(name, **case)


@pytest.mark.parametrize(("backend", "case", "message"), [
    ("splash", GPU, "runs on TPU, not on gpu"),
    ("splash", {**TPU, "query_chunk": 8}, "ignores query_chunk: leave it None"),
    ("splash", {**TPU, "decoding": True}, "not decoding with a cache"),
    ("splash", {**TPU, "kv_len": 128}, "needs queries and keys of the same tokens"),
    ("splash", {**TPU, "q_len": 130}, "a length that divides by 128, got 130"),
    ("splash", {**TPU, "context": 64}, "divides by 128 on each of 64 devices of mesh.context, got 4096"),
    ("splash", {**TPU, "window": 9, "positions": True}, "window by index.*leave positions out"),
    ("cudnn", TPU, "runs on NVIDIA GPUs, not on tpu"),
    ("cudnn", {**GPU, "dtype": "float32"}, "computes in bfloat16 or float16, not in float32"),
    ("cudnn", {**GPU, "query_chunk": 8}, "ignores query_chunk: leave it None"),
    ("cudnn", {**GPU, "decoding": True}, "not decoding with a cache"),
    ("cudnn", {**GPU, "head_dim": 136}, "head dimension up to 128 that divides by 8, got 136"),
    ("cudnn", {**GPU, "q_len": 7, "window": 3, "causal": False}, "an even length .* got 7"),
    ("cudnn", {**GPU, "q_len": 102, "context": 2}, "an even length .* got 51"),
    ("cudnn_packed", GPU, "is for packed rows: without segments use cudnn"),
    ("cudnn_packed", {**GPU, "segments": True, "window": 9}, "has no window: use cudnn"),
    ("cudnn_packed", {**GPU, "segments": True, "context": 2}, "needs whole rows, but mesh.context 2 splits them"),
    ("triton", TPU, "runs on NVIDIA GPUs, not on tpu"),
    ("triton", {**GPU, "dtype": "float32"}, "computes in bfloat16 or float16, not in float32"),
    ("triton", {**GPU, "context": 2}, "needs whole rows, but mesh.context 2 splits them"),
    ("splsh", TPU, r"unknown attention backend 'splsh' \(did you mean 'splash'\?\); known: auto, xla, splash, cudnn"),
])
def test_refusals(backend, case, message):
    with pytest.raises(ValueError, match=message):
        resolve_backend(backend, **case)


def test_platform_is_of_the_mesh_in_context():
    assert current_platform() == "cpu"
    device = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_platform() == "tpu"


@pytest.mark.parametrize(("change", "message"), [
    ({"q_BTNH": (6, 4, 8)}, r"attention takes q \[B, T, N, H\] and k, v \[B, S, K, H\]"),
    ({"v_BSKH": (2, 5, 2, 8)}, r"attention takes q \[B, T, N, H\] and k, v \[B, S, K, H\]"),
    ({"q_BTNH": (3, 6, 4, 8)}, "differ in batch or head dimension"),
    ({"q_BTNH": (2, 6, 4, 16)}, "differ in batch or head dimension"),
    ({"q_BTNH": (2, 6, 3, 8)}, "3 query heads do not divide among 2 key-value heads"),
    ({"q_segments": (2, 6)}, "segments of queries and keys must be given together"),
    ({"kv_positions": (2, 6)}, "positions of queries and keys must be given together"),
    ({"q_segments": (2, 6), "kv_segments": (2, 5)}, r"kv_segments must be .* shape \(2, 6\), got int32 \(2, 5\)"),
    ({"q_positions": (1, 6), "kv_positions": (2, 6)}, r"q_positions must be integers of shape \(2, 6\)"),
])
def test_shapes_that_do_not_fit(change, message):
    shapes = {"q_BTNH": (2, 6, 4, 8), "k_BSKH": (2, 6, 2, 8), "v_BSKH": (2, 6, 2, 8), **change}
    arrays = {name: jnp.zeros(shape, jnp.float32 if name.endswith("H") else jnp.int32)
              for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attention(arrays.pop("q_BTNH"), arrays.pop("k_BSKH"), arrays.pop("v_BSKH"), **arrays)


@pytest.mark.parametrize(("change", "message"), [
    ({"window": 0}, "window must be positive or None, got 0"),
    ({"query_chunk": -1}, "query_chunk must be positive or None, got -1"),
    ({"backend": "splash"}, "attention backend 'splash' runs on TPU, not on cpu"),
    ({"backend": "cudnn"}, "attention backend 'cudnn' runs on NVIDIA GPUs, not on cpu"),
    ({"backend": "flash"}, "unknown attention backend 'flash' .did you mean 'splash'"),
    ({"q_segments": jnp.ones((1, 4)), "kv_segments": jnp.ones((1, 4))}, "q_segments must be integers"),
])
def test_arguments_that_are_wrong(change, message):
    x = jnp.zeros((1, 4, 2, 4))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **change)


def test_types_must_agree():
    x = jnp.zeros((1, 4, 2, 4))
    with pytest.raises(ValueError, match="must share a floating point type, got float32, bfloat16, float32"):
        attention(x, x.astype(jnp.bfloat16), x)
    with pytest.raises(ValueError, match="must share a floating point type, got int32"):
        attention(*[x.astype(jnp.int32)] * 3)
