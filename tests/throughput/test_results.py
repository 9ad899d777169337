"""From rounds to the record: rates and ratios beside sums done by hand, and what stays empty."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest

from streamline_bench.throughput.footprint import Footprint
from streamline_bench.throughput.record import Round
from streamline_bench.throughput.results import (
    bootstrap_interval,
    model_result,
    per_second,
    points_of,
    rate,
    ratio,
    student_interval,
    widest,
)
from streamline_bench.throughput.sweep import Contender, Measured
from streamline_bench.throughput.workload import Workload

WHERE: dict[str, Any] = {"workload": Workload(), "dtype": "bfloat16", "on_cpu": True}


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
    (point,) = points_of([measured(2, 1.0, 2.0, 4.0)], None, "wall", confidence=0.9, seed=0)
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
    found = points_of(ours, dense, "wall", confidence=0.9, seed=0)
    assert [p.ratio.value if p.ratio else None for p in found] == [2.0, None, None, None]


def test_a_failure_after_some_rounds_has_no_figure_but_keeps_them() -> None:
    (point,) = points_of([measured(1, 1.0, reason="hung")], None, "wall", confidence=0.9, seed=0)
    assert point.status == "failed" and point.reason == "hung"
    assert point.output_tokens_per_second is None and len(point.rounds) == 1


def test_a_model_without_sizes_or_points_is_failed() -> None:
    result = model_result(Contender("x", "y", None, None), dense=None, **WHERE)
    assert (result.status, result.reason) == ("failed", "nothing was measured")


def test_sizes_come_with_the_dtype_that_was_run() -> None:
    sizes = Footprint(10, 40, 2, 6, 2, 0, 1.0, 4, 8, None, "float32")
    empty = Footprint(0, 0, 0, 0, 0, 0, 1.0, 0, None, None, None)
    points = points_of([measured(1, 1.0)], None, "wall", confidence=0.9, seed=0)
    result = model_result(Contender("x", "y", None, sizes), dense=sizes, points=points, **WHERE)
    assert result.kv_bytes_per_token == 16
    assert result.points[0].ideal is not None and result.points[0].ideal.ratio == 1
    result = model_result(Contender("x", "y", None, sizes), dense=empty, points=points, **WHERE)
    assert result.points[0].ideal is None


def rounds(*seconds: float, tokens: int = 100, first: int = 0, block: int = 0) -> list[Round]:
    return [
        Round(
            block=block,
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


def in_blocks(*blocks: tuple[float, ...]) -> list[Round]:
    return [r for block, seconds in enumerate(blocks) for r in rounds(*seconds, block=block)]


def test_the_ratio_is_taken_within_pairs() -> None:
    # The machine slows down threefold in the second half; the model is twice as fast always.
    found = ratio(in_blocks((1, 1), (3, 1)), in_blocks((2, 2), (6, 2)), "wall")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.median, found.median_low, found.median_high) == pytest.approx((2.0, 2.0, 2.0))


def test_pairs_go_by_block_and_number() -> None:
    found = ratio(rounds(1, 1, first=1), rounds(9, 2, 2, 9), "cpu")
    assert found is not None and found.value == pytest.approx(2.0)
    assert ratio(rounds(1), rounds(1, first=5), "wall") is None
    assert ratio(rounds(1, block=1), rounds(1), "wall") is None
    found = ratio(in_blocks((1,), (2,), (4,)), in_blocks((2,), (4,)), "wall")
    assert found is not None and (found.value, found.blocks) == (pytest.approx(2.0), 2)


def test_the_interval_is_students_over_blocks_however_many_rounds_they_have() -> None:
    from scipy import stats

    ours, dense = in_blocks((1, 1.2), (1.1, 1.3, 0.9), (1.2,)), in_blocks((2,) * 2, (2,) * 3, (2,))
    logs = [
        statistics.mean(math.log(2 / seconds) for seconds in block)
        for block in ((1, 1.2), (1.1, 1.3, 0.9), (1.2,))
    ]
    found = ratio(ours, dense, "wall", confidence=0.9)
    assert found is not None and found.value == pytest.approx(math.exp(statistics.mean(logs)))
    ends = stats.t.interval(0.9, 2, statistics.mean(logs), stats.sem(logs))
    assert (found.low, found.high) == pytest.approx(tuple(map(math.exp, ends)))
    turned = ratio(dense, ours, "wall", confidence=0.9)
    assert turned is not None and turned.value == pytest.approx(1 / found.value)
    assert turned.low == pytest.approx(1 / found.high)  # type: ignore[operator]


def test_the_bootstrap_draws_blocks_and_then_rounds() -> None:
    blocks = [np.log([1.0, 1.5]), np.log([2.0, 4.0])]
    every = sorted(
        statistics.median(statistics.mean(logs) for logs in drawn)
        for pair in itertools.product(blocks, repeat=2)
        for drawn in itertools.product(*(itertools.product(b, repeat=len(b)) for b in pair))
    )
    found = bootstrap_interval(blocks, 0.6, np.random.default_rng(0))
    ends = every[int(0.2 * len(every))], every[int(0.8 * len(every))]
    assert found == pytest.approx(tuple(map(math.exp, ends)))


def test_one_block_has_no_interval() -> None:
    found = ratio(rounds(1, 1, 2), rounds(2, 2, 4), "wall")
    assert found is not None and (found.value, found.low, found.high) == (2.0, None, None)
    assert (found.median_low, found.median_high) == (None, None)


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = in_blocks((1, 1.5), (2, 3)), in_blocks((2, 2.1), (2.2, 2.3))
    assert ratio(*pair, "wall", seed=3) == ratio(*pair, "wall", seed=3)


def test_intervals_cover_when_processes_differ() -> None:
    """5 % between processes, 2 % between rounds: rounds as units cover two times out of three."""
    generator, hits = np.random.default_rng(5), np.zeros(2)
    for _ in range(400):
        process = generator.normal(0, 0.05, (3, 1)) - generator.normal(0, 0.05, (3, 1))
        logs = process + generator.normal(0, 0.02, (3, 6)) - generator.normal(0, 0.02, (3, 6))
        low, high = student_interval([*logs], 0.95)
        assert low is not None and high is not None
        mean, error = logs.mean(), logs.std(ddof=1) / math.sqrt(logs.size)
        hits += low <= 1 <= high, abs(mean) <= 2.11 * error
    assert 0.92 <= hits[0] / 400 <= 0.98
    assert hits[1] / 400 < 0.8


def test_the_widest_interval_leaves_out_what_has_no_ratio() -> None:
    def point(*blocks: tuple[float, ...], **changes: Any) -> Measured:
        return Measured(1, changes.pop("size", 1), rounds=in_blocks(*blocks), **changes)

    dense, ours = point((1,), (1,)), point((1,), (1.1,))
    known = ratio(ours.rounds, dense.rounds, "wall")
    assert known is not None and known.high is not None and known.low is not None
    models = {"dense": [dense], "a": [ours], "b": [point((1,), (9,), size=2)],
              "c": [point((1,), reason="it died")]}  # fmt: skip
    half = (known.high - known.low) / 2 / known.value
    assert widest(models, "dense", "wall", 0.95) == pytest.approx(half)
    assert widest({**models, "d": [point((1,))]}, "dense", "wall", 0.95) == math.inf
