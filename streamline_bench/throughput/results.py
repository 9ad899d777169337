"""From rounds to the record: rates, ratios to dense with an interval, and the sizes of a model.

Rounds of equal number lie side by side in time, so that load from elsewhere hits both models: the
ratio is taken within each pair, the median over the pairs, and the interval by resampling pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.throughput.footprint import DTYPE_BYTES, Footprint, ideal
from streamline_bench.throughput.record import ModelResult, Point, Rate, Ratio, Round, ServingPoint
from streamline_bench.throughput.sweep import Contender, Measured
from streamline_bench.throughput.workload import Clock

_DRAWS = 10_000


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
    paired: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio | None:
    """Return model / dense, or None without rounds to compare.

    Paired, it is the median over rounds that both ran, by their number; else (the models ran one
    after the other) the ratio of both medians, each resampled by itself. A single round has no
    interval.
    """
    ours = {measured.index: per_second(measured, clock) for measured in model}
    theirs = {measured.index: per_second(measured, clock) for measured in dense}
    generator = np.random.default_rng(seed)
    if paired:
        shared = sorted(ours.keys() & theirs.keys())
        if not shared:
            return None
        ratios = [ours[index] / theirs[index] for index in shared]
        value, count = statistics.median(ratios), len(ratios)
        draws = _resampled_medians(generator, ratios)
    else:
        if not ours or not theirs:
            return None
        above, below = list(ours.values()), list(theirs.values())
        value = statistics.median(above) / statistics.median(below)
        count = min(len(ours), len(theirs))
        draws = _resampled_medians(generator, above) / _resampled_medians(generator, below)
    if count < 2:
        return Ratio(value=value, low=None, high=None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Ratio(value=value, low=float(low), high=float(high))


def _resampled_medians(
    generator: np.random.Generator, rates: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Medians of resampled rates, float64 [_DRAWS]."""
    drawn = generator.choice(np.array(rates), (_DRAWS, len(rates)))
    medians: npt.NDArray[np.float64] = np.median(drawn, axis=1)
    return medians


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
    reference: Mapping[int, Measured] = {
        m.batch_requested: m for m in dense or () if m.reason is None and m.rounds
    }
    found = []
    for point in measured:
        fields = _rates(point.rounds, clock) if point.reason is None else {}
        peer = reference.get(point.batch_requested)
        if fields and peer is not None and peer.batch_size == point.batch_size:
            fields["ratio"] = ratio(
                point.rounds, peer.rounds, clock, paired=paired, confidence=confidence, seed=seed
            )
        found.append(Point(status="ok" if fields else "failed", **vars(point), **fields))
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
    outcomes: list[Point | ServingPoint] = [*points, *serving]
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
            "ideal": ideal(dense, sizes) if dense and dense.flops and sizes.flops else None,
        }
    return ModelResult(
        label=contender.label, model=contender.model, status="ok" if worked else "failed",
        reason=reason or (None if worked else "nothing was measured"), notes=tuple(contender.notes),
        kv_cache_tokens=loaded.kv_cache_tokens if loaded is not None else None,
        start_seconds=contender.start_seconds, points=points, serving=serving, **measured,
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
