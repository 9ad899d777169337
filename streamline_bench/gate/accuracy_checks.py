"""Accuracy of one row against the reference's.

With verdicts of both sides on the same questions: the paired difference with its interval and
McNemar's test, over clusters where questions belong together; else the difference of the two
estimates by their standard errors. p is adjusted over the row's tasks by Holm.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.gate.change import (
    Change,
    check_of,
    excludes_zero,
    mean_checks,
    shared_tasks,
)
from streamline_bench.gate.evidence import Evidence
from streamline_bench.gate.reference import RowReference, TaskReference, unpack
from streamline_bench.gate.result import Check, Thresholds
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.decision import holm
from streamline_bench.stability.statistics.estimates import paired_estimates
from streamline_bench.stability.statistics.paired import Outcomes
from streamline_bench.stability.statistics.resampled import resample_clusters

__all__ = ["accuracy_checks"]

BoolArray = npt.NDArray[np.bool_]


def accuracy_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check the accuracy of every task that both have, and their mean.

    Raises:
        ComparisonError: a task has other questions now.
    """
    changes = [
        _accuracy_change(run, row, old, allowed)
        for row, old in shared_tasks(now, before, against, run)
    ]
    p_values = holm([change.p_value for change in changes if change.p_value is not None])
    adjusted = iter(p_values)
    checks = []
    for change in changes:
        p = next(adjusted) if change.p_value is not None else None
        significant = (
            p < 1 - allowed.confidence if p is not None else excludes_zero(change.difference)
        )
        checks.append(check_of(now, "accuracy", change, allowed.accuracy, significant, p))
    return checks + mean_checks(now, "accuracy", changes, allowed.accuracy)


def _accuracy_change(
    run: Evidence, task: TaskReference, old: TaskReference, allowed: Thresholds
) -> Change:
    before, now = old.accuracy.value, task.accuracy.value
    if task.right is None or old.right is None:
        difference, p = _independent(task.accuracy, old.accuracy, allowed.confidence)
        return Change(task, before, now, difference, "standard errors", p)
    clusters = run.clusters.get((task.task, task.filter))
    right = unpack(old.right, old.n), unpack(task.right, task.n)
    found = _paired(*right, clusters, allowed, task.task)
    return Change(
        task,
        before,
        now,
        found["difference"],
        f"paired, {task.n:,} questions",
        found["p_value"],
        unchanged=old.right == task.right,
    )


def _paired(
    before: BoolArray,
    now: BoolArray,
    clusters: ClusterLabels | None,
    allowed: Thresholds,
    task: str,
) -> dict[str, Any]:
    settings = Settings(
        confidence=allowed.confidence,
        draws=allowed.draws,
        seed=allowed.seed,
        margin=allowed.accuracy,
    )
    outcomes = Outcomes.of(before, now)
    if clusters is None:
        return paired_estimates(outcomes, settings, None, None)
    sums = clusters.sums(np.ones(len(now)), before, now, before == now)
    resampled = resample_clusters(sums, clusters.shown.kind, settings, task)
    net = clusters.sums(now.astype(np.int64) - before.astype(np.int64))[:, 0]
    return paired_estimates(outcomes, settings, resampled, net)


def _independent(
    now: Estimate, before: Estimate, confidence: float
) -> tuple[Estimate, float | None]:
    """Difference of two estimates by their standard errors; without them, no interval and no p."""
    value = now.value - before.value
    if now.standard_error is None or before.standard_error is None:
        return Estimate(value=value), None
    error = math.hypot(now.standard_error, before.standard_error)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    p = math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else float(value == 0)
    return Estimate(value=value, standard_error=error, low=value - half, high=value + half), p
