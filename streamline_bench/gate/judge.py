"""The gate: every row of the reference, checked in the run; and the speed of a run.

See :mod:`.task_checks` for accuracy and stability, :mod:`.speed_checks` for speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import ComparisonError
from streamline_bench.gate.evidence import Evidence, Reference, RowReference, open_source
from streamline_bench.gate.history import History, read_history
from streamline_bench.gate.result import Check, GateResult, Thresholds
from streamline_bench.gate.speed_checks import (
    against_base,
    against_history,
    against_reference,
    speed_checks,
)
from streamline_bench.gate.task_checks import accuracy_checks, grade_checks, stability_checks


def gate(
    run: Path | str,
    against: Path | str | None = None,
    *,
    history: Path | str | None = None,
    last: int = 10,
    base: str | None = None,
    thresholds: Thresholds | None = None,
    rows: Sequence[str] = (),
    across_engines: bool = False,
    progress: bool = True,
) -> GateResult:
    """Compare a run with a reference, with earlier runs of the machine, or with a base in it.

    Args:
        run: run folder, ``leaderboard.json``, or ``throughput.json``.
        against: the same of an earlier run, or a reference file.
        history: folder of ``throughput.json`` files; the ``last`` of this machine say what speed
            to expect. The speed of ``against`` is not looked at then.
        base: label of the model in this run that the speeds of the others are compared with.
        rows: labels to check; by default all of the reference, or of the run without one.
        across_engines: transformers may have answered one side and vLLM the other; the result
            names both.

    Raises:
        SamplesError: one of them cannot be read.
        ThroughputError: a record of speeds is damaged.
        ComparisonError: they were evaluated differently, a row of ``rows`` is not in the reference,
            or there is nothing to compare with.
    """
    allowed = thresholds or Thresholds()
    before = None if against is None else open_source(Path(against))
    now = open_source(Path(run))
    if before is None:
        figures = now.evidence(progress=False, answers=False).figures
        earlier = _history(history, figures, last, run)
        return judge_speed(figures, allowed, rows, history=earlier, base=base)
    # Answers take long to read; whatever the figures alone show to be wrong comes first.
    require_comparable(now.figures, before.figures, rows, across_engines=across_engines)
    evidence = now.evidence(progress=progress)
    earlier = _history(history, evidence.figures, last, run)
    reference = before.evidence(progress=progress)
    return judge(evidence, reference, allowed, rows, earlier, across_engines=across_engines)


def _history(
    folder: Path | str | None, figures: Reference, last: int, run: Path | str
) -> History | None:
    if folder is None:
        return None
    return read_history(Path(folder), figures.machine, last, Path(run))


def require_comparable(
    run: Reference,
    against: Reference,
    rows: Sequence[str] = (),
    *,
    across_engines: bool = False,
) -> None:
    """Refuse what no answer is needed to refuse; only labels and figures are looked at.

    Raises:
        ComparisonError: see :func:`gate`.
    """
    if (
        run.method is not None
        and against.method is not None
        and run.method.verdict != against.method.verdict
    ):
        raise ComparisonError(
            f"The run judges by '{run.method.verdict}', the reference by "
            f"'{against.method.verdict}'; report both with the same --verdict."
        )
    require_rows(against, rows)
    meeting = None if across_engines else next(_two_engines(run, against, rows), None)
    if meeting is not None:
        label, task, now, before = meeting
        raise ComparisonError(
            f"Task '{task}' of row '{label}' was answered by {now} in '{run.source}' and by "
            f"{before} in '{against.source}', so that a change would be that of the engines too; "
            "evaluate with one, write a new reference, or compare them by --across-engines."
        )


def _two_engines(
    run: Reference, against: Reference, rows: Sequence[str]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield row, task and engines, now and before, where these differ."""
    old = {row.label: row.asked for row in against.rows if not rows or row.label in rows}
    for row in run.rows:
        for task, now in row.asked.items():
            before = old.get(row.label, {}).get(task)
            if now and before and now != before:
                yield row.label, task, now, before


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
    run: Evidence,
    against: Evidence,
    thresholds: Thresholds,
    rows: Sequence[str] = (),
    history: History | None = None,
    *,
    across_engines: bool = False,
) -> GateResult:
    """Compare what was read (see :func:`gate`)."""
    require_comparable(run.figures, against.figures, rows, across_engines=across_engines)
    sources = _named(run.figures, against.figures, rows)
    checks: list[Check] = []
    chosen = {label: row for label, row in against.rows.items() if not rows or label in rows}
    for label, before in chosen.items():
        if before.failed is None:
            checks += _row_checks(run, against, run.rows.get(label), before, thresholds)
    pairs = [
        (now, before)
        for label, before in chosen.items()
        if (now := run.rows.get(label)) is not None and before.failed is None and now.failed is None
    ]
    if history is not None:
        found = [*against_history([now for now, _ in pairs], history.runs)]
    else:
        found = [*against_reference(run.figures, against.figures, pairs)]
    checks += speed_checks(found, thresholds)
    if not checks:
        raise ComparisonError(
            f"The reference '{against.figures.source}' has no task with right or wrong answers, "
            "no grade and no speed. A gate does not compare perplexities or texts: see the reports."
        )
    return GateResult(
        run=sources[0],
        against=_against(sources[1], history),
        thresholds=thresholds,
        checks=tuple(checks),
        new=_new(run, chosen, every=not rows),
    )


def judge_speed(
    run: Reference,
    thresholds: Thresholds,
    rows: Sequence[str] = (),
    *,
    history: History | None = None,
    base: str | None = None,
) -> GateResult:
    """Compare the speeds of a run with earlier ones, and with a base among its rows.

    Raises:
        ComparisonError: a row is not there, or there is no speed to compare.
    """
    known = [row.label for row in run.rows]
    for label in (*rows, *([base] if base is not None else [])):
        if label not in known:
            other = suggest(label, known)
            raise ComparisonError(f"The run '{run.source}' has no row '{label}'{other}")
    if base is not None and base != run.dense:
        raise ComparisonError(
            f"The ratios of '{run.source}' are to '{run.dense}', not to '{base}'; measure with "
            f"--dense {base}."
        )
    chosen = [row for row in run.rows if not rows or row.label in rows]
    found = [] if history is None else [*against_history(chosen, history.runs)]
    if base is not None:
        shown = [row for row in run.rows if row in chosen or row.label == base]
        found += against_base(shown, base)
    checks = speed_checks(found, thresholds)
    if not checks:
        raise ComparisonError(
            f"The run '{run.source}' has no speed to compare; measure it with streamline-bench "
            "throughput, or compare --throughput."
        )
    return GateResult(
        run=run.source,
        against=_against(None if base is None else f"'{base}' of the same run", history),
        thresholds=thresholds,
        checks=tuple(checks),
        new=(),
    )


def _named(run: Reference, against: Reference, rows: Sequence[str]) -> tuple[str, str]:
    """Both sources; with what answered them where that is not the same."""
    met = list(_two_engines(run, against, rows))
    if not met:
        return run.source, against.source
    now, before = (", ".join(dict.fromkeys(each[place] for each in met)) for place in (2, 3))
    return f"{run.source} ({now})", f"{against.source} ({before})"


def _against(reference: str | None, history: History | None) -> str:
    runs = None if history is None else f"{len(history.runs)} runs of {history.source}"
    return " and ".join(filter(None, [reference, runs]))


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
    return checks
