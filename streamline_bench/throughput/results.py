"""From rounds to the record: rates, ratios to dense, and the sizes beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.throughput.contender import Contender
from streamline_bench.throughput.footprint import Footprint, ideal
from streamline_bench.throughput.ratios import rate, ratio
from streamline_bench.throughput.record import ModelResult, Point, Round, ServingPoint
from streamline_bench.throughput.setup import DTYPE_BYTES
from streamline_bench.throughput.sweep import Measured
from streamline_bench.throughput.workload import Clock

__all__ = ["model_result", "points_of"]


def points_of(
    measured: Sequence[Measured],
    dense: Sequence[Measured] | None,
    clock: Clock,
    *,
    paired: bool,
    confidence: float,
    seed: int,
) -> tuple[Point, ...]:
    """Return the points of one model; ratios where dense ran the same batch size."""
    reference: Mapping[int, Measured] = {m.batch_requested: m for m in dense or ()}
    found = []
    for point in measured:
        fields = _rates(point.rounds, clock) if point.reason is None else {}
        peer = reference.get(point.batch_requested)
        if fields and peer is not None and _comparable(point, peer):
            fields["ratio"] = ratio(
                point.rounds, peer.rounds, clock, paired=paired, confidence=confidence, seed=seed
            )
        found.append(
            Point(
                batch_requested=point.batch_requested,
                batch_size=point.batch_size,
                status="ok" if fields else "failed",
                reason=point.reason,
                notes=tuple(point.notes),
                rounds=tuple(point.rounds),
                peak_memory_bytes=point.peak_memory_bytes,
                **fields,
            )
        )
    return tuple(found)


def model_result(
    contender: Contender,
    *,
    dtype: str,
    dense: Footprint | None,
    points: tuple[Point, ...] = (),
    serving: tuple[ServingPoint, ...] = (),
) -> ModelResult:
    """Return one model's part of the record."""
    sizes, loaded = contender.footprint, contender.loaded
    outcomes = [(p.status, p.reason) for p in points] + [(p.status, p.reason) for p in serving]
    worked = any(status == "ok" for status, _ in outcomes)
    reasons = [contender.failure, *(reason for _, reason in outcomes)]
    reason = next((reason for reason in reasons if reason), None)
    values = sizes.kv_values_per_token if sizes is not None else None
    return ModelResult(
        label=contender.label,
        model=contender.model,
        status="ok" if worked else "failed",
        reason=reason or (None if worked else "nothing was measured"),
        notes=tuple(contender.notes),
        parameters=sizes.parameters if sizes is not None else None,
        layers=(sizes.layers or None) if sizes is not None else None,
        weights_bytes=sizes.weights_bytes if sizes is not None else None,
        kv_bytes_per_token=values * DTYPE_BYTES[dtype] if values is not None else None,
        kv_cache_tokens=loaded.kv_cache_tokens if loaded is not None else None,
        ideal=ideal(dense, sizes) if dense and sizes and dense.flops and sizes.flops else None,
        start_seconds=contender.start_seconds,
        points=points,
        serving=serving,
    )


def _comparable(point: Measured, dense: Measured) -> bool:
    return dense.reason is None and bool(dense.rounds) and dense.batch_size == point.batch_size


def _rates(rounds: Sequence[Round], clock: Clock) -> dict[str, Any]:
    if not rounds:
        return {}
    shown = rate(rounds, clock)
    share = [(r.prompt_tokens + r.output_tokens) / r.output_tokens for r in rounds]
    each = [r.requests / r.output_tokens for r in rounds]
    drawn = [r.energy_joules / r.output_tokens for r in rounds if r.energy_joules is not None]
    return {
        "output_tokens_per_second": shown,
        "output_tokens_per_wall_second": rate(rounds, "wall").median,
        "output_tokens_per_cpu_second": rate(rounds, "cpu").median,
        "total_tokens_per_second": shown.median * statistics.median(share),
        "requests_per_second": shown.median * statistics.median(each),
        "energy_joules_per_token": statistics.median(drawn) if drawn else None,
    }
