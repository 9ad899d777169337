"""Summaries over tasks: macro (tasks weigh the same) and micro (documents weigh the same)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.bootstrap import (
    difference_draws,
    percentile_interval,
    stability_draws,
    task_generator,
)
from streamline_bench.stability.comparison import Estimate, Flips, Overall
from streamline_bench.stability.paired import Outcomes, accuracy_error, kappa, mcnemar
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.task_comparison import (
    ComparedTask,
    agreement_estimate,
    difference_estimate,
    stability_estimate,
)

__all__ = ["macro", "micro"]

FloatArray = npt.NDArray[np.float64]


def macro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """Unweighted means over tasks; intervals by a bootstrap that resamples inside each task."""
    results = [item.result for item in compared]
    stable = [item for item in compared if item.std is not None]
    return Overall(
        tasks=len(compared),
        n=sum(result.n for result in results),
        stability_tasks=len(stable),
        dense=_mean([result.dense for result in results]),
        pruned=_mean([result.pruned for result in results]),
        difference=_bootstrapped(
            [result.difference.value for result in results],
            [
                difference_draws(item.outcomes, settings.draws, _generator(item, settings))
                for item in compared
            ],
            settings,
        ),
        agreement=_bootstrapped(
            [result.agreement.value for result in results],
            [_agreement_draws(item, settings) for item in compared],
            settings,
        ),
        stability=_macro_stability(stable, settings),
        flips=_flips(compared),
    )


def micro(compared: Sequence[ComparedTask], settings: Settings) -> Overall:
    """All documents as if of one task."""
    outcomes: Outcomes = reduce(add, (item.outcomes for item in compared))
    stable = [item for item in compared if item.std is not None]
    n = outcomes.n
    return Overall(
        tasks=len(compared),
        n=n,
        stability_tasks=len(stable),
        dense=_accuracy(outcomes.dense_accuracy, n),
        pruned=_accuracy(outcomes.pruned_accuracy, n),
        difference=difference_estimate(outcomes, settings),
        agreement=agreement_estimate(outcomes, settings),
        stability=_micro_stability(stable, settings),
        flips=_flips(compared),
        mcnemar_p=mcnemar(outcomes),
        kappa=kappa(outcomes),
    )


def _generator(item: ComparedTask, settings: Settings) -> np.random.Generator:
    return task_generator(settings.seed, item.result.task, item.result.filter)


def _accuracy(value: float, n: int) -> Estimate:
    return Estimate(value=value, standard_error=accuracy_error(value, n))


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    errors = [item.standard_error for item in estimates if item.standard_error is not None]
    error = None
    if len(errors) == len(estimates):
        error = math.sqrt(sum(value**2 for value in errors)) / len(errors)
    value = sum(item.value for item in estimates) / len(estimates)
    return Estimate(value=value, standard_error=error)


def _bootstrapped(
    values: Sequence[float], draws: Sequence[FloatArray], settings: Settings
) -> Estimate:
    mean: FloatArray = np.mean(draws, axis=0)
    low, high = percentile_interval(mean, settings.confidence)
    method = f"bootstrap within tasks, {settings.draws} draws"
    return Estimate(value=sum(values) / len(values), low=low, high=high, method=method)


def _agreement_draws(item: ComparedTask, settings: Settings) -> FloatArray:
    equal = np.zeros(len(item.agree))
    return stability_draws(equal, item.agree, settings.draws, _generator(item, settings))


def _macro_stability(stable: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    values = [item.result.stability.value for item in stable if item.result.stability is not None]
    if not values:
        return None
    if settings.mode == "reference_script":
        return Estimate(value=sum(values) / len(values))
    draws = [item.stability_draws for item in stable if item.stability_draws is not None]
    return _bootstrapped(values, draws, settings)


def _micro_stability(stable: Sequence[ComparedTask], settings: Settings) -> Estimate | None:
    """None for the reference script, which never pools tasks."""
    spreads = [item.std for item in stable if item.std is not None]
    if not spreads or settings.mode == "reference_script":
        return None
    agree = np.concatenate([item.agree for item in stable])
    return stability_estimate(np.concatenate(spreads), agree, settings, "all tasks")[0]


def _flips(compared: Sequence[ComparedTask]) -> Flips:
    flips = [item.result.flips for item in compared]
    moved = [item.wrong_to_other_wrong for item in flips]
    return Flips(
        right_to_wrong=sum(item.right_to_wrong for item in flips),
        wrong_to_right=sum(item.wrong_to_right for item in flips),
        wrong_to_other_wrong=(
            None if None in moved else sum(value for value in moved if value is not None)
        ),
    )
