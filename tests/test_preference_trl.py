"""Preference objectives against the loss code of TRL's own trainers: value and gradient by every log-probability.

The code reads per-token log-probabilities from what a model returns, so a model that returns given ones is enough.
Where TRL means something else by design: its likelihood terms are means over the tokens of a batch, so RPO, and ORPO's
first term, are compared with numpy only (`test_preference`); its cDPO is gone.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objective.preference import PreferenceConfig, Rows, kto_anchor, preference_loss
from tests.reference import torch

pytest.importorskip("trl", reason="the objectives are compared with TRL: pip install jaxlm[parity]")
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

RNG = np.random.default_rng(1)
B, T = 4, 7
START, END = RNG.integers(1, 3, 2 * B), RNG.integers(4, T + 1, 2 * B)  # of the completions, [2 B]
MASK = (np.arange(T) >= START[:, None]) & (np.arange(T) < END[:, None])
TOKENS = RNG.uniform(-2.0, -0.05, (2 * B, T)) * MASK  # chosen, then rejected
REF = (TOKENS + RNG.normal(0, 1, (2 * B, T))).clip(max=0) * MASK
LENGTH = MASK.sum(1).astype(np.float32)
LABEL = [True, False, True, True]
RTOL = 1e-5


def pairs(x):
    """[2 B] as [B, 2]."""
    return jnp.asarray(x.reshape(2, B).T, jnp.float32)


def ours(method, tokens=TOKENS, ref=REF, **settings):
    """The mean loss of pairs and its gradient by every token, [2 B, T]."""
    reference = None if method in ("orpo", "simpo") else pairs(ref.sum(1))

    def mean(tokens):
        logp = jnp.sum(tokens, 1).reshape(2, B).T
        return jnp.mean(preference_loss(Rows(logp, pairs(LENGTH), reference), PreferenceConfig(
            method=method, **settings)).loss)

    return jax.value_and_grad(mean)(jnp.asarray(tokens, jnp.float32))


def stand_in(**settings):
    """What the loss code reads of a trainer."""
    same = lambda x: x
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(
            device="cpu", gather=same, gather_for_metrics=same, unwrap_model=same),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False), use_weighting=False,
        ld_alpha=None, f_divergence_type="reverse_kl", precompute_ref_logps=True, ref_model=None, **settings)


def model_of(tokens):
    """`inputs -> outputs` with these log-probabilities."""
    zeros = torch.zeros_like(tokens.detach())
    return lambda **_: SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
                                       loss=None, logits=None)


@pytest.mark.parametrize(("method", "theirs", "settings"), [
    ("dpo", "sigmoid", {}), ("robust", "robust", {"label_smoothing": 0.2}), ("hinge", "hinge", {}), ("ipo", "ipo", {})])
def test_pairs_with_a_reference(method, theirs, settings):
    tokens = torch.tensor(TOKENS, dtype=torch.float32, requires_grad=True)
    mask = torch.tensor(np.pad(MASK, ((0, 0), (1, 0))).astype(int))  # theirs has the first token, which has no target
    ref = torch.tensor(REF.sum(1), dtype=torch.float32)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": ref[:B],
              "ref_rejected_logps": ref[B:]}
    trainer = stand_in(loss_types=[theirs], loss_weights=[1.0], beta=0.3, **({"label_smoothing": 0.0} | settings))
    loss = DPOTrainer._compute_loss(trainer, model_of(tokens), inputs, False)
    loss.backward()
    value, gradient = ours(method, beta=0.3, **settings)
    np.testing.assert_allclose(value, loss.item(), rtol=RTOL)
    expected = tokens.grad.numpy()
    np.testing.assert_allclose(np.where(MASK, gradient, 0), np.where(MASK, expected, 0), rtol=RTOL, atol=1e-7)
    assert np.abs(expected[MASK]).max() > 1e-3


def test_kto():
    """Also its reference point, from completions of other prompts."""
    tokens = torch.tensor(TOKENS[:B], dtype=torch.float32, requires_grad=True)
    other, other_ref = (x[B:].sum(1) + 2 * sign for x, sign in ((TOKENS, 1), (REF, -1)))
    as_float = lambda x: torch.tensor(x, dtype=torch.float32)
    mask = torch.tensor(np.pad(MASK[:B], ((0, 0), (1, 0))).astype(int))
    trainer = stand_in(loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6, calculate_KL=True,
                       _compute_kl_logps=lambda model, batch: as_float(other))
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": torch.tensor(LABEL),
              "ref_logps": as_float(REF[:B].sum(1)), "ref_KL_logps": as_float(other_ref)}
    loss = KTOTrainer._compute_loss(trainer, model_of(tokens), inputs, False)
    loss.backward()
    config = PreferenceConfig(method="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    anchor = kto_anchor(jnp.asarray(other), jnp.asarray(other_ref), jnp.ones(B))

    def mean(tokens):
        column = lambda x: jnp.asarray(x, jnp.float32)[:, None]
        rows = Rows(jnp.sum(tokens, 1)[:, None], column(LENGTH[:B]), column(REF[:B].sum(1)), jnp.asarray(
            LABEL, jnp.float32), jnp.full(B, anchor))
        return jnp.mean(preference_loss(rows, config).loss)

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(TOKENS[:B], jnp.float32))
    assert anchor > 1
    np.testing.assert_allclose(trainer._metrics["train"]["kl"][0], anchor, rtol=RTOL)
    np.testing.assert_allclose(value, loss.item(), rtol=RTOL)
    np.testing.assert_allclose(gradient, tokens.grad, rtol=RTOL, atol=1e-7)


def test_without_a_reference():
    """SimPO whole; of ORPO the odds ratio, ours without its likelihood term."""
    mean = torch.tensor((TOKENS.sum(1) / LENGTH).reshape(2, B), dtype=torch.float32)
    device = {"accelerator": SimpleNamespace(device="cpu")}
    losses = CPOTrainer.cpo_loss(SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.0, **device), *mean)[0]
    np.testing.assert_allclose(ours("simpo", beta=2.5, gamma=0.8)[0], losses.mean(), rtol=RTOL)
    ratio = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.2, **device), *mean)[0]
    np.testing.assert_allclose(ours("orpo", beta=0.2)[0], -mean[0].mean() - ratio.mean(), rtol=RTOL)
