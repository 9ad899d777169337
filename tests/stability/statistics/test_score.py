"""The score test of a paired difference, its interval, Holm, what is detectable, and decisions."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, multinomial, norm
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from streamline_bench.errors import SamplesError
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample, mcnemar
from streamline_bench.stability.statistics.score import (
    PairedDifference,
    decide,
    detectable_difference,
    documents_needed,
    holm,
)

Counts = tuple[int, int, int, int]

COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0)
LEVELS = st.sampled_from([0.8, 0.95, 0.99])
TABLES = st.lists(COUNTS, min_size=2, max_size=8)


def of(*tables: Counts) -> PairedDifference:
    """The mean difference over tasks with these outcomes."""
    return PairedDifference(tuple(PairedSample(Outcomes(*counts)) for counts in tables))


def clustered(tables: list[Counts]) -> PairedSample:
    """One task whose clusters have these outcomes."""
    total = Outcomes(*(sum(column) for column in zip(*tables, strict=True)))
    rows = [[a + b + c + d, a + b, a + c, a + d] for a, b, c, d in tables]
    return PairedSample(total, (np.array(rows, dtype=float),), "passages")


def likeliest_variance(counts: Counts, difference: float) -> float:
    """Of one document's change at this true difference: by a search for the likeliest shares."""
    _, lost, gained, _ = counts
    same = sum(counts) - lost - gained

    def badness(share: float) -> float:
        parts = (lost, share), (gained, share + difference), (same, 1 - 2 * share - difference)
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    found = minimize_scalar(badness, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    share = min((low, high, float(found.x)), key=badness)
    return 2 * share + difference - difference**2


@settings(deadline=None)
@given(COUNTS, st.floats(-0.95, 0.95))
def test_the_error_is_that_of_the_likeliest_shares(counts: Counts, difference: float) -> None:
    expected = math.sqrt(likeliest_variance(counts, difference) / sum(counts))
    assert of(counts).error(difference) == pytest.approx(expected, abs=2e-5)


@given(COUNTS)
def test_p_is_mcnemars_without_correction(counts: Counts) -> None:
    p = of(counts).p_value()
    if counts[1] + counts[2] == 0:
        assert p == 1.0
        return
    table = np.reshape(counts, (2, 2))
    assert p == pytest.approx(statsmodels_mcnemar(table, exact=False, correction=False).pvalue)


def test_published_example() -> None:
    """Airway responsiveness, Bentur et al. 2009, as in Fagerland, Lydersen & Laake, chapter 8."""
    found = of((1, 7, 1, 12)).interval(0.95)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)


@settings(deadline=None)
@given(COUNTS, LEVELS)
def test_ends_are_where_the_statistic_is_the_quantile(counts: Counts, confidence: float) -> None:
    n, value = sum(counts), (counts[2] - counts[1]) / sum(counts)
    found = of(counts).interval(confidence)
    z = norm.ppf(0.5 + confidence / 2)

    def beyond(difference: float) -> float:
        error = math.sqrt(max(likeliest_variance(counts, difference), 0.0) / n)
        return abs(value - difference) - z * error

    for end, outer in ((found.low, -1.0), (found.high, 1.0)):
        inner = value + 1e-6 * (outer - value)
        if beyond(outer) <= 1e-9:
            assert end == pytest.approx(outer, abs=1e-6)
        elif outer != value:
            assert end == pytest.approx(brentq(beyond, inner, outer), abs=1e-4)


@settings(deadline=None)
@given(COUNTS)
def test_intervals_mirror_and_never_collapse(counts: Counts) -> None:
    a, b, c, d = counts
    found, mirrored = of(counts).interval(0.95), of((a, c, b, d)).interval(0.95)
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert found.high > found.low, "no flips seen is not no flips possible"


@settings(deadline=None)
@given(
    st.one_of(
        COUNTS.map(lambda counts: of(counts)),
        TABLES.map(lambda tables: of(*tables)),
        TABLES.map(lambda tables: PairedDifference((clustered(tables),))),
        TABLES.map(lambda tables: PairedDifference((clustered(tables), clustered(tables[:2])))),
    ),
    LEVELS,
    st.sampled_from([0.0, 0.02, 0.1]),
    st.integers(1, 12),
)
def test_p_interval_and_verdict_never_contradict(
    difference: PairedDifference, confidence: float, margin: float, comparisons: int
) -> None:
    level = 1 - confidence
    found = difference.interval(confidence, margin)
    p = difference.p_value()
    assert (p < level) == (not found.low <= 0 <= found.high)
    assert (difference.tail(-margin) < level / 2) == (found.low > -margin)
    adjusted = difference.interval(confidence, margin, comparisons)
    assert (comparisons * p < level) == (not adjusted.low <= 0 <= adjusted.high)
    assert adjusted.low <= found.low <= found.value <= found.high <= adjusted.high
    verdict = decide(found, margin, significant=p < level)
    if verdict in ("better", "worse"):
        assert not found.low <= 0 <= found.high
    if verdict == "cannot tell":
        assert found.low <= 0 <= found.high and found.low <= -margin


@settings(deadline=None)
@given(COUNTS, st.floats(-0.99, 0.99), st.floats(-0.99, 0.99))
def test_p_falls_with_the_distance(counts: Counts, one: float, other: float) -> None:
    """So that the interval has no holes."""
    difference = of(counts)
    near, far = sorted((one, other), key=lambda at: abs(at - difference.value))
    if (near - difference.value) * (far - difference.value) > 0:
        assert difference.p_value(far) <= difference.p_value(near) + 1e-9


def coverage(n: int, shares: tuple[float, float, float]) -> tuple[float, float, float]:
    """Chance that the interval has the truth, that p is < 5 %, and that the exact mid-p is."""
    lost, gained = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)], dtype=int).T
    chances = multinomial.pmf(np.stack([lost, gained, n - lost - gained], axis=1), n, shares)
    covered = power = mid = 0.0
    for b, c, chance in zip(lost.tolist(), gained.tolist(), chances.tolist(), strict=True):
        outcomes = Outcomes(n - b - c, b, c, 0)
        found = PairedDifference((PairedSample(outcomes),))
        covered += chance * (found.p_value(shares[1] - shares[0]) >= 0.05)
        power += chance * (found.p_value() < 0.05)
        mid += chance * (mcnemar(outcomes, mid_p=True) < 0.05)
    return covered, power, mid


@pytest.mark.parametrize(
    ("n", "shares"),
    [
        (12, (0.25, 0.25, 0.5)),
        (12, (0.4, 0.2, 0.4)),
        (30, (0.1, 0.1, 0.8)),
        (30, (0.3, 0.1, 0.6)),
        (60, (0.05, 0.05, 0.9)),
        (60, (0.1, 0.02, 0.88)),
    ],
)
def test_coverage_is_nominal_over_every_table(n: int, shares: tuple[float, float, float]) -> None:
    """From six expected flips on; the test finds what the exact conditional one finds."""
    covered, power, mid = coverage(n, shares)
    assert 0.93 < covered < 0.975
    assert power >= mid


def test_few_flips_are_never_significant() -> None:
    """With one expected flip no test can reject one time in twenty: coverage is above 97 %."""
    covered, power, _ = coverage(40, (0.0125, 0.0125, 0.975))
    assert covered > 0.99 and power < 0.01


@pytest.mark.parametrize(
    ("lost", "gained"), [((0.10, 0.02), (0.10, 0.02)), ((0.2, 0.1), (0.1, 0.0))]
)
def test_a_mean_over_tasks_covers_the_truth(
    lost: tuple[float, float], gained: tuple[float, float]
) -> None:
    """Two tasks of unlike size."""
    source, sizes = np.random.default_rng(5), (40, 200)
    drawn = [
        source.multinomial(n, (1 - b - c, b, c, 0.0), size=1500)
        for n, b, c in zip(sizes, lost, gained, strict=True)
    ]
    truth = sum(gained) / 2 - sum(lost) / 2
    covered = sum(
        of(*(tuple(map(int, table)) for table in tables)).p_value(truth) >= 0.05
        for tables in zip(*drawn, strict=True)
    )
    assert 0.93 < covered / 1500 < 0.97


def test_a_mean_over_tasks_is_the_task_where_there_is_one() -> None:
    one, twice = of((20, 8, 3, 9)), of((20, 8, 3, 9), (20, 8, 3, 9))
    both = of((40, 16, 6, 18))
    assert twice.value == one.value
    assert twice.error(0.01) == pytest.approx(one.error(0.01) / math.sqrt(2))
    assert twice.p_value() == pytest.approx(both.p_value())


def test_mean_over_tasks_with_much_data_is_walds() -> None:
    tables = ((50_000, 6_000, 5_900, 38_000), (2_000, 300, 250, 2_500))
    found, variance = of(*tables), 0.0
    for a, b, c, d in tables:
        n = a + b + c + d
        variance += (b + c - (b - c) ** 2 / n) / n**2
    error = math.sqrt(variance) / 2
    for margin in (0.0, 0.004, 0.008):
        expected = norm.sf((found.value + margin) / error)
        assert found.tail(-margin) == pytest.approx(expected, rel=0.03)


@settings(deadline=None)
@given(TABLES, st.floats(-0.9, 0.9))
def test_clusters_scale_the_error(tables: list[Counts], difference: float) -> None:
    sample = clustered(tables)
    alone, together = (
        PairedDifference((PairedSample(sample.outcomes),)),
        PairedDifference((sample,)),
    )
    effect, freedom = sample.design(dense=-1, pruned=1)
    assert together.error(difference) == pytest.approx(
        math.sqrt(effect) * alone.error(difference), abs=1e-12
    )
    distance = together.value - difference
    if together.error(difference) > 0 and distance:
        expected = 2 * student.sf(abs(distance) / together.error(difference), freedom)
        assert together.p_value(difference) == pytest.approx(expected, abs=1e-12)


def test_freedom_of_two_samples_is_satterthwaites() -> None:
    samples = (clustered([(4, 1, 0, 2)] * 3), clustered([(9, 2, 1, 3), (5, 0, 2, 1)] * 4))
    both = PairedDifference(samples)
    variances = []
    for sample in samples:
        effect, _ = sample.design(dense=-1, pruned=1)
        n = sample.outcomes.n
        variances.append(effect * (sample.outcomes.flips + 0.5) / (n + 1) / n)
    freedoms = [sample.design(dense=-1, pruned=1).freedom for sample in samples]
    below = sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    assert both.freedom == pytest.approx(sum(variances) ** 2 / below)


@pytest.mark.parametrize(("clusters", "size"), [(6, 30), (12, 10), (40, 4)])
@pytest.mark.parametrize("together", [0.0, 0.1])
def test_clusters_cover_the_truth(clusters: int, size: int, together: float) -> None:
    """Flips of a passage are independent, or their shares vary from passage to passage."""
    source = np.random.default_rng(4)
    covered, shares = 0, np.array([0.5, 0.2, 0.1, 0.2])
    for _ in range(800):
        shape = shares * (1 - together) / together if together else shares
        drawn = source.dirichlet(shape, size=clusters) if together else [shares] * clusters
        tables = [tuple(source.multinomial(size, row).tolist()) for row in drawn]
        covered += PairedDifference((clustered(tables),)).p_value(-0.1) >= 0.05
    assert 0.93 < covered / 800 < 0.98


def test_clusters_that_fail_together_are_fewer_witnesses() -> None:
    tables = [(0, 10, 0, 0)] * 3 + [(0, 0, 10, 0)]
    assert of((0, 30, 10, 0)).p_value() < 0.01
    assert PairedDifference((clustered(tables),)).p_value() > 0.3


def test_names_say_what_was_counted() -> None:
    single, both = of((3, 1, 2, 4)), of((3, 1, 2, 4), (1, 1, 1, 1))
    passages = PairedDifference((clustered([(3, 1, 0, 4), (1, 1, 1, 1)]),))
    assert single.method == "McNemar, score"
    assert passages.method == "McNemar over 2 passages, score"
    assert both.method == "score over 2 tasks"
    for found, over in ((single, "10 documents"), (passages, "2 passages"), (both, "2 tasks")):
        assert str(found.interval(0.95).method).endswith(over)


P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(deadline=None)
@given(P_VALUES)
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    with mock.patch("gc.collect"):  # which it calls each time; a second in a process this large
        expected = multipletests(p_values, method="holm")[1].tolist()
    assert [found.p for found in holm(p_values, 0.05)] == pytest.approx(expected)


@settings(deadline=None)
@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_holms_comparisons_decide_as_its_p(p_values: list[float], level: float) -> None:
    for p, (adjusted, comparisons) in zip(p_values, holm(p_values, level), strict=True):
        assert (adjusted < level) == (comparisons * p < level)
        assert 1 <= comparisons <= len(p_values)


def test_holm_by_hand() -> None:
    assert holm([], 0.05) == []
    found = holm([0.04, 0.01, 0.03], 0.05)
    assert [adjusted.p for adjusted in found] == pytest.approx([0.06, 0.03, 0.06])
    assert [adjusted.comparisons for adjusted in found] == [2, 3, 2]


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
        if b != c and abs(b - c) / math.sqrt(b + c) > norm.isf(0.025):
            power += math.prod(outcome[0] for outcome in outcomes)
    return power


@pytest.mark.parametrize("counts", [(5, 0, 0, 0), (3, 2, 1, 1), (0, 4, 2, 2)])
def test_detectable_difference_of_few_documents_is_enumerated(counts: Counts) -> None:
    outcomes = Outcomes(*counts)
    difference = detectable_difference(outcomes, 0.95)
    assert difference is not None
    seen = (outcomes.right_to_wrong + outcomes.wrong_to_right + 0.5) / (outcomes.n + 1)
    for moved, enough in ((0.0, True), (-0.01, False)):
        less = difference + moved
        share = max(seen, less)
        power = brute_power(outcomes.n, (share + less) / 2, (share - less) / 2)
        assert (power >= 0.8 - 1e-9) == enough, (moved, power)


def test_three_documents_detect_nothing() -> None:
    assert detectable_difference(Outcomes(3, 0, 0, 0), 0.95) is None
    assert detectable_difference(Outcomes(4, 0, 0, 0), 0.95) is not None
    assert detectable_difference(Outcomes(3, 0, 0, 0), 0.8) is not None


def test_detectable_difference_without_flips_and_with_few_documents() -> None:
    assert detectable_difference(Outcomes(1, 0, 0, 0), 0.95) is None
    assert detectable_difference(Outcomes(2, 0, 0, 1), 0.95) is None
    same = detectable_difference(Outcomes(50, 0, 0, 50), 0.95)
    assert same is not None and 0.05 < same < 0.12, "no flips seen does not mean all is detectable"


def test_clusters_detect_less() -> None:
    tables = [(20, 6, 1, 8), (22, 1, 5, 7), (18, 3, 3, 11), (25, 0, 0, 10), (17, 7, 2, 9)] * 3
    sample = clustered(tables)
    effect, freedom = sample.design(dense=-1, pruned=1)
    found = PairedDifference((sample,)).detectable(0.95)
    assert found is not None and effect > 1.2
    o = sample.outcomes
    share = max(found, (o.right_to_wrong + o.wrong_to_right + 0.5) / (o.n + 1))
    need = student.ppf(0.975, freedom) * math.sqrt(share)
    need += student.ppf(0.8, freedom) * math.sqrt(share - found**2)
    assert o.n / effect * found**2 == pytest.approx(need**2)


def test_detectable_over_tasks_is_from_the_width_of_the_interval() -> None:
    both = of((200, 30, 25, 145), (80, 9, 4, 20))
    ends = both.interval(0.95)
    error = (ends.high - ends.low) / 2 / norm.ppf(0.975)
    assert both.detectable(0.95) == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * error)
    assert of((1, 0, 0, 0), (0, 0, 0, 1)).detectable(0.9999) is None


@settings(deadline=None)
@given(COUNTS)
def test_more_documents_detect_smaller_differences(counts: Counts) -> None:
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


@pytest.mark.parametrize(("difference", "discordance"), [(0.02, 0.1), (0.05, 0.3), (0.1, 0.3)])
def test_documents_needed_give_the_power_in_a_simulation(
    difference: float, discordance: float
) -> None:
    n = documents_needed(-difference, discordance)
    lost, gained = (discordance + difference) / 2, (discordance - difference) / 2
    draws = np.random.default_rng(0).multinomial(n, [lost, gained, 1 - lost - gained], size=4000)
    statistic = np.abs(draws[:, 0] - draws[:, 1]) / np.sqrt(draws[:, 0] + draws[:, 1])
    power = (statistic > norm.isf(0.025)).mean()
    assert power == pytest.approx(0.8, abs=0.03)
    first = of((int(draws[0, 2]), int(draws[0, 0]), int(draws[0, 1]), 0))
    assert abs(first.statistic(0.0)) == pytest.approx(statistic[0])


def test_documents_needed_are_those_at_which_the_difference_is_detectable() -> None:
    seen = Outcomes(500, 60, 40, 400)
    wanted = detectable_difference(seen, 0.95)
    assert documents_needed(wanted, 100.5 / 1001) == pytest.approx(1000, rel=0.01)
    assert documents_needed(wanted, 100.5 / 1001, effect=3) == pytest.approx(3000, rel=0.01)


@pytest.mark.parametrize(("difference", "discordance"), [(0.0, 0.1), (0.02, 0.0), (1.5, 0.1)])
def test_documents_needed_refuses_what_is_no_share(difference: float, discordance: float) -> None:
    with pytest.raises(SamplesError, match="share"):
        documents_needed(difference, discordance)


def test_a_difference_seen_says_how_many_documents_it_needs() -> None:
    outcomes = (500, 60, 40, 400)
    assert of(outcomes).needed(0.95) == pytest.approx(documents_needed(0.02, 0.1), abs=1)
    twice = of(outcomes, outcomes).needed(0.95)
    assert twice == pytest.approx(documents_needed(0.02, 0.1), abs=1), "in all, not of each task"
    assert of((10, 5, 5, 10)).needed(0.95) is None
