"""Summaries over tasks: macro (tasks weigh the same) and micro (documents weigh the same)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from statistics import NormalDist
from typing import Any

import numpy as np

from streamline_bench.stability.bootstrap import percentile_interval
from streamline_bench.stability.choice_distribution import ChoiceMeasures, choice_shift
from streamline_bench.stability.clusters import ClusterLabels, pooled_labels
from streamline_bench.stability.comparison import Estimate, Flips, Overall
from streamline_bench.stability.decision import decide, detectable_at
from streamline_bench.stability.estimates import (
    accuracy_estimate,
    chance_corrected,
    paired_estimates,
    stability_estimate,
)
from streamline_bench.stability.means import mean_estimate
from streamline_bench.stability.paired import Outcomes, kappa, mcnemar
from streamline_bench.stability.resampled import (
    Resampled,
    resample_documents,
    retention_draws,
    varies,
)
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.task_comparison import ComparedTask

__all__ = ["macro", "micro", "pooled_stability", "square_and_add", "total_flips"]


def macro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """Unweighted means over tasks, which are taken as given; each task's error is of its documents.

    Their intervals add up by squares (:func:`square_and_add`), so that a task without flips keeps
    the uncertainty that its interval has.
    """
    results = [item.result for item in compared]
    difference = square_and_add([result.difference for result in results])
    low, high = difference.low, difference.high
    significant = low is not None and high is not None and (low > 0 or high < 0)
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
        retention=_macro_retention(compared, difference, settings),
        margin=settings.margin,
        detectable=_macro_detectable(difference, settings.confidence),
        decision=decide(difference, settings.margin, significant=significant),
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
    return Overall(
        tasks=len(compared),
        n=outcomes.n,
        stability_tasks=len(stable),
        dense=accuracy_estimate(outcomes.dense_accuracy, outcomes.n),
        pruned=accuracy_estimate(outcomes.pruned_accuracy, outcomes.n),
        stability=pooled_stability(stable, settings),
        flips=total_flips(compared),
        mcnemar_p=mcnemar(outcomes),
        kappa=kappa(outcomes),
        clusters=None if clusters is None else clusters.shown,
        decision=decide(paired["difference"], settings.margin, significant=significant),
        **paired,
        **_micro_choices([item for item in compared if item.measures is not None], settings),
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


def _macro_detectable(difference: Estimate, confidence: float) -> float | None:
    """By the standard error that the interval's width amounts to."""
    if difference.low is None or difference.high is None:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return detectable_at((difference.high - difference.low) / (2 * z), confidence)


def _macro_retention(
    compared: Sequence[ComparedTask], difference: Estimate, settings: Settings
) -> Estimate | None:
    """Ratio of the mean accuracies."""
    dense = sum(item.result.dense.value for item in compared)
    if dense == 0.0:
        return None
    value = sum(item.result.pruned.value for item in compared) / dense
    ratios = retention_draws([_resampled(item, settings) for item in compared], value)
    if varies(ratios):
        low, high = percentile_interval(ratios, settings.confidence)
        method = f"bootstrap within tasks, {settings.draws} draws"
        return Estimate(value=value, low=max(0.0, low), high=high, method=method)
    if difference.low is None or difference.high is None:
        return Estimate(value=value)
    # Without flips a bootstrap would claim certainty; the difference's interval does not.
    mean = dense / len(compared)
    low, high = (
        value + (difference.low - difference.value) / mean,
        value + (difference.high - difference.value) / mean,
    )
    return Estimate(value=value, low=max(0.0, low), high=high, method="difference / dense accuracy")


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


def _micro_choices(chosen: Sequence[ComparedTask], settings: Settings) -> dict[str, Any]:
    if not chosen:
        return {}
    outcomes: Outcomes = reduce(add, (item.outcomes for item in chosen))
    parts = [item.measures for item in chosen if item.measures is not None]
    measures = ChoiceMeasures.joined(parts)
    chance = float(np.nanmean(measures.chance))
    clusters = _pooled(chosen)
    labels = None if clusters is None else clusters.labels
    shift = choice_shift(measures, settings.confidence, labels)
    brier = measures.pruned_brier - measures.dense_brier
    return {
        "corrected_tasks": len(chosen),
        "dense_corrected": chance_corrected(
            accuracy_estimate(outcomes.dense_accuracy, outcomes.n), chance
        ),
        "pruned_corrected": chance_corrected(
            accuracy_estimate(outcomes.pruned_accuracy, outcomes.n), chance
        ),
        "choice_tasks": _count(item.result.choices for item in chosen),
        "choice_kl": shift and shift.kl,
        "choice_js": shift and shift.js,
        "margin_shift": shift and shift.margin_shift,
        "calibration_tasks": _count(item.result.calibration for item in chosen),
        "brier_shift": (
            None if np.isnan(brier).all() else mean_estimate(brier, settings.confidence, labels)
        ),
    }
