"""What the commands share: logging, ``KEY=VALUE`` options, safe output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["parse_assignments", "print_table", "setup_logging"]


def setup_logging(*, quiet: bool) -> None:
    """Show our own log on stderr; keep the libraries' to warnings, and their progress quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("streamline_bench").setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, str]:
    """Read ``--set key=value`` options.

    Raises:
        click.BadParameter: an option without ``=``.
    """
    parsed = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"'{assignment}' is not KEY=VALUE", param_hint="--set")
        parsed[key.strip()] = value
    return parsed


def print_table(table: Table) -> None:
    """Print a rich table; into a file or pipe at a width that does not depend on the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)
