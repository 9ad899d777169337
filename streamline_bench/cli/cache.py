"""``streamline-bench cache``: what compressions are kept, and how to be rid of them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamline_bench.cli.options import setup_logging
from streamline_bench.core.machine.environment import printable, user_cache

if TYPE_CHECKING:
    from streamline_bench.compression.cache import Cached

_DAY = 24 * 3600.0


@click.group("cache")
def command() -> None:
    """List or empty the cache of compressed models.

    It lies in ~/.cache/streamline-bench, or where STREAMLINE_BENCH_CACHE says. Run folders keep
    their checkpoints, whatever is removed here.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List what is in the cache, what was used last first."""
    from streamline_bench.compression.cache import entries

    found = entries()
    if as_json:
        click.echo(json.dumps([{**asdict(each), "path": str(each.path)} for each in found]))
        return
    click.echo(f"{user_cache()}: {_sum(found)}")
    for each in found:
        click.echo(_line(each))


@command.command("prune")
@click.option("--unused-for", "days", type=click.FloatRange(min=0), default=30.0,
              help="Keep what was used in the last so many days.")  # fmt: skip
@click.option("--everything", is_flag=True, help="Remove everything, however recent.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune_(days: float, everything: bool, dry_run: bool) -> None:
    """Remove what was not used for a time."""
    setup_logging(quiet=False)
    from streamline_bench.compression.cache import prune

    gone = prune(unused_for=0.0 if everything else days * _DAY, dry=dry_run)
    for each in gone:
        click.echo(_line(each))
    click.echo(f"{'Would be removed' if dry_run else 'Removed'}: {_sum(gone)}")


def _line(entry: Cached) -> str:
    ago = max(0.0, time.time() - entry.used) / _DAY
    what = " of ".join(filter(None, (entry.recipe, entry.model)))
    where = f", a link to {entry.in_run}" if entry.in_run else ""
    name = entry.name[:12]
    text = f"{_size(entry.bytes):>9}  {ago:5.1f} days  {entry.kind:<11} {name:<12} {what}{where}"
    return printable(text.rstrip())


def _sum(found: list[Cached]) -> str:
    freed = sum(each.freed for each in found)
    number = f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}"
    return f"{number}, {_size(freed)} that no run folder shares"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
