"""Several tasks: groups, and over all tasks the means of theirs (macro) and of documents (micro).

The tasks of a group (MMLU's subjects) are clusters of its documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.comparison import Clusters, Flips, GroupComparison, Overall
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import BoolArray
from streamline_bench.stability.statistics.choices import ChoiceMeasures
from streamline_bench.stability.statistics.clusters import ClusterLabels, pooled_labels
from streamline_bench.stability.statistics.guessing import retention_above_chance
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample, kappa, mcnemar
from streamline_bench.stability.statistics.score import PairedDifference, decide
from streamline_bench.stability.statistics.stability import stability_estimate
from streamline_bench.stability.task_comparison import (
    ComparedTask,
    accuracy_estimate,
    choice_estimates,
    mean_chance,
    paired_estimates,
    paired_sample,
    retention_estimate,
)


def macro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """Unweighted means over tasks, which are taken as given; each task's error is of its documents.

    The difference is tested as that of one task, by its error over all tasks
    (:class:`PairedDifference`). Other intervals add up by squares (:func:`square_and_add`), so that
    a task without flips keeps the uncertainty that its interval has.
    """
    results = [item.result for item in compared]
    samples = tuple(item.sample for item in compared)
    paired = PairedDifference(samples)
    p, difference = paired.p_value(), paired.interval(settings.confidence, settings.margin)
    kappas = [result.kappa for result in results if result.kappa is not None]
    of_answers = [each.answer_kappa for each in results if each.answer_kappa is not None]
    return Overall(
        tasks=len(compared),
        n=sum(result.n for result in results),
        stability_tasks=_count(result.stability for result in results),
        dense=_mean([result.dense for result in results]),
        pruned=_mean([result.pruned for result in results]),
        difference=difference,
        agreement=square_and_add([result.agreement for result in results]),
        retention=retention_estimate(samples, settings.confidence),
        stability=_over_tasks(result.stability for result in results),
        flips=_total_flips(compared),
        kappa=sum(kappas) / len(kappas) if kappas else None,
        answer_kappa=sum(of_answers) / len(of_answers) if of_answers else None,
        p_value=p,
        p_method=paired.method,
        margin=settings.margin,
        noninferiority_p=paired.tail(-settings.margin),
        detectable=paired.detectable(settings.confidence),
        decision=decide(difference, settings.margin, significant=p < 1 - settings.confidence),
        retention_above_chance=_above_chance(compared, settings),
        **_macro_choices(compared),
    )


def micro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """All documents as if of one task; clusters stay together."""
    outcomes: Outcomes = reduce(add, (item.sample.outcomes for item in compared))
    clusters = _pooled(compared)
    sample = PairedSample(outcomes)
    if clusters is not None:
        strata = tuple(table for item in compared for table in _strata(item))
        sample = PairedSample(outcomes, strata, clusters.shown.kind)
    found = _over_documents(compared, sample, _pooled, settings)
    significant = found["p_value"] < 1 - settings.confidence
    return Overall(
        tasks=len(compared),
        stability_tasks=_count(item.std for item in compared),
        mcnemar_p=mcnemar(outcomes),
        decision=decide(found["difference"], settings.margin, significant=significant),
        **found,
    )


def _over_documents(
    members: Sequence[ComparedTask],
    sample: PairedSample,
    labels: Callable[[Sequence[ComparedTask]], ClusterLabels | None],
    settings: Settings,
) -> dict[str, Any]:
    """What is computed over the documents of several tasks, for micro and for groups.

    Args:
        labels: the clusters of the documents of some of the tasks.
    """
    clusters = labels(members)
    chosen = [item for item in members if item.measures is not None]
    dense, pruned = (accuracy_estimate(right, clusters) for right in _verdicts(members))
    return {
        "n": sample.outcomes.n,
        "dense": dense,
        "pruned": pruned,
        "stability": _pooled_stability(members, settings),
        "flips": _total_flips(members),
        "kappa": kappa(sample.outcomes),
        "clusters": None if clusters is None else clusters.shown,
        **paired_estimates(sample, settings),
        **_pooled_choices(chosen, labels(chosen) if chosen else None, settings),
    }


def _above_chance(compared: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    """Over the tasks that have choices."""
    known = [(item.sample, mean_chance(item.measures)) for item in compared if item.measures]
    if not known:
        return None
    samples, chances = zip(*known, strict=True)
    return retention_above_chance(samples, chances, settings.confidence)


def _strata(item: ComparedTask) -> tuple[npt.NDArray[np.float64], ...]:
    """Clusters of a task; its documents where they stand alone."""
    if item.sample.strata:
        return item.sample.strata
    columns = [np.ones(len(item.right)), item.right, item.right_now, item.agree]
    return (np.stack(columns, axis=1).astype(np.float64),)


def _total_flips(compared: Sequence[ComparedTask]) -> Flips:
    flips = [item.result.flips for item in compared]
    moved = [item.wrong_to_other_wrong for item in flips if item.wrong_to_other_wrong is not None]
    return Flips(
        right_to_wrong=sum(item.right_to_wrong for item in flips),
        wrong_to_right=sum(item.wrong_to_right for item in flips),
        wrong_to_other_wrong=sum(moved) if len(moved) == len(flips) else None,
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


def _pooled(compared: Sequence[ComparedTask]) -> ClusterLabels | None:
    return pooled_labels([(item.sample.outcomes.n, item.clusters) for item in compared])


def _pooled_stability(members: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    """Stability over the documents of all tasks that have one.

    None for the reference script, which never pools tasks.
    """
    stable = [item for item in members if item.std is not None]
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


def _verdicts(members: Sequence[ComparedTask]) -> tuple[BoolArray, BoolArray]:
    """Verdicts of the dense and of the pruned model over the documents of all tasks."""
    return (
        np.concatenate([item.right for item in members]),
        np.concatenate([item.right_now for item in members]),
    )


def _pooled_choices(
    chosen: Sequence[ComparedTask], clusters: ClusterLabels | None, settings: Settings
) -> dict[str, Any]:
    """What needs choices, over the documents of all tasks that have them; else nothing."""
    parts = [item.measures for item in chosen if item.measures is not None]
    if not parts:
        return {}
    measures = ChoiceMeasures.joined(parts)
    accuracies = tuple(accuracy_estimate(right, clusters) for right in _verdicts(chosen))
    found = choice_estimates(measures, accuracies, clusters, settings)
    shift, calibrated = found["choices"], found["calibration"]
    return {
        "corrected_tasks": len(chosen),
        "dense_corrected": found["dense_corrected"],
        "pruned_corrected": found["pruned_corrected"],
        "choice_tasks": _count(item.result.choices for item in chosen),
        "choice_kl": shift and shift.kl,
        "choice_js": shift and shift.js,
        "margin_shift": shift and shift.margin_shift,
        "calibration_tasks": _count(item.result.calibration for item in chosen),
        "dense_calibration_error": calibrated and calibrated.dense_error,
        "pruned_calibration_error": calibrated and calibrated.pruned_error,
        "brier_shift": calibrated and calibrated.brier_shift,
    }


def compare_groups(
    compared: Sequence[ComparedTask], groups: Mapping[str, Sequence[str]], settings: Settings
) -> list[tuple[GroupComparison, PairedSample]]:
    """Compare every group of which at least two tasks were compared, in the order of ``groups``.

    ``p_holm``, ``adjusted`` and ``decision`` are left open: they need all groups.
    """
    by_task = {item.result.task: item for item in compared}
    found = []
    for group in groups:
        members = [by_task[name] for name in leaf_tasks(group, groups) if name in by_task]
        if len(members) > 1:
            found.append(_compare(group, members, settings))
    return found


def leaf_tasks(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, of its groups, and so on; each once."""
    return list(dict.fromkeys(_leaves(name, groups, frozenset())))


def _leaves(name: str, groups: Mapping[str, Sequence[str]], above: frozenset[str]) -> Iterator[str]:
    if not groups.get(name):
        yield name
        return
    for part in groups[name]:
        if part not in above:
            yield from _leaves(part, groups, above | {name})


def _compare(
    group: str, members: list[ComparedTask], settings: Settings
) -> tuple[GroupComparison, PairedSample]:
    sample = paired_sample(*_verdicts(members), _by_task(members))
    result = GroupComparison(
        group=group,
        tasks=tuple(item.result.task for item in members),
        macro_dense=float(np.mean([item.sample.outcomes.dense_accuracy for item in members])),
        macro_pruned=float(np.mean([item.sample.outcomes.pruned_accuracy for item in members])),
        macro_stability=_over_tasks(item.result.stability for item in members),
        **_over_documents(members, sample, _by_task, settings),
    )
    return result, sample


def _by_task(members: Sequence[ComparedTask]) -> ClusterLabels:
    sizes = [item.sample.outcomes.n for item in members]
    shown = Clusters(kind="tasks", count=len(sizes), largest=max(sizes))
    return ClusterLabels(np.repeat(np.arange(len(sizes)), sizes), shown)
