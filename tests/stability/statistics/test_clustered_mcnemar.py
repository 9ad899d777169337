"""The clustered McNemar test against every sign change, and against the plain test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from streamline_bench.stability.statistics.clustered_mcnemar import clustered_test, sign_flip
from streamline_bench.stability.statistics.paired import Outcomes, mcnemar


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_p_is_the_share_of_all_sign_changes(net: list[int]) -> None:
    seen = abs(sum(net))
    totals = [
        abs(sum(sign * value for sign, value in zip(signs, net, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(net))
    ]
    at_least = sum(total >= seen for total in totals) / len(totals)
    here = sum(total == seen for total in totals) / len(totals)
    assert sign_flip(np.array(net)) == pytest.approx(at_least)
    # With no net change anywhere there is one outcome, and nothing to halve.
    expected = at_least - here / 2 if any(net) else 1.0
    assert sign_flip(np.array(net), mid_p=True) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_single_documents_give_mcnemar(lost: int, gained: int) -> None:
    net = np.array([-1] * lost + [1] * gained + [0] * 5)
    plain = Outcomes(3, lost, gained, 2)
    assert sign_flip(net) == pytest.approx(mcnemar(plain))
    assert sign_flip(net, mid_p=True) == pytest.approx(mcnemar(plain, mid_p=True))


def every_sign(net: list[int], seen: int) -> float:
    """Share of sign changes at least as far from 0, by the counts of every total."""
    counts: dict[int, int] = {0: 1}
    for value in net:
        moved: dict[int, int] = {}
        for total, ways in counts.items():
            for to in (total + value, total - value):
                moved[to] = moved.get(to, 0) + ways
        counts = moved
    far = sum(ways for total, ways in counts.items() if abs(total) >= seen)
    return far / 2 ** len(net)


@pytest.mark.parametrize("net", [[-1100] * 4, [-1100, -900, -1300, 1200], [-2000, -2001, 5]])
def test_few_large_clusters_have_no_impossible_p(net: list[int]) -> None:
    p = sign_flip(np.array(net))
    assert p == every_sign(net, abs(sum(net))) >= 2 / 2 ** len(net)
    assert sign_flip(np.array(net), mid_p=True) >= 1 / 2 ** len(net)


def test_one_cluster_among_many_may_decide() -> None:
    """The normal limit would say 0.3: the largest cluster is nearly the whole of the spread."""
    net = [-3000] + [-100, 100] * 12
    assert sign_flip(np.array(net)) == pytest.approx(every_sign(net, 3000), rel=1e-9)
    assert sign_flip(np.array(net)) > 0.5


@pytest.mark.parametrize("singles", [0, 200])
def test_more_than_4000_flips_are_still_counted(singles: int) -> None:
    source = np.random.default_rng(1)
    net = [*source.integers(-90, 100, size=120).tolist(), *[1] * singles]
    assert sum(map(abs, net)) > 4000
    expected = every_sign(net, abs(sum(net)))
    assert sign_flip(np.array(net)) == pytest.approx(expected, rel=1e-9)


def test_normal_limit_continues_the_exact_test() -> None:
    source = np.random.default_rng(0)
    net = source.integers(-400, 400, size=1600)
    net[:40] = -400
    exact = net[:300]
    z, exact_z = (abs(part.sum()) / np.sqrt(np.square(part).sum()) for part in (net, exact))
    assert sign_flip(exact) == pytest.approx(2 * norm.sf(exact_z), rel=0.05)
    assert sign_flip(net) == pytest.approx(2 * norm.sf(z))
    assert clustered_test(exact, "300 passages")[1].endswith("exact")
    assert clustered_test(net, "1,600 passages")[1] == "McNemar over 1,600 passages, normal"


def test_clusters_that_fail_together_are_fewer_witnesses() -> None:
    net = np.array([-10, -10, -10, 10])
    assert sign_flip(net) == pytest.approx(10 / 16)
    assert mcnemar(Outcomes(0, 30, 10, 0)) < 0.01


def test_method_says_which_test() -> None:
    assert clustered_test(np.array([-1, 2]), "2 passages")[1] == "McNemar over 2 passages, mid-p"
    assert clustered_test(np.tile([-1, 1], 20), "40 passages")[1].endswith("exact")
