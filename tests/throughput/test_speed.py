"""One line per model, all at one batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.throughput.figures import Latency
from streamline_bench.throughput.record import ThroughputRecord, write_record
from streamline_bench.throughput.served import ServingPoint
from streamline_bench.throughput.speed import figures_of, read_figures

Make = Callable[..., ThroughputRecord]


def test_all_models_are_shown_at_the_largest_batch_of_dense(make_record: Make, point: Any) -> None:
    found = figures_of(
        make_record(
            dense=[point(1, 10.0, 1.0), point(8, 40.0, 1.0), point(32, None)],
            small=[point(1, 15.0, 1.5), point(8, 50.0, 1.25), point(32, 70.0)],
        )
    )
    small = found["small"]
    assert (small.batch_size, small.output_tokens_per_second, small.ratio) == (8, 50.0, 1.25)
    assert (small.low, small.high, small.ratio_low, small.ratio_high) == (49.0, 51.0, 1.15, 1.35)
    assert (small.status, small.ideal_ratio, small.clock) == ("ok", 1.25, "cpu")
    assert (small.weights_bytes, small.peak_memory_bytes, small.start_seconds) == (4096, 1000, 2.5)


def test_the_noise_floor_is_that_of_the_batch_shown(make_record: Make, point: Any) -> None:
    record = make_record(dense=[point(1, 10.0, 1.0), point(8, 40.0, 1.0)],
                         again=[point(1, 9.0, 0.9), point(8, 42.0, 1.05)],
                         small=[point(1, 15.0, 1.5), point(8, 50.0, 1.25)])  # fmt: skip
    assert figures_of(record)["small"].self_ratio is None
    small = figures_of(record.model_copy(update={"self_check": "again"}))["small"]
    ends = small.self_ratio, small.self_ratio_low, small.self_ratio_high
    assert ends == pytest.approx((1.05, 0.95, 1.15)) and small.blocks == 1
    assert small.noise_floor is not None and small.noise_floor.low == pytest.approx(0.95)


def test_a_failure_at_the_shown_batch_is_a_failed_line(make_record: Make, point: Any) -> None:
    found = figures_of(
        make_record(dense=[point(8, 40.0)], broken=[point(1, 9.0), point(8, None)], gone=[])
    )
    assert (found["broken"].status, found["broken"].reason) == ("failed", "killed by signal 9")
    assert found["broken"].output_tokens_per_second is None
    assert (found["gone"].status, found["gone"].reason) == ("failed", "it was not to be")


def test_without_dense_every_model_shows_its_own_largest(make_record: Make, point: Any) -> None:
    found = figures_of(make_record(one=[point(1, 10.0), point(8, 30.0)], two=[point(1, 5.0)]))
    assert {label: line.batch_size for label, line in found.items()} == {"one": 8, "two": 1}
    assert found["one"].ratio is None


def test_a_served_model_shows_its_first_token_at_the_lowest_rate(
    make_record: Make, point: Any, tmp_path: Path
) -> None:
    def served(rate: float, ttft: float, speed: float) -> ServingPoint:
        latency = Latency(mean=ttft, p50=ttft, p90=ttft, p99=ttft)
        return ServingPoint(
            request_rate=rate, status="ok", ttft=latency, output_tokens_per_second=speed
        )

    record = make_record(dense=[])
    points = (served(4.0, 30.0, 90.0), served(1.0, 12.0, 25.0))
    model = record.models[0].model_copy(update={"serving": points, "status": "ok", "reason": None})
    write_record(record.model_copy(update={"models": (model,)}), tmp_path)
    line = read_figures(tmp_path)["dense"]
    assert (line.ttft_ms, line.output_tokens_per_second, line.status) == (12.0, 90.0, "ok")
