"""The gate: every row of the reference, checked in the run; and the checks of speed.

Speed is compared only between equal measurements: tokens per second on the same machine, ratios to
the dense model of the same run wherever device, engine, precision, threads and workload are the
same. The interval of a change comes from the extremes of the rounds, or of the ratio's interval, on
both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import ComparisonError
from streamline_bench.gate.evidence import Evidence, Reference, RowReference, open_source
from streamline_bench.gate.result import Check, GateResult, Quantity, Status, Thresholds
from streamline_bench.gate.task_checks import accuracy_checks, grade_checks, stability_checks
from streamline_bench.throughput.record import Speed


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
        ComparisonError: they were evaluated differently, a row of ``rows`` is not in the reference,
            or there is nothing to compare with.
    """
    # Answers take long to read; whatever the figures alone show to be wrong comes first.
    before, now = open_source(Path(against)), open_source(Path(run))
    require_comparable(now.figures, before.figures, rows)
    return judge(
        now.evidence(progress=progress),
        before.evidence(progress=progress),
        thresholds or Thresholds(),
        rows,
    )


def require_comparable(run: Reference, against: Reference, rows: Sequence[str] = ()) -> None:
    """Refuse what no answer is needed to refuse; only labels and figures are looked at.

    Raises:
        ComparisonError: see :func:`gate`.
    """
    if run.method.verdict != against.method.verdict:
        raise ComparisonError(
            f"The run judges by '{run.method.verdict}', the reference by "
            f"'{against.method.verdict}'; report both with the same --verdict."
        )
    require_rows(against, rows)


def require_rows(against: Reference, rows: Sequence[str]) -> None:
    """Refuse labels that the reference has no result for, and a reference without any result.

    Raises:
        ComparisonError: see :func:`gate`.
    """
    known = {row.label: row for row in against.rows}
    for label in rows:
        if label not in known:
            other = suggest(label, list(known))
            raise ComparisonError(f"The reference '{against.source}' has no row '{label}'{other}")
        if known[label].failed is not None:
            raise ComparisonError(
                f"Row '{label}' failed in the reference '{against.source}' "
                f"({known[label].failed}), so there is nothing to compare with; leave the row out "
                "or write a new reference."
            )
    chosen = [row for row in against.rows if not rows or row.label in rows]
    usable = [row for row in chosen if row.failed is None]
    if not usable:
        raise ComparisonError(
            f"The reference '{against.source}' has no result to compare with; write a new one."
        )


def judge(
    run: Evidence, against: Evidence, thresholds: Thresholds, rows: Sequence[str] = ()
) -> GateResult:
    """Compare what was read (see :func:`gate`)."""
    require_comparable(run.figures, against.figures, rows)
    checks: list[Check] = []
    chosen = {label: row for label, row in against.rows.items() if not rows or label in rows}
    for label, before in chosen.items():
        if before.failed is None:
            checks += _row_checks(run, against, run.rows.get(label), before, thresholds)
    if not checks:
        raise ComparisonError(
            f"The reference '{against.figures.source}' has no task with right or wrong answers, "
            "no grade and no speed. A gate does not compare perplexities or texts: see the reports."
        )
    return GateResult(
        run=run.figures.source,
        against=against.figures.source,
        thresholds=thresholds,
        checks=tuple(checks),
        new=_new(run, chosen, every=not rows),
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
        known = {task.key for task in before.tasks}
        graded = {grade.key for grade in before.grades}
        more = [task.task for task in now.tasks if task.key not in known]
        more += [grade.task for grade in now.grades if grade.key not in graded]
        for task in more:
            tasks.setdefault(task, []).append(label)
    return (*rows, *(f"{task} ({', '.join(labels)})" for task, labels in tasks.items()))


def _row_checks(
    run: Evidence,
    against: Evidence,
    now: RowReference | None,
    before: RowReference,
    thresholds: Thresholds,
) -> list[Check]:
    if now is None or now.failed is not None:
        reason = "the run does not have this row" if now is None else now.failed
        return [Check(row=before.label, quantity="result", status="missing", reason=reason)]
    have = {task.key for task in now.tasks}
    missing = [
        Check(row=before.label, quantity="accuracy", task=task.task, status="missing",
              reference=task.accuracy.value, reason="the run does not have this task")
        for task in before.tasks
        if task.key not in have
    ]  # fmt: skip
    checks = missing + accuracy_checks(run, against, now, before, thresholds)
    checks += grade_checks(run, against, now, before, thresholds)
    if not now.is_dense:
        checks += stability_checks(run, against, now, before, thresholds)
    return checks + _speed_checks(run, against, now, before, thresholds.speed)


_ALIKE = (
    "device engine engine_version mode dtype clock threads batch_size prompt_tokens output_tokens "
    "request_load"
).split()
"""Fields of a speed that must agree."""


def _speed_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, tolerated: float
) -> list[Check]:
    """Check tokens per second and the ratio to dense, if the reference has them.

    Args:
        tolerated: relative loss that does not count (0.05).
    """
    old, new = before.speed, now.speed
    if old is None or old.status == "failed":
        return []

    def without(quantity: Quantity, status: Status, reason: str, figure: Any = None) -> Check:
        return Check(
            row=now.label, quantity=quantity, status=status, reference=figure, reason=reason
        )

    had = old.output_tokens_per_second
    if new is None:
        return [without("tokens/s", "missing", "the run has no throughput", had)]
    if new.status == "failed":
        return [without("tokens/s", "missing", new.reason or "the measurement failed", had)]
    reason = _unlike(new, old)
    if reason is not None:
        return [without("tokens/s", "not compared", reason)]
    have = new.output_tokens_per_second
    machines = against.figures.machine, run.figures.machine
    if None in machines:
        reason = "the machine is not known on both sides"
    elif machines[0] != machines[1]:
        reason = "other machine"
    elif had is None or have is None:
        reason = "not measured on both sides"
    if had is None or have is None or reason is not None:
        checks = [without("tokens/s", "not compared", str(reason))]
    else:
        ends = (old.low, old.high), (new.low, new.high)
        checks = [_speed_check(now, "tokens/s", (had, have), ends, tolerated)]
    if now.is_dense or old.ratio is None:
        return checks
    if new.ratio is None:
        gone = without("speed-up", "missing", "the run has no ratio to dense", old.ratio)
        return [*checks, gone]
    ends = (old.ratio_low, old.ratio_high), (new.ratio_low, new.ratio_high)
    return [*checks, _speed_check(now, "speed-up", (old.ratio, new.ratio), ends, tolerated)]


def _unlike(new: Speed, old: Speed) -> str | None:
    """Why the two speeds must not be compared."""
    for name in _ALIKE:
        here, there = getattr(new, name), getattr(old, name)
        if here is not None and there is not None and here != there:
            return f"{name.replace('_', ' ')} is {here} here, {there} there"
    return None


Ends = tuple[float | None, float | None]


def _speed_check(
    row: RowReference,
    quantity: Quantity,
    figures: tuple[float, float],
    ends: tuple[Ends, Ends],
    tolerated: float,
) -> Check:
    old, new = figures
    (old_low, old_high), (new_low, new_high) = ends
    high = new_high / old_low - 1 if new_high is not None and old_low else None
    change = new / old - 1
    status: Status = "ok"
    if change < -tolerated:
        status = "regressed" if high is not None and high < 0 else "cannot tell"
    return Check(
        row=row.label,
        quantity=quantity,
        status=status,
        reference=old,
        value=new,
        change=change,
        low=new_low / old_high - 1 if new_low is not None and old_high else None,
        high=high,
        how="extremes of the rounds" if quantity == "tokens/s" else "intervals of both ratios",
    )
