"""Estimates with intervals that tasks, groups and summaries over tasks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.bootstrap import (
    bootstrap_interval,
    ratio_draws,
    stability_draws,
    task_generator,
)
from streamline_bench.stability.statistics.clustered_mcnemar import clustered_test
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.decision import detectable_difference, noninferiority
from streamline_bench.stability.statistics.means import mean_estimate
from streamline_bench.stability.statistics.paired import (
    Outcomes,
    mcnemar_test,
    newcombe,
    retention,
    wilson,
)
from streamline_bench.stability.statistics.resampled import Resampled
from streamline_bench.stability.statistics.stability import (
    effective_sample_size,
    stability,
    stability_weights,
)

__all__ = [
    "accuracy_estimate",
    "chance_corrected",
    "paired_estimates",
    "stability_estimate",
]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def accuracy_estimate(right: BoolArray, clusters: ClusterLabels | None = None) -> Estimate:
    """Accuracy with its standard error: sample deviation / sqrt(n), as lm-eval gives it.

    With clusters the error is the cluster-robust one (:func:`mean_estimate`). None for one verdict:
    it says nothing about its own error.

    Args:
        right: bool [n].
    """
    labels = None if clusters is None else clusters.labels
    found = mean_estimate(right.astype(np.float64), 0.95, labels)
    return Estimate(value=found.value, standard_error=found.standard_error)


def chance_corrected(accuracy: Estimate, chance: float) -> Estimate:
    """(accuracy - chance) / (1 - chance): 0 is guessing, 1 is all right."""
    error = accuracy.standard_error
    return Estimate(
        value=(accuracy.value - chance) / (1 - chance),
        standard_error=None if error is None else error / (1 - chance),
    )


def paired_estimates(
    outcomes: Outcomes,
    settings: Settings,
    resampled: Resampled | None,
    net: FloatArray | None,
) -> dict[str, Any]:
    """Difference, agreement, retention, p and what could be found; the decision comes after Holm.

    Clusters widen what documents give, and where nothing varies they add nothing. The interval of
    the difference contains 0 exactly where p is not below 1 - confidence.

    Args:
        resampled, net: draws over clusters, and net change per cluster; None without clusters.
    """
    found = _by_documents(outcomes, settings)
    p_interval = _two_sided(noninferiority(outcomes, 0.0))
    if resampled is not None and net is not None:
        by_clusters = clustered_test(np.rint(net).astype(np.int64), resampled.what)
        if by_clusters[0] >= found["p_value"]:
            found["p_value"], found["p_method"] = by_clusters
        if resampled.varies:
            _widen(found, resampled, outcomes, settings)
            by_draws = _two_sided(resampled.noninferiority(outcomes.difference, 0.0))
            p_interval = max(p_interval, by_draws)
    return found | _reconciled(found, p_interval, 1 - settings.confidence)


def _widen(
    found: dict[str, Any], resampled: Resampled, outcomes: Outcomes, settings: Settings
) -> None:
    """Put what clusters give in the place of what is narrower by documents."""
    for name in ("difference", "agreement", "retention"):
        by_documents = found[name]
        if by_documents is not None:
            by_clusters = getattr(resampled, name)(by_documents.value, settings.confidence)
            found[name] = _wider(by_documents, by_clusters)
    p = resampled.noninferiority(outcomes.difference, settings.margin), found["noninferiority_p"]
    found["noninferiority_p"] = min(p, key=lambda value: abs(value - 0.5))  # of the wider interval
    detectable = resampled.detectable(settings.confidence), found["detectable"]
    found["detectable"] = None if None in detectable else max(detectable)


def _two_sided(p: float) -> float:
    return 2 * min(p, 1 - p)


def _reconciled(found: dict[str, Any], p_interval: float, level: float) -> dict[str, Any]:
    """p and interval answer one question; where they part, the more careful of the two is read."""
    difference: Estimate = found["difference"]
    low, high = difference.low, difference.high
    if low is None or high is None:
        return {}
    if low <= 0 <= high:
        if found["p_value"] >= level:
            return {}
        return {"p_value": max(p_interval, level), "p_method": "interval of the difference"}
    if found["p_value"] < level:
        return {}
    update = {
        "low": min(low, 0.0),
        "high": max(high, 0.0),
        "method": f"{difference.method}, up to 0, which the test does not exclude",
    }
    return {"difference": difference.model_copy(update=update)}


def _wider(by_documents: Estimate, by_clusters: Estimate | None) -> Estimate:
    """Clusters can only widen an interval: a bootstrap of few changes is too narrow by itself."""
    if by_clusters is None:
        return by_documents
    ends = (by_documents.low, by_clusters.low), (by_documents.high, by_clusters.high)
    low = min(end for end in ends[0] if end is not None)
    high = max(end for end in ends[1] if end is not None)
    method = by_clusters.method
    if (low, high) != (by_clusters.low, by_clusters.high):
        method = f"{method}, or {by_documents.method} where that is wider"
    return by_clusters.model_copy(update={"low": low, "high": high, "method": method})


def _by_documents(outcomes: Outcomes, settings: Settings) -> dict[str, Any]:
    confidence = settings.confidence
    p, method = mcnemar_test(outcomes)
    return {
        "difference": _difference(outcomes, confidence),
        "agreement": _agreement(outcomes, confidence),
        "retention": _retention(outcomes, confidence),
        "p_value": p,
        "p_method": method,
        "margin": settings.margin,
        "noninferiority_p": noninferiority(outcomes, settings.margin),
        "detectable": detectable_difference(outcomes, confidence),
    }


def _difference(outcomes: Outcomes, confidence: float) -> Estimate:
    low, high = newcombe(outcomes, confidence)
    return Estimate(
        value=outcomes.difference, low=low, high=high, method="Newcombe paired (square-and-add)"
    )


def _agreement(outcomes: Outcomes, confidence: float) -> Estimate:
    same = outcomes.both_right + outcomes.both_wrong
    low, high = wilson(same, outcomes.n, confidence)
    return Estimate(value=outcomes.agreement, low=low, high=high, method="Wilson")


def _retention(outcomes: Outcomes, confidence: float) -> Estimate | None:
    ends = retention(outcomes, confidence)
    if ends is None:
        return None
    value = outcomes.pruned_accuracy / outcomes.dense_accuracy
    return Estimate(value=value, low=ends[0], high=ends[1], method="paired ratio (square-and-add)")


def stability_estimate(
    std: FloatArray,
    agree: BoolArray,
    settings: Settings,
    *names: str,
    clusters: ClusterLabels | None = None,
) -> Estimate:
    """Stability with its bootstrap interval, seeded by the settings and ``names``.

    Where all pairs agree, or none, a bootstrap would claim certainty: then Wilson's interval at the
    effective sample size (at most the number of clusters). The reference script's value gets none:
    it is not a statistic of the answers but of their order.
    """
    value = stability(std, agree, mode=settings.mode)
    if settings.mode == "reference_script":
        return Estimate(value=value)
    if agree.all() or not agree.any():
        n = effective_sample_size(std)
        if clusters is not None:
            n = min(n, clusters.shown.count)
        low, high = wilson(value * n, n, settings.confidence)
        return Estimate(value=value, low=low, high=high, method="Wilson at the effective n")
    generator = task_generator(settings.seed, *names)
    units, over = len(std), ""
    if clusters is None:
        draws = stability_draws(std, agree, settings.draws, generator)
    else:
        weights = stability_weights(std)
        sums = clusters.sums(weights * agree, weights)
        draws = ratio_draws(sums[:, 0], sums[:, 1], settings.draws, generator)
        units, over = clusters.shown.count, f" over {clusters.shown.count:,} {clusters.shown.kind}"
    (low, high), method = bootstrap_interval(value, draws, units, settings.confidence)
    method = f"{method}{over}, {settings.draws} draws"
    return Estimate(value=value, low=max(0.0, low), high=min(1.0, high), method=method)
