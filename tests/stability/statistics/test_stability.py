"""Stability against loops written from the equations, and its invariances."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.statistics.intervals import ratio_draws
from streamline_bench.stability.statistics.stability import (
    choice_spread,
    effective_sample_size,
    stability,
    stability_weights,
)

CASES = st.lists(st.tuples(st.floats(0, 50), st.booleans()), min_size=1, max_size=40)


def rows(*loglikelihoods: list[float], length: int = 4) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": "t",
            "doc_id": range(len(loglikelihoods)),
            "choices": [["é" * length] * len(values) for values in loglikelihoods],
            "loglikelihoods": list(loglikelihoods),
            "lengths": [[length] * len(values) for values in loglikelihoods],
            "byte_lengths": [[2 * length] * len(values) for values in loglikelihoods],
            "mean_nll": None,
        }
    )


def by_the_equation(std: list[float], agree: list[bool]) -> float:
    """Equation 6 in exact big-number arithmetic: integers of e^std at 60 digits."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        weights = [Decimal(value).exp() for value in std]
        agreeing = sum((w for w, a in zip(weights, agree, strict=True) if a), Decimal(0))
        return float(agreeing / sum(weights, Decimal(0)))


@given(CASES)
def test_stability_is_equation_6(cases: list[tuple[float, bool]]) -> None:
    std, agree = map(list, zip(*cases, strict=True))
    value = stability(np.array(std), np.array(agree))
    assert value == pytest.approx(by_the_equation(std, agree), rel=1e-12, abs=1e-300)


@given(CASES, st.randoms(use_true_random=False))
def test_order_does_not_matter(cases: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(cases)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    values = [
        stability(*(np.array(column) for column in zip(*order, strict=True)))
        for order in (cases, shuffled)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_equal_weights_give_plain_agreement() -> None:
    agree = np.array([True, False, True, True])
    assert stability(np.full(4, 3.7), agree) == pytest.approx(0.75)
    assert stability(np.full(4, 3.7), agree, mode="reference_script") == pytest.approx(0.75)


def test_one_question() -> None:
    assert stability(np.array([2.0]), np.array([True])) == 1.0
    assert stability(np.array([2.0]), np.array([False])) == 0.0


def test_large_spreads_do_not_overflow() -> None:
    value = stability(np.array([5000.0, 5000.0 + math.log(3)]), np.array([True, False]))
    assert value == pytest.approx(0.25)


def test_reference_script_sums_the_first_weights() -> None:
    """The published arithmetic: population std, softmax, first m weights of m agreements."""
    std = np.array([3.0, 0.1, 0.2, 2.0])
    agree = np.array([False, True, True, False])
    weights = [math.exp(value) for value in std]
    expected = sum(weights[:2]) / sum(weights)
    assert stability(std, agree, mode="reference_script") == pytest.approx(expected)
    ours = (weights[1] + weights[2]) / sum(weights)
    assert stability(std, agree) == pytest.approx(ours)
    assert expected > 4 * ours


def test_reference_script_depends_on_the_order() -> None:
    """As measured on the authors' data: the same answers, reordered, span most of [0, 1]."""
    source = np.random.default_rng(0)
    std = source.exponential(1.5, size=60)
    agree = source.random(60) < 0.8
    orders = [np.argsort(std), np.argsort(-std)]
    low, high = (stability(std[o], agree[o], mode="reference_script") for o in orders)
    assert high - low > 0.4
    ours = {round(stability(std[o], agree[o]), 12) for o in orders}
    assert len(ours) == 1
    assert low < ours.pop() < high


def test_reference_script_overflow_is_an_error() -> None:
    with pytest.raises(NumericsError, match="overflows"):
        stability(np.array([800.0, 1.0]), np.array([True, True]), mode="reference_script")


def test_bad_input() -> None:
    with pytest.raises(SamplesError, match="at least one question"):
        stability(np.array([]), np.array([], dtype=bool))
    with pytest.raises(NumericsError, match="question 1 is nan"):
        stability(np.array([1.0, np.nan]), np.array([True, True]))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("nll", lambda ll: -ll),
        ("nll_per_char", lambda ll: -ll / 4),
        ("nll_per_byte", lambda ll: -ll / 8),
        ("ppl_per_char", lambda ll: math.exp(-ll / 4)),
        ("ppl_per_byte", lambda ll: math.exp(-ll / 8)),
    ],
)
def test_spread_is_the_deviation_over_the_choices(quantity, value, ddof: int) -> None:
    table = rows([-3.0, -7.5], [-1.0, -2.0, -9.0], [-4.0, -4.0])
    deviation = statistics.stdev if ddof == 1 else statistics.pstdev
    expected = [deviation([value(ll) for ll in lls]) for lls in table["loglikelihoods"]]
    assert choice_spread(table, quantity=quantity, ddof=ddof) == pytest.approx(expected)


def test_spread_without_alternatives() -> None:
    table = rows([-3.0], [-1.0, -2.0])
    generated = table.assign(choices=[None, ["a", "b"]])
    assert choice_spread(table)[0] == 0.0
    assert np.isnan(choice_spread(generated)[0])


def test_mean_token_nll_only_where_the_engine_gives_it() -> None:
    table = rows([-3.0, -7.0])
    with pytest.raises(SamplesError, match="document 0 has no 'mean_nll'"):
        choice_spread(table, quantity="mean_token_nll")
    given_by_engine = table.assign(mean_nll=[[6.848, 6.890]])
    spread = choice_spread(given_by_engine, quantity="mean_token_nll", ddof=0)
    assert spread == pytest.approx([0.021])


def test_unknown_quantity_and_overflow_are_errors() -> None:
    with pytest.raises(SamplesError, match="Unknown quantity 'ppl'"):
        choice_spread(rows([-1.0, -2.0]), quantity="ppl")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="Task 't', document 1"):
        choice_spread(rows([-1.0, -2.0], [-1.0, -9000.0]), quantity="ppl_per_char")


def test_weights_and_effective_size() -> None:
    assert stability_weights(np.array([0.0, math.log(3)])) == pytest.approx([0.25, 0.75])
    assert effective_sample_size(np.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([0.0, math.log(3)])) == pytest.approx(1 / 0.625)


def test_no_weight_vanishes() -> None:
    """Spreads of unnormalised quantities reach thousands; e^-800 is 0, and 0 / 0 no stability."""
    weights = stability_weights(np.array([0.0, 800.0, 5000.0]))
    assert (weights > 0).all() and weights[2] == 1.0
    draws = ratio_draws(weights * [1, 0, 1], weights, 2000, np.random.default_rng(0))
    assert np.isfinite(draws).all()
