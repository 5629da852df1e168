"""The kernels for NVIDIA GPUs as far as a CPU can prove them: arguments, arithmetic, lowering, interpreted kernels."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.model import attention as module
from jaxlm.model import attention_gpu
from jaxlm.model.attention import BACKENDS, attention
from jaxlm.model.attention_gpu import MAX_DOCUMENTS, documents
from tests.test_attention import close, draw, equal_call, packed, value_and_grads


def in_documents(seed, B, T, count):
    """Segments 1, 2, ... of random lengths, the last part of each row padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        cuts = [0, *sorted(rng.choice(np.arange(1, T), count, replace=False))]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            segments[row, start:stop] = number + 1
    return segments


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["plain", "segments", "positions"])
def test_cudnn_arguments_mean_the_same(causal, window, kind, monkeypatch):
    """cuDNN itself needs a GPU; here jax computes the same arguments by its own definition of them."""
    reference = jax.nn.dot_product_attention

    def instead(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return reference(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    q, k, v, g = draw(16, 2, 40, 40, 4, 2, 8)
    segments, positions = packed(17, 2, 40)
    call = equal_call(40, segments if kind == "segments" else None, causal, window)
    if kind == "positions":
        labels = call.q._replace(positions=2 * positions)
        call = call._replace(q=labels, kv=labels)
    cudnn, xla = (functools.partial(BACKENDS[name].compute, call=call) for name in ("cudnn", "xla"))
    close(value_and_grads(cudnn, q, k, v, g), value_and_grads(xla, q, k, v, g))


def test_documents():
    offsets, lengths, fits = documents(jnp.asarray([[1, 1, 1, 2, 2, 0]]), 4)
    assert offsets.tolist() == [[0, 3, 5, -1, -1]] and lengths.tolist() == [[3, 2, 1, -1]] and fits.tolist() == [True]
    segments = in_documents(0, 5, 97, 7)
    offsets, lengths, fits = jax.device_get(documents(jnp.asarray(segments), 8))
    assert fits.all() and offsets.dtype == lengths.dtype == np.int32
    for row, start, length in zip(segments, offsets, lengths, strict=True):
        numbers, first, counts = np.unique(np.where(row == 0, 99, row), return_index=True, return_counts=True)
        assert start.tolist() == [*first, *[-1] * (9 - len(numbers))]
        assert length.tolist() == [*counts, *[-1] * (8 - len(numbers))]


@pytest.mark.parametrize(("row", "fits"), [
    ([1, 1, 2, 2, 3, 3], True), ([3, 3, 5, 5, 0, 0], True), ([1, 2, 3, 4, 4, 4], False), ([1, 1, 2, 2, 1, 1], False),
    ([0, 0, 1, 1, 2, 2], False), ([1, 0, 2, 2, 2, 2], False), ([0, 0, 0, 0, 0, 0], True),
])
def test_rows_that_documents_cannot_describe(row, fits):
    """More than 3, returning ones, padding before the end."""
    assert documents(jnp.asarray([row]), 3)[2].tolist() == [fits]


def by_contract(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What jax documents of packed rows: document i of a row is `[offset, offset + length)`, -1 ends the list."""
    def number(offsets, lengths):
        index = jnp.arange(q.shape[1])[None, None]
        within = (index >= offsets[:, :-1, None]) & (index < (offsets[:, :-1] + lengths)[..., None])
        within &= (lengths >= 0)[..., None]
        return jnp.argmax(within, axis=1), jnp.any(within, axis=1)

    assert q.shape == k.shape == v.shape and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    (of_q, q_real), (of_kv, kv_real) = number(q_offsets, q_seqlen), number(kv_offsets, kv_seqlen)
    mask = (of_q[:, :, None] == of_kv[:, None, :]) & q_real[:, :, None] & kv_real[:, None, :]
    causal = mask_type is attention_gpu.cudnn_private.MaskType.PADDING_CAUSAL
    assert causal or mask_type is attention_gpu.cudnn_private.MaskType.PADDING
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, is_causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_arguments_mean_the_same(causal, monkeypatch):
    monkeypatch.setattr(attention_gpu.cudnn_private, "dot_product_attention", by_contract)
    q, k, v, g = draw(0, 3, 50, 50, 4, 2, 8)
    call = equal_call(50, jnp.asarray(in_documents(1, 3, 50, 6)), causal, None)
    run = {name: functools.partial(BACKENDS[name].compute, call=call) for name in ("cudnn_packed", "xla")}
    close(value_and_grads(run["cudnn_packed"], q, k, v, g), value_and_grads(run["xla"], q, k, v, g))


def test_a_row_of_too_many_documents_is_nan(monkeypatch):
    monkeypatch.setattr(attention_gpu.cudnn_private, "dot_product_attention", by_contract)
    q, k, v, _ = draw(2, 2, 40, 40, 2, 1, 8)
    segments = np.ones((2, 40), np.int32)
    segments[1] = np.arange(40) + 1
    assert segments.max() > MAX_DOCUMENTS
    y = BACKENDS["cudnn_packed"].compute(q, k, v, equal_call(40, jnp.asarray(segments), True, None))
    assert np.all(np.isfinite(y[0])) and np.all(np.isnan(y[1]))


def test_offsets_that_reach_cudnn():
    """Elements from the first of the batch, all rows in one list: where each document lies in q and in k, v."""
    B, T, N, H = 3, 50, 4, 8
    segments = in_documents(3, B, T, 6)
    offsets, lengths, _ = documents(jnp.asarray(segments), MAX_DOCUMENTS)
    x = jnp.zeros((B, T, N, H))
    sizes, _, of_q, of_kv = jax.device_get(attention_gpu.cudnn_private._fix_seqlen_offsets(
        lengths, lengths, offsets, offsets, x, x))
    flat = segments + 1000 * np.arange(B)[:, None]
    begins = np.flatnonzero(np.diff(flat.ravel(), prepend=-1))
    ends = np.append(begins[1:], B * T)
    for of in (of_q.ravel(), of_kv.ravel()):
        assert of[:len(begins)].tolist() == (begins * N * H).tolist()
        assert set(of[len(begins):].tolist()) == {B * T * N * H}
    assert sizes.ravel()[:len(begins)].tolist() == (ends - begins).tolist() and not sizes.ravel()[len(begins):].any()


def lowered_for_gpu(name, monkeypatch, T=512, dtype=jnp.bfloat16):
    monkeypatch.setattr(module, "current_platform", lambda: "gpu")
    private = attention_gpu.cudnn_private
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)

    def loss(q, k, v, segments):
        y = attention(q, k, v, q_segments=segments, kv_segments=segments, backend=name)
        return jnp.sum(y.astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((2, T, heads, 64), dtype) for heads in (4, 2))
    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    return grad.trace(q, k, k, jax.ShapeDtypeStruct((2, T), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()


def test_packed_lowers_for_gpus(monkeypatch):
    text = lowered_for_gpu("cudnn_packed", monkeypatch).replace(r"\22", "'")
    calls = re.findall(
        r"custom_call @__cudnn\$(\w+)\((.*?)\).*?'mask_type': '(\w+)'.*?'max_seg_per_batch': (\d+)", text)
    # q, k, v, 2 lengths, 2 offsets; backward also statistics, the result and its gradient
    assert [(kind, operands.count("%"), mask, int(most)) for kind, operands, mask, most in calls] == [
        (kind, count, "PADDING_CAUSAL", MAX_DOCUMENTS) for kind, count in (("fmhaSoftmax", 7),
                                                                           ("fmhaSoftmaxBackward", 10))]
    assert "512x512" not in text  # no mask


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_lowers_for_gpus(dtype, monkeypatch):
    text = lowered_for_gpu("triton", monkeypatch, T=500, dtype=dtype)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3  # forward, preparation, backward
    assert "512x512" not in text


@pytest.mark.parametrize(("T", "causal", "segmented", "heads", "head_dim"), [
    (256, True, True, (4, 2), 16), (200, True, True, (2, 2), 24), (130, False, True, (2, 1), 16),
    (130, True, False, (4, 2), 16), (100, False, False, (2, 1), 8),
])
def test_triton_equals_xla(T, causal, segmented, heads, head_dim):
    q, k, v, g = draw(4, 2, T, T, *heads, head_dim)
    call = equal_call(T, packed(5, 2, T)[0] if segmented else None, causal, None)
    triton = functools.partial(BACKENDS["triton"].compute, call=call, interpret=True)
    xla = functools.partial(BACKENDS["xla"].compute, call=call)
    close(value_and_grads(triton, q, k, v, g), value_and_grads(xla, q, k, v, g))


def test_triton_in_bfloat16_rounds_like_xla():
    q, k, v, g = draw(6, 1, 256, 256, 2, 1, 32)
    call = equal_call(256, packed(7, 1, 256)[0], True, None, scale=32**-0.5)
    exact = value_and_grads(functools.partial(BACKENDS["xla"].compute, call=call), q, k, v, g)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v, g)]
    runs = (functools.partial(BACKENDS["triton"].compute, call=call, interpret=True),
            functools.partial(BACKENDS["xla"].compute, call=call))
    errors = [[np.linalg.norm(np.asarray(a, np.float32) - e) for a, e in zip(
        value_and_grads(run, *half), exact, strict=True)] for run in runs]
    assert all(triton < 1.5 * xla for triton, xla in zip(*errors, strict=True)), errors


def test_triton_on_a_mesh():
    q, k, v, g = draw(8, 4, 128, 128, 4, 2, 8)
    call = equal_call(128, packed(9, 4, 128)[0], True, None)
    triton = functools.partial(BACKENDS["triton"].compute, call=call, interpret=True)
    expected = value_and_grads(triton, q, k, v, g)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        close(value_and_grads(triton, q, k, v, g), expected)


@pytest.mark.parametrize(("name", "attribute"), [("cudnn_packed", "cudnn_private"), ("triton", "pallas_attention")])
def test_a_jax_without_them_is_refused(name, attribute, monkeypatch):
    monkeypatch.setattr(attention_gpu, attribute, None)
    with pytest.raises(ValueError, match=rf"'{name}' needs .* that jax .* does not have|'{name}' needs .*, which jax"):
        module.resolve_backend(name, platform="gpu", dtype="bfloat16", head_dim=64, q_len=128, segments=True)
