"""Holm, non-inferiority, detectable differences and decisions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests

from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.statistics.decision import (
    decide,
    detectable_at,
    detectable_difference,
    holm,
    noninferiority,
    noninferiority_from_draws,
)
from streamline_bench.stability.statistics.paired import Outcomes, mcnemar_test, newcombe

COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_holm_of_nothing() -> None:
    assert holm([]) == []


@settings(deadline=None)
@given(COUNTS, st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.8, 0.95, 0.99]))
def test_noninferiority_p_and_the_interval_agree(
    counts: tuple[int, int, int, int], margin: float, confidence: float
) -> None:
    outcomes = Outcomes(*counts)
    low = newcombe(outcomes, confidence)[0]
    p = noninferiority(outcomes, margin)
    assert 0.0 <= p <= 1.0
    if abs(low + margin) > 1e-6:
        assert (p < (1 - confidence) / 2) == (low > -margin)


def test_noninferiority_is_walds_test_when_there_is_much_data() -> None:
    outcomes = Outcomes(500_000, 60_000, 58_000, 382_000)
    n, b, c = outcomes.n, 60_000, 58_000
    error = math.sqrt(b + c - (b - c) ** 2 / n) / n
    for margin in (0.001, 0.002, 0.0025, 0.003):
        expected = norm.sf((outcomes.difference + margin) / error)
        assert noninferiority(outcomes, margin) == pytest.approx(expected, rel=0.02)


def test_noninferiority_from_draws() -> None:
    draws = np.linspace(-0.05, 0.05, 101)
    assert noninferiority_from_draws(draws, 0.02) == pytest.approx((1 + 31) / 102, abs=0.011)
    assert noninferiority_from_draws(draws, 1.0) == pytest.approx(1 / 102)


def exact_power(n: int, lost: float, gained: float, level: float) -> float:
    """Of McNemar's test without correction: summed over all numbers of discordant pairs."""
    z = norm.isf(level / 2)
    power = 0.0
    for m in range(1, n + 1):
        chance = binom.pmf(m, n, lost + gained)
        if chance < 1e-9:
            continue
        b = np.arange(m + 1)
        rejected = np.abs(2 * b - m) / math.sqrt(m) > z
        power += chance * binom.pmf(b, m, lost / (lost + gained))[rejected].sum()
    return power


@pytest.mark.parametrize("outcomes", [Outcomes(200, 30, 25, 145), Outcomes(500, 40, 60, 400)])
def test_detectable_difference_has_the_power_it_says(outcomes: Outcomes) -> None:
    difference = detectable_difference(outcomes, 0.95)
    assert difference is not None
    share = (outcomes.right_to_wrong + outcomes.wrong_to_right + 0.5) / (outcomes.n + 1)
    lost, gained = (share + difference) / 2, (share - difference) / 2
    assert exact_power(outcomes.n, lost, gained, 0.05) == pytest.approx(0.8, abs=0.02)


def brute_power(n: int, lost: float, gained: float) -> float:
    """Of the test that is read: every sequence of outcomes of n pairs."""
    power = 0.0
    for outcomes in itertools.product(((lost, 1, 0), (gained, 0, 1), (1 - lost - gained, 0, 0)),
                                      repeat=n):  # fmt: skip
        b, c = (sum(outcome[side] for outcome in outcomes) for side in (1, 2))
        if mcnemar_test(Outcomes(0, b, c, n - b - c))[0] < 0.05:
            power += math.prod(outcome[0] for outcome in outcomes)
    return power


@pytest.mark.parametrize("counts", [(5, 0, 0, 0), (3, 2, 1, 1), (0, 4, 2, 2)])
def test_detectable_difference_of_few_documents_is_enumerated(
    counts: tuple[int, int, int, int],
) -> None:
    outcomes = Outcomes(*counts)
    difference = detectable_difference(outcomes, 0.95)
    assert difference is not None
    seen = (outcomes.right_to_wrong + outcomes.wrong_to_right + 0.5) / (outcomes.n + 1)
    for moved, enough in ((0.0, True), (-0.01, False)):
        less = difference + moved
        share = max(seen, less)
        power = brute_power(outcomes.n, (share + less) / 2, (share - less) / 2)
        assert (power >= 0.8 - 1e-9) == enough, (moved, power)


def test_four_documents_detect_nothing() -> None:
    assert detectable_difference(Outcomes(4, 0, 0, 0), 0.95) is None
    assert detectable_difference(Outcomes(4, 0, 0, 0), 0.8) is not None


def test_detectable_difference_without_flips_and_with_few_documents() -> None:
    assert detectable_difference(Outcomes(1, 0, 0, 0), 0.95) is None
    assert detectable_difference(Outcomes(2, 0, 0, 1), 0.95) is None
    same = detectable_difference(Outcomes(50, 0, 0, 50), 0.95)
    assert same is not None and 0.05 < same < 0.12, "no flips seen does not mean all is detectable"


def test_detectable_at_an_error() -> None:
    assert detectable_at(0.01, 0.95) == pytest.approx(0.01 * (norm.ppf(0.975) + norm.ppf(0.8)))
    few = detectable_at(0.01, 0.95, freedom=3)
    assert few == pytest.approx(0.01 * (student.ppf(0.975, 3) + student.ppf(0.8, 3)))
    assert detectable_at(0.5, 0.95) is None


@settings(deadline=None)
@given(COUNTS)
def test_more_documents_detect_smaller_differences(counts: tuple[int, int, int, int]) -> None:
    few = detectable_difference(Outcomes(*counts), 0.95)
    many = detectable_difference(Outcomes(*(10 * count for count in counts)), 0.95)
    assert few is None or (many is not None and many <= few)


@pytest.mark.parametrize(
    ("value", "low", "significant", "decision"),
    [
        (0.03, 0.01, True, "better"),
        (0.03, -0.01, False, "no worse than margin"),
        (-0.01, -0.015, True, "no worse than margin"),
        (-0.01, -0.025, True, "worse"),
        (-0.01, -0.025, False, "cannot tell"),
        (0.03, -0.05, False, "cannot tell"),
        (-0.02, -0.02, True, "worse"),
        (0.0, None, False, "cannot tell"),
    ],
)
def test_decisions(value: float, low: float | None, significant: bool, decision: str) -> None:
    assert decide(Estimate(value=value, low=low), 0.02, significant=significant) == decision
