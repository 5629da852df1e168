"""Modules of the optional extras of jaxlm, imported when they are needed: some take seconds, some are seldom there."""

import importlib
from types import ModuleType


def extra(module: str, name: str) -> ModuleType:
    """A module of the extra `name`; ValueError naming what to install if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ValueError(f"this needs the package {missing}: pip install 'jaxlm[{name}]' ({error})") from None
