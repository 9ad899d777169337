"""Records made by hand for the throughput tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streamline_bench.throughput.record import (
    Environment,
    Ideal,
    ModelResult,
    Point,
    Rate,
    Ratio,
    ThroughputRecord,
)
from streamline_bench.throughput.workload import Workload


@pytest.fixture
def point() -> Callable[..., Point]:
    """Return a function that makes a measured point, or a failed one without a median."""

    def make(batch: int, median: float | None, ratio: float | None = None, **changes: Any) -> Point:
        fields: dict[str, Any] = {"batch_requested": batch, "batch_size": batch}
        if median is None:
            fields.update(status="failed", reason="killed by signal 9")
        else:
            rate = Rate(median=median, low=median - 1, high=median + 1)
            fields.update(status="ok", output_tokens_per_second=rate, peak_memory_bytes=1000)
            if ratio is not None:
                fields["ratio"] = Ratio(value=ratio, low=ratio - 0.1, high=ratio + 0.1)
        return Point(**{**fields, **changes})

    return make


@pytest.fixture
def make_record() -> Callable[..., ThroughputRecord]:
    """Return a function label=points, ... -> record; ``dense`` is the reference if it is there."""

    def make(**models: list[Point]) -> ThroughputRecord:
        results = tuple(
            ModelResult(
                label=label,
                model=f"models/{label}",
                status="ok" if any(p.status == "ok" for p in points) else "failed",
                reason=None if any(p.status == "ok" for p in points) else "it was not to be",
                weights_bytes=4096,
                ideal=Ideal(kind="layers", ratio=1.25, layers=1.25, flops=1.2, weights=1.2),
                start_seconds=2.5,
                points=tuple(points),
            )
            for label, points in models.items()
        )
        return ThroughputRecord(
            created="2026-01-02T03:04:05+00:00",
            engine="hf",
            mode="offline",
            dense="dense" if "dense" in models else None,
            dtype="float32",
            clock="cpu",
            confidence=0.95,
            interleaved=True,
            workload=Workload(batch_sizes=(1, 8)),
            environment=Environment(
                machine_id="abc",
                device="cpu",
                device_name="a processor",
                driver=None,
                cpu_count=2,
                threads=1,
                engine_version="5",
                versions={},
                memory="rss",
                energy="not read: no accelerator",
            ),
            models=results,
        )

    return make
