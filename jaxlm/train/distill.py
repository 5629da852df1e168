"""White-box distillation from a frozen teacher: the loss, its step, and how far teacher and student agree.

The teacher runs inside the student's step, micro-batch by micro-batch and without a backward pass. Its parameters are
an argument of the compiled step: no constants of the program, no part of the state. So checkpoints hold the student
alone, no moments are kept of the teacher, and its buffers are read where they lie. A pass of its own before the step
would hold the hidden states of the whole batch, and the loss would still need the teacher's head.

Models are compared on the tokens of their tokenizer; rows of a vocabulary beyond these belong to no token and never
count.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.core.batch import LMBatch
from jaxlm.core.masked import Mean, aggregate
from jaxlm.core.matmul import matmul
from jaxlm.core.mesh import Rules, place_leaf, put_whole
from jaxlm.model.decoder import Model
from jaxlm.objective.chunks import map_chunks
from jaxlm.objective.distill import DistillConfig, chunked_divergence, divergence
from jaxlm.objective.distill_topk import chunked_top_k, chunked_topk_divergence
from jaxlm.objective.lm import chunked_cross_entropy, cross_entropy
from jaxlm.train.pretrained import Pretrained, load_weights
from jaxlm.train.state import TrainState
from jaxlm.train.step import Loss, Metrics, make_step

TEACHER = "teacher"  # its place beside the student's parameters, within a step only

# state, parameters of the teacher, batch -> state, metrics; the state is donated
DistillStep = Callable[[TrainState, Any, LMBatch], tuple[TrainState, Metrics]]


class Pair(NamedTuple):
    """Two models that read the same tokens; static under jit."""

    student: Model
    teacher: Model
    num_tokens: int      # ids from here on belong to no token
    num_chunks: int = 1  # parts of a row whose logits exist at once


class Agreement(NamedTuple):
    """How near a student is to its teacher, over the targets of a batch."""

    kl: Mean    # KL(T, S) at temperature 1, nats
    same: Mean  # 1 where both find the same token most probable


def hidden_and_head(model: Model, params: Any, batch: LMBatch, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, T, D] and the head [D, num_tokens]."""
    hidden = model.apply(params, batch.tokens, positions=batch.positions, segments=batch.segments, logits=False).hidden
    return hidden, model.head(params)[:, :num_tokens]


def make_distill_loss(pair: Pair, config: DistillConfig, *, top_k: int = 0, hard_weight: float = 0.0) -> Loss:
    """sum_t (1 - w) D(T_t, S_t) - w log S_t(target_t) over the targets of a batch, w the hard weight.

    The parameters are the student's, and the teacher's under `TEACHER`.

    Args:
      top_k: compare the teacher's K most probable tokens and the rest as one class; 0: all tokens.
      hard_weight: share of the next-token loss, at temperature 1 whatever that of the divergence is.
    """
    check_loss(pair.num_tokens, top_k=top_k, hard_weight=hard_weight)

    def loss(params: Any, batch: LMBatch, key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        read = partial(hidden_and_head, batch=batch, num_tokens=pair.num_tokens)
        teacher = read(pair.teacher, params[TEACHER])
        student = read(pair.student, student_part(params))
        if top_k:
            known = chunked_top_k(*teacher, top_k, config, pair.num_chunks)
            values = chunked_topk_divergence(known, *student, config, pair.num_chunks)
        else:
            values = chunked_divergence(*teacher, *student, config, pair.num_chunks)
        soft = aggregate(values, batch.loss_mask)
        if not hard_weight:
            return soft.total, {"loss": soft}
        hard = aggregate(chunked_cross_entropy(*student, batch.targets, pair.num_chunks).nll, batch.loss_mask)
        total = (1 - hard_weight) * soft.total + hard_weight * hard.total
        return total, {"loss": Mean(total, soft.weight), "divergence": soft, "nll": hard}

    return loss


def check_loss(num_tokens: int, *, top_k: int, hard_weight: float) -> None:
    """ValueError for a loss that cannot be, or that is another recipe's."""
    if not 0 <= top_k < num_tokens:
        raise ValueError(f"top_k {top_k} must be from 1 to {num_tokens - 1}, below the {num_tokens} tokens of the "
                         "tokenizer; 0 compares all of them")
    if not 0 <= hard_weight < 1:
        raise ValueError(f"hard_weight must be at least 0 and below 1, where no teacher is needed; got {hard_weight}")


def student_part(params: Any) -> Any:
    """The parameters without the teacher's."""
    return {name: part for name, part in params.items() if name != TEACHER}


def make_distill_step(
    loss: Loss, tx: optax.GradientTransformation, schedule: optax.Schedule, *, mesh: Mesh, rules: Rules,
    accumulate: int = 1, seed: int = 0,
) -> DistillStep:
    """`train.step.make_step` for a loss that also reads a teacher; the state is the student's alone."""
    inner = make_step(loss, tx, schedule, mesh=mesh, rules=rules, accumulate=accumulate, seed=seed,
                      trainable=lambda path: not path.startswith(f"{TEACHER}/"))

    def step(state: TrainState, teacher: Any, batch: LMBatch) -> tuple[TrainState, Metrics]:
        state, metrics = inner(state._replace(params={**state.params, TEACHER: teacher}), batch)
        return state._replace(params=student_part(state.params)), metrics

    return jax.jit(step, donate_argnums=0)


def with_teacher(step: DistillStep, teacher: Any) -> Callable[[TrainState, LMBatch], tuple[TrainState, Metrics]]:
    """The step of a run, with its teacher."""
    return lambda state, batch: step(state, teacher, batch)


def student_nll(pair: Pair) -> Callable[[Any, LMBatch], Mean]:
    """Jitted `params of the student, batch -> next-token nats over the targets`, among the tokenizer's tokens."""
    def nll(params: Any, batch: LMBatch) -> Mean:
        student = hidden_and_head(pair.student, params, batch, pair.num_tokens)
        return aggregate(chunked_cross_entropy(*student, batch.targets, pair.num_chunks).nll, batch.loss_mask)

    return jax.jit(nll)


def make_agreement(pair: Pair) -> Callable[[Any, Any, LMBatch], Agreement]:
    """Jitted `params of the student, of the teacher, batch -> Agreement`, the same measure whatever is minimised."""
    def one(teacher: jax.Array, student: jax.Array, teacher_head: jax.Array, student_head: jax.Array) -> Any:
        expected, found = matmul(teacher, teacher_head, jnp.float32), matmul(student, student_head, jnp.float32)
        same = cross_entropy(found, jnp.argmax(expected, axis=-1)).correct
        return divergence(expected, found, DistillConfig()), same

    def agreement(params: Any, teacher_params: Any, batch: LMBatch) -> Agreement:
        teacher, teacher_head = hidden_and_head(pair.teacher, teacher_params, batch, pair.num_tokens)
        student, student_head = hidden_and_head(pair.student, params, batch, pair.num_tokens)
        values = map_chunks(one, (teacher, student), (teacher_head, student_head), pair.num_chunks)
        return Agreement(*(aggregate(value, batch.loss_mask) for value in values))

    return jax.jit(agreement)


def make_agreement_evaluation(
    pair: Pair, teacher: Any, batches: Mapping[str, Sequence[LMBatch]], mesh: Mesh
) -> Callable[[Any, int], tuple[dict[str, float], str]]:
    """`params, step -> ({"eval/kl_NAME": nats a target, "eval/agreement_NAME": share}, a line)` on host batches."""
    measure = make_agreement(pair)

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        values = {}
        for name, part in batches.items():
            found = jax.device_get([measure(params, teacher, put_whole(batch, mesh)) for batch in part])
            for label, means in zip(("kl", "agreement"), zip(*found, strict=True), strict=True):
                values[f"eval/{label}_{name}"] = float(sum(one.total for one in means) / sum(
                    one.weight for one in means))
        numbers = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items())
        return values, f"  with the teacher: {numbers}"

    return evaluate


def check_same_tokenizer(teacher: Pretrained, student: Pretrained, names: tuple[str, str]) -> None:
    """ValueError unless both models, called `names`, read text as the same ids."""
    found = [one.tokenizer and one.tokenizer.fingerprint() for one in (teacher, student)]
    for name, fingerprint in zip(names, found, strict=True):
        if fingerprint is None:
            raise ValueError(f"{name} has no tokenizer, so it is not known which tokens its numbers are about")
    if found[0] != found[1]:
        raise ValueError(f"{names[1]} has another tokenizer than {names[0]} (fingerprints {found[1]:.12} and "
                         f"{found[0]:.12}): distributions over different tokens cannot be compared; use models of one "
                         "tokenizer")


def load_teacher(source: Path, opened: Pretrained, *, dtype: str, mesh: Mesh, rules: Rules) -> tuple[Any, str]:
    """The weights on the mesh in the type of the activations, and a checksum of them as they are in `source`."""
    checksums = {}

    def put(path: str, leaf: Any) -> jax.Array:
        leaf = np.ascontiguousarray(leaf)
        checksums[path] = zlib.crc32(leaf.reshape(-1).view(np.uint8))
        # What products would cast anyway; nothing is ever added to these weights.
        return place_leaf(path, leaf.astype(dtype), mesh=mesh, rules=rules)

    params = load_weights(source, opened, put=put).params
    return params, f"{zlib.crc32(repr(sorted(checksums.items())).encode()):08x}"
