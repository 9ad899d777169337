"""Bootstrap intervals without resampling rows: resampling n pairs is a multinomial draw of counts.

Paired verdicts have four outcomes, so a resample is one multinomial draw of four counts: exact, and
as fast for a million pairs as for ten. Weighted stability needs the weights too: pairs of equal
weight and verdict form a cell, and a resample is a multinomial draw over the cells. With more than
:data:`MAX_CELLS` distinct cells, pairs of neighbouring spread (equal steps of std) share a cell and
its mean weight; that leaves out only the variance of weights inside a cell.

Clusters (documents of one passage, of one subject) are resampled whole. Those with the same sums
are interchangeable, so this too is a multinomial draw, over the distinct sums. Percentiles of few
clusters are too narrow: below :data:`FEW_UNITS` the interval is Student's, with the draws' error.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.statistics.means import t_quantile
from streamline_bench.stability.statistics.paired import Outcomes
from streamline_bench.stability.statistics.stability import LEAST_EXPONENT

__all__ = [
    "FEW_UNITS",
    "MAX_CELLS",
    "Interval",
    "bootstrap_interval",
    "cluster_draws",
    "outcome_draws",
    "percentile_interval",
    "ratio_draws",
    "stability_draws",
    "task_generator",
]

FEW_UNITS = 20
MAX_CELLS = 128
_CHUNK = 4_000_000  # counts held at once

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def task_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the task only: not on which tasks come along."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode("utf-8")) for name in names)])


def percentile_interval(draws: FloatArray, confidence: float = 0.95) -> Interval:
    """Percentile interval of bootstrap draws [draws]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def bootstrap_interval(
    value: float, draws: FloatArray, units: int, confidence: float
) -> tuple[Interval, str]:
    """Interval of ``value`` from draws over resampled units, and its name."""
    if not 1 < units < FEW_UNITS:
        return percentile_interval(draws, confidence), "bootstrap"
    half = t_quantile(confidence, units - 1) * float(draws.std())
    return Interval(value - half, value + half), "Student with bootstrap error"


def outcome_draws(outcomes: Outcomes, draws: int, generator: np.random.Generator) -> FloatArray:
    """Resampled shares of the four outcomes, float64 [draws, 4]; exact."""
    probabilities = np.array(outcomes.counts) / outcomes.n
    shares: FloatArray = generator.multinomial(outcomes.n, probabilities, size=draws) / outcomes.n
    return shares


def cluster_draws(
    sums: npt.NDArray[np.int64], draws: int, generator: np.random.Generator
) -> FloatArray:
    """Totals of ``sums`` (int64 [clusters, k]) over resampled clusters, float64 [draws, k]; exact.

    Memory and time go with the number of distinct rows.
    """
    distinct, sizes = np.unique(sums, axis=0, return_counts=True)
    totals = np.empty((draws, sums.shape[1]))
    step = max(1, _CHUNK // len(sizes))
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        drawn = generator.multinomial(len(sums), sizes / len(sums), size=count)
        totals[begin : begin + count] = drawn @ distinct
    return totals


def ratio_draws(
    numerators: FloatArray,
    denominators: FloatArray,
    draws: int,
    generator: np.random.Generator,
    *,
    max_cells: int = 4 * MAX_CELLS,
) -> FloatArray:
    """Resampled sum(numerators) / sum(denominators) over units [units], float64 [draws].

    With more units than ``max_cells``, units of neighbouring influence on the ratio (numerator -
    ratio x denominator, the linear part of its variance) share a cell and its means.
    """
    units = len(numerators)
    sizes = np.ones(units, dtype=np.int64)
    if units > max_cells:
        influence = numerators - numerators.sum() / denominators.sum() * denominators
        edges = (np.arange(max_cells) * units) // max_cells
        order = np.argsort(influence, kind="stable")
        sizes = np.diff(np.append(edges, units))
        numerators = np.add.reduceat(numerators[order], edges) / sizes
        denominators = np.add.reduceat(denominators[order], edges) / sizes
    values = np.empty(draws)
    step = max(1, _CHUNK // len(sizes))
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        drawn = generator.multinomial(units, sizes / units, size=count)
        values[begin : begin + count] = (drawn @ numerators) / (drawn @ denominators)
    return values


def stability_draws(
    std: FloatArray,
    agree: BoolArray,
    draws: int,
    generator: np.random.Generator,
    *,
    max_cells: int = MAX_CELLS,
) -> FloatArray:
    """Resampled stability (equation 6), float64 [draws].

    Args:
        std: float64 [n], spread per question; its weight is e^std, kept with its question.
        agree: bool [n], same verdict.
        max_cells: above this many distinct (spread, verdict) pairs, spreads are grouped.
    """
    sizes, weights, agreeing = _cells(std, agree, max_cells)
    n = int(sizes.sum())
    values = np.empty(draws)
    step = max(1, _CHUNK // len(sizes))
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        drawn = generator.multinomial(n, sizes / n, size=count) * weights
        values[begin : begin + count] = drawn[:, agreeing].sum(axis=1) / drawn.sum(axis=1)
    return values


def _cells(
    std: FloatArray, agree: BoolArray, max_cells: int
) -> tuple[npt.NDArray[np.int64], FloatArray, BoolArray]:
    """Sizes, mean weights and verdicts of the cells that the pairs fall into, each [cells]."""
    # A resample of negligible questions only must still have a ratio.
    shifted = np.maximum(std - std.max(), LEAST_EXPONENT)
    _, label = np.unique(shifted, return_inverse=True)
    if 2 * (int(label.max()) + 1) > max_cells:
        bins = max_cells // 2
        label = np.minimum((shifted / shifted.min() * bins).astype(np.int64), bins - 1)
    cell = 2 * label + agree
    sizes = np.bincount(cell)
    weights = np.bincount(cell, weights=np.exp(shifted))
    used = np.flatnonzero(sizes)
    agreeing: BoolArray = used % 2 == 1
    return sizes[used].astype(np.int64), weights[used] / sizes[used], agreeing
