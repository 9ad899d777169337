"""The bootstrap over counts against one that resamples rows."""

from __future__ import annotations

import numpy as np
import pytest

from streamline_bench.stability.statistics.bootstrap import (
    MAX_CELLS,
    cluster_draws,
    outcome_draws,
    percentile_interval,
    ratio_draws,
    stability_draws,
    task_generator,
)
from streamline_bench.stability.statistics.paired import Outcomes
from streamline_bench.stability.statistics.stability import stability

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


def test_differences_have_the_multinomial_moments() -> None:
    outcomes = Outcomes(40, 20, 10, 30)
    shares = outcome_draws(outcomes, 40_000, task_generator(0, "t"))
    assert shares.sum(axis=1) == pytest.approx(1.0)
    drawn = shares[:, 2] - shares[:, 1]
    variance = (0.3 - outcomes.difference**2) / 100
    assert drawn.mean() == pytest.approx(outcomes.difference, abs=0.002)
    assert drawn.var() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("max_cells", [100_000, MAX_CELLS])
def test_stability_draws_match_resampling_rows(max_cells: int) -> None:
    std, agree = answers(600)
    ours = stability_draws(std, agree, DRAWS, task_generator(0, "t"), max_cells=max_cells)
    rows = by_rows(std, agree, DRAWS)
    assert ours.mean() == pytest.approx(rows.mean(), abs=0.004)
    assert ours.std() == pytest.approx(rows.std(), rel=0.06)
    for mine, theirs in zip(percentile_interval(ours), percentile_interval(rows), strict=True):
        assert mine == pytest.approx(theirs, abs=0.008)
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


def test_clusters_are_resampled_whole() -> None:
    source = np.random.default_rng(5)
    sums = source.integers(0, 4, size=(60, 3))
    ours = cluster_draws(sums, DRAWS, task_generator(0, "t"))
    rows = np.random.default_rng(6).integers(60, size=(DRAWS, 60))
    brute = sums[rows].sum(axis=1)
    assert ours.shape == (DRAWS, 3)
    assert ours.mean(axis=0) == pytest.approx(sums.sum(axis=0), rel=0.01)
    for column in range(3):
        assert ours[:, column].std() == pytest.approx(brute[:, column].std(), rel=0.05)
    assert np.corrcoef(ours.T)[0, 1] == pytest.approx(np.corrcoef(brute.T)[0, 1], abs=0.06)


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
