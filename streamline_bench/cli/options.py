"""What the commands share: logging, the device, ``KEY=VALUE`` options, safe output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamline_bench.errors import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

_Command = TypeVar("_Command", bound=Callable[..., Any])


def device_option(command: _Command) -> _Command:
    """Add ``--device``; the command gets a torch device that is there, ``auto`` resolved."""
    option = click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_found_device,
        help="cpu, cuda or cuda:N; auto: cuda if there is one.",
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


def named_device_option(command: _Command) -> _Command:
    """Add ``--device`` for work that may be done elsewhere; None: not given, as good as auto."""
    option = click.option(
        "--device",
        show_default="auto",
        callback=_named_device,
        help="cpu, cuda or cuda:N; auto: cuda if there is one.",
    )
    return option(command)


def until_option(command: _Command) -> _Command:
    """Add ``--until``: the last stage of a comparison that is run."""
    from streamline_bench.runs.execution.options import STAGES

    option = click.option(
        "--until",
        type=click.Choice(STAGES),
        default=STAGES[-1],
        show_default=True,
        help="Last stage to run.",
    )
    return option(command)


def _found_device(ctx: click.Context, option: click.Parameter, value: str) -> str:
    from streamline_bench.core.machine.environment import found_device

    try:
        return found_device(value)
    except RecipeError as error:
        raise click.BadParameter(str(error)) from None


def _named_device(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value in (None, "auto"):
        return value
    from streamline_bench.core.machine.environment import known_device

    try:
        return known_device(str(value))
    except RecipeError as error:
        raise click.BadParameter(str(error)) from None


def setup_logging(*, quiet: bool) -> None:
    """Show our own log on stderr; keep the libraries' to warnings, and their progress quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("streamline_bench").setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ[f"{library}_DISABLE_PROGRESS_BARS"] = "1"
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
