"""What the commands share: logging, the device, ``KEY=VALUE`` options, safe output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "device_option",
    "dtype_option",
    "parse_assignments",
    "print_table",
    "setup_logging",
    "split_assignments",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def device_option(command: _Command) -> _Command:
    """Add ``--device``; the command gets a torch device that is there, ``auto`` resolved."""
    option = click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_found_device,
        help="cpu, cuda or cuda:N; auto: cuda where there is one.",
    )
    return option(command)


def dtype_option(what: str) -> Callable[[_Command], _Command]:
    """Add ``--dtype``: float32 unless given; ``what`` says of which tensors."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help=what,
    )


def _found_device(ctx: click.Context, option: click.Parameter, value: str) -> str:
    import torch

    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"'{value}': {reason}") from None
    return value


def setup_logging(*, quiet: bool) -> None:
    """Show our own log on stderr; keep the libraries' to warnings, and their progress quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("streamline_bench").setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def split_assignments(assignments: tuple[str, ...], option: str) -> Iterator[tuple[str, str]]:
    """Yield key and value of each ``KEY=VALUE`` that an option was given.

    Args:
        option: its name, for the message.

    Raises:
        click.BadParameter: one has no ``=``, or nothing before it.
    """
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise click.BadParameter(f"'{assignment}' is not KEY=VALUE", param_hint=option)
        yield key.strip(), value


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, str]:
    """Read ``--set key=value`` options; of a key that is given twice, the last value counts.

    Raises:
        click.BadParameter: an option without ``=``.
    """
    return dict(split_assignments(assignments, "--set"))


def print_table(table: Table) -> None:
    """Print a rich table; into a file or pipe at a width that does not depend on the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)
