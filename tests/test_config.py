"""Flags, presets and JSON files: what a typo answers, and that a dump starts the same run."""

import json
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from jaxlm.core.config import differences, from_json, load_config, nearest, parse, save_config, to_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    kind: Literal["adamw", "lion"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    paths: tuple[str, ...] = ()
    name: str | None = None
    scaling: Inner | None = None


PRESETS = {"smoke": Outer(steps=3), "base": Outer(steps=30, paths=("a", "b"), scaling=Inner(lr=2.0))}


def run(*argv: str) -> Outer:
    return parse(PRESETS, argv, prog="recipes.test", description="Test.")


def test_preset_and_overrides():
    assert run() == PRESETS["smoke"]
    assert run("--preset", "base", "--inner.lr", "0.5") == replace(PRESETS["base"], inner=Inner(lr=0.5))
    assert run("--preset=base", "--paths", "c").paths == ("c",)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (("--inner.rl", "1"), "--inner.lr"),
        (("--stesp", "1"), "--steps"),
        (("--inner.kind", "adamx"), "adamw"),
        (("--inner.lr", "fast"), "--inner.lr"),
        (("--preset", "smok"), "did you mean 'smoke'"),
        (("--preset",), "--preset needs a value"),
        (("--config", "nowhere.json"), "nowhere.json"),
        (("--config", "a", "--preset", "smoke"), "give one of them"),
    ],
)
def test_mistakes_end_with_the_nearest_name(argv, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert answer in output.err + output.out


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert not stop.value.code
    text = capsys.readouterr().out
    assert all(name in text for name in ("--steps", "--inner.lr", "--preset", "--config", "smoke"))


@pytest.mark.parametrize("preset", PRESETS)
def test_file_round_trip(preset, tmp_path):
    path = tmp_path / "config.json"
    save_config(PRESETS[preset], path)
    assert load_config(Outer, path) == PRESETS[preset]
    assert run("--config", str(path)) == PRESETS[preset]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"stepz": 1}, "unknown field 'stepz' (did you mean 'steps'?)"),
        ({"inner": {"lrr": 1}}, "unknown field 'inner.lrr' (did you mean 'lr'?)"),
        ({"steps": "3"}, "'steps' must be int"),
        ({"inner": {"kind": "sgd"}}, "'inner.kind' must be one of 'adamw', 'lion'"),
        ({"inner": 3}, "'inner' must be an object"),
        ({"paths": "a"}, "'paths' must be a list"),
        ({"paths": ["a", 1]}, "'paths[1]' must be str"),
    ],
)
def test_wrong_files_name_field_and_place(change, answer, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(PRESETS["smoke"]) | change))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        load_config(Outer, path)
    assert answer in str(error.value)


def test_missing_field():
    with pytest.raises(ValueError, match="'steps' is missing"):
        from_json(Outer, {})


def test_differences_are_named_by_their_path():
    other = replace(PRESETS["smoke"], steps=4, inner=Inner(lr=1.0))
    assert differences(PRESETS["smoke"], other) == ["steps: 3 -> 4", "inner.lr: 0.001 -> 1.0"]
    assert differences(other, other) == []


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("xyzzy", ["steps"]) == ""
