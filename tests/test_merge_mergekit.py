"""The methods against mergekit on the same tensors (`pip install --no-deps mergekit`; skipped without it)."""

import numpy as np
import pytest

from jaxlm.merge.methods import METHODS
from jaxlm.merge.spec import MergeConfig
from jaxlm.merge.tensors import merge_tensor

torch = pytest.importorskip("torch")
mergekit = pytest.importorskip("mergekit.merge_methods")

WEIGHTS = (0.2, 0.5, 0.3)

# Ours with settings, theirs with parameters. Weights of both are added where the method has them.
CASES = [
    ("linear", {}, "linear", {}),
    ("linear", {"normalize": False}, "linear", {"normalize": False}),
    ("task_arithmetic", {"scale": 0.7}, "task_arithmetic", {"lambda": 0.7}),
    ("ties", {"density": 0.4}, "ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "normalize": False, "scale": 1.2}, "ties", {"density": 0.4, "normalize": False,
                                                                          "lambda": 1.2}),
    ("dare_linear", {}, "dare_linear", {"density": 1.0}),
    ("dare_ties", {}, "dare_ties", {"density": 1.0}),
    ("della", {}, "della", {"density": 1.0}),
    ("della_linear", {}, "della_linear", {"density": 1.0}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, "breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}, "breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}),
    ("model_stock", {}, "model_stock", {}),
    ("model_stock", {"row_wise": True}, "model_stock", {"filter_wise": True}),
    ("sce", {"density": 0.3}, "sce", {"select_topk": 0.3}),
    ("ram", {"threshold": 0.2}, "ram", {"epsilon": 0.2}),
    ("ram_plus", {"threshold": 0.2}, "ramplus_tl", {"epsilon": 0.2}),
    ("slerp", {"t": 0.3}, "slerp", {"t": 0.3}),
    ("nuslerp", {}, "nuslerp", {}),
    ("nuslerp", {"row_wise": True}, "nuslerp", {"nuslerp_flatten": False}),
    ("multislerp", {}, "multislerp", {}),
    ("karcher", {}, "karcher", {}),
    ("nearswap", {"t": 0.1}, "nearswap", {"t": 0.1}),
]


@pytest.mark.parametrize(("name", "settings", "theirs", "parameters"), CASES)
def test_equals_mergekit(name, settings, theirs, parameters):
    rng = np.random.default_rng(1)
    method = METHODS[name]
    num = method.models[1] or len(WEIGHTS)
    base = rng.standard_normal((11, 13)).astype(np.float32)
    # Shared drift, so that task vectors agree on the whole, as fine-tuned models do.
    drift = 0.3 * rng.standard_normal(base.shape)
    models = [(base + drift + 0.2 * rng.standard_normal(base.shape)).astype(np.float32) for _ in range(num)]
    has_base = method.base == "required"
    weights = WEIGHTS[:num] if method.weighted and name != "karcher" else ()  # mergekit's karcher has none
    ours = merge_tensor("w", base if has_base else None, models,
                        MergeConfig(method=name, weights=weights, **settings))
    group = [torch.from_numpy(x.copy()) for x in ([base, *models] if has_base else models)]
    if weights:
        parameters = {**parameters, "weight": list(weights)}
    # slerp and nearswap call their first model the base.
    origin = 0 if has_base or name in ("slerp", "nearswap") else None
    expected = mergekit.merge_tensors(group, theirs, parameters=parameters, base_index=origin)
    np.testing.assert_allclose(np.asarray(ours), expected.numpy(), rtol=2e-5, atol=2e-6)
