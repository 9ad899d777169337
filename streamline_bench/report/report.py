"""``build_report``: a run folder becomes ``leaderboard.json`` and its views."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamline_bench.errors import SamplesError
from streamline_bench.report.data.run_folder import RUN_FILE, RunRow, read_run_file

if TYPE_CHECKING:
    from streamline_bench.stability.settings import Settings

__all__ = ["build_report"]


def build_report(folder: Path, *, settings: Settings | None = None, progress: bool = True) -> Path:
    """Make the report files of a run folder, in that folder; return ``leaderboard.html``.

    Args:
        settings: how rows are compared; by default as ``streamline-bench stability`` does.

    Raises:
        SamplesError: run.json, an evaluation or the throughput is missing or damaged, or the dense
            row failed.
        ComparisonError: rows were not asked the same.
        OutputError: the folder is not writable.
    """
    from streamline_bench.report.board.leaderboard import RowSource, build_leaderboard
    from streamline_bench.report.views.write import write_report

    folder = Path(folder)
    run = read_run_file(folder)
    leaderboard = build_leaderboard(
        {row.label: _row_evaluation(folder, row) for row in run.rows},
        run.dense,
        sources={
            row.label: RowSource(
                checkpoint=folder / row.checkpoint if row.checkpoint else None,
                recipe=row.recipe,
                divergence=_inside(folder, row.divergence) if row.divergence else None,
                seconds=row.seconds,
                failed=row.failed,
                scored_with=row.scored_with,
                scored_alone=row.scored_alone,
            )
            for row in run.rows
        },
        throughput=_inside(folder, run.throughput) if run.throughput else None,
        noise={again.label: _inside(folder, again.eval) for again in run.noise},
        settings=settings,
        title=run.title,
        commands=run.commands,
        versions=run.versions,
        failed_jobs=run.failed_jobs,
        not_compared=run.not_compared,
        progress=progress,
    )
    return write_report(leaderboard, folder)


def _row_evaluation(folder: Path, row: RunRow) -> Path | None:
    return None if row.failed or row.eval is None else _inside(folder, row.eval)


def _inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SamplesError(
            f"{folder / RUN_FILE}: '{relative}' lies outside the run folder; move it into the "
            "folder."
        )
    return path
