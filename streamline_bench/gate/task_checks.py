"""Accuracy and stability of one row against the reference's, per task and as a mean over tasks.

Accuracy: with verdicts of both sides on the same questions, the paired difference and its score
test, over clusters where questions belong together; else the difference of the two estimates by
their standard errors. p and interval of a task are adjusted over the row's tasks by Holm, and they
decide its status.

Stability: with verdicts of the row and of its dense model on both sides, the difference of
agreement with the dense model, weighted as in the stability itself, with an interval by resampling
questions (or what they belong to); else the difference of the two estimates, whose intervals add up
by squares. Intervals are Bonferroni adjusted over the row's tasks.

Grades (F1, ROUGE): of tasks that are judged by one, with the grades of both sides the paired
difference by resampling questions (or what they belong to); else by standard errors. p and interval
are adjusted over the row's graded tasks by Holm.

The mean over tasks is not adjusted. A drop counts as a regression if it is significant and the
interval does not exclude a drop of the tolerated size or more. If no answer to the same questions
changed, nothing is a regression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from streamline_bench.errors import ComparisonError
from streamline_bench.gate.evidence import (
    Evidence,
    GradeReference,
    RowReference,
    TaskReference,
    unpack,
)
from streamline_bench.gate.result import Check, Quantity, Thresholds
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.grades import PairedGrades
from streamline_bench.stability.statistics.intervals import (
    bootstrap_interval,
    ratio_draws,
    task_generator,
)
from streamline_bench.stability.statistics.paired import wilson
from streamline_bench.stability.statistics.score import PairedDifference, decide, holm
from streamline_bench.stability.statistics.stability import effective_sample_size, stability_weights
from streamline_bench.stability.task_comparison import paired_sample

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Change:
    """The change of one task, or of the mean over tasks (``task`` is None).

    Attributes:
        unchanged: the questions are the same and no answer changed.
    """

    task: str | None
    before: float
    now: float
    difference: Estimate
    how: str
    unchanged: bool


def accuracy_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check the accuracy of every task that both have, and their mean.

    Raises:
        ComparisonError: a task has other questions now.
    """
    shared = _shared_tasks(now, before, against, run)
    found = [_difference(run, task, old) for task, old in shared]
    level = 1 - allowed.confidence
    checks, changes = [], []
    for (task, old), difference, (holms, comparisons) in zip(
        shared, found, _adjusted(found, level), strict=True
    ):
        paired = isinstance(difference, PairedDifference)
        change = _Change(
            task.task,
            old.accuracy.value,
            task.accuracy.value,
            difference.interval(allowed.confidence, allowed.accuracy),
            f"paired, {task.n:,} questions" if paired else "standard errors",
            unchanged=paired and old.right == task.right,
        )
        changes.append(change)
        shown = difference.interval(allowed.confidence, allowed.accuracy, comparisons)
        significant = holms is not None and holms < level
        change = replace(change, difference=shown)
        checks.append(_check(now, "accuracy", change, allowed.accuracy, significant, holms))
    return checks + _mean_checks(now, "accuracy", changes, allowed.accuracy)


def stability_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check the stability of every task that has one in the reference, and their mean.

    Raises:
        ComparisonError: a task has other questions now.
    """
    shared = _shared_tasks(now, before, against, run)
    pairs = [
        (task, old, task.stability, old.stability)
        for task, old in shared
        if task.stability is not None and old.stability is not None
    ]
    missing = [
        Check(row=now.label, quantity="stability", task=old.task, status="missing",
              reference=old.stability.value, reason="the run has no stability of this task")
        for task, old in shared
        if task.stability is None and old.stability is not None
    ]  # fmt: skip
    reason = _unlike(run, against) if pairs else None
    if reason is not None:
        left_out = Check(row=now.label, quantity="stability", status="not compared", reason=reason)
        return [*missing, left_out]
    each = 1 - (1 - allowed.confidence) / max(1, len(pairs))
    changes = [_stability_change(run, against, *pair, allowed, each) for pair in pairs]
    checks = [
        _check(now, "stability", change, allowed.stability, _excludes_zero(change.difference))
        for change in changes
    ]
    plain = [_stability_change(run, against, *pair, allowed, allowed.confidence) for pair in pairs]
    return missing + checks + _mean_checks(now, "stability", plain, allowed.stability)


def grade_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check every task that is judged by a grade, and their mean.

    Raises:
        ComparisonError: a task has other questions now.
    """
    have = {grade.key: grade for grade in now.grades}
    checks = [
        Check(row=now.label, quantity="grade", task=old.task, status="missing",
              reference=old.value.value, reason=f"the run does not judge it by {old.metric}")
        for old in before.grades
        if old.key not in have
    ]  # fmt: skip
    pairs = [(have[old.key], old) for old in before.grades if old.key in have]
    for task, old in pairs:
        _require_same_questions(task, old, against, run)
    tests = [_grade_test(run, task, old, allowed) for task, old in pairs]
    level = 1 - allowed.confidence
    changes = []
    for (task, old), test, (holms, comparisons) in zip(
        pairs, tests, _adjusted(tests, level), strict=True
    ):
        paired = isinstance(test, PairedGrades)
        change = _Change(
            task.task,
            old.value.value,
            task.value.value,
            test.interval(allowed.confidence, allowed.accuracy),
            f"{task.metric}, paired, {task.n:,} questions" if paired else "standard errors",
            unchanged=paired and old.values == task.values,
        )
        shown = test.interval(allowed.confidence, allowed.accuracy, comparisons)
        significant = holms is not None and holms < level
        changes.append(change)
        change = replace(change, difference=shown)
        check = _check(now, "grade", change, allowed.accuracy, significant, holms)
        checks.append(check if task.higher_is_better else _turned(check))
    # A mean of which parts are better when lower says nothing.
    alike = all(task.higher_is_better for task, _ in pairs)
    return checks + (_mean_checks(now, "grade", changes, allowed.accuracy) if alike else [])


def _grade_test(
    run: Evidence, task: GradeReference, old: GradeReference, allowed: Thresholds
) -> PairedGrades | _Independent:
    """Of the improvement: positive where the run is better."""
    sign = 1.0 if task.higher_is_better else -1.0
    if task.values is None or old.values is None:
        return _independent(sign, task.value, old.value)
    return PairedGrades.of(
        sign * (np.array(task.values) - np.array(old.values)),
        run.clusters.get((task.task, task.filter)),
        (*task.key, "gate"),
        draws=allowed.draws,
        seed=allowed.seed,
    )


def _turned(check: Check) -> Check:
    """A check of an improvement as one of a metric for which lower is better."""
    return check.model_copy(
        update={
            "change": None if check.change is None else -check.change,
            "low": None if check.high is None else -check.high,
            "high": None if check.low is None else -check.low,
        }
    )


def _shared_tasks(
    now: RowReference, before: RowReference, against: Evidence, run: Evidence
) -> list[tuple[TaskReference, TaskReference]]:
    """Tasks of both, now and before, which must ask the same."""
    old = {task.key: task for task in before.tasks}
    pairs = [(task, old[task.key]) for task in now.tasks if task.key in old]
    for task, reference in pairs:
        _require_same_questions(task, reference, against, run)
    return pairs


def _require_same_questions(
    task: TaskReference | GradeReference,
    reference: TaskReference | GradeReference,
    against: Evidence,
    run: Evidence,
) -> None:
    known = task.documents is not None and reference.documents is not None
    if (known and task.documents != reference.documents) or task.n != reference.n:
        raise ComparisonError(
            f"The questions of task '{task.task}' differ: '{run.figures.source}' has {task.n}, "
            f"'{against.figures.source}' has {reference.n}, and documents, prompts or answers "
            "changed; evaluate with the same data and settings, or write a new reference."
        )


def _excludes_zero(difference: Estimate) -> bool:
    """Whether the interval says that something changed."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and (low > 0 or high < 0)  # NaN is neither


def _check(
    row: RowReference,
    quantity: Quantity,
    change: _Change,
    margin: float,
    significant: bool,
    p_value: float | None = None,
) -> Check:
    difference, status = change.difference, "ok"
    if not change.unchanged:
        decision = decide(difference, margin, significant=significant)
        status = {"worse": "regressed", "cannot tell": "cannot tell"}.get(decision, "ok")
    return Check(
        row=row.label,
        quantity=quantity,
        task=change.task,
        status=status,
        reference=change.before,
        value=change.now,
        change=difference.value,
        low=None if change.unchanged else difference.low,
        high=None if change.unchanged else difference.high,
        p_value=p_value,
        how="no answer changed" if change.unchanged else change.how,
    )


def _mean_checks(
    row: RowReference, quantity: Quantity, changes: Sequence[_Change], margin: float
) -> list[Check]:
    """The mean over tasks, if there are several; its interval decides."""
    if len(changes) < 2:
        return []
    mean = _Change(
        None,
        float(np.mean([change.before for change in changes])),
        float(np.mean([change.now for change in changes])),
        square_and_add([change.difference for change in changes]),
        f"mean of {len(changes)} tasks",
        unchanged=all(change.unchanged for change in changes),
    )
    return [_check(row, quantity, mean, margin, _excludes_zero(mean.difference))]


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


def _independent(sign: float, now: Estimate, before: Estimate) -> _Independent:
    """The signed difference of two means, from their standard errors alone."""
    errors = [each.standard_error for each in (now, before) if each.standard_error is not None]
    value = sign * (now.value - before.value)
    return _Independent(value, math.hypot(*errors) if len(errors) == 2 else None)


def _adjusted(
    tests: Sequence[PairedDifference | PairedGrades | _Independent], level: float
) -> Iterator[tuple[float | None, int]]:
    """Yield Holm's p and number of comparisons of each test; no p where it has none."""
    p_values = [test.p_value() for test in tests]
    adjusted = iter(holm([p for p in p_values if p is not None], level))
    for p in p_values:
        yield next(adjusted) if p is not None else (None, 1)


def _difference(
    run: Evidence, task: TaskReference, old: TaskReference
) -> PairedDifference | _Independent:
    if task.right is None or old.right is None:
        return _independent(1.0, task.accuracy, old.accuracy)
    before, now = unpack(old.right, old.n), unpack(task.right, task.n)
    return PairedDifference((paired_sample(before, now, run.clusters.get(task.key)),))


def _unlike(run: Evidence, against: Evidence) -> str | None:
    """Why the stabilities of the two must not be compared."""
    ours, theirs = run.figures.method, against.figures.method
    if ours is None or theirs is None:
        return "one side has speeds only"
    for name in ("mode", "quantity", "ddof"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} is {getattr(ours, name)} here, {getattr(theirs, name)} there"
    return None if ours.mode == "paper" else f"mode {ours.mode} has no interval"


def _stability_change(
    run: Evidence,
    against: Evidence,
    task: TaskReference,
    old: TaskReference,
    stability: Estimate,
    old_stability: Estimate,
    allowed: Thresholds,
    confidence: float,
) -> _Change:
    before, now = _agreeing(against, old), _agreeing(run, task)
    spread = run.spreads.get(task.key)
    if before is None or now is None or spread is None:
        difference, how, unchanged = _by_intervals(stability, old_stability), "intervals", False
    else:
        unchanged = not (before != now).any()
        clusters = run.clusters.get(task.key)
        limits = allowed.model_copy(update={"confidence": confidence})
        difference = _resampled(before, now, spread, clusters, limits, task.task)
        how = f"paired, {task.n:,} questions"
    return _Change(task.task, old_stability.value, stability.value, difference, how, unchanged)


def _agreeing(side: Evidence, task: TaskReference) -> BoolArray | None:
    """On which questions a row agrees with its own dense model, bool [n]."""
    of_dense = {other.key: other for other in side.rows[side.figures.dense].tasks}
    dense = of_dense.get(task.key)
    if dense is None or dense.right is None or task.right is None or dense.n != task.n:
        return None
    same: BoolArray = unpack(dense.right, dense.n) == unpack(task.right, task.n)
    return same


def _resampled(
    before: BoolArray,
    now: BoolArray,
    spread: FloatArray,
    clusters: ClusterLabels | None,
    allowed: Thresholds,
    task: str,
) -> Estimate:
    weights = stability_weights(spread)
    moved = weights * (now.astype(np.float64) - before.astype(np.float64))
    value = float(moved.sum())
    if not (before != now).any():  # a bootstrap would claim certainty
        n = effective_sample_size(spread)
        n = n if clusters is None else min(n, clusters.shown.count)
        most = wilson(0.0, n, allowed.confidence)[1]  # share that may change, of which none did
        return Estimate(value=value, low=-most, high=most)
    if clusters is not None:
        sums = clusters.sums(moved, weights)
        moved, weights = sums[:, 0], sums[:, 1]
    draws = ratio_draws(moved, weights, allowed.draws, task_generator(allowed.seed, task, "gate"))
    (low, high), _ = bootstrap_interval(value, draws, len(weights), allowed.confidence)
    return Estimate(value=value, low=low, high=high)


def _by_intervals(now: Estimate, before: Estimate) -> Estimate:
    """Difference of independent estimates; distances to their intervals' ends add by squares."""
    value = now.value - before.value
    if now.low is None or now.high is None or before.low is None or before.high is None:
        return Estimate(value=value)
    return Estimate(
        value=value,
        low=value - math.hypot(now.value - now.low, before.high - before.value),
        high=value + math.hypot(now.high - now.value, before.value - before.low),
    )
