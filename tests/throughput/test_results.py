"""From rounds to the record: rates and ratios beside sums done by hand, and what stays empty."""

from __future__ import annotations

import itertools
import statistics

import pytest

from streamline_bench.throughput.footprint import Footprint
from streamline_bench.throughput.record import Round
from streamline_bench.throughput.results import model_result, per_second, points_of, rate, ratio
from streamline_bench.throughput.sweep import Contender, Measured


def measured(batch: int, *seconds: float, size: int | None = None, **changes: object) -> Measured:
    size = batch if size is None else size
    rounds = [
        Round(
            index=index,
            seconds=spent,
            cpu_seconds=2 * spent,
            requests=size,
            prompt_tokens=30 * size,
            output_tokens=10 * size,
            energy_joules=5.0,
        )
        for index, spent in enumerate(seconds)
    ]
    return Measured(batch, size, rounds=rounds, **changes)  # type: ignore[arg-type]


def test_rates_of_a_point() -> None:
    (point,) = points_of(
        [measured(2, 1.0, 2.0, 4.0)], None, "wall", paired=True, confidence=0.9, seed=0
    )
    assert point.output_tokens_per_second is not None
    assert point.output_tokens_per_second.median == 10
    assert point.output_tokens_per_wall_second == 10
    assert point.output_tokens_per_cpu_second == 5
    assert point.total_tokens_per_second == 40
    assert point.requests_per_second == 1
    assert point.energy_joules_per_token == 0.25
    assert point.ratio is None


def test_ratios_only_where_both_ran_the_same_batch() -> None:
    dense = [measured(1, 2.0), measured(4, 2.0, size=2), measured(8, reason="killed")]
    ours = [measured(1, 1.0), measured(4, 1.0), measured(8, 1.0), measured(16, 1.0)]
    found = points_of(ours, dense, "wall", paired=True, confidence=0.9, seed=0)
    assert [p.ratio.value if p.ratio else None for p in found] == [2.0, None, None, None]


def test_a_failure_after_some_rounds_has_no_figure_but_keeps_them() -> None:
    (point,) = points_of(
        [measured(1, 1.0, reason="hung")], None, "wall", paired=True, confidence=0.9, seed=0
    )
    assert point.status == "failed" and point.reason == "hung"
    assert point.output_tokens_per_second is None and len(point.rounds) == 1


def test_a_model_without_sizes_or_points_is_failed() -> None:
    result = model_result(Contender("x", "y", None, None), dtype="float32", dense=None)
    assert (result.status, result.reason, result.ideal) == ("failed", "nothing was measured", None)


def test_sizes_come_with_the_dtype_that_was_run() -> None:
    sizes = Footprint(10, 40, 2, 6.0, 20.0, 8, None, "float32")
    empty = Footprint(0, 0, 0, 0.0, 0.0, None, None, None)
    contender = Contender("x", "y", None, sizes)
    result = model_result(contender, dtype="bfloat16", dense=sizes)
    assert result.kv_bytes_per_token == 16
    assert result.ideal is not None and result.ideal.ratio == 1
    assert model_result(contender, dtype="float32", dense=empty).ideal is None


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
