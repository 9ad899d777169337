"""Questions crossed with seeds and calibrations, against an analysis of variance by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2
from scipy.stats import t as student

from streamline_bench.errors import SamplesError
from streamline_bench.stability.statistics.crossed import (
    CrossedTask,
    crossed_difference,
    crossed_error,
    crossed_estimate,
    method_variance,
)

RNG = np.random.default_rng(5)


def scores(seeds: int, calibrations: int, n: int) -> np.ndarray:
    """Effects of everything, so that no mean square is nothing."""
    return (
        RNG.normal(0.6, 0.4, n)
        + RNG.normal(0, 0.3, (seeds, 1, 1))
        + RNG.normal(0, 0.2, (1, calibrations, 1))
        + RNG.normal(0, 0.1, (seeds, calibrations, 1))
        + RNG.normal(0, 0.2, (seeds, calibrations, n))
    )


def mean_squares(y: np.ndarray) -> dict[str, float]:
    """The textbook's three-way table without replication, by loops over cells."""
    s, c, n = y.shape
    all_mean = y.mean()
    found = {
        "Q": s * c * sum((y[:, :, q].mean() - all_mean) ** 2 for q in range(n)) / (n - 1),
        "S": c * n * sum((y[i].mean() - all_mean) ** 2 for i in range(s)) / (s - 1),
        "C": s * n * sum((y[:, j].mean() - all_mean) ** 2 for j in range(c)) / (c - 1),
    }
    sc = qs = qc = rest = 0.0
    for i in range(s):
        for j in range(c):
            sc += (y[i, j].mean() - y[i].mean() - y[:, j].mean() + all_mean) ** 2
            for q in range(n):
                fitted = (
                    y[i, j].mean() + y[i, :, q].mean() + y[:, j, q].mean()
                    - y[i].mean() - y[:, j].mean() - y[:, :, q].mean() + all_mean
                )  # fmt: skip
                rest += (y[i, j, q] - fitted) ** 2
    for q in range(n):
        for i in range(s):
            qs += (y[i, :, q].mean() - y[i].mean() - y[:, :, q].mean() + all_mean) ** 2
        for j in range(c):
            qc += (y[:, j, q].mean() - y[:, j].mean() - y[:, :, q].mean() + all_mean) ** 2
    return found | {
        "SC": n * sc / ((s - 1) * (c - 1)),
        "QS": c * qs / ((n - 1) * (s - 1)),
        "QC": s * qc / ((n - 1) * (c - 1)),
        "QSC": rest / ((n - 1) * (s - 1) * (c - 1)),
    }


def test_components_are_those_of_the_analysis_of_variance() -> None:
    s, c, n = 4, 3, 15
    y = scores(s, c, n)
    ms = mean_squares(y)
    estimate, parts = crossed_estimate([CrossedTask(y)])
    assert estimate.value == pytest.approx(y.mean())
    both = (ms["SC"] - ms["QSC"]) / n
    seed = (ms["S"] - ms["SC"] - ms["QS"] + ms["QSC"]) / (c * n)
    calibration = (ms["C"] - ms["SC"] - ms["QC"] + ms["QSC"]) / (s * n)
    assert parts.both == pytest.approx(max(0.0, both))
    assert parts.seed == pytest.approx(seed) and parts.calibration == pytest.approx(calibration)
    assert parts.question == pytest.approx(np.mean(y.var(axis=-1, ddof=1)) / n)
    whole = ms["Q"] + ms["S"] + ms["C"] - ms["QS"] - ms["QC"] - ms["SC"] + ms["QSC"]
    assert estimate.standard_error**2 == pytest.approx(whole / (s * c * n))


def test_the_interval_adds_each_part_with_its_own_quantile() -> None:
    y = scores(3, 1, 20)
    estimate, parts = crossed_estimate([CrossedTask(y)], 0.9)
    assert parts.calibration is None and parts.both is None and parts.seeds == 3
    question = y.mean(axis=0).var(ddof=1) / 20
    seeds = y.mean(axis=-1)[:, 0]
    effects = (y - y.mean(axis=0))[:, 0]
    method = (seeds.var(ddof=1) - effects.var(axis=1, ddof=1).sum() / 20 / 2) / 3
    half = math.hypot(
        student.ppf(0.95, 19) * math.sqrt(question), student.ppf(0.95, 2) * math.sqrt(method)
    )
    assert estimate.high - estimate.value == pytest.approx(half)
    assert estimate.value - estimate.low == pytest.approx(half)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_two_runs_keep_the_whole_square_of_their_difference(shape: tuple[int, int]) -> None:
    y = scores(*shape, 30)
    one, two = y.reshape(2, 30)
    estimate, _ = crossed_estimate([CrossedTask(y)])
    square, covariance = ((one - two).mean() / 2) ** 2, np.cov(one, two)[0, 1] / 30
    half = math.hypot(
        student.ppf(0.975, 29) * math.sqrt(max(0, covariance)),
        student.ppf(0.975, 1) * math.sqrt(square),
    )
    assert estimate.high - estimate.value == pytest.approx(half)
    assert method_variance([CrossedTask(y)]) == pytest.approx(
        max(0.0, square - ((one - two) / 2).var(ddof=1) / 30)
    )


def test_upper_limits_hold_the_true_variance() -> None:
    """95 % of the limits are above it, of however few seeds."""
    source, n, spread, within = np.random.default_rng(3), 50, 1.0, 0.3
    for seeds in (2, 4):
        held = 0
        for _ in range(400):
            y = (
                source.normal(0, 0.4, n)
                + source.normal(0, spread, (seeds, 1, 1))
                + source.normal(0, within, (seeds, 1, n))
            )
            _, parts = crossed_estimate([CrossedTask(y)])
            assert parts.limits.keys() == {"seed"} and parts.limits["seed"] >= parts.seed
            held += parts.limits["seed"] >= spread**2
        assert 0.92 <= held / 400 <= 0.98, seeds


def test_runs_that_agree_do_not_exclude_an_effect() -> None:
    """Equally many right, by other questions: the limit is what questions alone allow."""
    one = RNG.permutation(np.repeat([0.0, 1.0], 20))
    _, parts = crossed_estimate([CrossedTask(np.array([one, 1 - one])[:, None])])
    of_questions = (2 * one - 1).var(ddof=1) / 2 / 40
    assert parts.seed == 0
    assert parts.limits["seed"] == pytest.approx(of_questions * (1 / chi2.ppf(0.05, 1) - 1))


def test_one_run_has_the_error_of_its_questions() -> None:
    y = scores(1, 1, 25)
    estimate, parts = crossed_estimate([CrossedTask(y)])
    assert estimate.standard_error == pytest.approx(y.std(ddof=1) / 5)
    assert (parts.seed, parts.calibration, parts.both) == (None, None, None)


def test_tasks_clusters_and_weights() -> None:
    """Two tasks count alike; questions of a cluster are one; equal weights change nothing."""
    one, two = scores(2, 2, 12), scores(2, 2, 30)
    together = crossed_error([CrossedTask(one), CrossedTask(two)])
    alone = [crossed_error([CrossedTask(each)]).question[0] for each in (one, two)]
    assert together.question[0] == pytest.approx(sum(alone) / 4)
    clusters = np.repeat(np.arange(6), 2)
    sums = one.reshape(2, 2, 6, 2).mean(axis=-1)
    expected, parts = crossed_estimate([CrossedTask(sums)])
    found, same = crossed_estimate([CrossedTask(one, clusters)])
    assert found.low == pytest.approx(expected.low)
    assert same.seed == pytest.approx(parts.seed)
    weighted, _ = crossed_estimate([CrossedTask(one, clusters, np.full(12, 3.0))])
    assert weighted.high == pytest.approx(expected.high)


def test_a_difference_is_paired_over_questions() -> None:
    one = scores(2, 1, 40)
    value, error = crossed_difference([CrossedTask(one)], [CrossedTask(one - 0.25)])
    assert value == pytest.approx(0.25)
    assert error.question[0] == pytest.approx(0.0, abs=1e-12)
    two = scores(3, 1, 40)
    value, error = crossed_difference([CrossedTask(one)], [CrossedTask(two)])
    paired = one.mean(axis=(0, 1)) - two.mean(axis=(0, 1))
    apart = (one[0, 0] - one[1, 0]) / 2  # what questions make of the difference of two runs
    of_questions = paired.var(ddof=1) / 40 - apart.var(ddof=1) / 40
    assert error.question[0] == pytest.approx(max(0.0, of_questions))
    assert len(error.methods) == 2
    p = error.p_value(value)
    assert error.half(1 - p) == pytest.approx(abs(value), rel=1e-6)


def test_runs_of_different_design_are_refused() -> None:
    with pytest.raises(SamplesError, match="seeds"):
        crossed_estimate([CrossedTask(scores(2, 1, 5)), CrossedTask(scores(3, 1, 5))])


def test_more_documents_help_as_far_as_seeds_allow() -> None:
    error = crossed_error([CrossedTask(scores(2, 1, 50))])
    method = math.sqrt(error.variance - error.question[0])
    assert error.needed(method, 50, 0.95, 0.8) is None
    far = error.needed(3 * method, 5000, 0.95, 0.8)
    assert far is not None
    at = math.sqrt(error.question[0] * 5000 / far + method**2)
    assert 3 * method / at == pytest.approx(1.959964 + 0.8416212, rel=0.01)


def test_the_interval_holds_the_true_mean_as_often_as_it_says(repository: Path) -> None:
    """Known variances of questions, seeds and calibrations; concepts.md has all designs."""
    path = repository / "tests" / "benchmarks" / "coverage_of_seeds.py"
    spec = importlib.util.spec_from_file_location("coverage_of_seeds", path)
    simulation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulation)
    for kind, seeds, calibrations, ratio in (
        ("normal", 3, 1, 0.0),
        ("normal", 5, 1, 1.0),
        ("normal", 3, 2, 5.0),
        ("right or wrong", 3, 1, 1.0),
        ("right or wrong", 3, 3, 2.0),
    ):
        share, _ = simulation.coverage(kind, seeds, calibrations, 200, ratio, 1000)
        assert 0.93 <= share <= 0.97, (kind, seeds, calibrations, ratio)
    # Two runs: cautious where the method adds nothing, and exact where it decides.
    for kind, ratio in (("normal", 0.0), ("right or wrong", 2.0), ("right or wrong", 5.0)):
        share, _ = simulation.coverage(kind, 2, 1, 200, ratio, 1000)
        assert 0.94 <= share <= 0.995, (kind, ratio)
