"""A recipe as a program: logging, flags, and the errors of its user in one sentence."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from jaxlm.core import config as flags
from jaxlm.core.log import setup_logging

T = TypeVar("T")


def run_command(
    work: Callable[[T], None], presets: Mapping[str, T], argv: Sequence[str] | None, *, prog: str, description: str
) -> None:
    """`work` with the configuration that a command line asks for (`config.parse`).

    ValueError and OSError end the process as `config.fail` says, with status 2; an interrupt with 130, as shells do.
    """
    setup_logging()
    config = flags.parse(presets, argv, prog=prog, description=description)
    try:
        work(config)
    except (ValueError, OSError) as error:
        flags.fail(error, prog)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
