"""Few clusters of unequal size, against every resample of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import t as scipy_t

from streamline_bench.stability.compare_answers import compare
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.paired import Outcomes
from streamline_bench.stability.statistics.resampled import (
    Resampled,
    resample_clusters,
    resample_documents,
)

MANY = Settings(draws=40_000)
# documents, right by dense, right by pruned, same verdict
SIZES = [100, 600]
SMALL = np.array([100, 70, 50, 70])
LARGE = np.array([600, 300, 330, 540])


def spread_of(statistic: Callable[[np.ndarray], float], clusters: np.ndarray) -> float:
    """Standard error of a statistic of totals: every resample of the clusters, each as likely."""
    n = len(clusters)
    every = itertools.product(range(n), repeat=n)
    values = [statistic(clusters[list(chosen)].sum(axis=0)) for chosen in every]
    deviations = [value - statistic(clusters.sum(axis=0)) for value in values]
    return math.sqrt(n / (n - 1)) * float(np.std(deviations))


STATISTICS = {
    "difference": lambda total: (total[2] - total[1]) / total[0],
    "agreement": lambda total: total[3] / total[0],
    "retention": lambda total: total[2] / total[1],
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("clusters", [[SMALL, LARGE], [SMALL, LARGE, SMALL + 3, 2 * LARGE]])
def test_unequal_clusters_give_the_error_of_every_resample(
    name: str, clusters: list[np.ndarray]
) -> None:
    table = np.array(clusters, dtype=np.float64)
    statistic = STATISTICS[name]
    drawn = resample_clusters(table, "tasks", MANY, name)
    value = float(statistic(table.sum(axis=0)))
    found = getattr(drawn, name)(value, 0.5)
    expected = spread_of(statistic, table)
    assert found.standard_error == pytest.approx(expected, rel=0.02)
    half = scipy_t.ppf(0.75, len(clusters) - 1) * expected
    assert found.high - found.low == pytest.approx(2 * half, rel=0.02)
    assert (found.low + found.high) / 2 == pytest.approx(value, abs=1e-9)


def test_two_unequal_tasks_give_no_impossible_difference() -> None:
    drawn = resample_clusters(np.array([SMALL, LARGE], dtype=float), "tasks", MANY, "group")
    assert np.abs(drawn.differences).max() < 0.3  # the tasks' own are -0.2 and 0.05


def test_a_group_of_two_unequal_tasks(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, pruned = pair({"a": (100, None), "b": (583, None)}, groups={"both": ["a", "b"]})
    result = compare(dense, pruned, settings=Settings(draws=4000))
    (group,), (first, second) = result.groups, result.tasks
    table = np.array(
        [[task.n, task.n * task.dense.value, task.n * task.pruned.value] for task in result.tasks]
    )
    half = scipy_t.ppf(0.975, 1) * spread_of(STATISTICS["difference"], table)
    assert first.n == 100 and second.n == 583 and half < 1
    low, high = group.difference.value - half, group.difference.value + half
    assert group.difference.low == pytest.approx(max(-1, low), abs=0.02 * half)
    assert group.difference.high == pytest.approx(min(1, high), abs=0.02 * half)


def together(source: Resampled, other: Resampled) -> list[np.ndarray]:
    joined = source + other
    return [joined.differences, joined.ratio(3), joined.ratio(2, 1)]


def test_tasks_together_spread_each_part_by_its_own_factor() -> None:
    """One task of two clusters, one of single documents: errors of the linear parts add up."""
    clusters = resample_clusters(np.array([SMALL, LARGE], dtype=float), "passages", MANY, "a")
    alone = Outcomes(900, 60, 40, 1000)
    documents = resample_documents(alone, MANY, "b")
    n = SMALL[0] + LARGE[0] + alone.n
    value = (SMALL[2] + LARGE[2] - SMALL[1] - LARGE[1] + 40 - 60) / n
    residuals = [part[2] - part[1] - value * part[0] for part in (SMALL, LARGE)]
    # Two resampled clusters differ by (a - b) / sqrt(2) in their total; the factor sqrt(2) on top.
    by_clusters = abs(residuals[0] - residuals[1]) / n
    moved = (60 + 40 - 20**2 / alone.n) / n**2
    found = together(clusters, documents)[0]
    assert float(found.std()) == pytest.approx(math.hypot(by_clusters, math.sqrt(moved)), rel=0.15)
    assert np.abs(found).max() < 0.3
    assert np.median(found) == pytest.approx(value, abs=0.05)


def test_documents_are_plain_ratios() -> None:
    drawn = resample_documents(Outcomes(30, 20, 10, 40), MANY, "t")
    assert np.array_equal(drawn.ratio(2, 1), drawn.totals[:, 2] / drawn.totals[:, 1])


@pytest.mark.parametrize("clusters", [[SMALL, LARGE], [SMALL, LARGE, SMALL + 3, 2 * LARGE]])
def test_reach_is_students_of_every_resample(clusters: list[np.ndarray]) -> None:
    """Whose quantile is of the few clusters there are."""
    table = np.array(clusters, dtype=np.float64)
    drawn = resample_clusters(table, "passages", MANY, "a")
    error = spread_of(lambda total: (total[2] - 0.9 * total[1]) / total[0], table)
    quantile = scipy_t.ppf(0.975, len(clusters) - 1)
    assert drawn.reach(0.9, 0.95) == pytest.approx(quantile * error, rel=0.02)
    many = resample_documents(Outcomes(400, 30, 20, 550), MANY, "b")
    assert many.reach(1.0, 0.95) == pytest.approx(1.96 * many.differences.std(), rel=1e-4)


def test_equal_clusters_do_not_vary_by_rounding() -> None:
    table = np.array([[7, 3, 2, 5]] * 3, dtype=float) * np.array([[1], [10], [77]])
    drawn = resample_clusters(table, "passages", MANY, "a")
    assert not drawn.varies
    assert drawn.difference(-1 / 7, 0.95) is None and drawn.retention(2 / 3, 0.95) is None
