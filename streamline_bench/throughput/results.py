"""From rounds to the record: rates, ratios to dense with an interval, and the sizes of a model.

The unit is the block: what a process gets at its start (memory, placing, compilation) changes its
speed by several percent, and all of its rounds share that. Rounds of equal block and number lie
side by side in time, so that load from elsewhere hits both models; their logarithms are subtracted,
and averaged in each block. See :func:`ratio` for the interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.throughput.figures import Rate, Ratio
from streamline_bench.throughput.footprint import DTYPE_BYTES, Footprint, ideal
from streamline_bench.throughput.record import ModelResult, Point, Round
from streamline_bench.throughput.served import MemorySplit, ServingPoint, Sustained
from streamline_bench.throughput.sweep import Contender, Measured
from streamline_bench.throughput.workload import Clock, Workload

_DRAWS = 10_000

Floats = npt.NDArray[np.float64]


def per_second(measured: Round, clock: Clock) -> float:
    """Output tokens of a round per second of wall or processor time."""
    spent = measured.seconds if clock == "wall" else measured.cpu_seconds
    return measured.output_tokens / max(spent, 1e-9)


def rate(rounds: Sequence[Round], clock: Clock) -> Rate:
    """Median, smallest and largest output rate of at least one round."""
    rates = [per_second(measured, clock) for measured in rounds]
    return Rate(median=statistics.median(rates), low=min(rates), high=max(rates))


def ratio(
    model: Sequence[Round],
    dense: Sequence[Round],
    clock: Clock,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio | None:
    """Return model / dense, or None without rounds that both ran.

    The value is the geometric mean over blocks. Its interval is Student's over the blocks'
    logarithms. The median over the blocks is given too, with a hierarchical bootstrap of it: blocks
    are drawn, then rounds in each. With few blocks that percentile interval is too narrow, as there
    are few different draws. Coverage at 95 %, of 6,000 (Student) and 600 (bootstraps) simulated
    runs with 6 rounds a block, rounds of 2 % standard deviation and processes of 3 to 8 %
    (``tests/benchmarks/coverage_of_blocks.py``):

    ========  ==========  ======================  ================
    blocks    Student     hierarchical bootstrap  rounds as units
    ========  ==========  ======================  ================
    3         94.5..95.0  80.7..81.3              63.2..70.5
    5         95.2        91.8..94.7              62.3..67.0
    8         95.1..95.4  91.2..92.8              60.0..69.2
    ========  ==========  ======================  ================

    A single block has no interval.
    """
    return ratio_of(paired_blocks(model, dense, clock), confidence=confidence, seed=seed)


def ratio_of(blocks: Sequence[Floats], *, confidence: float, seed: int = 0) -> Ratio | None:
    """Return the ratio whose logarithms are given, an array per block; None without a block."""
    if not blocks:
        return None
    low, high = student_interval(blocks, confidence)
    median = statistics.median(float(block.mean()) for block in blocks)
    ends = bootstrap_interval(blocks, confidence, np.random.default_rng(seed))
    return Ratio(
        value=math.exp(_center(blocks)),
        low=low,
        high=high,
        blocks=len(blocks),
        median=math.exp(median),
        median_low=ends[0],
        median_high=ends[1],
    )


def paired_blocks(model: Sequence[Round], dense: Sequence[Round], clock: Clock) -> list[Floats]:
    """Return log(model / dense) of the rounds that both ran, one array per block."""
    theirs = {(found.block, found.index): per_second(found, clock) for found in dense}
    blocks: dict[int, list[float]] = {}
    for found in model:
        peer = theirs.get((found.block, found.index))
        if peer is not None:
            here = blocks.setdefault(found.block, [])
            here.append(math.log(per_second(found, clock) / peer))
    return [np.array(blocks[block]) for block in sorted(blocks)]


def student_interval(
    blocks: Sequence[Floats], confidence: float
) -> tuple[float, float] | tuple[None, None]:
    """Return the ends of Student's interval of the ratio, over the means of at least two blocks."""
    if len(blocks) < 2:
        return None, None
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    spread = statistics.stdev(float(block.mean()) for block in blocks)
    quantile = float(stdtrit(len(blocks) - 1, 0.5 + confidence / 2))
    half, center = quantile * spread / math.sqrt(len(blocks)), _center(blocks)
    return math.exp(center - half), math.exp(min(center + half, _LARGEST))


def bootstrap_interval(
    blocks: Sequence[Floats], confidence: float, generator: np.random.Generator, draws: int = _DRAWS
) -> tuple[float, float] | tuple[None, None]:
    """Return the ends of the interval of the median block: blocks are drawn, then their rounds."""
    if len(blocks) < 2:
        return None, None
    chosen = generator.integers(len(blocks), size=(draws, len(blocks)))
    means = np.empty(chosen.shape)
    for index, block in enumerate(blocks):
        places = np.nonzero(chosen == index)
        means[places] = generator.choice(block, (len(places[0]), len(block))).mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(np.median(means, axis=1), [tail, 1 - tail]))
    return float(low), float(high)


_LARGEST = math.log(np.finfo(np.float64).max)


def _center(blocks: Sequence[Floats]) -> float:
    return statistics.fmean(float(block.mean()) for block in blocks)


def widest(
    measured: Mapping[str, Sequence[Measured]], dense: str, clock: Clock, confidence: float
) -> float:
    """Return the largest half width of any ratio's interval, as a share of the ratio.

    Points that failed, or whose batch is another than dense's, have no ratio and do not count.
    """
    found = [0.0]
    for label, points in measured.items():
        for point, peer in zip(points, measured[dense], strict=True):
            if label == dense or not _comparable(point, peer):
                continue
            blocks = paired_blocks(point.rounds, peer.rounds, clock)
            found.append(half_width(blocks, confidence))
    return max(found)


def half_width(blocks: Sequence[Floats], confidence: float) -> float:
    """Return half the width of Student's interval, as a share of the ratio."""
    low, high = student_interval(blocks, confidence)
    if low is None or high is None:
        return math.inf
    return (high - low) / 2 / math.exp(_center(blocks))


def _comparable(point: Measured, dense: Measured) -> bool:
    usable = all(each.reason is None and each.rounds for each in (point, dense))
    return usable and point.batch_size == dense.batch_size


def points_of(
    measured: Sequence[Measured],
    dense: Sequence[Measured] | None,
    clock: Clock,
    *,
    confidence: float,
    seed: int,
) -> tuple[Point, ...]:
    """Return the points of one model; ratios where dense ran the same batch size."""
    reference = {point.batch_requested: point for point in dense or ()}
    found = []
    for point in measured:
        fields = _rates(point.rounds, clock) if point.reason is None else {}
        peer = reference.get(point.batch_requested)
        if peer is not None and _comparable(point, peer):
            fields["ratio"] = ratio(
                point.rounds, peer.rounds, clock, confidence=confidence, seed=seed
            )
        found.append(Point(status="ok" if fields else "failed", **vars(point), **fields))
    return tuple(found)


def model_result(
    contender: Contender,
    *,
    workload: Workload,
    dtype: str,
    on_cpu: bool,
    dense: Footprint | None,
    points: tuple[Point, ...] = (),
    serving: tuple[ServingPoint, ...] = (),
    sustained: Sustained | None = None,
    memory: MemorySplit | None = None,
) -> ModelResult:
    """Return one model's part of the record."""
    sizes, loaded = contender.footprint, contender.loaded
    outcomes: list[Point | ServingPoint | Sustained] = [*points, *serving]
    outcomes += [sustained] if sustained is not None else []
    worked = any(outcome.status == "ok" for outcome in outcomes)
    reasons = [contender.failure, *(outcome.reason for outcome in outcomes)]
    reason = next((reason for reason in reasons if reason), None)
    measured: dict[str, Any] = {}
    if sizes is not None:
        values = sizes.kv_values_per_token
        measured = {
            "parameters": sizes.parameters,
            "layers": sizes.layers or None,
            "weights_bytes": sizes.weights_bytes,
            "kv_bytes_per_token": values * DTYPE_BYTES[dtype] if values is not None else None,
        }
    if sizes is not None and dense is not None and not (sizes.empty or dense.empty):
        points = tuple(
            point.model_copy(update={"ideal": ideal(
                dense, sizes, workload, point.batch_size, dtype, on_cpu=on_cpu
            )})
            for point in points
        )  # fmt: skip
    return ModelResult(
        label=contender.label, model=contender.model, status="ok" if worked else "failed",
        reason=reason or (None if worked else "nothing was measured"), notes=tuple(contender.notes),
        kv_cache_tokens=loaded.kv_cache_tokens if loaded is not None else None,
        start_seconds=contender.start_seconds, points=points, serving=serving,
        sustained=sustained, memory=memory, **measured,
    )  # fmt: skip


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
