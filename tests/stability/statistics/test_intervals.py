"""Intervals against scipy, statsmodels, and a bootstrap that resamples rows."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from streamline_bench.stability.statistics.intervals import (
    bootstrap_interval,
    mean_estimate,
    mean_per_unit,
    ratio_draws,
    t_quantile,
    t_tail,
    task_generator,
)
from streamline_bench.stability.statistics.stability import (
    MAX_CELLS,
    stability,
    stability_draws,
)

DRAWS = 4000


def answers(n: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    std = source.exponential(scale, size=n)
    return std, source.random(n) < 0.55 + 0.1 * std.clip(max=4)


def by_rows(std: np.ndarray, agree: np.ndarray, draws: int) -> np.ndarray:
    source = np.random.default_rng(123)
    rows = source.integers(len(std), size=(draws, len(std)))
    weights = np.exp(std)[rows]
    return (weights * agree[rows]).sum(axis=1) / weights.sum(axis=1)


@pytest.mark.parametrize("max_cells", [100_000, MAX_CELLS])
def test_stability_draws_match_resampling_rows(max_cells: int) -> None:
    std, agree = answers(600)
    ours = stability_draws(std, agree, DRAWS, task_generator(0, "t"), max_cells=max_cells)
    rows = by_rows(std, agree, DRAWS)
    assert ours.mean() == pytest.approx(rows.mean(), abs=0.004)
    assert ours.std() == pytest.approx(rows.std(), rel=0.06)
    ends = [0.025, 0.975]
    assert np.quantile(ours, ends) == pytest.approx(np.quantile(rows, ends), abs=0.008)
    assert np.median(ours) == pytest.approx(stability(std, agree), abs=0.01)


def test_grouping_keeps_the_estimate() -> None:
    """Cells hold mean weights, so their total is right; light tails leave no ratio bias."""
    std, agree = answers(5000, scale=0.2)
    ours = stability_draws(std, agree, 20_000, task_generator(0, "t"), max_cells=128)
    assert ours.mean() == pytest.approx(stability(std, agree), abs=4 * ours.std() / 20_000**0.5)


def test_large_spreads_do_not_overflow() -> None:
    std = np.array([1000.0, 999.0, 3.0])
    drawn = stability_draws(std, np.array([True, False, True]), 500, task_generator(0, "t"))
    assert np.isfinite(drawn).all()
    assert set(np.round(drawn, 6)) >= {0.0, 1.0}


def test_equal_spreads_and_one_question() -> None:
    drawn = stability_draws(np.zeros(1), np.array([True]), 10, task_generator(0, "t"))
    assert (drawn == 1.0).all()
    even = stability_draws(np.zeros(400), np.arange(400) % 2 == 0, DRAWS, task_generator(0, "t"))
    assert even.std() == pytest.approx(0.5 / 20, rel=0.06)


def test_seeds() -> None:
    std, agree = answers(50)

    def drawn(seed: int, task: str) -> list[float]:
        return stability_draws(std, agree, 20, task_generator(seed, task)).tolist()

    assert drawn(0, "a") == drawn(0, "a")
    assert drawn(0, "a") != drawn(1, "a")
    assert drawn(0, "a") != drawn(0, "b")


@pytest.mark.parametrize("max_cells", [10_000, 64])
def test_ratios_match_resampling_units(max_cells: int) -> None:
    source = np.random.default_rng(7)
    below = source.exponential(size=900) + 0.1
    above = below * source.beta(6, 3, size=900)
    ours = ratio_draws(above, below, DRAWS, task_generator(0, "t"), max_cells=max_cells)
    rows = np.random.default_rng(8).integers(900, size=(DRAWS, 900))
    brute = above[rows].sum(axis=1) / below[rows].sum(axis=1)
    assert ours.mean() == pytest.approx(brute.mean(), abs=3e-4)
    assert ours.std() == pytest.approx(brute.std(), rel=0.05)


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


@pytest.mark.parametrize("freedom", [1.0, 2.7, 40.0, np.inf])
def test_quantiles_and_tails_are_scipys(freedom: float) -> None:
    law = stats.t(freedom) if np.isfinite(freedom) else stats.norm
    for confidence in (0.6, 0.95, 0.999):
        assert t_quantile(confidence, freedom) == pytest.approx(law.ppf(0.5 + confidence / 2))
    for distance in (-1.5, 0.0, 0.3, 4.0):
        assert t_tail(distance, freedom) == pytest.approx(law.sf(distance))


def test_few_units_have_students_interval() -> None:
    draws = np.random.default_rng(0).normal(0.6, 0.05, size=5000)
    for units in (2, 6, 19):
        ends, method = bootstrap_interval(0.6, draws, units, 0.9)
        half = stats.t.ppf(0.95, units - 1) * draws.std()
        assert ends == pytest.approx((0.6 - half, 0.6 + half)) and "Student" in method
    for units in (1, 20):
        ends, method = bootstrap_interval(0.6, draws, units, 0.9)
        assert ends == pytest.approx(np.quantile(draws, [0.05, 0.95])) and method == "bootstrap"
