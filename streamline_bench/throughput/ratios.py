"""Rates over rounds, and the ratio of two models with an interval.

Rounds of equal number lie side by side in time, so that load from elsewhere hits both models: the
ratio is taken within each pair, the median over the pairs, and the interval by resampling pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamline_bench.throughput.record import Rate, Ratio, Round
from streamline_bench.throughput.workload import Clock

__all__ = ["DRAWS", "per_second", "rate", "ratio"]

DRAWS = 10_000


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
        value, count = (
            statistics.median(above) / statistics.median(below),
            min(len(ours), len(theirs)),
        )
        draws = _resampled_medians(generator, above) / _resampled_medians(generator, below)
    if count < 2:
        return Ratio(value=value, low=None, high=None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Ratio(value=value, low=float(low), high=float(high))


def _resampled_medians(
    generator: np.random.Generator, rates: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Medians of resampled rates, float64 [DRAWS]."""
    drawn = generator.choice(np.array(rates), (DRAWS, len(rates)))
    medians: npt.NDArray[np.float64] = np.median(drawn, axis=1)
    return medians
