"""Percentiles, against a binomial sum by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamline_bench.throughput.percentiles import percentile


def covered(n: int, low: int, high: int, share: float) -> float:
    """P(the quantile lies between the order statistics low and high, from 1), summed by hand."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(low, high))


@pytest.mark.parametrize(("share", "least"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_how_many_values_each_needs(share: float, least: int) -> None:
    assert percentile(np.arange(least - 1.0), share) is None
    assert percentile(np.arange(float(least)), share) is not None
    assert 1 - share**least >= 0.975 > 1 - share ** (least - 1)


@pytest.mark.parametrize(("n", "share"), [(20, 0.5), (40, 0.9), (500, 0.99)])
def test_the_ends_are_the_order_statistics_of_the_binomial(n: int, share: float) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    found = percentile(values, share)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == np.quantile(values, share)
    low, high = int(found.low), int(found.high)
    assert covered(n, low, high, share) >= 0.95
    assert covered(n, low + 1, high, share) < 0.975 and covered(n, low, high - 1, share) < 0.975


def test_it_covers_whatever_the_distribution() -> None:
    generator, hits = np.random.default_rng(1), 0
    for _ in range(400):
        found = percentile(generator.lognormal(0, 1, 100), 0.9)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= math.exp(1.2816) <= found.high
    assert 0.93 <= hits / 400 <= 0.995


def test_values_that_share_a_start_are_fewer_than_they_look() -> None:
    """8 starts of 40 requests, which differ as much as requests do."""
    generator, hits = np.random.default_rng(2), np.zeros(2)
    groups = np.repeat(np.arange(8), 40)
    for _ in range(300):
        values = generator.normal(0, 1, 8)[groups] + generator.normal(0, 1, 320)
        for place, given in enumerate(((), (groups,))):
            found = percentile(values, 0.5, 0.95, *given)
            assert found is not None
            if found.low is None or found.high is None:
                hits[place] += 1  # too few for an interval: none is claimed
            else:
                hits[place] += found.low <= 0 <= found.high
    assert hits[0] / 300 < 0.6 and hits[1] / 300 > 0.9


def test_groups_that_differ_in_all_leave_a_value_without_an_interval() -> None:
    groups = np.repeat(np.arange(3), 40)
    found = percentile(100.0 * groups + np.tile(np.arange(40.0), 3), 0.9, 0.95, groups)
    assert found is not None and found.value > 200 and (found.low, found.high) == (None, None)
