"""``streamline-bench report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamline_bench.cli.options import refuse_given

if TYPE_CHECKING:
    from streamline_bench.report.leaderboard import Leaderboard


@click.command("report")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, metavar="[RUN]...")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Where the report of several runs goes.")  # fmt: skip
@click.option("--model-cards", "cards", is_flag=True,
              help="Also write a card of each compressed model into RUN/model-cards.")  # fmt: skip
@click.option("--exports", is_flag=True,
              help="Also write tables (LaTeX, Markdown, CSV), BibTeX and figures (SVG, PDF) into "
              "RUN/exports.")  # fmt: skip
@click.option("--every-eval-ever", "organization", metavar="ORGANIZATION",
              help="Also write records in the schema of Every Eval Ever into RUN/every-eval-ever: "
              "a file for each row and task, with its answers. ORGANIZATION provides "
              "them.")  # fmt: skip
@click.option("--schema", is_flag=True, help="Print the JSON Schema of leaderboard.json instead.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    output: Path | None,
    cards: bool,
    exports: bool,
    organization: str | None,
    schema: bool,
    quiet: bool,
) -> None:
    """Make the report of the run folder RUN again, or one of several runs.

    RUN holds run.json. Without run.json, the leaderboard.json (the file or its folder) is rendered
    as it is. Several runs must have answered the same questions. A model card holds metadata for
    the Hugging Face Hub (model-index, .eval_results) and text.
    """
    if schema:
        if runs:
            raise click.UsageError(f"--schema reads no run; leave it or '{runs[0]}' out.")
        refuse_given(ctx, "--schema reads no run", "output", "cards", "exports", "organization",
                     "quiet")  # fmt: skip
        from streamline_bench.report.leaderboard import json_schema

        click.echo(json.dumps(json_schema(), indent=1))
        return
    if not runs:
        raise click.UsageError("Give the run folder, or --schema.")
    if (len(runs) > 1) != (output is not None):
        raise click.UsageError("Several runs need --output; one run is reported in its folder.")
    from streamline_bench.report.build import build_report, write_report
    from streamline_bench.report.leaderboard import read_leaderboard
    from streamline_bench.report.run_file import RUN_FILE
    from streamline_bench.report.views.terminal import terminal_table

    run = runs[0]
    folder = run.parent if run.is_file() else run
    file = run if run.is_file() else run / "leaderboard.json"
    if output is not None:
        page, folder = _merged(runs, output, progress=not quiet), output
    elif file.is_file() and not (folder / RUN_FILE).is_file():
        page = write_report(read_leaderboard(file), folder)
    else:
        page = build_report(folder, progress=not quiet)
    board = read_leaderboard(folder / "leaderboard.json")
    if cards:
        from streamline_bench.report.views.model_card import write_model_cards

        for card in write_model_cards(board, folder / "model-cards"):
            click.echo(f"Model card: {card / 'README.md'}")
    if exports:
        from streamline_bench.report.views.exports import write_exports

        click.echo(f"Exports: {write_exports(board, folder / 'exports')}")
    if organization is not None:
        _write_records(board, folder, organization, progress=not quiet)
    click.echo(f"{terminal_table(board)}\n\nOpen {page}")


def _merged(runs: tuple[Path, ...], output: Path, *, progress: bool) -> Path:
    from streamline_bench.errors import OutputError
    from streamline_bench.report.build import write_report
    from streamline_bench.report.merge import merged_leaderboard
    from streamline_bench.report.run_file import RUN_FILE

    if (output / RUN_FILE).exists():
        raise OutputError(f"{output} is the folder of a run; give another --output.")
    return write_report(merged_leaderboard(runs, progress=progress), output)


def _write_records(board: Leaderboard, folder: Path, organization: str, *, progress: bool) -> None:
    """Records of a board; without its answers where only the board is left."""
    from streamline_bench.report.reading import row_answers
    from streamline_bench.report.run_file import RUN_FILE
    from streamline_bench.report.views.every_eval_ever import write_records

    answers = row_answers(folder, progress=progress) if (folder / RUN_FILE).is_file() else None
    target = folder / "every-eval-ever"
    count = write_records(board, target, organization, answers)
    said = "" if answers else ", without single answers (no run.json)"
    click.echo(f"Records for Every Eval Ever: {target} ({count}{said})")
