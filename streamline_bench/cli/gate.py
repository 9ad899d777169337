"""``streamline-bench gate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import (
    FiniteRange,
    print_table,
    refuse_existing,
    refuse_given,
    refuse_unwritable_file,
    refuse_unwritable_folder,
    write_json,
)

if TYPE_CHECKING:
    from streamline_bench.gate.result import GateResult

_OF_WRITING = {"run", "reference", "overwrite", "quiet"}
_SHARE = FiniteRange(0, 1, max_open=True)


@click.command("gate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Reference to compare with.")
@click.option("--base", help="Row of RUN that the speeds of the others are compared with.")
@click.option("--history", type=click.Path(path_type=Path),
              help="Folder of earlier throughput.json of this machine.")  # fmt: skip
@click.option("--last", type=click.IntRange(3), default=10, help="Runs of the history that count.")
@click.option("--keep", is_flag=True, help="Add RUN to the history if the gate is open.")
@click.option("--write-reference", "reference", type=click.Path(path_type=Path),
              help="Write the results of RUN into a reference file; compare nothing.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing reference.")
@click.option("--row", "rows", multiple=True, help="Check only this row; may be repeated.")
@click.option("--across-engines", is_flag=True,
              help="Compare answers of transformers with those of vLLM.")  # fmt: skip
@click.option("--accuracy-margin", "accuracy", type=_SHARE, default=0.02,
              help="Accepted drop of accuracy, as a share.")  # fmt: skip
@click.option("--stability-margin", "stability", type=_SHARE, default=0.02,
              help="Accepted drop of stability, as a share.")  # fmt: skip
@click.option("--speed-tolerance", "speed", type=_SHARE, default=0.05,
              help="Accepted relative loss of speed and of goodput.")  # fmt: skip
@click.option("--confidence", type=FiniteRange(0.5, 0.9999), default=0.95)
@click.option("--draws", type=click.IntRange(min=100), default=10_000)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option(
    "--strict",
    is_flag=True,
    help="Also exit with 1 if checks cannot tell, or none compares.",
)
@click.option("--all", "every", is_flag=True, help="Show also the tasks that are ok.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write JSON here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    run: Path,
    against: Path | None,
    base: str | None,
    history: Path | None,
    last: int,
    keep: bool,
    reference: Path | None,
    overwrite: bool,
    rows: tuple[str, ...],
    across_engines: bool,
    every: bool,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    **thresholds: Any,
) -> None:
    """Exit with 1 if RUN lost accuracy, stability or speed against a reference.

    RUN and the reference are run folders, their leaderboard.json or throughput.json; the reference
    may also be a file of --write-reference. Answers are compared one by one if both sides have
    them. Speeds are compared as ratios to the dense model of the same blocks, and on the same
    machine also by themselves; with --history, by what the last runs of this machine predict; with
    --base, within RUN. GitHub Actions also gets the result in the step summary.

    Of a run folder, the rows of its leaderboard.json count, each with the evaluation that run.json
    names. If that holds several evaluations, those with the same settings are joined; a warning
    names what is left out. Answers that the leaderboard was not made from are an error.
    """
    compared = [given for given in (against, history, base) if given is not None]
    if bool(compared) == (reference is not None):
        raise click.UsageError(
            "Give --against, --history or --base to compare, or --write-reference."
        )
    if base is not None and against is not None:
        raise click.UsageError("--base compares within RUN; leave out --against.")
    if reference is not None:
        others = {option.name or "" for option in ctx.command.params} - _OF_WRITING
        refuse_given(ctx, "--write-reference compares nothing: leave one of them out", *others)
        _write_reference(run, reference, overwrite, quiet)
        return
    refuse_given(ctx, "it needs --write-reference", "overwrite")
    if history is None:
        refuse_given(ctx, "it needs --history", "last", "keep")
    if against is None:
        refuse_given(ctx, "it needs --against", "across_engines", "accuracy", "stability", "draws",
                     "seed")  # fmt: skip
    refuse_unwritable_file(output)
    if against is not None and against.resolve() == run.resolve():
        click.echo("Note: RUN is compared with itself.", err=True)
    from streamline_bench.core.machine.environment import printable
    from streamline_bench.gate.judge import gate
    from streamline_bench.gate.result import Thresholds

    if keep and history is not None:
        from streamline_bench.gate.history import require_records

        if run.exists():  # else the gate says so
            require_records(run)
        if not history.exists():
            refuse_unwritable_folder(history)
            history.mkdir(parents=True)
    result = gate(
        run, against, history=history, last=last, base=base, thresholds=Thresholds(**thresholds),
        rows=rows, across_engines=across_engines, progress=not quiet,
    )  # fmt: skip
    if across_engines:
        click.echo(f"Note: {printable(result.run)} against {printable(result.against)}.", err=True)
    write_json(result, output, as_json)
    if not as_json:
        _show(result, every)
    _tell_github(result, to_stderr=as_json)
    # A history that nothing can be compared with yet must be able to grow.
    if keep and history is not None and (result.passed or not result.compared):
        from streamline_bench.gate.history import keep as keep_run

        for kept in keep_run(run, history):
            if not quiet and not as_json:
                click.echo(f"Kept as {kept}.")
    if not result.passed:
        sys.exit(1)


def _write_reference(run: Path, reference: Path, overwrite: bool, quiet: bool) -> None:
    from streamline_bench.core.machine.environment import printable
    from streamline_bench.gate.evidence import read_evidence, write_reference

    refuse_existing(reference, overwrite, "path")
    refuse_unwritable_file(reference, "path")
    figures = read_evidence(run, progress=not quiet).figures
    write_reference(figures, reference)
    if quiet:
        return
    failed = [row.label for row in figures.rows if row.failed is not None]
    whole = sum(task.right is not None for row in figures.rows for task in row.tasks)
    click.echo(
        f"Wrote {printable(str(reference))}: {len(figures.rows)} rows, "
        f"{sum(len(row.tasks) for row in figures.rows)} results, {whole} with every answer, "
        f"{sum(row.speed is not None for row in figures.rows)} with speed."
    )
    if failed:
        click.echo(f"Failed rows, which no gate will compare: {printable(', '.join(failed))}.")


def _show(result: GateResult, every: bool) -> None:
    from streamline_bench.core.machine.environment import printable
    from streamline_bench.gate.table import NOTE, brief, ordered, to_table, verdict

    shown = ordered(result) if every else brief(result)
    print_table(to_table(shown))
    if any(check.p_value is not None for check in shown):
        click.echo(NOTE)
    if len(shown) < len(result.checks):
        click.echo(f"{len(result.checks) - len(shown)} more checks of tasks are ok (--all).")
    click.echo(verdict(result))
    if result.new:
        click.echo(f"Not in the reference: {printable(', '.join(result.new))}.")


def _tell_github(result: GateResult, *, to_stderr: bool) -> None:
    from streamline_bench.gate.table import append_summary, workflow_commands

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        append_summary(result, Path(summary))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(result):
            click.echo(line, err=to_stderr)
