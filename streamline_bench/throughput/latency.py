"""Latencies that were measured, by the size of the model, and what lies between two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.record import ModelResult, ThroughputRecord

Metric = Literal["latency", "ttft"]
"""``latency``: seconds per output token; ``ttft``: seconds to the first one."""


class Measured(NamedTuple):
    """One model at one load.

    Attributes:
        model: folder or hub name, as the measurement was given it.
        seconds: mean latency.
    """

    label: str
    model: str
    layers: int | None
    parameters: int | None
    seconds: float


def load_of(record: ThroughputRecord, concurrency: int | None) -> tuple[int | None, str]:
    """Return the load at which latencies are read, and its name; batch size or requests in flight.

    Args:
        concurrency: None: the only one that was measured.

    Raises:
        ThroughputError: it was not measured, or there are several and none is named.
    """
    served = {p.concurrency for m in record.models for p in m.serving if p.concurrency}
    batches = {p.batch_requested for m in record.models for p in m.points}
    what, known = ("requests in flight", served) if served else ("sequences in a batch", batches)
    listed = ", ".join(map(str, sorted(known)))
    if not known:
        raise ThroughputError(
            "No latency was measured in a batch or with a fixed number of requests in flight, so "
            "that no target can be solved from it; measure with --batch or --concurrency."
        )
    if concurrency is None and len(known) != 1:
        raise ThroughputError(
            f"Latencies were measured with {listed} {what}; name one by concurrency=N in the "
            "target."
        )
    chosen = next(iter(known)) if concurrency is None else concurrency
    if chosen not in known:
        raise ThroughputError(
            f"No latency was measured with {concurrency} {what}, only with {listed}; name one of "
            "them, or measure that."
        )
    return chosen, f"{chosen} {what}"


def latencies(record: ThroughputRecord, metric: Metric, concurrency: int | None) -> list[Measured]:
    """Return the mean latency of every model that was measured at a load.

    A batch gives seconds per output token of each of its sequences, prompts included; only a
    server gives the time to the first token.

    Raises:
        ThroughputError: as :func:`load_of`.
    """
    load, _ = load_of(record, concurrency)
    found = []
    for model in record.models:
        seconds = _seconds(model, metric, load)
        if seconds is not None:
            found.append(
                Measured(model.label, model.model, model.layers, model.parameters, seconds)
            )
    return found


def _seconds(model: ModelResult, metric: Metric, load: int | None) -> float | None:
    for served in model.serving:
        latency = served.tpot if metric == "latency" else served.ttft
        if served.concurrency == load and served.status == "ok" and latency is not None:
            return latency.mean / 1000
    for point in model.points if metric == "latency" else ():
        rate = point.output_tokens_per_wall_second
        if point.batch_requested == load == point.batch_size and point.status == "ok" and rate:
            return point.batch_size / rate
    return None


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the value at ``x`` on the line through neighbours; None: outside of all points.

    Args:
        points: (x, value), in any order, each x once.
    """
    ordered = sorted(points)
    for (left, below), (right, above) in pairwise(ordered):
        if left <= x <= right:
            return below + (above - below) * (x - left) / (right - left)
    return None
