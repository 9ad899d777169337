"""Accuracy of one row against the reference's.

With verdicts of both sides on the same questions: the paired difference and its score test, over
clusters where questions belong together; else the difference of the two estimates by their standard
errors. p and interval of a task are adjusted over the row's tasks by Holm, and the status follows
from them; those of the mean over tasks are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from streamline_bench.gate.change import Change, check_of, mean_checks, shared_tasks
from streamline_bench.gate.evidence import Evidence
from streamline_bench.gate.reference import RowReference, TaskReference, unpack
from streamline_bench.gate.result import Check, Thresholds
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.statistics.score import PairedDifference, holm
from streamline_bench.stability.task_comparison import paired_sample


def accuracy_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check the accuracy of every task that both have, and their mean.

    Raises:
        ComparisonError: a task has other questions now.
    """
    shared = shared_tasks(now, before, against, run)
    found = [_difference(run, row, old) for row, old in shared]
    level = 1 - allowed.confidence
    p_values = [difference.p_value() for difference in found]
    adjusted = iter(holm([p for p in p_values if p is not None], level))
    checks, changes = [], []
    for (row, old), difference, p in zip(shared, found, p_values, strict=True):
        change = _change(row, old, difference, allowed)
        changes.append(change)
        holms, comparisons = next(adjusted) if p is not None else (None, 1)
        shown = difference.interval(allowed.confidence, allowed.accuracy, comparisons)
        significant = holms is not None and holms < level
        checks.append(
            check_of(now, "accuracy", replace(change, difference=shown), allowed.accuracy,
                     significant, holms)
        )  # fmt: skip
    return checks + mean_checks(now, "accuracy", changes, allowed.accuracy)


@dataclass(frozen=True)
class _Independent:
    """Difference of two estimates by their standard errors; without them, no interval and no p."""

    value: float
    error: float | None

    def p_value(self) -> float | None:
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.value == 0)
        return math.erfc(abs(self.value) / self.error / math.sqrt(2))

    def interval(self, confidence: float, margin: float, comparisons: int = 1) -> Estimate:
        if self.error is None:
            return Estimate(value=self.value)
        half = -NormalDist().inv_cdf((1 - confidence) / comparisons / 2) * self.error
        low, high = self.value - half, self.value + half
        return Estimate(value=self.value, standard_error=self.error, low=low, high=high)


def _difference(
    run: Evidence, task: TaskReference, old: TaskReference
) -> PairedDifference | _Independent:
    if task.right is None or old.right is None:
        value = task.accuracy.value - old.accuracy.value
        errors = task.accuracy.standard_error, old.accuracy.standard_error
        known = [error for error in errors if error is not None]
        return _Independent(value, math.hypot(*known) if len(known) == 2 else None)
    before, now = unpack(old.right, old.n), unpack(task.right, task.n)
    clusters = run.clusters.get((task.task, task.filter))
    return PairedDifference((paired_sample(before, now, clusters),))


def _change(
    task: TaskReference,
    old: TaskReference,
    difference: PairedDifference | _Independent,
    allowed: Thresholds,
) -> Change:
    paired = isinstance(difference, PairedDifference)
    return Change(
        task,
        old.accuracy.value,
        task.accuracy.value,
        difference.interval(allowed.confidence, allowed.accuracy),
        f"paired, {task.n:,} questions" if paired else "standard errors",
        unchanged=paired and old.right == task.right,
    )
