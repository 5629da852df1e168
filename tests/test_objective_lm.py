"""Cross-entropy against torch, and the chunked form against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.core.masked import aggregate
from jaxlm.objective.lm import chunked_cross_entropy, cross_entropy

B, T, D, V = 2, 8, 4, 11


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, size=(B, T)).astype(np.int32)
    return hidden, head, targets


def test_values_equal_torch(arrays):
    hidden, head, targets = arrays
    logits = 5 * hidden @ head
    loss = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    peer = torch.tensor(logits)
    expected = torch.nn.functional.cross_entropy(
        peer.reshape(-1, V), torch.tensor(targets).long().reshape(-1), reduction="none"
    )
    np.testing.assert_allclose(loss.nll.reshape(-1), expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss.log_z, peer.logsumexp(-1).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(loss.correct, (logits.argmax(-1) == targets).astype(np.float32))


@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_chunks_change_neither_values_nor_gradients(arrays, num_chunks):
    hidden, head, targets = (jnp.asarray(x) for x in arrays)
    weights = jnp.linspace(0, 1, B * T).reshape(B, T)

    def chunked(hidden, head):
        loss = chunked_cross_entropy(hidden, head, targets, num_chunks)
        return jnp.sum(weights * (loss.nll + 0.1 * loss.log_z**2)), loss

    def plain(hidden, head):
        loss = cross_entropy(hidden @ head, targets)
        return jnp.sum(weights * (loss.nll + 0.1 * loss.log_z**2)), loss

    (_, got), got_grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, head)
    (_, want), want_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    for a, b in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_must_divide_the_sequence(arrays):
    with pytest.raises(ValueError, match="3 does not divide the sequence length 8"):
        chunked_cross_entropy(*arrays, num_chunks=3)


MASK = jnp.ones((B, T)).at[0, 3].set(0)


def test_a_masked_target_has_no_gradient(arrays):
    hidden, head, targets = (jnp.asarray(x) for x in arrays)
    loss = lambda logits: aggregate(cross_entropy(logits, targets).nll, MASK).value()
    grad = jax.grad(loss)(hidden @ head)
    assert jnp.array_equal((grad == 0).all(axis=-1), MASK == 0), "zero there and nowhere else"


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_a_nan_under_the_mask_spares_the_loss_and_other_tokens_but_not_the_head(arrays, num_chunks):
    hidden, head, targets = (jnp.asarray(x) for x in arrays)

    def loss(hidden, head):
        return aggregate(chunked_cross_entropy(hidden, head, targets, num_chunks).nll, MASK).value()

    want, (want_hidden, _) = jax.value_and_grad(loss, (0, 1))(hidden, head)
    got, (got_hidden, got_head) = jax.value_and_grad(loss, (0, 1))(hidden.at[0, 3].set(jnp.nan), head)
    assert got == want
    np.testing.assert_array_equal(got_hidden, want_hidden.at[0, 3].set(jnp.nan))
    # The mask zeroes the gradient of the loss, and zero times NaN is NaN: hidden states must be finite everywhere.
    assert jnp.isnan(got_head).all()
