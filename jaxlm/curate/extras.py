"""Modules of the optional extra `curate`, imported when they are needed: datatrove alone takes seconds."""

import importlib
from types import ModuleType


def extra(module: str) -> ModuleType:
    """A module of the extra; ValueError naming the extra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"curation needs the package {error.name}: pip install jaxlm[curate]") from None
