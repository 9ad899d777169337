"""Paired statistics against scipy, statsmodels, brute force and published examples."""

from __future__ import annotations

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
    PairedSample,
    kappa,
    mcnemar,
    retention,
    wilson,
)


def interval(*tasks: Outcomes) -> tuple[float, float] | None:
    """Of retention, without clusters."""
    return retention([PairedSample(task) for task in tasks])


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
    assert wilson(successes / n, n, 0.9) == pytest.approx(expected, abs=1e-12)


@given(COUNTS)
def test_retention_is_the_ratio_whose_difference_may_be_zero(
    counts: tuple[int, int, int, int],
) -> None:
    """Ends solve: the square-and-add interval of p1 - r p2 touches 0."""
    outcomes = Outcomes(*counts)
    ends = interval(outcomes)
    if outcomes.dense_accuracy == 0.0:
        assert ends is None
        return
    assert ends is not None
    ratio = outcomes.pruned_accuracy / outcomes.dense_accuracy
    assert 0.0 <= ends[0] <= ratio + 1e-9 and ratio <= ends[1] + 1e-9
    n = outcomes.n
    p1, p2 = outcomes.pruned_accuracy, outcomes.dense_accuracy
    (l1, u1), (l2, u2) = wilson(p1, n, 0.95), wilson(p2, n, 0.95)
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
    ends = interval(outcomes)
    assert ends == pytest.approx((ratio * math.exp(-1.96 * error), ratio * math.exp(1.96 * error)),
                                 abs=2e-3)  # fmt: skip
    shares = np.random.default_rng(0).multinomial(2000, np.array(outcomes.counts) / 2000, 20_000)
    ratios = (shares[:, 0] + shares[:, 2]) / (shares[:, 0] + shares[:, 1])
    assert ends == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=3e-3)


def test_retention_without_flips_and_without_right_answers() -> None:
    same = interval(Outcomes(30, 0, 0, 10))
    assert same is not None and same[0] < 1 < same[1], "no flips seen is not no flips possible"
    none_left = interval(Outcomes(0, 12, 0, 8))
    assert none_left is not None and none_left[0] == 0.0 and 0 < none_left[1] < 0.5
    all_right = interval(Outcomes(25, 0, 0, 0))
    assert all_right is not None and 0.8 < all_right[0] < 1 < all_right[1] < 1.25


def test_retention_where_the_dense_model_has_none_right() -> None:
    assert interval(Outcomes(0, 0, 3, 4)) is None
    assert interval(Outcomes(0, 0, 3, 4), Outcomes(0, 0, 1, 0)) is None


def test_mean_retention_is_the_ratio_whose_mean_difference_may_be_zero() -> None:
    tasks = [Outcomes(40, 1, 0, 9), Outcomes(5, 4, 2, 30), Outcomes(0, 0, 1, 8)]
    p1, p2 = (np.mean([getattr(task, f"{side}_accuracy") for task in tasks])
              for side in ("pruned", "dense"))  # fmt: skip
    ends = interval(*tasks)
    assert ends is not None and ends[0] < p1 / p2 < ends[1]
    for r, upper in zip(ends, (False, True), strict=True):
        square = 0.0
        for task in tasks:
            n, (a, b, c, d) = task.n, task.counts
            margins = (a + b) * (c + d) * (a + c) * (b + d)
            phi = max(0.0, a * d - b * c - n / 2) / math.sqrt(margins) if margins else 0.0
            now, before = (wilson(right / n, n, 0.95) for right in (a + c, a + b))
            x = now[1] - (a + c) / n if upper else (a + c) / n - now[0]
            y = (a + b) / n - before[0] if upper else before[1] - (a + b) / n
            square += x**2 - 2 * phi * r * x * y + (r * y) ** 2
        assert (p1 - r * p2) ** 2 == pytest.approx(square / 9)


def test_mean_retention_covers_the_truth_with_few_flips() -> None:
    """Two tasks of 40 documents: percentiles of a bootstrap cover 83 %."""
    shares = [0.70, 0.02, 0.01, 0.27]
    drawn = np.random.default_rng(7).multinomial(40, shares, size=(1500, 2))
    covered = 0
    for tables in drawn.tolist():
        low, high = interval(*(Outcomes(*table) for table in tables)) or (0.0, 0.0)
        covered += low <= 0.71 / 0.72 <= high
    assert covered / 1500 > 0.94


def clustered(tables: np.ndarray) -> PairedSample:
    """Clusters with these outcomes, [clusters, 4]."""
    a, b, c, d = tables.T
    rows = np.stack([a + b + c + d, a + b, a + c, a + d], axis=1).astype(float)
    return PairedSample(Outcomes(*tables.sum(axis=0).tolist()), (rows,), "passages")


def test_clusters_of_twins_halve_the_documents() -> None:
    """Each document twice: retention has nearly the interval of half as many documents."""
    source = np.random.default_rng(3)
    single = source.multinomial(1, [0.5, 0.15, 0.1, 0.25], size=400)
    half = PairedSample(Outcomes(*single.sum(axis=0).tolist()))
    twins = retention([clustered(2 * single)])
    assert twins == pytest.approx(retention([half]), abs=4e-3)
    alone = retention([PairedSample(clustered(2 * single).outcomes)])
    assert twins is not None and alone is not None
    assert twins[1] - twins[0] > 1.3 * (alone[1] - alone[0])


def brute_design(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """CR2 variance of a sum over that of documents alone, and its degrees of freedom: matrices."""
    n = len(values)
    residual = np.eye(n) - np.full((n, n), 1 / n)
    variance, vectors = 0.0, []
    for cluster in np.unique(clusters):
        rows = np.flatnonzero(clusters == cluster)
        block = np.eye(len(rows)) - np.full((len(rows), len(rows)), 1 / n)
        eigenvalues, basis = np.linalg.eigh(block)
        root = basis @ np.diag(eigenvalues**-0.5) @ basis.T  # Bell and McCaffrey's adjustment
        vectors.append(np.ones(len(rows)) @ root @ residual[rows])
        variance += float(vectors[-1] @ values) ** 2
    products = np.array([[one @ other for other in vectors] for one in vectors])
    freedom = np.trace(products) ** 2 / (products**2).sum()
    alone = float(np.square(values - values.mean()).sum())
    return (variance + 0.5) / (alone + 0.5), float(freedom)


@pytest.mark.parametrize("weights", [(-1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-0.8, 1.0, 0.0)])
@pytest.mark.parametrize("clusters", [3, 12])
def test_design_is_bell_and_mccaffreys(weights: tuple[float, ...], clusters: int) -> None:
    source = np.random.default_rng(clusters)
    labels = np.sort(source.integers(clusters, size=70))
    tables = source.multinomial(1, [0.4, 0.25, 0.15, 0.2], size=70)
    dense, pruned, same = weights
    values = tables @ np.array([dense + pruned + same, dense, pruned, same])
    sums = np.stack([tables[labels == label].sum(axis=0) for label in np.unique(labels)])
    found = clustered(sums).design(dense=dense, pruned=pruned, same=same)
    assert tuple(found) == pytest.approx(brute_design(values, labels))


def test_design_of_tasks_together_is_within_each() -> None:
    """Tasks that differ in their change are no clusters that differ."""
    source = np.random.default_rng(0)
    lost = source.multinomial(10, [0.4, 0.4, 0.1, 0.1], size=12)
    gained = source.multinomial(10, [0.4, 0.1, 0.4, 0.1], size=12)
    one, other, both = clustered(lost), clustered(gained), clustered(np.concatenate([lost, gained]))
    strata = PairedSample(both.outcomes, (*one.strata, *other.strata), "passages")
    assert strata.units == both.units == 24
    effects = [sample.design(dense=-1, pruned=1) for sample in (one, other, both, strata)]
    assert effects[3].effect < effects[2].effect
    moved = np.concatenate([table[:, 2] - table[:, 1] for table in strata.strata])
    within = sum(12 / 11 * np.square(part - part.mean()).sum() for part in (moved[:12], moved[12:]))
    b, c = both.outcomes.right_to_wrong, both.outcomes.wrong_to_right
    alone = b + c - (b - c) ** 2 / both.outcomes.n
    assert effects[3].effect == pytest.approx((within + 0.5) / (alone + 0.5))
    assert effects[0].freedom == pytest.approx(11)
    assert 11 < effects[3].freedom <= 22


def test_clusters_without_change_say_nothing() -> None:
    same = clustered(np.array([[5, 0, 0, 3]] * 6))
    assert tuple(same.design(dense=-1, pruned=1)) == pytest.approx((1.0, 5.0))
    single = clustered(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    assert single.design(dense=-1, pruned=1).effect == pytest.approx((1 + 0.5) / (2 / 3 + 0.5))
    assert tuple(PairedSample(same.outcomes).design(same=1)) == (1.0, math.inf)
    one = PairedSample(same.outcomes, (*same.strata, np.array([[1.0, 1.0, 1.0, 1.0]])))
    assert math.isfinite(one.design(dense=-1, pruned=1).freedom)
