"""The clustered McNemar test against every sign change, and against the plain test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from streamline_bench.stability.paired import Outcomes, mcnemar
from streamline_bench.stability.sign_flip import clustered_test, sign_flip


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


def test_normal_limit_continues_the_exact_test() -> None:
    source = np.random.default_rng(0)
    net = source.integers(-3, 4, size=2600)
    net[:40] = -3
    exact = net[: int(np.searchsorted(np.abs(net).cumsum(), 3990))]
    assert np.abs(net).sum() > 4000 >= np.abs(exact).sum()
    z = abs(exact.sum()) / np.sqrt(np.square(exact).sum())
    assert sign_flip(exact) == pytest.approx(2 * norm.sf(z), rel=0.05)
    z = abs(net.sum()) / np.sqrt(np.square(net).sum())
    assert sign_flip(net) == pytest.approx(2 * norm.sf(z))


def test_clusters_that_fail_together_are_fewer_witnesses() -> None:
    net = np.array([-10, -10, -10, 10])
    assert sign_flip(net) == pytest.approx(10 / 16)
    assert mcnemar(Outcomes(0, 30, 10, 0)) < 0.01


def test_method_says_which_test() -> None:
    assert clustered_test(np.array([-1, 2]), "2 passages")[1] == "McNemar over 2 passages, mid-p"
    assert clustered_test(np.tile([-1, 1], 20), "40 passages")[1].endswith("exact")
