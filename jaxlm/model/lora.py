"""Low-rank adapters: small trained matrices beside frozen kernels, as leaves of the same parameter tree.

    LoRA    y = x W + s (x A) B                    (Hu et al. 2021, arXiv:2106.09685)
    DoRA    y = m / |W + s A B| * that             (Liu et al. 2024, arXiv:2402.09353), |.| over the inputs of a column

A kernel [L, *inputs, *outputs] gets `lora_a` [L, *inputs, R], `lora_b` [L, R, *outputs], the factor s as `lora_scale`
[L], and for DoRA the magnitude m as `magnitude` [L, *outputs]. `layers.Linear` uses what it finds beside its kernel.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from jaxlm.core.matmul import matmul
from jaxlm.core.tree import named_leaves, select

KERNELS = ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
NUM_INPUTS = {name: 2 if name == "attention/out" else 1 for name in KERNELS}  # axes of a kernel that are inputs
ADAPTER = re.compile(r"(^|/)(lora_a|lora_b|magnitude)$")
ADAPTER_PARTS = ("lora_a", "lora_b", "lora_scale", "magnitude")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels get adapters, and of what size."""

    rank: int = 0                            # R; 0: no adapters, the whole model is learnt
    alpha: float | None = None               # s = alpha / rank; None is 2 * rank
    kind: Literal["lora", "dora"] = "lora"
    targets: tuple[str, ...] = ("attention", "mlp")  # patterns in the names of kernels, such as attention/query
    rank_stabilized: bool = False            # s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.alpha is not None and not 0 < self.alpha < math.inf):
            raise ValueError("lora.rank must not be negative and lora.alpha a positive number, got "
                             f"{self.rank} and {self.alpha}")
        if not self.rank and any(getattr(self, one.name) != one.default for one in fields(self)):
            raise ValueError("lora settings have no effect without lora.rank")
        self.names()

    def names(self) -> tuple[str, ...]:
        """The kernels that the targets match; ValueError for one that matches none."""
        for pattern in self.targets:
            if not any(re.search(pattern, name) for name in KERNELS):
                raise ValueError(f"lora.targets {pattern!r} matches none of {', '.join(KERNELS)}")
        found = tuple(name for name in KERNELS if any(re.search(pattern, name) for pattern in self.targets))
        if not found:
            raise ValueError("lora.targets is empty")
        return found

    def scale(self) -> float:
        """s."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def init(key: jax.Array, params: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The parameters with adapters that change nothing yet: A uniform within 1/sqrt(inputs) (as torch and PEFT), B 0.

    Without a rank the parameters as they are. Base leaves are not copied.
    """
    if not config.rank:
        return params
    layers = {part: dict(modules) if part in ("attention", "mlp") else modules
              for part, modules in params["layers"].items()}
    present = [name for name in KERNELS if name.split("/")[1] in layers[name.split("/")[0]]]  # encoders have no gate
    for pattern in config.targets:
        if not any(re.search(pattern, name) for name in present):
            raise ValueError(f"lora.targets {pattern!r} matches no kernel of this model; it has {', '.join(present)}")
    for number, name in enumerate(config.names()):
        part, module = name.split("/")
        if name not in present:
            continue
        old, split = layers[part][module], 1 + NUM_INPUTS[name]
        kernel = old["kernel"]
        assert "lora_a" not in old, f"{name} has an adapter already"
        (depth, *inputs), outputs = kernel.shape[:split], kernel.shape[split:]
        bound = 1 / math.sqrt(math.prod(inputs))
        new = {"lora_a": jax.random.uniform(jax.random.fold_in(key, number), (depth, *inputs, config.rank), jnp.float32,
                                            -bound, bound),
               "lora_b": jnp.zeros((depth, config.rank, *outputs), jnp.float32),
               "lora_scale": jnp.full(depth, config.scale(), jnp.float32)}
        if config.kind == "dora":
            new["magnitude"] = jax.vmap(lambda kernel, new: column_norm(*_matrices(kernel, new)).reshape(
                new["lora_b"].shape[1:]))(kernel, new)
        layers[part] |= {module: {**old, **new}}
    return {**params, "layers": layers}


def is_adapter(path: str) -> bool:
    """Whether a parameter of this path is a trained part of an adapter."""
    return ADAPTER.search(path) is not None


def adapt(x: jax.Array, y: jax.Array, kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """The product `y = x @ kernel` with an adapter, in the type of y.

    Args:
      x: [..., I]; y: [..., O].
      kernel: one layer's, any shape of I * O elements; adapter: `ADAPTER_PARTS` of that layer.
    """
    w_IO, a_IR, b_RO, scale = _matrices(kernel, adapter)
    chex.assert_axis_dimension(x, -1, w_IO.shape[0])
    y = y.astype(jnp.float32) + scale * matmul(matmul(x, a_IR), b_RO, jnp.float32)
    if "magnitude" in adapter:
        # The norm takes no gradient, as the paper has it (section 4.3).
        norm_O = jax.lax.stop_gradient(column_norm(w_IO, a_IR, b_RO, scale))
        ratio_O = adapter["magnitude"].reshape(-1) / norm_O
        y = y * jnp.expand_dims(ratio_O, tuple(range(y.ndim - 1)))
    return y.astype(x.dtype)


def column_norm(w_IO: jax.Array, a_IR: jax.Array, b_RO: jax.Array, scale: jax.Array) -> jax.Array:
    """`|W + s A B|` over the inputs, [O] float32, without the matrix A B:

        |w|^2 + 2 s b . (A^T w) + s^2 b . (A^T A b)     for each column w of W and b of B
    """
    cross_RO = jnp.matmul(a_IR.T, w_IO, preferred_element_type=jnp.float32)
    inner_RO = jnp.matmul(jnp.matmul(a_IR.T, a_IR), b_RO)
    squared = jnp.sum(jnp.square(w_IO), 0) + jnp.sum(b_RO * (2 * scale * cross_RO + scale**2 * inner_RO), 0)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def merge(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the plain model: adapters multiplied out into the kernels; those without one stay as they are.

    With B = 0 every kernel of LoRA comes back exactly.
    """
    def module(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if "lora_a" not in node:
            return {name: module(child) for name, child in node.items()}
        adapter = {name: jnp.asarray(node[name]) for name in ADAPTER_PARTS if name in node}
        rest = {name: leaf for name, leaf in node.items() if name not in ADAPTER_PARTS}
        return rest | {"kernel": _multiply_out(jnp.asarray(node["kernel"]), adapter)}

    return module(params)


@jax.jit
@jax.vmap
def _multiply_out(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    w_IO, a_IR, b_RO, scale = _matrices(kernel, adapter)
    merged_IO = w_IO + scale * (a_IR @ b_RO)
    if "magnitude" in adapter:
        ratio_O = adapter["magnitude"].reshape(-1) / column_norm(w_IO, a_IR, b_RO, scale)
        merged_IO = merged_IO * ratio_O[None]
    return merged_IO.reshape(kernel.shape).astype(kernel.dtype)


def adapters(params: dict[str, Any]) -> dict[str, Any]:
    """The trained leaves alone."""
    return select(params, is_adapter)


def has_adapters(params: dict[str, Any]) -> bool:
    """Whether any kernel has one."""
    return any(map(is_adapter, named_leaves(params)))


def _matrices(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Kernel [I, O], A [I, R] and B [R, O] of one layer, and the scale."""
    rank = adapter["lora_a"].shape[-1]
    a_IR, b_RO = adapter["lora_a"].reshape(-1, rank), adapter["lora_b"].reshape(rank, -1)
    return kernel.reshape(a_IR.shape[0], b_RO.shape[1]), a_IR, b_RO, adapter["lora_scale"]
