"""Checks the import rules of docs/architecture.md: ranks, no imports inside functions, empty `__init__.py`.

Run: python -m tools.check_layers
"""

import ast
import sys
from pathlib import Path

RANKS = {
    "core": 0,
    "data": 1, "model": 1, "objective": 1, "reward": 1, "merge": 1, "optim": 1,
    "train": 2, "generate": 2, "retrieval": 2, "compress": 2, "curate": 2,
    "rl": 3, "eval": 3,
}
# Peers that tools compare with may be imported where they are used; all else stands at the top of its file, and
# `core.extras` imports what is optional.
PEERS = {"datasets", "sentence_transformers", "torch", "transformers", "trl"}
FORBIDDEN = {"data": {"jax", "flax", "optax"}}  # loader workers stay light
FLAX_HOME = "model"


def check(root: Path) -> list[str]:
    """All violations below `root` as `file:line: sentence`."""
    problems = []
    for path in sorted([*root.glob("jaxlm/**/*.py"), *root.glob("recipes/**/*.py"), *root.glob("tools/**/*.py")]):
        name = path.relative_to(root)
        if path.name == "__init__.py" and path.read_text(encoding="utf-8").strip():
            problems.append(f"{name}:1: __init__.py must be empty")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
                problems.append(f"{name}:{node.lineno}: TYPE_CHECKING block")
            for module in _modules(node):
                problems += [f"{name}:{node.lineno}: {text}"
                             for text in _violations(name.parts, module, id(node) in inside)]
    return list(dict.fromkeys(problems))


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        # An alias may be a package itself: `from jaxlm import train`.
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def _violations(parts: tuple[str, ...], module: str, inside: bool) -> list[str]:
    top, *rest = module.split(".")
    found = []
    if module.startswith("."):
        found.append("relative import; write the full name")
    if inside and top not in PEERS:
        found.append(f"import of {module} inside a function")
    package = parts[1] if parts[0] == "jaxlm" and len(parts) > 2 else None
    if package and package not in RANKS:
        found.append(f"package jaxlm/{package} has no rank")
    elif package:
        if top in ("recipes", "tools", "tests"):
            found.append(f"jaxlm/{package} must not import {top}")
        if top == "jaxlm" and rest and rest[0] != package and RANKS.get(rest[0], 99) >= RANKS[package]:
            found.append(f"jaxlm/{package} (rank {RANKS[package]}) must not import {module}")
        if top in FORBIDDEN.get(package, ()):
            found.append(f"jaxlm/{package} must not import {top}")
        if top == "flax" and package != FLAX_HOME:
            found.append(f"flax lives in jaxlm/{FLAX_HOME} only")
    elif parts[0] == "recipes" and top == "recipes":
        found.append("a recipe must not import another recipe")
    return found


if __name__ == "__main__":
    violations = check(Path(__file__).parent.parent)
    print("\n".join(violations) or "layers: ok")
    sys.exit(bool(violations))
