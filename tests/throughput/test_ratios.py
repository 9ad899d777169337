"""Rates and ratios over rounds, beside sums done by hand."""

from __future__ import annotations

import itertools
import statistics

import pytest

from streamline_bench.throughput.ratios import per_second, rate, ratio
from streamline_bench.throughput.record import Round


def rounds(*seconds: float, tokens: int = 100, first: int = 0) -> list[Round]:
    return [
        Round(
            index=first + index,
            seconds=spent,
            cpu_seconds=spent / 2,
            requests=1,
            prompt_tokens=10,
            output_tokens=tokens,
        )
        for index, spent in enumerate(seconds)
    ]


def test_rates_by_either_clock() -> None:
    measured = rounds(1.0, 2.0, 4.0)
    assert per_second(measured[1], "wall") == 50
    assert per_second(measured[1], "cpu") == 100
    shown = rate(measured, "wall")
    assert (shown.median, shown.low, shown.high) == (50, 25, 100)


def test_the_ratio_is_taken_within_pairs() -> None:
    # The machine slows down threefold in the last two rounds; the model is twice as fast always.
    found = ratio(rounds(1, 1, 3, 3), rounds(2, 2, 6, 6), "wall")
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_pairs_go_by_the_rounds_number() -> None:
    found = ratio(rounds(1, 1, first=1), rounds(9, 2, 2, 9), "cpu")
    assert found is not None and found.value == 2.0
    assert ratio(rounds(1), rounds(1, first=5), "wall") is None


def test_interval_is_that_of_all_resamples() -> None:
    ratios = [1.0, 1.25, 2.0, 4.0]
    found = ratio(rounds(*(1 / r for r in ratios)), rounds(1, 1, 1, 1), "wall", confidence=0.6)
    every = sorted(statistics.median(s) for s in itertools.product(ratios, repeat=4))
    assert found is not None and found.value == pytest.approx(1.625)
    assert found.low == pytest.approx(every[int(0.2 * len(every))])
    assert found.high == pytest.approx(every[int(0.8 * len(every))])


def test_one_round_has_no_interval() -> None:
    found = ratio(rounds(1), rounds(2), "wall")
    assert found is not None and (found.value, found.low, found.high) == (2.0, None, None)


def test_unpaired_ratio_is_that_of_the_medians() -> None:
    found = ratio(rounds(1, 1, 4), rounds(2, 2, 2), "wall", paired=False)
    assert found is not None and found.value == 2.0
    assert found.low is not None and found.high is not None and found.low < 2.0 <= found.high


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = rounds(1, 1.5, 2, 3), rounds(2, 2.1, 2.2, 2.3)
    assert ratio(*pair, "wall", seed=3) == ratio(*pair, "wall", seed=3)
