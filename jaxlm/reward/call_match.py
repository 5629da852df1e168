"""Calls against accepted calls, as the Berkeley Function Calling Leaderboard has them.

Accepted calls are a list of `{name: {parameter: [accepted values]}}`; an empty string among the values means that the
parameter may be left out, and no values at all that it must be. `[{"area": {"radius": [10], "unit": ["cm", ""]}}]`
accepts area(radius=10) and area(radius=10.0, unit="CM"). An empty list accepts no call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Call = tuple[str, Mapping[str, Any]]

_DROPPED = re.compile(r"[ ,./\-_*^]")


def match_calls(calls: Sequence[Call], accepted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each call meets an accepted one of its own and none is left over, in any order.

    Texts are compared without case, spaces and the characters ,./-_*^ as BFCL does. Numbers are equal by value, so
    that 5.0 passes for an integer; true is no number. Lists match element by element; objects by key, each with its
    own list of accepted values.

    Raises:
      ValueError: `accepted` has another form.
    """
    wanted = [_named(one) for one in accepted]
    if len(calls) != len(wanted):
        return False
    fits = [[i for i, (name, parameters) in enumerate(wanted) if name == call[0] and _fits_object(call[1], parameters)]
            for call in calls]
    owner: dict[int, int] = {}

    def place(call: int, tried: set[int]) -> bool:
        """Gives the call a partner, moving others where they have a choice (Kuhn's augmenting path)."""
        for i in fits[call]:
            if i not in tried:
                tried.add(i)
                if i not in owner or place(owner[i], tried):
                    owner[i] = call
                    return True
        return False

    return all(place(call, set()) for call in range(len(calls)))


def read_calls(text: str) -> list[Call] | None:
    """The calls in JSON: an object with "name" and "arguments", or a list of such. None if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("arguments"), dict)
               for one in values):
        return None
    return [(one["name"], one["arguments"]) for one in values]


def _named(accepted: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(accepted, Mapping) and len(accepted) == 1:
        (name, parameters), = accepted.items()
        if isinstance(parameters, Mapping) and all(isinstance(values, list) for values in parameters.values()):
            return name, parameters
    raise ValueError(f"an accepted call must be {{name: {{parameter: [values]}}}}, got {accepted!r:.120}")


def _fits_object(value: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Every key accepted with its value, and only optional ones left out."""
    return all(key in accepted and any(_fits(one, choice) for choice in _choices(accepted[key]))
               for key, one in value.items()) and all(
        key in value or not choices or "" in _choices(choices) for key, choices in accepted.items())


def _choices(accepted: Any) -> Sequence[Any]:
    return accepted if isinstance(accepted, list) else [accepted]


def _fits(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, Mapping):
        return isinstance(value, Mapping) and _fits_object(value, accepted)
    if isinstance(accepted, list):
        return isinstance(value, list) and len(value) == len(accepted) and all(map(_fits, value, accepted))
    if isinstance(accepted, str):
        return isinstance(value, str) and _plain(value) == _plain(accepted)
    return isinstance(value, bool) == isinstance(accepted, bool) and value == accepted


def _plain(text: str) -> str:
    return _DROPPED.sub("", text).lower().replace("'", '"')
