"""From the requests of all blocks to the record: latencies, ratios to dense, what is saturated.

The unit is the block, as for batches: in each, every server is started anew. A ratio is that of
the means in one block; both models got the same prompts at the same times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamline_bench.throughput.figures import Latency, Ratio
from streamline_bench.throughput.load import Level, ServingLoad
from streamline_bench.throughput.percentiles import percentile
from streamline_bench.throughput.results import Floats, half_width, ratio_of
from streamline_bench.throughput.served import Probe, ServedPass, ServingPoint, Sustained
from streamline_bench.throughput.trace import METRICS, Trace

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_GROUPS_NEED = 3  # two blocks say little on how much blocks differ
_FLAT = 0.05
_WAITING = 0.1
_GAIN = 0.1

Value = Callable[[ServedPass], float | None]


@dataclass
class Served:
    """What one model gave at one load: a run of the client for each block."""

    level: Level
    traces: list[Trace] = field(default_factory=list)
    passes: list[ServedPass] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Searched:
    """What the searches of one model found: by block, the load and the run of the client there."""

    levels: dict[int, float] = field(default_factory=dict)
    passes: dict[int, ServedPass] = field(default_factory=dict)
    limits: dict[int, str] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    reason: str | None = None


def logs(model: Served, dense: Served, value: Value) -> list[Floats]:
    """Return log(model / dense) of every block that both ran, in which both have a value."""
    theirs = {found.block: value(found) for found in dense.passes}
    pairs = [(value(found), theirs.get(found.block)) for found in model.passes]
    return [np.array([math.log(one / other)]) for one, other in pairs if one and other]


def widest(
    served: Sequence[tuple[Served, Served]],
    searched: Sequence[tuple[Searched, Searched]],
    confidence: float,
) -> float:
    """Return the largest half width of the ratios of whole requests, tokens per second and loads.

    Args:
        served, searched: of each model and of dense; those that failed have no ratio.
    """
    values: tuple[Value, ...] = (lambda p: p.e2el, lambda p: p.output_tokens_per_second)
    ratios = [
        logs(model, dense, value)
        for model, dense in served
        if model.reason is None and dense.reason is None
        for value in values
    ]
    ratios += [
        _level_logs(ours, theirs, _level)
        for ours, theirs in searched
        if ours.reason is None and theirs.reason is None
    ]
    return max((half_width(found, confidence) for found in ratios if found), default=0.0)


def points_of(
    model: Sequence[Served],
    dense: Sequence[Served] | None,
    load: ServingLoad,
    *,
    confidence: float,
    seed: int,
) -> tuple[ServingPoint, ...]:
    """Return the points of one model; ratios where dense was served at the same load."""
    peers: Sequence[Served | None] = dense if dense is not None else [None] * len(model)
    points = []
    for found, peer in zip(model, peers, strict=True):
        usable = peer is not None and peer.reason is None and found.reason is None
        point = _point(found, peer if usable else None, load, confidence, seed)
        below = [other for other in model if _below(other, found)]
        closest = max(below, key=lambda other: other.level.concurrency or 0, default=None)
        points.append(point.model_copy(update={"saturated": _saturated(found, closest)}))
    return tuple(points)


def _point(
    found: Served, peer: Served | None, load: ServingLoad, confidence: float, seed: int
) -> ServingPoint:
    where = {"request_rate": found.level.rate, "concurrency": found.level.concurrency}
    if found.reason is not None or not found.passes:
        reason = found.reason or "nothing was measured"
        passes = tuple(found.passes)
        return ServingPoint(**where, status="failed", reason=reason, passes=passes)

    def to_dense(value: Value) -> Ratio | None:
        pairs = [] if peer is None else logs(found, peer, value)
        whole = peer is not None and len(pairs) == min(len(found.passes), len(peer.passes))
        return ratio_of(pairs, confidence=confidence, seed=seed) if whole else None

    halves = [each.first_half for each in found.passes if each.first_half is not None]
    flat = ratio_of([np.array([math.log(h)]) for h in halves], confidence=confidence, seed=seed)
    good = [each.good for each in found.passes if each.good is not None]
    return ServingPoint(
        **where,
        status="ok",
        notes=tuple(_notes(flat, found.passes[0].requests)),
        completed=sum(each.requests for each in found.passes),
        seconds=sum(each.seconds for each in found.passes),
        **{name: _mean(found, name) for name in _RATES},
        throughput_ratio=to_dense(lambda p: p.output_tokens_per_second),
        goodput=statistics.fmean(each.goodput or 0.0 for each in found.passes) if good else None,
        goodput_ratio=to_dense(lambda p: p.goodput) if good else None,
        good=statistics.fmean(good) if good else None,
        first_half=flat,
        passes=tuple(found.passes),
        **{
            metric: _latency(found, metric, to_dense(lambda p, m=metric: getattr(p, m)), confidence)  # type: ignore[misc]
            for metric in METRICS
        },
    )


_RATES = ("requests_per_second", "output_tokens_per_second", "total_tokens_per_second")


def _mean(found: Served, name: str) -> Any:
    return statistics.fmean(getattr(each, name) for each in found.passes)


def _latency(
    found: Served, metric: str, to_dense: Ratio | None, confidence: float
) -> Latency | None:
    """Percentiles over all blocks; what shares a block, or a request, may be alike."""
    parts, requests, blocks, shift = [], [], [], 0
    for number, trace in enumerate(found.traces):
        values, of = trace.values(metric)
        parts.append(values)
        requests.append(of + shift)
        blocks.append(np.full(len(values), number))
        shift += len(trace.start)
    values = np.concatenate(parts)
    if not len(values):
        return None
    groups = [np.concatenate(requests)] if metric == "itl" else []
    if len(found.traces) >= _GROUPS_NEED:
        groups.append(np.concatenate(blocks))
    shown: dict[str, Any] = {}
    intervals = {}
    for name, share in _PERCENTILES.items():
        known = percentile(values, share, confidence, *groups)
        shown[name] = known.value if known is not None else None
        if known is not None and known.low is not None and known.high is not None:
            intervals[name] = (known.low, known.high)
    return Latency(
        mean=float(values.mean()), n=len(values), intervals=intervals, ratio=to_dense, **shown
    )


def _notes(flat: Ratio | None, counted: int) -> list[str]:
    """Whether the warm-up was long enough: the first half must be as fast as the second."""
    if flat is None or abs(flat.value - 1) <= _FLAT:
        return []
    if flat.low is not None and flat.high is not None and flat.low <= 1 <= flat.high:
        return []
    half = f"the first half of {counted} requests took {flat.value:.2f} times as long per token"
    if flat.value > 1:
        return [f"{half} as the second: the warm-up was too short; give more --warmup-requests"]
    return [f"{half} as the second: latencies grew; give more --requests, or a lower load"]


def _below(other: Served, found: Served) -> bool:
    both = other.level.closed and found.level.closed and other.reason is None and other.passes
    return bool(both) and (other.level.concurrency or 0) < (found.level.concurrency or 0)


def _saturated(found: Served, below: Served | None) -> str | None:
    """Why more load would give no more output; None where it would, or where it is unknown."""
    if found.reason is not None or not found.passes:
        return None
    if not found.level.closed:
        return outrun(found.passes)
    if below is None:
        return None
    low, high = (_mean(each, "output_tokens_per_second") for each in (below, found))
    few, many = below.level.concurrency or 1, found.level.concurrency or 1
    if high / low - 1 >= _GAIN * (many / few - 1):
        return None
    return f"tokens/s changed by {100 * (high / low - 1):+.0f} % from {few} to {many} in flight"


def outrun(passes: Sequence[ServedPass]) -> str | None:
    """Whether requests arrived faster than they were served: by then, waiting ones pile up.

    In a steady server, the requests in flight at two moments differ by chance, by about the root
    of twice their number. More than twice that, and more than a tenth of what arrived, is a pile.
    """
    known = [each for each in passes if each.backlog is not None]
    if not known:
        return None
    arrived = sum(each.requests for each in known)
    more = sum((each.backlog or 0) * each.requests for each in known)
    in_flight = sum(each.requests_per_second * each.e2el / 1000 for each in known)
    if more <= max(_WAITING * arrived, 2 * math.sqrt(2 * in_flight)):
        return None
    return f"of {arrived} requests that arrived, {more:.0f} piled up: they come faster than served"


def sustained_of(
    model: Searched, dense: Searched | None, load: ServingLoad, *, confidence: float, seed: int
) -> Sustained:
    """Return what the searches of one model found, and its ratio to dense's."""
    levels = tuple(model.levels[block] for block in sorted(model.levels))
    goodputs = tuple(_good(model, block) for block in sorted(model.levels))
    if model.reason is not None or not levels:
        reason = model.reason or "nothing was measured"
        return Sustained(by=load.search, status="failed", reason=reason, probes=tuple(model.probes))

    def to_dense(value: Callable[[Searched, int], float]) -> Ratio | None:
        if dense is None or dense.reason is not None:
            return None
        return ratio_of(_level_logs(model, dense, value), confidence=confidence, seed=seed)

    mean = statistics.geometric_mean if all(levels) else statistics.fmean
    return Sustained(
        by=load.search,
        status="ok",
        level=mean(levels),
        levels=levels,
        goodput=statistics.fmean(goodputs),
        goodputs=goodputs,
        ratio=to_dense(_level),
        goodput_ratio=to_dense(_good),
        limit=tuple(model.limits[block] for block in sorted(model.limits)),
        probes=tuple(model.probes),
    )


def _good(found: Searched, block: int) -> float:
    return (found.passes[block].goodput or 0.0) if block in found.passes else 0.0


def _level(found: Searched, block: int) -> float:
    return found.levels[block]


def _level_logs(
    model: Searched, dense: Searched, value: Callable[[Searched, int], float]
) -> list[Floats]:
    """Return log(model / dense) by block; none if a block of either kept the objective nowhere."""
    both = [block for block in sorted(model.levels) if block in dense.levels]
    pairs = [(value(model, block), value(dense, block)) for block in both]
    if not all(one > 0 and other > 0 for one, other in pairs):
        return []
    return [np.array([math.log(one / other)]) for one, other in pairs]
