"""How a throughput record looks in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from streamline_bench.report.text import MISSING, terminal_text

if TYPE_CHECKING:
    from streamline_bench.throughput.record import (
        Latency,
        ModelResult,
        Point,
        ServingPoint,
        ThroughputRecord,
    )

_MIB = 1 << 20


def tables(record: ThroughputRecord) -> Iterator[Table]:
    """Yield the tables that a record fills: batches, served rates, the paper's figures."""
    if record.mode == "serving":
        yield _serving(record)
        return
    yield _batches(record)
    if record.paper:
        yield _paper(record)


def notes(record: ThroughputRecord) -> str:
    """Return what the figures count against, where they come from, and every failure."""
    where = record.environment
    clock = "processor seconds" if record.clock == "cpu" else "wall seconds"
    version = f" {where.engine_version}" if where.engine_version else ""
    lines = [
        f"{terminal_text(record.engine)}{terminal_text(version)}, {record.dtype}, "
        f"{terminal_text(where.device_name)}, {where.threads} thread(s); "
        f"{record.workload.prompt_tokens} + {record.workload.output_tokens} tokens."
    ]
    if record.mode != "serving":
        lines.append(
            f"Output tokens per second of {clock}: median of {record.workload.rounds} rounds "
            f"[lowest, highest]; ratio to dense with its {100 * record.confidence:g} % interval."
        )
    of_points = [note for model in record.models for point in model.points for note in point.notes]
    lines += [f"{terminal_text(note)}." for note in dict.fromkeys(of_points)]  # shared in a group
    for model in record.models:
        name = terminal_text(model.label)
        lines += [f"{name}: {terminal_text(note)}." for note in model.notes]
        if model.reason:
            lines.append(f"{name} failed: {terminal_text(model.reason)}")
    return "\n".join(lines)


def _batches(record: ThroughputRecord) -> Table:
    names = ("batch", "tokens/s", "to dense", "ideal", "of ideal", "weights", "peak", "KV tokens")
    table = _table("Throughput", ("model",), names)
    for model in record.models:
        for point in model.points:
            table.add_row(*map(escape, _batch_cells(model, point)))
    return table


def _batch_cells(model: ModelResult, point: Point) -> list[str]:
    rate, ratio, ideal = point.output_tokens_per_second, point.ratio, model.ideal
    if rate is None:
        return [terminal_text(model.label), str(point.batch_requested), "failed", *[MISSING] * 6]
    low = ratio.low if ratio is not None else None
    ends = f"\n[{low:.2f}, {ratio.high:.2f}]" if ratio and low is not None and ratio.high else ""
    reduced = "" if point.batch_size == point.batch_requested else f" (of {point.batch_requested})"
    return [
        terminal_text(model.label),
        f"{point.batch_size}{reduced}",
        f"{rate.median:.1f}\n[{rate.low:.1f}, {rate.high:.1f}]",
        f"{ratio.value:.2f}{ends}" if ratio is not None else MISSING,
        f"{ideal.ratio:.2f} ({ideal.kind})" if ideal is not None else MISSING,
        f"{ratio.value / ideal.ratio:.2f}" if ratio is not None and ideal is not None else MISSING,
        _mebibytes(model.weights_bytes),
        _mebibytes(point.peak_memory_bytes),
        MISSING if model.kv_cache_tokens is None else f"{model.kv_cache_tokens:,}",
    ]


def _serving(record: ThroughputRecord) -> Table:
    names = ("requests/s", "tokens/s", "TTFT", "TPOT", "ITL", "E2EL")
    table = _table("Serving: milliseconds at p50 / p90 / p99", ("model",), names)
    for model in record.models:
        for point in model.serving:
            table.add_row(*map(escape, _serving_cells(model, point)))
    return table


def _serving_cells(model: ModelResult, point: ServingPoint) -> list[str]:
    rate = "all at once" if point.request_rate == float("inf") else f"{point.request_rate:g}"
    if point.output_tokens_per_second is None:
        return [terminal_text(model.label), rate, "failed", *[MISSING] * 4]
    latencies = (point.ttft, point.tpot, point.itl, point.e2el)
    speed = f"{point.output_tokens_per_second:.1f}"
    return [terminal_text(model.label), rate, speed, *map(_latency, latencies)]


def _latency(found: Latency | None) -> str:
    if found is None:
        return MISSING
    return " / ".join(f"{value:.3g}" for value in (found.p50, found.p90, found.p99))


def _paper(record: ThroughputRecord) -> Table:
    table = _table("The paper's figures (Llama-2-7B)", ("model",), ("tokens/s", "to dense"))
    for row in record.paper:
        table.add_row(escape(row.name), f"{row.tokens_per_second:.2f}", f"{row.ratio:.2f}")
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _mebibytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / _MIB:,.0f} MiB"
