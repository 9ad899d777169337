"""One line per model out of a record: what tables and charts of other packages show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streamline_bench.core.recipe.schema import Frozen

if TYPE_CHECKING:
    from streamline_bench.throughput.record import (
        ModelResult,
        Point,
        ThroughputRecord,
    )


class Speed(Frozen):
    """The speed of a model at one batch size (see ``streamline-bench throughput``).

    Attributes:
        batch_size: the largest that was measured for the dense model (0: nothing was measured).
        output_tokens_per_second: median by ``clock``; ``low`` and ``high`` are its extremes.
        ratio: to dense in the same measurement, with the ends of its interval; None without a dense
            result.
        ideal_ratio: what the ratio would be if only size counted.
        ttft_ms: median time to first token at the lowest request rate, where it was served.
        mode, engine_version, threads, prompt_tokens, output_tokens: how it was measured, and on
            sequences of what length; with ``request_load``, the rates and numbers of requests where
            it was served. None in files of versions that did not note them.
    """

    status: Literal["ok", "failed"]
    reason: str | None = None
    engine: str
    device: str
    dtype: str
    clock: Literal["wall", "cpu"] | None = None
    batch_size: int
    output_tokens_per_second: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ideal_ratio: float | None = None
    weights_bytes: int | None = None
    peak_memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    ttft_ms: float | None = None
    start_seconds: float | None = None
    mode: Literal["offline", "paper", "serving"] | None = None
    engine_version: str | None = None
    threads: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    request_load: str | None = None


class ThroughputFigures(Speed):
    """The speed of the model that the measurement calls ``label``."""

    label: str


def read_figures(path: Path | str) -> dict[str, ThroughputFigures]:
    """Read a ``throughput.json`` (or the one in a folder) as one line per model, by label.

    Raises:
        ThroughputError: it is missing, damaged, or of a newer schema.
    """
    from streamline_bench.throughput.record import read_record

    return figures_of(read_record(Path(path)))


def figures_of(record: ThroughputRecord) -> dict[str, ThroughputFigures]:
    """Return one line per model, at the largest batch that the dense model ran.

    Without a dense model, or where it failed, each model's own largest batch is shown.
    """
    dense = record.model(record.dense) if record.dense is not None else None
    shown = _largest(dense) if dense is not None else None
    batch = None if shown is None else shown.batch_requested
    return {model.label: _figures(record, model, batch) for model in record.models}


def _largest(model: ModelResult) -> Point | None:
    measured = [point for point in model.points if point.status == "ok"]
    return max(measured, key=lambda point: point.batch_size, default=None)


def _figures(record: ThroughputRecord, model: ModelResult, batch: int | None) -> ThroughputFigures:
    if batch is None:
        point = _largest(model) or next(iter(model.points), None)
    else:
        point = next((point for point in model.points if point.batch_requested == batch), None)
    served = [found for found in model.serving if found.status == "ok"]
    slowest = min(served, key=lambda found: found.request_rate, default=None)
    rate = point.output_tokens_per_second if point is not None else None
    ratio = point.ratio if point is not None else None
    per_second = rate.median if rate is not None else None
    if per_second is None and served:
        per_second = max(found.output_tokens_per_second or 0.0 for found in served)
    failed = per_second is None
    reason = point.reason if point is not None and point.reason else model.reason
    return ThroughputFigures(
        label=model.label,
        status="failed" if failed else "ok",
        reason=(reason or "nothing was measured") if failed else None,
        engine=record.engine,
        device=record.environment.device_name,
        dtype=record.dtype,
        clock=record.clock,
        batch_size=point.batch_size if point is not None else 0,
        output_tokens_per_second=per_second,
        low=rate.low if rate is not None else None,
        high=rate.high if rate is not None else None,
        ratio=ratio.value if ratio is not None else None,
        ratio_low=ratio.low if ratio is not None else None,
        ratio_high=ratio.high if ratio is not None else None,
        ideal_ratio=model.ideal.ratio if model.ideal is not None else None,
        weights_bytes=model.weights_bytes,
        peak_memory_bytes=point.peak_memory_bytes if point is not None else None,
        kv_cache_tokens=model.kv_cache_tokens,
        ttft_ms=slowest.ttft.p50 if slowest is not None and slowest.ttft is not None else None,
        start_seconds=model.start_seconds,
        mode=record.mode,
        engine_version=record.environment.engine_version,
        threads=record.environment.threads,
        prompt_tokens=record.workload.prompt_tokens,
        output_tokens=record.workload.output_tokens,
        request_load=None if record.serving_load is None else record.serving_load.described,
    )
