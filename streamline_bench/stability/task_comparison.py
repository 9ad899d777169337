"""Dense against pruned on one task: every number of a leaderboard cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.bootstrap import (
    percentile_interval,
    stability_draws,
    task_generator,
)
from streamline_bench.stability.comparison import Estimate, Flips, TaskComparison
from streamline_bench.stability.metrics import choice_spread, effective_sample_size, stability
from streamline_bench.stability.paired import (
    Outcomes,
    accuracy_error,
    kappa,
    mcnemar,
    newcombe,
    wilson,
)
from streamline_bench.stability.settings import Settings, Verdict

__all__ = [
    "ComparedTask",
    "agreement_estimate",
    "compare_task",
    "difference_estimate",
    "stability_estimate",
]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ComparedTask:
    """One compared task, with what the summaries over tasks need of it.

    Attributes:
        agree: bool [n], same verdict.
        std: float64 [n], spread of the dense model's choices; None for tasks without choices.
        stability_draws: float64 [draws], resampled stability; None where there is no interval.
    """

    result: TaskComparison
    outcomes: Outcomes
    agree: BoolArray
    std: FloatArray | None
    stability_draws: FloatArray | None


def compare_task(dense: pd.DataFrame, pruned: pd.DataFrame, settings: Settings) -> ComparedTask:
    """Compare aligned rows of one (task, filter); every row has a verdict."""
    right = dense[settings.verdict].to_numpy(dtype=np.bool_)
    right_now = pruned[settings.verdict].to_numpy(dtype=np.bool_)
    outcomes = Outcomes.of(right, right_now)
    agree: BoolArray = right == right_now
    std = None
    if any(isinstance(choices, list) and len(choices) > 1 for choices in dense["choices"]):
        std = choice_spread(dense, quantity=settings.spread_quantity, ddof=settings.spread_ddof)
    stable, draws = None, None
    if std is not None:
        names = (str(dense.iloc[0]["task"]), str(dense.iloc[0]["filter"]))
        stable, draws = stability_estimate(std, agree, settings, *names)
    same = _same_choice(dense, pruned, settings.verdict)
    first = dense.iloc[0]
    verdict = first["verdict_metric"] if settings.verdict == "correct" else "acc_norm"
    result = TaskComparison(
        task=str(first["task"]),
        filter=str(first["filter"]),
        output_type=str(first["output_type"]),
        verdict=str(verdict),
        n=outcomes.n,
        dense=_accuracy(outcomes.dense_accuracy, outcomes.n),
        pruned=_accuracy(outcomes.pruned_accuracy, outcomes.n),
        difference=difference_estimate(outcomes, settings),
        mcnemar_p=mcnemar(outcomes),
        mcnemar_mid_p=mcnemar(outcomes, mid_p=True),
        agreement=agreement_estimate(outcomes, settings),
        stability=stable,
        effective_n=effective_sample_size(std) if std is not None else None,
        same_choice=None if same is None else float(same.mean()),
        kappa=kappa(outcomes),
        flips=_flips(outcomes, right, right_now, same),
    )
    return ComparedTask(result, outcomes, agree, std, draws)


def _same_choice(dense: pd.DataFrame, pruned: pd.DataFrame, verdict: Verdict) -> BoolArray | None:
    """Which documents both answered alike, bool [n]; None if the choice is not recorded."""
    by_norm = verdict == "correct_norm" or (dense["verdict_metric"] == "acc_norm").all()
    for column in ("text", "prediction_norm" if by_norm else "prediction"):
        if dense[column].notna().all() and pruned[column].notna().all():
            same: BoolArray = dense[column].to_numpy() == pruned[column].to_numpy()
            return np.asarray(same, dtype=np.bool_)
    return None


def _flips(
    outcomes: Outcomes, right: BoolArray, right_now: BoolArray, same: BoolArray | None
) -> Flips:
    moved = None if same is None else int((~right & ~right_now & ~same).sum())
    return Flips(
        right_to_wrong=outcomes.right_to_wrong,
        wrong_to_right=outcomes.wrong_to_right,
        wrong_to_other_wrong=moved,
    )


def _accuracy(value: float, n: int) -> Estimate:
    return Estimate(value=value, standard_error=accuracy_error(value, n))


def difference_estimate(outcomes: Outcomes, settings: Settings) -> Estimate:
    """Paired difference of accuracy with Newcombe's interval."""
    low, high = newcombe(outcomes, settings.confidence)
    return Estimate(
        value=outcomes.difference, low=low, high=high, method="Newcombe paired (square-and-add)"
    )


def agreement_estimate(outcomes: Outcomes, settings: Settings) -> Estimate:
    """Share of equal verdicts with Wilson's interval."""
    same = outcomes.both_right + outcomes.both_wrong
    low, high = wilson(same, outcomes.n, settings.confidence)
    return Estimate(value=outcomes.agreement, low=low, high=high, method="Wilson")


def stability_estimate(
    std: FloatArray, agree: BoolArray, settings: Settings, *names: str
) -> tuple[Estimate, FloatArray | None]:
    """Stability with its bootstrap interval, and the draws, seeded by the settings and ``names``.

    Where all pairs agree, or none, a bootstrap would claim certainty: then Wilson's interval at the
    effective sample size. The reference script's value gets none: it is not a statistic of the
    answers but of their order.
    """
    value = stability(std, agree, mode=settings.mode)
    if settings.mode == "reference_script":
        return Estimate(value=value), None
    draws = stability_draws(std, agree, settings.draws, task_generator(settings.seed, *names))
    if agree.all() or not agree.any():
        n = effective_sample_size(std)
        low, high = wilson(value * n, n, settings.confidence)
        return Estimate(value=value, low=low, high=high, method="Wilson at the effective n"), draws
    low, high = percentile_interval(draws, settings.confidence)
    method = f"bootstrap, {settings.draws} draws"
    return Estimate(value=value, low=low, high=high, method=method), draws
