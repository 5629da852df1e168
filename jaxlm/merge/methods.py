"""The merging methods by name: their functions, what they need and the settings they read."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax

from jaxlm.merge import consensus, interpolate, vectors

MethodName = Literal[
    "linear", "task_arithmetic", "model_stock", "ties", "dare_linear", "dare_ties", "della", "della_linear",
    "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ram_plus", "slerp", "nuslerp", "multislerp", "karcher",
    "nearswap"]


class Method(NamedTuple):
    """One entry of `METHODS`."""

    function: Callable[..., jax.Array]
    settings: Mapping[str, float | int | bool | str]    # keyword and default
    base: Literal["required", "optional", "none"] = "required"
    models: tuple[int, int | None] = (1, None)          # fewest and most, the base not counted
    weighted: bool = True                               # False: weights have no effect
    random: bool = False                                # takes `key`
    ordered: bool = False                               # the order of coordinates as stored decides: masks, equal ones
    elects: bool = False                                # `normalize` divides by the weights that agree, not by all


SUM = {"scale": 1.0, "normalize": False}
MEAN = {"scale": 1.0, "normalize": True}
DARE = {"density": 1.0, "rescale": "inverse"}
DELLA = {**DARE, "epsilon": 0.15}
CRUMBS = {"density": 1.0, "gamma": 0.01}

METHODS: dict[str, Method] = {
    "linear": Method(vectors.linear, {"normalize": True}, base="none"),
    "task_arithmetic": Method(vectors.task_arithmetic, SUM),
    "model_stock": Method(vectors.model_stock, {"row_wise": False}, models=(2, None), weighted=False),
    "ties": Method(consensus.ties, {"density": 1.0, **MEAN}, ordered=True, elects=True),
    "dare_linear": Method(consensus.dare_linear, {**DARE, **SUM}, random=True, ordered=True),
    "dare_ties": Method(consensus.dare_ties, {**DARE, **SUM}, random=True, ordered=True, elects=True),
    "della": Method(consensus.della, {**DELLA, **MEAN}, random=True, ordered=True, elects=True),
    "della_linear": Method(consensus.della_linear, {**DELLA, **SUM}, random=True, ordered=True),
    "breadcrumbs": Method(consensus.breadcrumbs, {**CRUMBS, **SUM}, ordered=True),
    "breadcrumbs_ties": Method(consensus.breadcrumbs_ties, {**CRUMBS, **SUM}, ordered=True, elects=True),
    "sce": Method(consensus.sce, {"density": 1.0}, weighted=False, ordered=True),
    "ram": Method(consensus.ram, {"threshold": 1e-5}, weighted=False),
    "ram_plus": Method(consensus.ram_plus, {"threshold": 1e-5, "bonus": 0.1, "bonus_limit": 0.2}, weighted=False),
    "slerp": Method(interpolate.slerp, {"t": 0.5}, base="none", models=(2, 2), weighted=False),
    "nuslerp": Method(interpolate.nuslerp, {"row_wise": False}, base="optional", models=(2, 2)),
    "multislerp": Method(interpolate.multislerp, {}, base="optional"),
    "karcher": Method(interpolate.karcher, {"iterations": 10}, base="optional"),
    "nearswap": Method(interpolate.nearswap, {"t": 1e-3}, base="none", models=(2, 2), weighted=False),
}
