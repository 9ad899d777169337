"""A record as one line per model, for reports and the gate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.throughput.figures import Ratio
from streamline_bench.throughput.record import ModelResult, Point, ThroughputRecord, read_record
from streamline_bench.throughput.served import ServedPass, ServingPoint, Sustained

Metric = Literal["tokens/s", "TTFT", "TPOT", "ITL", "E2EL", "goodput", "load"]
"""``load``: the highest that keeps an objective. Latencies are means, in milliseconds."""


class ServedFigure(Frozen):
    """One figure of a served model.

    Attributes:
        load: ``4 per second``, ``8 in flight``; the objective, of a search.
        value: mean over blocks.
        error: standard error of the logarithm of the value, over blocks; None with one.
        ratio, ratio_error: to dense in the same blocks, likewise.
        blocks: those of the value.
    """

    load: str
    metric: Metric
    value: float
    error: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    blocks: int = 1

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a latency."""
        return self.metric in ("TTFT", "TPOT", "ITL", "E2EL")

    def ratio_ends(self, confidence: float) -> tuple[float, float] | None:
        """Ends of the ratio's interval over the blocks; None without one."""
        if self.ratio is None or self.ratio_error is None or self.blocks < 2:
            return None
        from scipy.special import stdtrit

        half = float(stdtrit(self.blocks - 1, 0.5 + confidence / 2)) * self.ratio_error
        return self.ratio * math.exp(-half), self.ratio * math.exp(half)


class Speed(Frozen):
    """The speed of a model at one batch size (see ``streamline-bench throughput``).

    Attributes:
        batch_size: the largest that was measured for the dense model (0: nothing was measured).
        output_tokens_per_second: median by ``clock``; ``low`` and ``high`` are its extremes.
        error: standard error of its logarithm, over blocks; None with one block, and in files of
            earlier versions.
        ratio: to dense in the same measurement, with the ends of its interval; None without a dense
            result. ``ratio_error`` is like ``error``.
        blocks: starts of every model's process; with one, the ratio has no interval (in files of
            versions before blocks, one over the rounds of one process).
        self_ratio: of a copy of the dense model to it, with its interval: what is noise.
        ideal_ratio: what the ratio would be if only size counted.
        ttft_ms: median time to first token at the lowest load, where it was served.
        served: figures of every load that it was served at.
        accelerators: that each model ran on.
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
    error: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_error: float | None = None
    blocks: int | None = None
    self_ratio: float | None = None
    self_ratio_low: float | None = None
    self_ratio_high: float | None = None
    ideal_ratio: float | None = None
    weights_bytes: int | None = None
    peak_memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    ttft_ms: float | None = None
    start_seconds: float | None = None
    served: tuple[ServedFigure, ...] = ()
    mode: Literal["offline", "paper", "serving"] | None = None
    engine_version: str | None = None
    threads: int | None = None
    accelerators: int = 1
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    request_load: str | None = None

    @property
    def noise_floor(self) -> Ratio | None:
        """What a copy of the dense model has of its speed, where that was measured."""
        if self.self_ratio is None:
            return None
        return Ratio(value=self.self_ratio, low=self.self_ratio_low, high=self.self_ratio_high)

    @property
    def goodput(self) -> ServedFigure | None:
        """Good requests per second at the highest load that keeps the objective."""
        loads = {figure.load for figure in self.served if figure.metric == "load"}
        found = (figure for figure in self.served if figure.metric == "goodput")
        return next((figure for figure in found if figure.load in loads), None)


class ThroughputFigures(Speed):
    """The speed of the model that the measurement calls ``label``."""

    label: str


def read_figures(path: Path | str) -> dict[str, ThroughputFigures]:
    """Read a ``throughput.json`` (or the one in a folder) as one line per model, by label.

    Raises:
        ThroughputError: it is missing, damaged, or of a newer schema.
    """
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


def _shown(model: ModelResult, batch: int | None) -> Point | None:
    if batch is None:
        return _largest(model) or next(iter(model.points), None)
    return next((point for point in model.points if point.batch_requested == batch), None)


def floor_of(record: ThroughputRecord, batch: int | None) -> Ratio | None:
    """Return the ratio of the copy of the dense model to it; None where it was not measured."""
    copy = record.model(record.self_check) if record.self_check is not None else None
    point = _shown(copy, batch) if copy is not None else None
    return point.ratio if point is not None else None


def _figures(record: ThroughputRecord, model: ModelResult, batch: int | None) -> ThroughputFigures:
    point = _shown(model, batch)
    measured: dict[str, Any] = {"batch_size": 0}
    if point is not None:
        measured = _of_batches(record, point)
    served = [found for found in model.serving if found.status == "ok"]
    if served:
        lowest = min(served, key=lambda found: (found.request_rate, found.concurrency or 0))
        measured["ttft_ms"] = lowest.ttft.p50 if lowest.ttft is not None else None
        fastest = max(found.output_tokens_per_second or 0.0 for found in served)
        measured.setdefault("output_tokens_per_second", fastest)
    figures = (*_served(model, record.confidence), *_sustained(record, model.sustained))
    worked = "output_tokens_per_second" in measured or figures
    reason = point.reason if point is not None and point.reason else model.reason
    return ThroughputFigures(
        label=model.label, status="ok" if worked else "failed",
        reason=None if worked else (reason or "nothing was measured"), engine=record.engine,
        device=record.environment.device_name, dtype=record.dtype, clock=record.clock, **measured,
        weights_bytes=model.weights_bytes, kv_cache_tokens=model.kv_cache_tokens,
        start_seconds=model.start_seconds, served=figures, mode=record.mode,
        engine_version=record.environment.engine_version, threads=record.environment.threads,
        accelerators=record.environment.accelerators,
        prompt_tokens=record.workload.prompt_tokens, output_tokens=record.workload.output_tokens,
        request_load=None if record.serving_load is None else record.serving_load.described,
    )  # fmt: skip


def _of_batches(record: ThroughputRecord, point: Point) -> dict[str, Any]:
    rate, ratio = point.output_tokens_per_second, point.ratio
    measured: dict[str, Any] = {
        "batch_size": point.batch_size,
        "peak_memory_bytes": point.peak_memory_bytes,
        "ideal_ratio": point.ideal.ratio if point.ideal is not None else None,
    }
    if point.rounds:
        measured["blocks"] = len({found.block for found in point.rounds})
    if rate is not None:
        measured |= {"output_tokens_per_second": rate.median}
        measured |= {"low": rate.low, "high": rate.high, "error": _error_of(record, point)}
    if ratio is not None:
        measured |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        measured |= {"blocks": ratio.blocks, "ratio_error": error_of(ratio, record.confidence)}
    if (floor := floor_of(record, point.batch_requested)) is not None:
        measured |= {"self_ratio": floor.value}
        measured |= {"self_ratio_low": floor.low, "self_ratio_high": floor.high}
    return measured


def error_of(ratio: Ratio | None, confidence: float) -> float | None:
    """Return the standard error of a ratio's logarithm, from its interval; None without one."""
    if ratio is None or ratio.low is None or ratio.high is None or ratio.blocks < 2:
        return None
    from scipy.special import stdtrit

    quantile = float(stdtrit(ratio.blocks - 1, 0.5 + confidence / 2))
    return (math.log(ratio.high) - math.log(ratio.low)) / 2 / quantile


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean logarithm of positive values."""
    if len(values) < 2 or min(values) <= 0:
        return None
    return statistics.stdev(map(math.log, values)) / math.sqrt(len(values))


def _error_of(record: ThroughputRecord, point: Point) -> float | None:
    blocks: dict[int, list[float]] = {}
    for each in point.rounds:
        spent = each.seconds if record.clock == "wall" else each.cpu_seconds
        blocks.setdefault(each.block, []).append(math.log(each.output_tokens / max(spent, 1e-9)))
    return _error([math.exp(statistics.fmean(found)) for found in blocks.values()])


_LATENCIES: tuple[tuple[Metric, str], ...] = (
    ("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2EL", "e2el"),
)  # fmt: skip


def _served(model: ModelResult, confidence: float) -> Iterator[ServedFigure]:
    """Figures of every load; those of records before blocks have no error."""
    for point in model.serving:
        if point.status != "ok" or not point.passes:
            continue

        def figure(
            metric: Metric,
            value: Callable[[ServedPass], float | None],
            ratio: Ratio | None,
            point: ServingPoint = point,
        ) -> Iterator[ServedFigure]:
            values = [found for each in point.passes if (found := value(each)) is not None]
            if values:
                yield ServedFigure(
                    load=point.described, metric=metric, value=statistics.fmean(values),
                    error=_error(values), ratio=ratio.value if ratio is not None else None,
                    ratio_error=error_of(ratio, confidence), blocks=len(values),
                )  # fmt: skip

        yield from figure("tokens/s", lambda p: p.output_tokens_per_second, point.throughput_ratio)
        for metric, name in _LATENCIES:
            latency = getattr(point, name)
            if latency is not None:
                yield from figure(metric, lambda p, name=name: getattr(p, name), latency.ratio)  # type: ignore[misc]
        yield from figure("goodput", lambda p: p.goodput, point.goodput_ratio)


def _sustained(record: ThroughputRecord, found: Sustained | None) -> Iterator[ServedFigure]:
    load = record.serving_load
    if found is None or found.level is None or load is None or load.slo is None:
        return
    parts: tuple[tuple[Metric, float | None, tuple[float, ...], Ratio | None], ...] = (
        ("load", found.level, found.levels, found.ratio),
        ("goodput", found.goodput, found.goodputs, found.goodput_ratio),
    )
    for metric, value, values, ratio in parts:
        if value is not None:
            yield ServedFigure(
                load=load.slo.described, metric=metric, value=value, error=_error(values),
                ratio=ratio.value if ratio is not None else None,
                ratio_error=error_of(ratio, record.confidence), blocks=len(values),
            )  # fmt: skip
