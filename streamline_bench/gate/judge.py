"""The gate: every row of the reference, checked in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamline_bench.core.recipe.suggestions import suggest
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
        ComparisonError: they were not asked the same, a row of ``rows`` is not in the reference, or
            there is nothing to compare with.
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
        _require_result(label, against)
    checks: list[Check] = []
    chosen = {label: row for label, row in known.items() if not rows or label in rows}
    for label, before in chosen.items():
        if before.failed is None:
            checks += _row_checks(run, against, run.rows.get(label), before, thresholds)
    if not checks and any(row.failed is None for row in chosen.values()):
        raise ComparisonError(
            f"The reference '{against.figures.source}' has no task with right or wrong answers and "
            "no speed; a gate does not compare perplexities or texts: see the reports."
        )
    if not checks:
        raise ComparisonError(
            f"The reference '{against.figures.source}' has no result to compare with; "
            "write a new one."
        )
    return GateResult(
        run=run.figures.source,
        against=against.figures.source,
        thresholds=thresholds,
        checks=tuple(checks),
        new=_new(run, chosen, every=not rows),
    )


def _require_result(label: str, against: Evidence) -> None:
    source, known = against.figures.source, against.rows
    if label not in known:
        raise ComparisonError(
            f"The reference '{source}' has no row '{label}'{suggest(label, list(known))}"
        )
    if known[label].failed is not None:
        raise ComparisonError(
            f"Row '{label}' failed in the reference '{source}' ({known[label].failed}): there is "
            "nothing to compare with; leave it out, or write a new reference."
        )


def _new(run: Evidence, chosen: Mapping[str, RowReference], *, every: bool) -> tuple[str, ...]:
    """Rows, and tasks of the rows of both sides, that only the run has."""
    rows, tasks = list[str](), dict[str, list[str]]()
    for label, now in run.rows.items():
        before = chosen.get(label)
        if before is None or before.failed is not None:
            if every and now.failed is None:
                rows.append(label)
            continue
        had = {(task.task, task.filter) for task in before.tasks}
        for task in now.tasks:
            if (task.task, task.filter) not in had:
                tasks.setdefault(task.task, []).append(label)
    return (*rows, *(f"{task} ({', '.join(labels)})" for task, labels in tasks.items()))


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
