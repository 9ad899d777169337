"""``streamline-bench report``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(run: Path, quiet: bool) -> None:
    """Make the report of the run folder RUN again.

    RUN holds run.json; a leaderboard.json alone (the file or its folder) is rendered as it is.
    """
    from streamline_bench.report.run_folder import RUN_FILE, build_report
    from streamline_bench.report.write import read_leaderboard, write_report

    board = run if run.is_file() else run / "leaderboard.json"
    if board.is_file() and not (board.parent / RUN_FILE).is_file():
        page = write_report(read_leaderboard(board), board.parent)
    else:
        page = build_report(run.parent if run.is_file() else run, progress=not quiet)
    click.echo(f"Open {page}")
