"""What to merge how: a configuration, and the numbers it gives one tensor."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.core.config import nearest
from jaxlm.merge.methods import METHODS, MethodName
from jaxlm.merge.sparsify import Rescale

NumberName = Literal["scale", "density", "epsilon", "gamma", "t", "threshold", "bonus", "bonus_limit"]
NUMBERS = NumberName.__args__            # may differ from tensor to tensor
SWITCHES = ("normalize", "rescale", "row_wise", "iterations")  # one for all tensors, known when compiling
LAYER = re.compile(r"(?:^|[./])(?:layers?|blocks?|h)[./](\d+)(?=[./]|$)")
FIRST = re.compile(r"emb|wte|wpe")       # tensors outside layers that come before them; all others come after


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Another value of one setting for some tensors: `Rule(setting="density", pattern="mlp", values=(0.2, 0.8))`.

    Two values or more are points of a line over the depth of the network, evenly spaced: with (0, 1, 1) and nine layers
    the layers 0, 2, 4 and 8 get 0, 0.5, 1 and 1. Outside layers: embeddings get the first value, others the last.
    """

    setting: Literal["weights", NumberName]
    values: tuple[float, ...]
    pattern: str = ""           # searched in the tensor's name, as a regular expression; "" fits every tensor
    model: int | None = None    # weights only: which model's; None: every model's

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"a merge rule of {self.setting} has no values")
        if self.model is not None and self.setting != "weights":
            raise ValueError(f"model {self.model} has no effect in a merge rule of {self.setting}: only weights differ "
                             "by model")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} of a merge rule is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A method, its weights and its settings. None: the method's default (`METHODS`), or a setting it does not read."""

    method: MethodName = "linear"
    weights: tuple[float, ...] = ()   # one a model; (): 1 / N each
    scale: float | None = None        # lambda: of the merged task vector
    density: float | None = None      # share of coordinates that stay, in (0, 1]
    epsilon: float | None = None      # della: keep probabilities are density +- epsilon
    gamma: float | None = None        # breadcrumbs: share of largest coordinates that are dropped
    t: float | None = None            # slerp: share of the second model; nearswap: the largest step
    threshold: float | None = None    # ram: smaller differences are no change
    bonus: float | None = None        # ram_plus: r
    bonus_limit: float | None = None  # ram_plus: alpha
    rescale: Rescale | None = None    # dare, della
    normalize: bool | None = None     # divide by the sum of weights
    row_wise: bool | None = None      # one angle a row instead of one a tensor
    iterations: int | None = None     # karcher
    seed: int | None = None           # of random masks; None: 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the result; None: that of the first model
    rules: tuple[Rule, ...] = ()      # the first that fits a tensor (and model) wins over the fields above

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"merge.method '{self.method}' is unknown{nearest(self.method, METHODS)}; methods: "
                             f"{', '.join(METHODS)}")
        method = METHODS[self.method]
        given = [name for name in (*NUMBERS, *SWITCHES) if getattr(self, name) is not None]
        for name in [*given, *(rule.setting for rule in self.rules)]:
            if name not in method.settings and not (name == "weights" and method.weighted):
                raise ValueError(f"merge.{name} has no effect with method {self.method}, whose settings are: "
                                 f"{', '.join([*(['weights'] if method.weighted else []), *method.settings])}")
        if self.weights and not method.weighted:
            raise ValueError(f"merge.weights has no effect with method {self.method}")
        if self.seed is not None and not method.random:
            raise ValueError(f"merge.seed has no effect with method {self.method}, which draws no numbers")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"merge.iterations must be positive, got {self.iterations}")
        for weight in self.weights:
            check_number("weights", weight, "merge.weights")
        for name in NUMBERS:
            check_number(name, getattr(self, name), f"merge.{name}")
        for rule in self.rules:
            for value in rule.values:
                check_number(rule.setting, value, f"a merge rule of {rule.setting}")
        if {"density", "epsilon"} <= set(method.settings) and not self.rules:
            check_spread(self.setting("density"), self.setting("epsilon"), "merge")

    def setting(self, name: str) -> Any:
        """The value of a setting, or the method's default."""
        value = getattr(self, name)
        return METHODS[self.method].settings[name] if value is None else value


class Values(NamedTuple):
    """The numbers of one tensor."""

    weights: np.ndarray          # [N] float32
    numbers: dict[str, float]


def check_number(name: str, value: float | None, where: str) -> None:
    """ValueError for a number outside its range."""
    if value is None:
        return
    if not np.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if name == "density" and not 0 < value <= 1:
        raise ValueError(f"{where} is the share of coordinates that stay and must be in (0, 1], got {value}")
    if name == "gamma" and not 0 <= value < 1:
        raise ValueError(f"{where} is a share of coordinates and must be in [0, 1), got {value}")
    if name in ("epsilon", "threshold", "bonus", "bonus_limit") and value < 0:
        raise ValueError(f"{where} must not be negative, got {value}")


def check_spread(density: float, epsilon: float, where: str) -> None:
    """ValueError unless della's probabilities density +- epsilon lie in (0, 1); density 1 keeps all."""
    if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(f"{where}: density {density:g} +- epsilon {epsilon:g} are probabilities and must lie between "
                         "0 and 1; lower epsilon")


def check_models(config: MergeConfig, num_models: int, has_base: bool) -> None:
    """ValueError when a method cannot merge so many models, with or without a base."""
    method = METHODS[config.method]
    fewest, most = method.models
    if num_models < fewest or (most is not None and num_models > most):
        wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        raise ValueError(f"method {config.method} merges {wanted} models (the base not counted), got {num_models}")
    if method.base == "required" and not has_base:
        raise ValueError(f"method {config.method} works on differences to a base model, and none is given")
    if method.base == "none" and has_base:
        raise ValueError(f"method {config.method} uses no base model, but one is given; list it as a model to merge it")
    if config.weights and len(config.weights) != num_models:
        raise ValueError(f"merge.weights are {len(config.weights)} numbers for {num_models} models")
    for rule in config.rules:
        if rule.model is not None and not 0 <= rule.model < num_models:
            raise ValueError(f"a merge rule of weights names model {rule.model}; the {num_models} models are counted "
                             "from 0")


def depths(names: Iterable[str], rules: Iterable[Rule] = ()) -> dict[str, float]:
    """Where each tensor lies in the network, from 0 (first layer, embeddings) to 1 (last layer, what follows it).

    Layers are recognised by names such as `layers.3.`, `layer/3/`, `h.3.`, `block.3.`. ValueError for a rule with
    values over depth where no name has a layer, and for one whose pattern fits no name.
    """
    found = {name: LAYER.search(name) for name in names}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    last = max(layers.values(), default=0)
    for rule in rules:
        if not any(re.search(rule.pattern, name) for name in found):
            raise ValueError(f"the pattern {rule.pattern!r} of a merge rule of {rule.setting} fits no tensor")
        if len(rule.values) > 1 and not layers:
            raise ValueError(f"a merge rule of {rule.setting} has values over depth, but no tensor's name has a layer")
    return {name: (layers[name] / last if last else 0.0) if name in layers else float(not FIRST.search(name))
            for name in found}


def resolve(config: MergeConfig, name: str, depth: float, num_models: int) -> Values:
    """The weights and numbers of the tensor `name`. ValueError when the weights that are divided by sum to 0."""
    def value(setting: str, default: float, model: int | None = None) -> float:
        for rule in config.rules:
            if rule.setting == setting and rule.model in (None, model) and re.search(rule.pattern, name):
                return float(np.interp(depth, np.linspace(0, 1, len(rule.values)), rule.values))
        return default

    method = METHODS[config.method]
    numbers = {key: value(key, config.setting(key)) for key in NUMBERS if key in method.settings}
    if {"density", "epsilon"} <= set(numbers):
        check_spread(numbers["density"], numbers["epsilon"], f"tensor {name}")
    defaults = config.weights or (1 / num_models,) * num_models
    weights = np.array([value("weights", weight, i) for i, weight in enumerate(defaults)], np.float32)
    # Means on spheres divide by the sum as well; they have no `normalize`.
    divides = config.setting("normalize") if "normalize" in method.settings else method.weighted
    if divides and not method.elects and abs(weights.sum()) < 1e-6 * max(abs(weights).max(), 1e-30):
        raise ValueError(f"the weights of tensor {name} sum to 0, and method {config.method} divides by their sum")
    return Values(weights, numbers)


def switches(config: MergeConfig) -> tuple[tuple[str, Any], ...]:
    """The settings that a program is compiled for."""
    return tuple((name, config.setting(name)) for name in SWITCHES if name in METHODS[config.method].settings)
