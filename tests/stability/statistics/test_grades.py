"""Intervals of paired grades against plain resampling, and their agreement with p."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.grades import PairedGrades


def resampled(difference: np.ndarray, clusters: ClusterLabels | None = None) -> PairedGrades:
    return PairedGrades.of(difference, clusters, ("task", "none", "f1"), draws=10_000, seed=0)


def differences(n: int, seed: int = 0, shift: float = -0.03) -> np.ndarray:
    source = np.random.default_rng(seed)
    before = source.beta(0.5, 0.5, n)
    now = np.clip(before + source.normal(shift, 0.2, n) * (source.random(n) < 0.5), 0, 1)
    return now - before


def brute_force(difference: np.ndarray, labels: np.ndarray, draws: int = 20_000) -> np.ndarray:
    """Draw clusters with replacement, put their documents together, take the mean."""
    source = np.random.default_rng(1)
    groups = [difference[labels == label] for label in np.unique(labels)]
    found = []
    for _ in range(draws):
        chosen = source.integers(len(groups), size=len(groups))
        found.append(np.concatenate([groups[each] for each in chosen]).mean())
    return np.quantile(found, [0.025, 0.975])


def test_documents_against_brute_force() -> None:
    difference = differences(60)
    found = resampled(difference).interval(0.95)
    low, high = brute_force(difference, np.arange(60))
    assert found.value == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.003)


def test_clusters_against_brute_force() -> None:
    difference = differences(90) + np.repeat(np.random.default_rng(2).normal(0, 0.1, 30), 3)
    difference = np.clip(difference, -1, 1)
    names = [f"passages:{index // 3}" for index in range(90)]
    clusters = cluster_labels(pd.Series(names))
    assert clusters is not None
    found, alone = (
        resampled(difference, clusters).interval(0.95),
        resampled(difference).interval(0.95),
    )
    low, high = brute_force(difference, np.repeat(np.arange(30), 3))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)
    assert found.high - found.low > 1.1 * (alone.high - alone.low)
    assert "30 passages" in str(found.method)


@pytest.mark.parametrize("n", [1, 2, 12, 40, 400])
@pytest.mark.parametrize("comparisons", [1, 7])
@pytest.mark.parametrize("kind", ["some", "none", "all"])
def test_p_and_interval_agree(n: int, comparisons: int, kind: str) -> None:
    for seed in range(6):
        values = {
            "some": differences(n, seed, -0.06),
            "none": np.zeros(n),
            "all": np.full(n, (-0.1, -0.3, -0.8)[seed % 3]),
        }[kind]
        test = resampled(values)
        found = test.interval(0.95, comparisons=comparisons)
        assert found.low is not None and found.high is not None
        assert -1 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
        for at in (-0.5, -0.05, -0.011, 0.0, 0.013):
            outside = not found.low <= at <= found.high
            assert outside == (comparisons * test.p_value(at) < 0.05 - 1e-12), (seed, at)
        plain = test.interval(0.95)
        assert (plain.low > -0.02) == (test.tail(-0.02) < 0.025)


def test_no_moved_grade_is_not_certainty() -> None:
    found = resampled(np.zeros(50)).interval(0.95)
    z2 = 1.959964**2
    assert found.high == pytest.approx(z2 / (50 + z2))  # Wilson's limit of 0 of 50
    assert resampled(np.zeros(50)).p_value() == 1.0


def test_everything_moved_alike_is_significant() -> None:
    test = resampled(np.full(50, -0.5))
    assert test.p_value() == pytest.approx(math.erfc(math.sqrt(25) / math.sqrt(2)))
    assert test.interval(0.95).high < 0


def test_lower_is_better_is_the_same_test_turned_round() -> None:
    difference = differences(80)
    test, turned = resampled(difference), resampled(-difference)
    assert test.worse_by(0.02, higher=False) == pytest.approx(turned.tail(-0.02), abs=0.01)


def test_same_draws_for_same_names() -> None:
    difference = differences(50)
    assert resampled(difference).interval(0.95) == resampled(difference).interval(0.95)
