"""Paired statistics against scipy, statsmodels, brute force and published examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from streamline_bench.errors import SamplesError
from streamline_bench.stability.statistics.paired import (
    Outcomes,
    kappa,
    mcnemar,
    mcnemar_test,
    mean_retention,
    newcombe,
    retention,
    wilson,
)

COUNTS = st.tuples(*[st.integers(0, 30)] * 4).filter(lambda counts: sum(counts) > 0)


def test_outcomes_are_counted_by_direction() -> None:
    verdicts = [(1, 1), (1, 0), (1, 0), (0, 1), (0, 0), (0, 0), (0, 0)]
    dense, pruned = (np.array(side, dtype=bool) for side in zip(*verdicts, strict=True))
    outcomes = Outcomes.of(dense, pruned)
    assert outcomes.counts == (1, 2, 1, 3)
    assert outcomes.dense_accuracy == pytest.approx(3 / 7)
    assert outcomes.pruned_accuracy == pytest.approx(2 / 7)
    assert outcomes.agreement == pytest.approx(4 / 7)
    assert outcomes.difference == pytest.approx(-1 / 7)
    assert (outcomes + Outcomes(1, 1, 1, 1)).counts == (2, 3, 2, 4)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(SamplesError, match="at least one"):
        Outcomes.of(np.array([], dtype=bool), np.array([], dtype=bool))
    with pytest.raises(SamplesError, match="got 2 and 1"):
        Outcomes.of(np.array([True, False]), np.array([True]))


@given(COUNTS)
def test_mcnemar_is_the_exact_binomial_test(counts: tuple[int, int, int, int]) -> None:
    outcomes = Outcomes(*counts)
    flips = outcomes.right_to_wrong + outcomes.wrong_to_right
    p = mcnemar(outcomes)
    if flips:
        assert p == pytest.approx(binomtest(outcomes.right_to_wrong, flips, 0.5).pvalue)
        table = np.reshape(outcomes.counts, (2, 2))
        assert p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    else:
        assert p == 1.0


@given(st.integers(0, 12), st.integers(0, 12))
def test_mid_p_counts_equally_extreme_outcomes_by_half(b: int, c: int) -> None:
    flips = b + c
    distance = abs(b - flips / 2)
    expected = 0.0
    for k in range(flips + 1):
        chance = math.comb(flips, k) / 2**flips
        if abs(k - flips / 2) > distance:
            expected += chance
        elif abs(k - flips / 2) == distance:
            expected += chance / 2
    expected = expected if flips else 1.0
    assert mcnemar(Outcomes(5, b, c, 5), mid_p=True) == pytest.approx(expected)


@given(COUNTS)
def test_kappa_is_statsmodels(counts: tuple[int, int, int, int]) -> None:
    outcomes = Outcomes(*counts)
    if kappa(outcomes) is None:
        assert outcomes.dense_accuracy == outcomes.pruned_accuracy
        assert outcomes.dense_accuracy in (0.0, 1.0)
        return
    expected = cohens_kappa(np.reshape(counts, (2, 2)), return_results=False)
    assert kappa(outcomes) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 200), st.data())
def test_wilson_is_statsmodels(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    expected = proportion_confint(successes, n, alpha=0.1, method="wilson")
    assert wilson(successes, n, 0.9) == pytest.approx(expected, abs=1e-12)


def test_newcombe_gives_the_published_example() -> None:
    """Airway responsiveness, Bentur et al. 2009, as in Fagerland, Lydersen & Laake, chapter 8.

    The table [[1, 1], [7, 12]]: difference -0.2857, 95 % interval -0.507 to -0.026.
    """
    low, high = newcombe(Outcomes(1, 7, 1, 12))
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)


@given(COUNTS)
def test_newcombe_contains_the_difference_and_mirrors(counts: tuple[int, int, int, int]) -> None:
    outcomes = Outcomes(*counts)
    low, high = newcombe(outcomes)
    assert -1.0 <= low <= outcomes.difference <= high <= 1.0
    a, b, c, d = counts
    assert newcombe(Outcomes(a, c, b, d)) == pytest.approx((-high, -low), abs=1e-12)
    assert high > low, "no flips seen is not no flips possible"


def test_newcombe_covers_the_truth() -> None:
    """Exact coverage for 12 pairs: the sum over every possible table is near 95 %."""
    truth, n = (0.5, 0.2, 0.1, 0.2), 12
    covered = 0.0
    for b, c, d in itertools.product(range(n + 1), repeat=3):
        a = n - b - c - d
        if a < 0:
            continue
        ways = math.factorial(n)
        chance = 1.0
        for count, share in zip((a, b, c, d), truth, strict=True):
            ways //= math.factorial(count)
            chance *= share**count
        low, high = newcombe(Outcomes(a, b, c, d))
        covered += ways * chance * (low <= truth[2] - truth[1] <= high)
    assert 0.93 < covered < 0.99


@given(COUNTS)
def test_retention_is_the_ratio_whose_difference_may_be_zero(
    counts: tuple[int, int, int, int],
) -> None:
    """Ends solve: the square-and-add interval of p1 - r p2 touches 0."""
    outcomes = Outcomes(*counts)
    ends = retention(outcomes)
    if outcomes.dense_accuracy == 0.0:
        assert ends is None
        return
    assert ends is not None
    ratio = outcomes.pruned_accuracy / outcomes.dense_accuracy
    assert 0.0 <= ends[0] <= ratio + 1e-9 and ratio <= ends[1] + 1e-9
    n = outcomes.n
    p1, p2 = outcomes.pruned_accuracy, outcomes.dense_accuracy
    (l1, u1), (l2, u2) = wilson(p1 * n, n), wilson(p2 * n, n)
    a, b, c, d = counts
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product = a * d - b * c
    product = max(0.0, product - n / 2) if product > 0 else product
    phi = product / math.sqrt(margins) if margins else 0.0
    for r, (one, two) in zip(ends, ((p1 - l1, u2 - p2), (u1 - p1, p2 - l2)), strict=True):
        square = one**2 - 2 * phi * r * one * two + (r * two) ** 2
        assert (p1 - r * p2) ** 2 == pytest.approx(square, abs=1e-9, rel=1e-6)


def test_retention_is_the_bootstraps_and_log_deltas_when_there_is_data() -> None:
    outcomes = Outcomes(900, 180, 120, 800)
    a, b, c, _ = outcomes.counts
    error = math.sqrt((b + c) / ((a + b) * (a + c)))  # of the logarithm of a paired ratio
    ratio = outcomes.pruned_accuracy / outcomes.dense_accuracy
    ends = retention(outcomes)
    assert ends == pytest.approx((ratio * math.exp(-1.96 * error), ratio * math.exp(1.96 * error)),
                                 abs=2e-3)  # fmt: skip
    shares = np.random.default_rng(0).multinomial(2000, np.array(outcomes.counts) / 2000, 20_000)
    ratios = (shares[:, 0] + shares[:, 2]) / (shares[:, 0] + shares[:, 1])
    assert ends == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=3e-3)


def test_retention_without_flips_and_without_right_answers() -> None:
    same = retention(Outcomes(30, 0, 0, 10))
    assert same is not None and same[0] < 1 < same[1], "no flips seen is not no flips possible"
    none_left = retention(Outcomes(0, 12, 0, 8))
    assert none_left is not None and none_left[0] == 0.0 and 0 < none_left[1] < 0.5
    all_right = retention(Outcomes(25, 0, 0, 0))
    assert all_right is not None and 0.8 < all_right[0] < 1 < all_right[1] < 1.25


def test_mean_retention_of_one_task_is_its_own() -> None:
    for counts in ((40, 1, 0, 9), (1, 0, 0, 0), (0, 12, 0, 8), (30, 20, 10, 40)):
        assert mean_retention([Outcomes(*counts)]) == retention(Outcomes(*counts))
    assert mean_retention([Outcomes(0, 0, 3, 4), Outcomes(0, 0, 1, 0)]) is None


def test_mean_retention_is_the_ratio_whose_mean_difference_may_be_zero() -> None:
    tasks = [Outcomes(40, 1, 0, 9), Outcomes(5, 4, 2, 30), Outcomes(0, 0, 1, 8)]
    p1, p2 = (np.mean([getattr(task, f"{side}_accuracy") for task in tasks])
              for side in ("pruned", "dense"))  # fmt: skip
    ends = mean_retention(tasks)
    assert ends is not None and ends[0] < p1 / p2 < ends[1]
    for r, upper in zip(ends, (False, True), strict=True):
        square = 0.0
        for task in tasks:
            n, (a, b, c, d) = task.n, task.counts
            margins = (a + b) * (c + d) * (a + c) * (b + d)
            phi = max(0.0, a * d - b * c - n / 2) / math.sqrt(margins) if margins else 0.0
            now, before = wilson(a + c, n), wilson(a + b, n)
            x = now[1] - (a + c) / n if upper else (a + c) / n - now[0]
            y = (a + b) / n - before[0] if upper else before[1] - (a + b) / n
            square += x**2 - 2 * phi * r * x * y + (r * y) ** 2
        assert (p1 - r * p2) ** 2 == pytest.approx(square / 9)


def test_what_clusters_say_widens_mean_retention() -> None:
    tasks = [Outcomes(400, 30, 20, 550), Outcomes(600, 40, 30, 330)]
    narrow, same = mean_retention(tasks), mean_retention(tasks, 0.95, [0.0, 1e-6])
    wide = mean_retention(tasks, 0.95, [0.05, 0.0])
    assert narrow is not None and wide is not None and narrow == same
    ratio = (420 + 630) / (430 + 640)
    dense = (0.430 + 0.640) / 2
    # One reaches 0.05 / 2 of the mean difference, the other what its documents give.
    other = mean_retention(tasks, 0.95, [0.0, 0.0])
    alone = mean_retention([tasks[1]])
    assert other == narrow and alone is not None
    rest = (alone[1] - alone[0]) / 2 * 0.640 / 2
    assert (wide[1] - wide[0]) / 2 == pytest.approx(math.hypot(0.025, rest) / dense, rel=0.02)
    assert wide[0] < ratio < wide[1]


def test_mean_retention_covers_the_truth_with_few_flips() -> None:
    """Two tasks of 40 documents: percentiles of a bootstrap cover 83 %."""
    shares = [0.70, 0.02, 0.01, 0.27]
    drawn = np.random.default_rng(7).multinomial(40, shares, size=(1500, 2))
    covered = 0
    for tables in drawn.tolist():
        low, high = mean_retention([Outcomes(*table) for table in tables]) or (0.0, 0.0)
        covered += low <= 0.71 / 0.72 <= high
    assert covered / 1500 > 0.94


def test_mid_p_is_read_when_few_pairs_are_discordant() -> None:
    few, enough = Outcomes(10, 14, 10, 9), Outcomes(10, 14, 11, 9)
    assert mcnemar_test(few) == (mcnemar(few, mid_p=True), "McNemar, mid-p")
    assert mcnemar_test(enough) == (mcnemar(enough), "McNemar, exact")
    assert mcnemar_test(Outcomes(3, 0, 0, 2))[0] == 1.0
