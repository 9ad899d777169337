"""``streamline-bench demo``."""

from __future__ import annotations

from pathlib import Path

import click

from streamline_bench.cli.options import setup_logging, until_option


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("streamline-demo"),
    show_default=True, help="Run folder; the same command continues an interrupted demo.",
)  # fmt: skip
@click.option("--sparsity", type=float, default=0.25, show_default=True)
@click.option("--rows", help="Comma-separated recipes; dense is added if missing.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task.")
@until_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--overwrite", is_flag=True, help="Delete the results of an earlier demo first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no log.")
def command(
    output: Path,
    sparsity: float,
    rows: str | None,
    limit: int | None,
    until: str,
    batch_size: int,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Prune, replace, evaluate and compare the bundled model, offline, in a few minutes."""
    setup_logging(quiet=quiet)
    from streamline_bench.cli.compare import finish, stops_with_a_word
    from streamline_bench.demo.pipeline import DEMO_ROWS, DemoOptions, run_demo

    names = tuple(name.strip() for name in rows.split(",")) if rows else DEMO_ROWS
    with stops_with_a_word():
        result = run_demo(
            DemoOptions(
                output, names, sparsity, limit, until, batch_size, overwrite, progress=not quiet
            )
        )
    finish(result)
