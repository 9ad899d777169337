"""Summaries over tasks: macro (tasks weigh the same) and micro (documents weigh the same)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from statistics import NormalDist
from typing import Any

import numpy as np

from streamline_bench.stability.comparison import Estimate, Flips, Overall
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.choices import ChoiceMeasures, calibration, choice_shift
from streamline_bench.stability.statistics.clusters import ClusterLabels, pooled_labels
from streamline_bench.stability.statistics.decision import decide, detectable_at
from streamline_bench.stability.statistics.estimates import (
    accuracy_estimate,
    chance_corrected,
    paired_estimates,
    stability_estimate,
)
from streamline_bench.stability.statistics.paired import Outcomes, kappa, mcnemar, mean_retention
from streamline_bench.stability.statistics.resampled import Resampled, resample_documents
from streamline_bench.stability.task_comparison import ComparedTask

__all__ = [
    "macro",
    "micro",
    "pooled_accuracies",
    "pooled_choices",
    "pooled_stability",
    "square_and_add",
    "total_flips",
]


def macro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """Unweighted means over tasks, which are taken as given; each task's error is of its documents.

    Their intervals add up by squares (:func:`square_and_add`), so that a task without flips keeps
    the uncertainty that its interval has.
    """
    results = [item.result for item in compared]
    difference = square_and_add([result.difference for result in results])
    low, high = difference.low, difference.high
    significant = low is not None and high is not None and (low > 0 or high < 0)
    kappas = [result.kappa for result in results if result.kappa is not None]
    return Overall(
        tasks=len(compared),
        n=sum(result.n for result in results),
        stability_tasks=_count(result.stability for result in results),
        dense=_mean([result.dense for result in results]),
        pruned=_mean([result.pruned for result in results]),
        difference=difference,
        agreement=square_and_add([result.agreement for result in results]),
        stability=_over_tasks(result.stability for result in results),
        flips=total_flips(compared),
        kappa=sum(kappas) / len(kappas) if kappas else None,
        margin=settings.margin,
        decision=decide(difference, settings.margin, significant=significant),
        **_macro_tests(compared, difference, settings),
        **_macro_choices(compared),
    )


def micro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """All documents as if of one task; clusters stay together."""
    outcomes: Outcomes = reduce(add, (item.outcomes for item in compared))
    stable = [item for item in compared if item.std is not None]
    clusters = _pooled(compared)
    resampled, net = None, None
    if clusters is not None:
        resampled = _resampled_together(compared, settings)
        net = clusters.sums(np.concatenate([item.net for item in compared]))[:, 0]
    paired = paired_estimates(outcomes, settings, resampled, net)
    significant = paired["p_value"] < 1 - settings.confidence
    dense, pruned = pooled_accuracies(compared, clusters)
    chosen = [item for item in compared if item.measures is not None]
    return Overall(
        tasks=len(compared),
        n=outcomes.n,
        stability_tasks=len(stable),
        dense=dense,
        pruned=pruned,
        stability=pooled_stability(stable, settings),
        flips=total_flips(compared),
        mcnemar_p=mcnemar(outcomes),
        kappa=kappa(outcomes),
        clusters=None if clusters is None else clusters.shown,
        decision=decide(paired["difference"], settings.margin, significant=significant),
        **paired,
        **pooled_choices(chosen, _pooled(chosen) if chosen else None, settings),
    )


def square_and_add(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates; distances to their intervals' ends add up by squares.

    G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008) 1693-1702. No interval where one of
    the estimates has none.
    """
    count = len(estimates)
    value = sum(item.value for item in estimates) / count
    below = [item.value - item.low for item in estimates if item.low is not None]
    above = [item.high - item.value for item in estimates if item.high is not None]
    if len(below) < count or len(above) < count:
        return Estimate(value=value)
    return Estimate(
        value=value,
        low=value - math.hypot(*below) / count,
        high=value + math.hypot(*above) / count,
        method="square-and-add over tasks",
    )


def total_flips(compared: Sequence[ComparedTask]) -> Flips:
    """Flips of all tasks."""
    flips = [item.result.flips for item in compared]
    moved = [item.wrong_to_other_wrong for item in flips]
    return Flips(
        right_to_wrong=sum(item.right_to_wrong for item in flips),
        wrong_to_right=sum(item.wrong_to_right for item in flips),
        wrong_to_other_wrong=(
            None if None in moved else sum(value for value in moved if value is not None)
        ),
    )


def _count(values: Any) -> int:
    return sum(1 for value in values if value is not None)


def _over_tasks(values: Any) -> Estimate | None:
    """Of the tasks that have it; None if none has."""
    known = [value for value in values if value is not None]
    return square_and_add(known) if known else None


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    errors = [item.standard_error for item in estimates if item.standard_error is not None]
    error = None
    if len(errors) == len(estimates):
        error = math.hypot(*errors) / len(errors)
    value = sum(item.value for item in estimates) / len(estimates)
    return Estimate(value=value, standard_error=error)


def _macro_tests(
    compared: Sequence[ComparedTask], difference: Estimate, settings: Settings
) -> dict[str, Any]:
    """What follows from the interval of the mean difference; of one task, what the task has.

    Its width amounts to a standard error, to which the normal distribution gives p and power: p is
    below 1 - confidence exactly where the interval does not contain 0.
    """
    if len(compared) == 1:
        names = "retention", "p_value", "p_method", "noninferiority_p", "detectable"
        return {name: getattr(compared[0].result, name) for name in names}
    found: dict[str, Any] = {"retention": _macro_retention(compared, settings)}
    low, high = difference.low, difference.high
    if low is None or high is None:
        return found
    z = NormalDist().inv_cdf(0.5 + settings.confidence / 2)
    p = _chance_at_or_below(0.0, difference.value, (low, high), z)
    return found | {
        "p_value": 2 * min(p, 1 - p),
        "p_method": "normal, from the interval over tasks",
        "noninferiority_p": _chance_at_or_below(-settings.margin, difference.value, (low, high), z),
        "detectable": detectable_at((high - low) / (2 * z), settings.confidence),
    }


def _chance_at_or_below(truth: float, value: float, ends: tuple[float, float], z: float) -> float:
    """One-sided p of a true difference of ``truth`` or less: ends lie z errors from the value."""
    distance = value - truth
    if distance == 0.0:
        return 0.5
    error = (value - ends[0] if distance > 0 else ends[1] - value) / z
    return math.erfc(distance / error / math.sqrt(2)) / 2


def _macro_retention(compared: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    """Ratio of the mean accuracies; clusters can only widen what a task adds to its interval."""
    outcomes = [item.outcomes for item in compared]
    dense = sum(one.dense_accuracy for one in outcomes)
    if dense == 0.0:
        return None
    value = sum(one.pruned_accuracy for one in outcomes) / dense
    reach = [
        0.0 if item.resampled is None else item.resampled.reach(value, settings.confidence)
        for item in compared
    ]
    low, high = mean_retention(outcomes, settings.confidence, reach) or (None, None)
    method = "ratio of means over tasks (square-and-add)"
    return Estimate(value=value, low=low, high=high, method=method)


def _resampled(item: ComparedTask, settings: Settings) -> Resampled:
    names = item.result.task, item.result.filter
    return item.resampled or resample_documents(item.outcomes, settings, *names)


def _resampled_together(compared: Sequence[ComparedTask], settings: Settings) -> Resampled:
    together: Resampled = reduce(add, (_resampled(item, settings) for item in compared))
    return together


def _pooled(compared: Sequence[ComparedTask]) -> ClusterLabels | None:
    return pooled_labels([(item.outcomes.n, item.clusters) for item in compared])


def pooled_stability(stable: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    """Stability over the documents of all tasks that have one.

    None for the reference script, which never pools tasks.
    """
    spreads = [item.std for item in stable if item.std is not None]
    if not spreads or settings.mode == "reference_script":
        return None
    agree = np.concatenate([item.agree for item in stable])
    std = np.concatenate(spreads)
    return stability_estimate(std, agree, settings, "all tasks", clusters=_pooled(stable))


def _macro_choices(compared: Sequence[ComparedTask]) -> dict[str, Any]:
    results = [item.result for item in compared if item.result.chance is not None]
    if not results:
        return {}
    shifts = [result.choices for result in results if result.choices is not None]
    calibrations = [result.calibration for result in results if result.calibration is not None]
    n = len(calibrations)
    return {
        "corrected_tasks": len(results),
        "dense_corrected": _mean([r.dense_corrected for r in results if r.dense_corrected]),
        "pruned_corrected": _mean([r.pruned_corrected for r in results if r.pruned_corrected]),
        "choice_tasks": len(shifts),
        "choice_kl": _over_tasks(shift.kl for shift in shifts),
        "choice_js": _over_tasks(shift.js for shift in shifts),
        "margin_shift": _over_tasks(shift.margin_shift for shift in shifts),
        "calibration_tasks": n,
        "dense_calibration_error": sum(c.dense_error for c in calibrations) / n if n else None,
        "pruned_calibration_error": sum(c.pruned_error for c in calibrations) / n if n else None,
        "brier_shift": _over_tasks(c.brier_shift for c in calibrations),
    }


def pooled_accuracies(
    compared: Sequence[ComparedTask], clusters: ClusterLabels | None
) -> tuple[Estimate, Estimate]:
    """Accuracy over the documents of all tasks, of the dense and of the pruned model."""
    return (
        accuracy_estimate(np.concatenate([item.right for item in compared]), clusters),
        accuracy_estimate(np.concatenate([item.right_now for item in compared]), clusters),
    )


def pooled_choices(
    chosen: Sequence[ComparedTask], clusters: ClusterLabels | None, settings: Settings
) -> dict[str, Any]:
    """What needs choices, over the documents of all tasks that have them; else nothing."""
    parts = [item.measures for item in chosen if item.measures is not None]
    if not parts:
        return {}
    measures = ChoiceMeasures.joined(parts)
    chance = float(np.nanmean(measures.chance))
    dense, pruned = pooled_accuracies(chosen, clusters)
    labels = None if clusters is None else clusters.labels
    shift = choice_shift(measures, settings.confidence, labels)
    calibrated = calibration(measures, settings.confidence, labels)
    return {
        "corrected_tasks": len(chosen),
        "dense_corrected": chance_corrected(dense, chance),
        "pruned_corrected": chance_corrected(pruned, chance),
        "choice_tasks": _count(item.result.choices for item in chosen),
        "choice_kl": shift and shift.kl,
        "choice_js": shift and shift.js,
        "margin_shift": shift and shift.margin_shift,
        "calibration_tasks": _count(item.result.calibration for item in chosen),
        "dense_calibration_error": calibrated and calibrated.dense_error,
        "pruned_calibration_error": calibrated and calibrated.pruned_error,
        "brier_shift": calibrated and calibrated.brier_shift,
    }
