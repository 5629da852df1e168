"""What a reward sees of finished rollouts: arrays, made on the host and read by jitted terms."""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import power_of_two
from jaxlm.core.masked import Mean

log = logging.getLogger(__name__)

NO_CALL = -1       # in `tool_ids`: a slot without a call
UNKNOWN_TOOL = -2  # in `tool_ids`: a call of a name that is not in the row's list of tools
NO_HASH = -1       # in hashes: nothing stands there; hashes are not negative

Call = tuple[str, Mapping[str, Any]]  # the name of a tool and its arguments


class Trajectory(NamedTuple):
    """B finished rollouts. A field that is None is absent, and a reward that needs it is refused.

    Worked example, a row with tools ("add", "sqrt") and C=4, A=2. The policy called add(a=1, b=2), got 3 (r), called
    cube(x=3), which does not exist, got an error (r), wrote a call that was no JSON, got an error (r), and answered:

        tokens     q q c c r c c r c r a e      num_turns       4
        sampled    0 0 1 1 0 1 1 0 1 0 1 1      num_calls       3
        tool_ids   0 -2 -1 -1                   num_unparsable  1
        call_keys  h(add..) h(cube..) -1 -1     num_failed      0
        params     [h(a) h(b)] [h(x) -1] [-1 -1] [-1 -1]
        values     [h(1) h(2)] [h(3) -1] [-1 -1] [-1 -1]

    Only what the policy sampled may be parsed into these fields: a prompt often shows a call or an empty box.
    """

    tokens: jax.Array                           # [B, T] int32, prompt and response
    sampled: jax.Array                          # [B, T], 1 where the policy wrote the token
    group: jax.Array                            # [B] int32, number of the prompt

    tool_ids: jax.Array | None = None           # [B, C] int32, called tools in order; `encode_calls`
    call_keys: jax.Array | None = None          # [B, C] int32, hash of name and arguments
    params: jax.Array | None = None             # [B, C, A] int32, hashes of the names of the arguments
    values: jax.Array | None = None             # [B, C, A] int32, hashes of their values
    teacher_tool_ids: jax.Array | None = None   # [B, C'], the same of the reference; C' and A' may differ
    teacher_call_keys: jax.Array | None = None  # [B, C']
    teacher_params: jax.Array | None = None     # [B, C', A']
    teacher_values: jax.Array | None = None     # [B, C', A']

    num_turns: jax.Array | None = None          # [B] int32, turns of the policy
    num_calls: jax.Array | None = None          # [B] int32, calls tried, with those that follow
    num_unparsable: jax.Array | None = None     # [B] int32, calls whose text did not parse
    num_failed: jax.Array | None = None         # [B] int32, calls of a known tool that raised

    ended: jax.Array | None = None              # [B] bool, by the end of text, not by a budget
    answered: jax.Array | None = None           # [B] bool, a final answer could be extracted
    well_formed: jax.Array | None = None        # [B] bool, tags as they should be
    correct: jax.Array | None = None            # [B] float32 in [0, 1], by a judge on the host; NaN: not judged
    max_length: jax.Array | None = None         # [B] or scalar, the budget of sampled tokens


class Calls(NamedTuple):
    """Calls of B rows as numpy arrays; the first four are fields of `Trajectory`."""

    tool_ids: np.ndarray   # [B, C] int32
    call_keys: np.ndarray  # [B, C] int32
    params: np.ndarray     # [B, C, A] int32
    values: np.ndarray     # [B, C, A] int32
    num_cut: np.ndarray    # [B] int32, calls and parameters that found no place


def present(trajectory: Trajectory) -> frozenset[str]:
    """Names of the fields that a trajectory has."""
    return frozenset(name for name, value in trajectory._asdict().items() if value is not None)


def lengths(trajectory: Trajectory) -> jax.Array:
    """Tokens that the policy wrote, [B] float32."""
    return jnp.sum(trajectory.sampled != 0, axis=1).astype(jnp.float32)


def summary(trajectory: Trajectory) -> dict[str, Mean]:
    """What a log shows of rollouts besides rewards, of the fields that are there; per row, and per call where named so.

    `invalid_calls` is the share of calls of unknown tools or that did not parse, `failed_calls` of those that raised.
    """
    t, one = trajectory, jnp.ones(len(trajectory.group), jnp.float32)
    mean = lambda values, weight: Mean(jnp.sum(values).astype(jnp.float32), jnp.sum(weight).astype(jnp.float32))
    found = {"length": mean(lengths(t), one)}
    for name, values in (("turns", t.num_turns), ("calls", t.num_calls), ("ended", t.ended), ("answered", t.answered),
                         ("well_formed", t.well_formed)):
        if values is not None:
            found[name] = mean(values, one)
    if t.num_calls is not None and t.num_failed is not None:
        found["failed_calls"] = mean(t.num_failed, t.num_calls)
    if t.num_calls is not None and t.num_unparsable is not None and t.tool_ids is not None:
        unknown = jnp.sum(t.tool_ids == UNKNOWN_TOOL, axis=1)
        found["invalid_calls"] = mean(unknown + t.num_unparsable, t.num_calls)
    return found


def encode_calls(
    rows: Sequence[Sequence[Call]], tool_names: Sequence[Sequence[str]], *,
    max_calls: int | None = None, max_params: int | None = None,
) -> Calls:
    """Calls as arrays, so that comparing them is comparing integers. On the host.

    With tools ("add", "sqrt"), `[("sqrt", {"x": 4.0}), ("cube", {"x": 2})]` gives tool_ids [1, -2], and `{"x": 4}`
    the same hashes as `{"x": 4.0}`: numbers are equal by value, but true is not 1, and the order of arguments does
    not count. A hash is 31 bits of a CRC-32 of the canonical JSON, equal on every machine; two that differ in text
    meet with probability 2**-31, so that one of a million comparisons is wrong with probability 0.0005.

    Args:
      rows: per row its calls, in order.
      tool_names: per row its list of tools. The reference's tools must be among them.
      max_calls: C. None: the smallest power of two that holds every row, so that few shapes are compiled and nothing
        is lost, which is right for references. For what a policy wrote give a bound: a longer row gets UNKNOWN_TOOL
        in every slot, so that it is not valid and matches nothing; `num_cut` and a warning say so.
      max_params: A, alike. A call with more keeps the first A; its key is that of the whole call.

    Raises:
      ValueError: names that are no list or stand there twice, arguments that JSON does not have, a bound below 1.
    """
    for name, bound in (("max_calls", max_calls), ("max_params", max_params)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} must be at least 1, got {bound}")
    if len(rows) != len(tool_names):
        raise ValueError(f"there are {len(rows)} rows of calls, but lists of tools for {len(tool_names)}")
    num_calls = max_calls or power_of_two(max((len(row) for row in rows), default=0))
    num_params = max_params or power_of_two(max((len(call[1]) for row in rows for call in row), default=0))
    shape = (len(rows), num_calls)
    empty = lambda *shape: np.full(shape, NO_HASH, np.int32)
    calls = Calls(empty(*shape), empty(*shape), empty(*shape, num_params), empty(*shape, num_params),
                  np.zeros(len(rows), np.int32))
    for b, (row, names) in enumerate(zip(rows, tool_names, strict=True)):
        index = {name: i for i, name in enumerate(names)}
        if isinstance(names, str) or len(index) < len(names):
            raise ValueError(f"row {b}: the tools must be a list that names each once, got {names!r:.80}")
        if len(row) > num_calls:
            calls.tool_ids[b] = UNKNOWN_TOOL
            calls.num_cut[b] = len(row) - num_calls
            continue
        for c, (name, arguments) in enumerate(row):
            calls.tool_ids[b, c] = index.get(name, UNKNOWN_TOOL)
            calls.call_keys[b, c] = _hash([name, arguments], b)
            for a, (param, value) in enumerate(islice(arguments.items(), num_params)):
                calls.params[b, c, a], calls.values[b, c, a] = _hash(param, b), _hash(value, b)
            calls.num_cut[b] += max(len(arguments) - num_params, 0)
    if cut := np.count_nonzero(calls.num_cut):
        log.warning("%d of %d rows have more calls than %d or calls with more parameters than %d; %d did not fit",
                    cut, len(rows), num_calls, num_params, calls.num_cut.sum())
    return calls


def _hash(value: Any, row: int) -> int:
    try:
        text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"))
    except RecursionError:
        text = "nested too deeply"  # no JSON, hence equal to nothing that a reference holds
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {row}: a call holds what JSON does not have: {error}") from None
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def _canonical(value: Any) -> Any:
    """The same value with 4.0 as 4."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _canonical(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(one) for one in value]
    return value
