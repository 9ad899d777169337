"""Dense against pruned on one task: every number of a leaderboard cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.comparison import Estimate, Flips, TaskComparison
from streamline_bench.stability.settings import Settings, Verdict
from streamline_bench.stability.statistics.choices import (
    ChoiceMeasures,
    calibration,
    choice_shift,
    measure_choices,
)
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.estimates import (
    accuracy_estimate,
    chance_corrected,
    paired_estimates,
    stability_estimate,
)
from streamline_bench.stability.statistics.paired import Outcomes, kappa, mcnemar
from streamline_bench.stability.statistics.resampled import Resampled, resample_clusters
from streamline_bench.stability.statistics.stability import choice_spread, effective_sample_size

__all__ = ["ComparedTask", "compare_task"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ComparedTask:
    """One compared task, with what the summaries over tasks need of it.

    Attributes:
        right, right_now: bool [n], verdicts of the dense and of the pruned model.
        std: float64 [n], spread of the dense model's choices; None for tasks without choices.
        measures: of the choices, per document; None likewise.
        clusters: None where every document stands alone.
        resampled: draws of the clusters; None likewise.
    """

    result: TaskComparison
    outcomes: Outcomes
    right: BoolArray
    right_now: BoolArray
    std: FloatArray | None
    measures: ChoiceMeasures | None
    clusters: ClusterLabels | None
    resampled: Resampled | None

    @property
    def agree(self) -> BoolArray:
        """Same verdict, bool [n]."""
        same: BoolArray = self.right == self.right_now
        return same

    @property
    def net(self) -> IntArray:
        """1 gained, -1 lost, 0 unchanged, int64 [n]."""
        return self.right_now.astype(np.int64) - self.right.astype(np.int64)


def compare_task(dense: pd.DataFrame, pruned: pd.DataFrame, settings: Settings) -> ComparedTask:
    """Compare aligned rows of one (task, filter); every row has a verdict.

    Raises:
        NumericsError: a log-likelihood or a spread is not finite; the document is named.
    """
    first = dense.iloc[0]
    names = (str(first["task"]), str(first["filter"]))
    right = dense[settings.verdict].to_numpy(dtype=np.bool_)
    right_now = pruned[settings.verdict].to_numpy(dtype=np.bool_)
    outcomes = Outcomes.of(right, right_now)
    agree: BoolArray = right == right_now
    measures = measure_choices(dense, pruned)
    std = None
    if measures is not None:
        std = choice_spread(dense, quantity=settings.spread_quantity, ddof=settings.spread_ddof)
    clusters = cluster_labels(dense["cluster"])
    resampled, net = None, None
    if clusters is not None:
        sums = clusters.sums(np.ones(len(agree)), right, right_now, agree)
        net = sums[:, 2] - sums[:, 1]
        resampled = resample_clusters(sums, clusters.shown.kind, settings, *names)
    same = _same_choice(dense, pruned, settings.verdict)
    verdict = first["verdict_metric"] if settings.verdict == "correct" else "acc_norm"
    accuracies = accuracy_estimate(right, clusters), accuracy_estimate(right_now, clusters)
    result = TaskComparison(
        task=names[0],
        filter=names[1],
        output_type=str(first["output_type"]),
        verdict=str(verdict),
        n=outcomes.n,
        dense=accuracies[0],
        pruned=accuracies[1],
        mcnemar_p=mcnemar(outcomes),
        mcnemar_mid_p=mcnemar(outcomes, mid_p=True),
        stability=_stability(std, agree, clusters, settings, names),
        effective_n=effective_sample_size(std) if std is not None else None,
        same_choice=None if same is None else float(same.mean()),
        kappa=kappa(outcomes),
        flips=_flips(outcomes, right, right_now, same),
        clusters=None if clusters is None else clusters.shown,
        **paired_estimates(outcomes, settings, resampled, net),
        **_of_choices(measures, accuracies, clusters, settings),
    )
    return ComparedTask(result, outcomes, right, right_now, std, measures, clusters, resampled)


def _stability(
    std: FloatArray | None,
    agree: BoolArray,
    clusters: ClusterLabels | None,
    settings: Settings,
    names: tuple[str, str],
) -> Estimate | None:
    if std is None:
        return None
    return stability_estimate(std, agree, settings, *names, clusters=clusters)


def _of_choices(
    measures: ChoiceMeasures | None,
    accuracies: tuple[Estimate, Estimate],
    clusters: ClusterLabels | None,
    settings: Settings,
) -> dict[str, Any]:
    """Fields that need choices; none for generated text."""
    if measures is None:
        return {}
    chance = float(np.nanmean(measures.chance))
    labels = None if clusters is None else clusters.labels
    return {
        "chance": chance,
        "dense_corrected": chance_corrected(accuracies[0], chance),
        "pruned_corrected": chance_corrected(accuracies[1], chance),
        "choices": choice_shift(measures, settings.confidence, labels),
        "calibration": calibration(measures, settings.confidence, labels),
    }


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
