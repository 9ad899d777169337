"""Means with intervals against scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from streamline_bench.stability.statistics.means import mean_estimate, mean_per_unit


def test_interval_is_students() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    found = mean_estimate(values, 0.9)
    low, high = stats.t.interval(0.9, 29, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.standard_error == pytest.approx(stats.sem(values))


def test_clusters_give_the_robust_error_of_a_regression_on_a_constant() -> None:
    source = np.random.default_rng(1)
    clusters = source.integers(12, size=90)
    values = source.normal(size=12)[clusters] + source.normal(size=90)
    found = mean_estimate(values, 0.95, clusters)
    fit = sm.OLS(values, np.ones(90)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert found.standard_error == pytest.approx(float(fit.bse[0]))
    alone = mean_estimate(values, 0.95).standard_error
    assert alone is not None and found.standard_error is not None
    assert found.standard_error > 1.5 * alone


def test_missing_values_do_not_count() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    clusters = np.array([0, 1, 2, 2])
    assert mean_estimate(values, 0.95) == mean_estimate(values[[0, 2, 3]], 0.95)
    assert mean_estimate(values, 0.95, clusters) == mean_estimate(
        values[[0, 2, 3]], 0.95, np.array([0, 1, 1])
    )


def test_one_document_has_no_interval() -> None:
    for clusters in (None, np.array([3])):
        found = mean_estimate(np.array([0.5]), 0.95, clusters)
        assert (found.value, found.low, found.standard_error) == (0.5, None, None)


def test_floor_and_equal_values() -> None:
    assert mean_estimate(np.array([0.0, 0.1]), 0.95, floor=0.0).low == 0.0
    equal = mean_estimate(np.full(5, 2.0), 0.95)
    assert (equal.low, equal.high) == (2.0, 2.0)


def test_mean_per_unit_has_the_bootstraps_interval() -> None:
    source = np.random.default_rng(0)
    words = source.integers(20, 400, size=300).astype(float)
    lost = words * source.normal(0.1, 0.05, size=300)
    found = mean_per_unit(lost, words, 0.95)
    rows = np.random.default_rng(1).integers(300, size=(5000, 300))
    ratios = lost[rows].sum(axis=1) / words[rows].sum(axis=1)
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(ratios, [0.025, 0.975])), abs=6e-4
    )
    assert found.standard_error == pytest.approx(ratios.std(), rel=0.05)


def test_mean_per_unit_of_one_document_and_of_nothing_lost() -> None:
    alone = mean_per_unit(np.array([3.0]), np.array([10.0]), 0.95)
    assert alone.value == pytest.approx(0.3) and alone.low is None
    same = mean_per_unit(np.zeros(4), np.full(4, 7.0), 0.95)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
