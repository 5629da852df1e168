"""Divergences against float64, their bounds and limits, the tail bucket, and the chunked forms."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.objective.distill import (
    DIVERGENCES,
    DistillConfig,
    Divergence,
    chunked_divergence,
    divergence,
)
from jaxlm.objective.distill_topk import (
    TopK,
    chunked_top_k,
    chunked_topk_divergence,
    top_k,
    topk_agreement,
    topk_divergence,
)
from jaxlm.objective.logprobs import chunked_token_logprobs, token_logprobs

V = 50
CONFIGS = {name: DistillConfig(divergence=name, mix=None if name in ("forward_kl", "reverse_kl") else 0.3)
           for name in DIVERGENCES}


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def reference(name, t, s, mix):
    if name == "forward_kl":
        return kl(t, s)
    if name == "reverse_kl":
        return kl(s, t)
    if name == "skew_kl":
        return kl(t, mix * t + (1 - mix) * s)
    if name == "skew_reverse_kl":
        return kl(s, (1 - mix) * t + mix * s)
    if name == "jsd_normalized" and mix in (0, 1):
        return kl(s, t) if mix else kl(t, s)
    m = mix * t + (1 - mix) * s
    value = mix * kl(t, m) + (1 - mix) * kl(s, m)
    return value if name == "jsd" else value / (mix * (1 - mix))


def logits(seed=0, count=40, spread=2.0, width=V):
    rng = np.random.default_rng(seed)
    return spread * rng.normal(size=(2, count, width))


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


full = jax.jit(divergence, static_argnums=2)
bucket = jax.jit(topk_divergence, static_argnums=2)
best = jax.jit(top_k, static_argnums=(1, 2))


@partial(jax.jit, static_argnums=(0, 3))
def value_and_slope(f, teacher, student, config):
    """Of the sum over tokens, for both."""
    return jax.value_and_grad(lambda t, s: jnp.sum(f(t, s, config)), (0, 1), allow_int=True)(teacher, student)


def central_differences(f, x, eps=1e-5):
    slopes = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = eps
        slopes[at] = (f(x + step) - f(x - step)) / (2 * eps)
    return slopes


def test_names():
    assert tuple(DIVERGENCES) == get_args(Divergence)


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in DIVERGENCES), ("skew_kl", 2.0)])
def test_value_and_gradient_in_float64(name, temperature):
    t, s = logits(count=3, width=7)
    config = replace(CONFIGS[name], temperature=temperature, scale_gradient=temperature != 1)

    plain = lambda s: temperature**2 * reference(name, softmax(t / temperature), softmax(s / temperature), config.mix)
    np.testing.assert_allclose(full(*f32(t, s), config), plain(s), rtol=1e-5)
    _, (to_teacher, grad) = value_and_slope(divergence, *f32(t, s), config)
    np.testing.assert_allclose(grad, central_differences(lambda s: plain(s).sum(), s), rtol=1e-4, atol=2e-6)
    assert not to_teacher.any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_negative_and_zero_at_equality(name):
    """bfloat16 logits and students within rounding of the teacher are where signed sums fall below 0."""
    t, s = f32(*logits(1, 300))
    config = CONFIGS[name]
    f = lambda t, s: full(t, s, config)
    np.testing.assert_allclose(f(t, t), np.zeros(300), atol=0 if config.mix is None else 1e-12)
    noise = jax.random.normal(jax.random.key(0), t.shape)
    for size in (1e-7, 1e-5, 1e-3, 1e-1):
        assert (f(t, t + size * noise) >= 0).all()
    assert (f(t, s) > 0).all()
    rounded = f(t.astype(jnp.bfloat16), s.astype(jnp.bfloat16))
    assert (rounded > 0).all()
    assert rounded.dtype == jnp.float32


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nearly_equal_models_keep_their_digits(name):
    """Where the plain sum of p log(p / q) is wrong by 200 %: against float64 on the same float32 logits."""
    t = np.float32(logits(2, 20)[0])
    s = np.float32(t + 1e-3 * np.random.default_rng(3).normal(size=t.shape))
    want = reference(name, *(softmax(x.astype(np.float64)) for x in (t, s)), CONFIGS[name].mix)
    np.testing.assert_allclose(full(t, s, CONFIGS[name]), want, rtol=2e-3)


def test_limits_of_the_normalised_jsd():
    t, s = logits(4, 8)
    at = lambda mix: divergence(*f32(t, s), DistillConfig(divergence="jsd_normalized", mix=mix))
    plain = lambda name: divergence(*f32(t, s), DistillConfig(divergence=name))
    np.testing.assert_array_equal(at(0.0), plain("forward_kl"))
    np.testing.assert_array_equal(at(1.0), plain("reverse_kl"))
    for mix in (1e-6, 1e-4, 1e-2):
        # Continuous from both sides, while jsd itself falls to 0.
        np.testing.assert_allclose(at(mix), reference("jsd_normalized", softmax(t), softmax(s), mix), rtol=1e-4)
        np.testing.assert_allclose(at(mix), plain("forward_kl"), rtol=100 * mix)
        np.testing.assert_allclose(at(1 - mix), plain("reverse_kl"), rtol=100 * mix + 1e-3)
    small = divergence(*f32(t, s), DistillConfig(divergence="jsd", mix=1e-4))
    assert (small < 1e-3 * plain("forward_kl")).all()


def test_skew_without_a_share_is_the_plain_divergence():
    t, s = f32(*logits(5, 4))
    for skew, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        np.testing.assert_array_equal(full(t, s, DistillConfig(divergence=skew, mix=0.0)),
                                      full(t, s, DistillConfig(divergence=plain)))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_cannot_be(name):
    """A token neither has adds nothing; gradients stay finite. One the other cannot have makes a plain KL infinite."""
    t, s = f32(*logits(6, 4))
    config = CONFIGS[name]
    want, (_, slope) = value_and_slope(divergence, t[:, 1:], s[:, 1:], config)
    t, s = t.at[:, 0].set(-jnp.inf), s.at[:, 0].set(-jnp.inf)
    got, (_, grad) = value_and_slope(divergence, t, s, config)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(grad, jnp.pad(slope, ((0, 0), (1, 0))), rtol=1e-5, atol=1e-7)
    assert jnp.isinf(full(t, s.at[:, 0].set(0), config)).all() == (name == "reverse_kl")
    assert jnp.isinf(full(t.at[:, 0].set(0), s, config)).all() == (name == "forward_kl")


def coarse(p, ids):
    """K + 1 classes of p, float64."""
    picked = np.take_along_axis(p, ids, axis=-1)
    return np.concatenate((picked, 1 - picked.sum(axis=-1, keepdims=True)), axis=-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_tail_bucket_lies_between_zero_and_the_full_divergence(name):
    t, s = logits(7, 500)
    config = CONFIGS[name]
    above, before = full(*f32(t, s), config), np.zeros(500)
    for k in (1, 8, 30):
        teacher = best(*f32(t), k, DistillConfig())
        ids = np.asarray(teacher.ids)
        got = bucket(teacher, *f32(s), config)
        want = reference(name, coarse(softmax(t), ids), coarse(softmax(s), ids), config.mix)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        assert (got >= 0).all()
        assert (got <= above * (1 + 1e-5)).all()
        assert (got >= before * (1 - 1e-5)).all(), "more classes see more"
        before = got


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_normalized"])
def test_gradient_of_the_tail_bucket(name):
    t, s = logits(8, 2, width=6)
    config = CONFIGS[name]
    teacher = best(*f32(t), 2, DistillConfig())
    ids = np.asarray(teacher.ids)
    plain = lambda s: reference(name, coarse(softmax(t), ids), coarse(softmax(s), ids), config.mix).sum()
    _, (to_teacher, grad) = value_and_slope(topk_divergence, teacher, *f32(s), config)
    np.testing.assert_allclose(grad, central_differences(plain, s), rtol=1e-3, atol=2e-6)
    assert not to_teacher.logp.any()


def test_the_tail_bucket_of_the_docstring():
    teacher = TopK(jnp.array([[3, 0]]), jnp.log(jnp.array([[0.6, 0.3]])))
    student = jnp.log(jnp.array([[0.2, 0.1, 0.1, 0.5, 0.1]]))
    want = kl(np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.2, 0.3]))
    np.testing.assert_allclose(bucket(teacher, student, DistillConfig()), [want], rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_normalized"])
def test_a_teacher_without_a_measurable_tail(name):
    """All mass in the K: the tail is below float32's rounding, for a student alike or not."""
    t = jnp.where(jnp.arange(V)[None] < 1, 40.0, 0.0)
    teacher = best(t, 1, DistillConfig())
    assert teacher.logp == 0
    value, (_, slope) = value_and_slope(topk_divergence, teacher, t, CONFIGS[name])
    assert value == pytest.approx(0, abs=2e-6)
    assert np.isfinite(slope).all()
    value, (_, slope) = value_and_slope(topk_divergence, teacher, jnp.zeros((1, V)), CONFIGS[name])
    assert value > 0
    assert np.isfinite(slope).all()
    assert slope[0, 0] < 0 < slope[0, 1:].min(), "towards the teacher's token"


def test_agreement_of_teacher_and_student():
    teacher = TopK(jnp.array([[3, 0]]), jnp.log(jnp.array([[0.6, 0.3]])))
    student = jnp.log(jnp.array([[0.2, 0.3, 0.1, 0.35, 0.05]]))
    got = jax.jit(topk_agreement, static_argnums=2)(teacher, student, DistillConfig())
    np.testing.assert_allclose(jnp.stack(got), [[0.9], [0.55], [0.5]], rtol=1e-5)


B, T, D, DT = 4, 8, 6, 10


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(9)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return draw(B, T, DT), draw(DT, V), draw(B, T, D), draw(D, V), jnp.asarray(rng.integers(0, V, size=(B, T)))


WEIGHTS = jnp.linspace(0, 1, B * T).reshape(B, T)
KD = DistillConfig(divergence="jsd_normalized", mix=0.4, temperature=1.5)


def run(kind, models, num_chunks):
    """Weighted sum and gradient for the student's hidden states and head."""
    teacher, teacher_head, student, head, targets = models

    def loss(student, head):
        if kind == "divergence":
            per_token = chunked_divergence(teacher, teacher_head, student, head, KD, num_chunks)
        elif kind == "topk":
            kept = chunked_top_k(teacher, teacher_head, 5, KD, num_chunks)
            per_token = chunked_topk_divergence(kept, student, head, KD, num_chunks)
        else:
            out = chunked_token_logprobs(student, head, targets, num_chunks, 0.6)
            per_token = out.logp + 0.3 * out.entropy
        return jnp.sum(WEIGHTS * per_token)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(student, head)


def whole(kind, models):
    teacher, teacher_head, student, head, targets = models

    def loss(student, head):
        t, s = teacher @ teacher_head, student @ head
        if kind == "divergence":
            per_token = divergence(t, s, KD)
        elif kind == "topk":
            per_token = topk_divergence(top_k(t, 5, KD), s, KD)
        else:
            per_token = sum(w * x for w, x in zip((1, 0.3), token_logprobs(s, targets, 0.6), strict=True))
        return jnp.sum(WEIGHTS * per_token)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(student, head)


@pytest.mark.parametrize("kind", ["divergence", "topk", "logprobs"])
def test_chunks_and_devices_change_nothing(models, kind):
    want = whole(kind, models)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    for num_chunks in (1, 4):
        jax.tree.map(close, run(kind, models, num_chunks), want)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
        jax.tree.map(close, run(kind, models, 2), want)


def test_logits_of_all_tokens_never_exist_at_once(models):
    """No array of the compiled gradient has B x T x V elements with 8 chunks; with 1 there are some."""
    teacher, teacher_head, student, head, _ = models

    def largest(num_chunks):
        loss = lambda s, h: jnp.sum(chunked_divergence(teacher, teacher_head, s, h, KD, num_chunks))
        text = jax.jit(jax.grad(loss, (0, 1))).lower(student, head).compile().as_text()
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(1) == B * T * V
    assert largest(8) < B * T * V / 2


def test_log_probabilities_and_entropy_in_float64(models):
    logits = 3 * np.random.default_rng(10).normal(size=(B, T, V))
    targets = np.asarray(models[4])
    p = softmax(logits / 0.6)
    got = jax.jit(token_logprobs, static_argnums=2)(*f32(logits), jnp.asarray(targets), 0.6)
    np.testing.assert_allclose(got.logp, np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0]), rtol=2e-5)
    np.testing.assert_allclose(got.entropy, -np.sum(p * np.log(p), axis=-1), rtol=2e-5, atol=1e-6)


def test_entropy_of_tokens_that_cannot_be():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    entropy = lambda x: token_logprobs(x, jnp.array([0])).entropy[0]
    value, grad = jax.value_and_grad(entropy)(logits)
    assert value == pytest.approx(np.log(2))
    np.testing.assert_allclose(grad, [[0, 0, 0]], atol=1e-7)


@pytest.mark.parametrize(("values", "match"), [
    ({"mix": 0.5}, "no effect on forward_kl"),
    ({"divergence": "jsd"}, "needs distill.mix"),
    ({"divergence": "jsd", "mix": 0.0}, "or jsd_normalized"),
    ({"divergence": "skew_kl", "mix": 1.0}, "below 1 for skew"),
    ({"divergence": "jsd_normalized", "mix": 1.5}, "at most 1"),
    ({"temperature": 0.0}, "above 0"),
    ({"scale_gradient": True}, "no effect at temperature 1"),
])
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        DistillConfig(**values)


def test_wrong_calls(models):
    teacher, teacher_head, student, head, targets = models
    with pytest.raises(ValueError, match="teacher's has 49 tokens, the student's 50"):
        chunked_divergence(teacher, teacher_head[:, 1:], student, head, KD)
    with pytest.raises(ValueError, match="3 does not divide the sequence length 8"):
        chunked_divergence(teacher, teacher_head, student, head, KD, 3)
    with pytest.raises(ValueError, match="k 50 leaves nothing"):
        topk_divergence(top_k(student @ head, V, KD), student @ head, KD)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(student @ head, targets, 0.0)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"8 times mesh.context 2 does not divide .* 8"):
        chunked_token_logprobs(student, head, targets, 8)
