"""The gate: every row of the reference, checked in the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamline_bench.core.suggestions import suggest
from streamline_bench.errors import ComparisonError
from streamline_bench.gate.accuracy_checks import accuracy_checks
from streamline_bench.gate.evidence import Evidence, read_evidence
from streamline_bench.gate.reference import RowReference
from streamline_bench.gate.result import Check, GateResult
from streamline_bench.gate.speed_checks import speed_checks
from streamline_bench.gate.stability_checks import stability_checks
from streamline_bench.gate.thresholds import Thresholds

__all__ = ["gate", "judge"]


def gate(
    run: Path | str,
    against: Path | str,
    *,
    thresholds: Thresholds | None = None,
    rows: Sequence[str] = (),
    progress: bool = True,
) -> GateResult:
    """Compare a run with a reference.

    Args:
        run: run folder or ``leaderboard.json``.
        against: the same of an earlier run, or a reference file.
        rows: labels to check; by default all of the reference.

    Raises:
        SamplesError: one of them cannot be read.
        ComparisonError: they were not asked the same, or a row of ``rows`` is not in the reference.
    """
    return judge(
        read_evidence(Path(run), progress=progress),
        read_evidence(Path(against), progress=progress),
        thresholds or Thresholds(),
        rows,
    )


def judge(
    run: Evidence, against: Evidence, thresholds: Thresholds, rows: Sequence[str] = ()
) -> GateResult:
    """Compare what was read (see :func:`gate`)."""
    if run.figures.method.verdict != against.figures.method.verdict:
        raise ComparisonError(
            f"The run judges by '{run.figures.method.verdict}', the reference by "
            f"'{against.figures.method.verdict}'; report both with one --verdict."
        )
    known = against.rows
    for label in rows:
        if label not in known:
            raise ComparisonError(
                f"The reference '{against.figures.source}' has no row '{label}'"
                f"{suggest(label, list(known))}"
            )
    checks: list[Check] = []
    for label, before in known.items():
        if before.failed is None and (not rows or label in rows):
            checks += _row_checks(run, against, run.rows.get(label), before, thresholds)
    return GateResult(
        run=run.figures.source,
        against=against.figures.source,
        thresholds=thresholds,
        checks=tuple(checks),
        new=() if rows else tuple(label for label in run.rows if label not in known),
    )


def _row_checks(
    run: Evidence,
    against: Evidence,
    now: RowReference | None,
    before: RowReference,
    thresholds: Thresholds,
) -> list[Check]:
    if now is None or now.failed is not None:
        reason = "the run has no such row" if now is None else now.failed
        return [Check(row=before.label, quantity="result", status="missing", reason=reason)]
    have = {(task.task, task.filter) for task in now.tasks}
    missing = [
        Check(
            row=before.label,
            quantity="accuracy",
            task=task.task,
            status="missing",
            reference=task.accuracy.value,
            reason="the run has no such task",
        )
        for task in before.tasks
        if (task.task, task.filter) not in have
    ]
    checks = missing + accuracy_checks(run, against, now, before, thresholds)
    if not now.is_dense:
        checks += stability_checks(run, against, now, before, thresholds)
    return checks + speed_checks(run, against, now, before, thresholds.speed)
