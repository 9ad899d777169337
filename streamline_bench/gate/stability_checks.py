"""Stability of one row against the reference's.

With verdicts of the row and of its dense model on both sides: the difference of agreement with the
dense model, weighted as in the stability itself, with an interval by resampling questions (or what
they belong to); else the difference of the two estimates, whose intervals add up by squares.
Intervals are Bonferroni adjusted over the row's tasks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.intervals import (
    bootstrap_interval,
    ratio_draws,
    task_generator,
)
from streamline_bench.stability.statistics.paired import wilson
from streamline_bench.stability.statistics.stability import effective_sample_size, stability_weights

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def stability_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, allowed: Thresholds
) -> list[Check]:
    """Check the stability of every task that has one in the reference, and their mean."""
    shared = shared_tasks(now, before, against, run)
    pairs = [
        _Pair(task, old, task.stability, old.stability)
        for task, old in shared
        if task.stability is not None and old.stability is not None
    ]
    missing = [
        _missing(now, old.task, old.stability)
        for task, old in shared
        if task.stability is None and old.stability is not None
    ]
    if not pairs:
        return missing
    reason = _unlike(run, against)
    if reason is not None:
        left_out = Check(row=now.label, quantity="stability", status="not compared", reason=reason)
        return [*missing, left_out]
    level = allowed.model_copy(update={"confidence": 1 - (1 - allowed.confidence) / len(pairs)})
    changes = [_change(run, against, pair, level) for pair in pairs]
    checks = [
        check_of(now, "stability", change, allowed.stability, excludes_zero(change.difference))
        for change in changes
    ]
    mean = [_change(run, against, pair, allowed) for pair in pairs]
    return missing + checks + mean_checks(now, "stability", mean, allowed.stability)


class _Pair(NamedTuple):
    """One task now and in the reference, with both stabilities."""

    task: TaskReference
    old: TaskReference
    stability: Estimate
    old_stability: Estimate


def _missing(row: RowReference, task: str, old: Estimate) -> Check:
    return Check(
        row=row.label,
        quantity="stability",
        task=task,
        status="missing",
        reference=old.value,
        reason="the run has no stability of this task",
    )


def _unlike(run: Evidence, against: Evidence) -> str | None:
    """Why the stabilities of the two must not be compared."""
    ours, theirs = run.figures.method, against.figures.method
    for name in ("mode", "quantity", "ddof"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} is {getattr(ours, name)} here, {getattr(theirs, name)} there"
    if ours.mode != "paper":
        return f"mode {ours.mode} has no interval"
    return None


def _change(run: Evidence, against: Evidence, pair: _Pair, allowed: Thresholds) -> Change:
    task = pair.task
    before, now = _agreeing(against, pair.old), _agreeing(run, task)
    spread = run.spreads.get((task.task, task.filter))
    values = pair.old_stability.value, pair.stability.value
    if before is None or now is None or spread is None:
        difference = _by_intervals(pair.stability, pair.old_stability)
        return Change(task, *values, difference, "intervals")
    clusters = run.clusters.get((task.task, task.filter))
    return Change(
        task,
        *values,
        _paired(before, now, spread, clusters, allowed, task.task),
        f"paired, {task.n:,} questions",
        unchanged=not (before != now).any(),
    )


def _agreeing(side: Evidence, task: TaskReference) -> BoolArray | None:
    """On which questions a row agrees with its own dense model, bool [n]."""
    dense = next(
        (
            other
            for other in side.rows[side.figures.dense].tasks
            if (other.task, other.filter) == (task.task, task.filter)
        ),
        None,
    )
    if dense is None or dense.right is None or task.right is None or dense.n != task.n:
        return None
    same: BoolArray = unpack(dense.right, dense.n) == unpack(task.right, task.n)
    return same


def _paired(
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
