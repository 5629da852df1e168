"""Frozen dataclasses as configuration: flags through tyro, named presets, an exact JSON round trip.

Nothing here starts a device, so a wrong flag or file fails at once.
"""

import dataclasses
import difflib
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxlm.core.files import replacing

T = TypeVar("T")


def parse(presets: Mapping[str, T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """The configuration that a command line asks for.

    `--preset NAME` (default: the first one) or `--config run/config.json` gives the starting values; every other
    flag replaces one field (`--optim.lr 1e-3`). Errors, with the nearest valid name, end the process with status 2
    and one message on standard error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        preset, argv = _take(argv, "--preset")
        path, argv = _take(argv, "--config")
        if preset and path:
            raise ValueError("--preset and --config both name the starting values; give one of them")
        name = preset or next(iter(presets))
        if name not in presets:
            raise ValueError(f"--preset {name} is unknown{nearest(name, presets)}; presets: {', '.join(presets)}")
        base = load_config(type(presets[name]), Path(path)) if path else presets[name]
    except ValueError as error:
        fail(error, prog)
    starts = f"{description}\n\nStarting values: --preset {{{','.join(presets)}}} (default {next(iter(presets))}), " \
             "or --config FILE with a run's config.json."
    return tyro.cli(type(base), default=base, args=argv, config=(tyro.conf.AvoidSubcommands,),
                     prog=f"python -m {prog}", description=starts)


def fail(error: Exception, prog: str) -> typing.NoReturn:
    """Ends the process as a command line tool does: one sentence on standard error, status 2.

    An error that another library raised is not ours to shorten and goes on with its traceback; those of the
    operating system are sentences already.
    """
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else __file__
    root = Path(__file__).parent.parent.parent
    ours = [root / package for package in ("jaxlm", "recipes", "tools")]
    if not isinstance(error, OSError) and not any(folder in Path(innermost).parents for folder in ours):
        raise error
    print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(2)


def nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """`" (did you mean 'X'?)"` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def from_json(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The inverse of `to_json`. Unknown, missing and mistyped fields raise ValueError naming field and place."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{f'field {where[:-1]!r}' if where else 'a configuration'} must be an object, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown field '{where}{name}'{nearest(name, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"field '{where}{name}' is missing")
    return cls(**{name: _decode(hints[name], value, f"{where}{name}") for name, value in values.items()})


def save_config(config: Any, path: Path) -> None:
    """Writes `to_json(config)`; the file appears whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(to_json(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_config(cls: type[T], path: Path) -> T:
    """Reads a file that `save_config` wrote. ValueError names the file and what is wrong with it."""
    try:
        return from_json(cls, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read configuration {path}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"configuration {path}: {error}") from None


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Fields in which two configurations of one class differ, as `name: a -> b` lines."""
    lines = []
    for field in dataclasses.fields(a):
        left, right, name = getattr(a, field.name), getattr(b, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            lines += differences(left, right, f"{name}.")
        elif left != right:
            lines.append(f"{name}: {left!r} -> {right!r}")
    return lines


def _take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Removes `flag VALUE` or `flag=VALUE` from a command line."""
    for i, argument in enumerate(argv):
        if argument == flag:
            if i + 1 == len(argv):
                raise ValueError(f"{flag} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2:]
        if argument.startswith(flag + "="):
            return argument[len(flag) + 1:], argv[:i] + argv[i + 1:]
    return None, argv


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, f"{where}.")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"field '{where}' must be a list, got {value!r}")
        items = args[:-1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_decode(item, entry, f"{where}[{i}]") for i, (item, entry) in
                     enumerate(zip(items, value, strict=True)))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"field '{where}' must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and type(value) is str:
        return Path(value)
    if type(value) is not hint:
        raise ValueError(f"field '{where}' must be {hint.__name__}, got {value!r}")
    return value
