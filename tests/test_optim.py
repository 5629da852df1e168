"""AdamW against torch, the decay mask, and the schedules at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxlm.optim.optimizer import OptimConfig, decay_mask, make_optimizer
from jaxlm.optim.schedule import SCHEDULES, Kind, ScheduleConfig, make_schedule


def rates(config: ScheduleConfig, steps: int = 100) -> np.ndarray:
    schedule = make_schedule(config, 1.0, steps)
    return np.array([float(schedule(jnp.int32(i))) for i in range(steps + 20)])


def test_the_table_holds_every_kind():
    assert set(SCHEDULES) == set(Kind.__args__)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_kind_warms_up_and_stays_in_range(kind):
    options = {"wsd": {"decay": 0.3, "min_ratio": 0.2}, "constant": {}}.get(kind, {"min_ratio": 0.2})
    values = rates(ScheduleConfig(kind=kind, warmup=0.1, **options))
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert values.max() <= 1 + 1e-6
    assert values[-1] == pytest.approx(options.get("min_ratio", 1.0), rel=1e-5)
    assert values[10:].min() >= values[-1] - 1e-6


def test_wsd_is_constant_after_warmup_without_a_decay_phase():
    np.testing.assert_allclose(rates(ScheduleConfig(warmup=0.03))[3:], 1.0)


def test_wsd_decays_over_the_last_fraction():
    values = rates(ScheduleConfig(warmup=0.1, decay=0.2, min_ratio=0.1))
    np.testing.assert_allclose(values[10:81], 1.0, rtol=1e-6)
    assert values[81] < 1
    np.testing.assert_allclose(values[90], 0.55, rtol=1e-5)
    np.testing.assert_allclose(values[100:], 0.1, rtol=1e-5)


def test_cosine_half_way_and_linear_half_way():
    assert rates(ScheduleConfig(kind="cosine", warmup=0.0, min_ratio=0.1))[50] == pytest.approx(0.55, rel=1e-5)
    assert rates(ScheduleConfig(kind="linear", warmup=0.0))[50] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"warmup": 1.5}, {"warmup": 0.6, "decay": 0.6}, {"min_ratio": 2.0}, {"kind": "cosine", "decay": 0.1},
              {"min_ratio": 0.1}, {"kind": "constant", "min_ratio": 0.1}]
)
def test_wrong_schedules(wrong):
    with pytest.raises(ValueError, match="schedule"):
        ScheduleConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"beta2": 1.0}, {"clip_norm": -1.0}])
def test_wrong_optimizers(wrong):
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**wrong)


PARAMS = {
    "embed": {"embedding": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)},
    "layers": {
        "attention": {"query": {"kernel": np.ones((2, 3, 2), np.float32), "bias": np.ones((2, 2), np.float32)}},
        "mlp_norm": {"scale": np.ones((2, 3), np.float32)},
    },
    "head": {"kernel": np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)},
}
DECAYED = {"layers/attention/query/kernel", "head/kernel"}


def test_norms_embeddings_and_biases_do_not_decay_but_the_head_does():
    mask = decay_mask(PARAMS)
    assert mask["head"]["kernel"] and mask["layers"]["attention"]["query"]["kernel"]
    assert not mask["embed"]["embedding"]
    assert not mask["layers"]["attention"]["query"]["bias"]
    assert not mask["layers"]["mlp_norm"]["scale"]


@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_ten_updates_equal_torch_adamw_with_clipping(decay):
    config = OptimConfig(lr=0.05, weight_decay=0.1, decay=decay, clip_norm=0.7, schedule=ScheduleConfig(warmup=0.0))
    tx = make_optimizer(config, 10)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    mask = [decay == "all" or decays for decays in jax.tree.leaves(decay_mask(PARAMS))]
    peers = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(PARAMS)]
    groups = [
        {"params": [p for p, m in zip(peers, mask, strict=True) if m == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    rng = np.random.default_rng(0)
    for _ in range(10):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), PARAMS)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for peer, grad in zip(peers, jax.tree.leaves(grads), strict=True):
            peer.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(peers, 0.7)
        adamw.step()
    for peer, leaf in zip(peers, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, peer.detach().numpy(), rtol=2e-5, atol=2e-6)
