"""Intervals of means (Student's) and of ratios (bootstrap), over documents or clusters of them.

The bootstrap resamples no rows: resampling n units is a multinomial draw of counts over units of
equal value. Percentiles of few clusters are too narrow: below :data:`FEW_UNITS` the interval is
Student's, with the draws' error.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics import FloatArray, IntArray

FEW_UNITS = 20
_MOST_COUNTS = 4_000_000
"""Counts that a bootstrap holds at once."""


def t_quantile(confidence: float, freedom: float) -> float:
    """Two-sided quantile of Student's distribution; of the normal one for infinite freedom."""
    if math.isinf(freedom):
        return NormalDist().inv_cdf(0.5 + confidence / 2)
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def t_tail(distance: float, freedom: float) -> float:
    """Chance above ``distance`` of the same distribution."""
    if math.isinf(freedom):
        return math.erfc(distance / math.sqrt(2)) / 2
    from scipy.special import stdtr

    return float(stdtr(freedom, -distance))


def mean_estimate(
    values: FloatArray,
    confidence: float,
    clusters: IntArray | None = None,
    *,
    floor: float = -math.inf,
) -> Estimate:
    """Mean of the values that are not NaN, with its interval.

    With clusters the error is the cluster-robust one (sums of deviations per cluster, CR1).
    :func:`mean_per_unit` does the rest.

    Args:
        values: float64 [n]; at least one is not NaN.
        clusters: int64 [n], 0-based labels; None if every document stands alone.
        floor: the interval's lower end is not below this.
    """
    counted = ~np.isnan(values)
    totals, sizes, what = values[counted], np.ones(int(counted.sum())), ""
    if clusters is not None:
        labels, what = clusters[counted], "clusters"
        sizes = np.bincount(labels).astype(np.float64)
        totals = np.bincount(labels, weights=totals).astype(np.float64)[sizes > 0]
        sizes = sizes[sizes > 0]
    return mean_per_unit(totals, sizes, confidence, what=what, bounds=(floor, math.inf))


def mean_per_unit(
    totals: FloatArray,
    units: FloatArray,
    confidence: float,
    *,
    what: str = "documents",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """sum(totals) / sum(units), as nats per word of a text, with Student's interval.

    The error of this ratio is that of its linear part, totals - ratio x units, per row. One row
    says nothing about its error: then there is no interval.

    Args:
        totals, units: float64 [n], per row.
        what: what the rows are, for the name of the method.
        bounds: between which the ratio must lie; the interval does not leave them.
    """
    n = len(totals)
    value = float(totals.sum() / units.sum())
    if n < 2:
        return Estimate(value=value)
    deviations = totals - value * units
    error = math.sqrt(n / (n - 1) * float(np.square(deviations).sum())) / float(units.sum())
    half = t_quantile(confidence, n - 1) * error
    return Estimate(
        value=value,
        standard_error=error,
        low=max(bounds[0], value - half),
        high=min(bounds[1], value + half),
        method=f"Student over {n:,} {what}" if what else "Student",
    )


def task_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the task only: not on which tasks come along."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode("utf-8")) for name in names)])


def bootstrap_interval(
    value: float, draws: FloatArray, units: int, confidence: float
) -> tuple[tuple[float, float], str]:
    """Interval of ``value`` from draws over resampled units, and its name."""
    if not 1 < units < FEW_UNITS:
        tail = (1 - confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return (float(low), float(high)), "bootstrap"
    half = t_quantile(confidence, units - 1) * float(draws.std())
    return (value - half, value + half), "Student with bootstrap error"


def resamples(sizes: IntArray, draws: int, generator: np.random.Generator) -> Iterator[IntArray]:
    """Yield counts [some draws, cells] of as many units as there are, drawn from cells of these
    sizes; all draws together are ``draws``."""
    units, step = int(sizes.sum()), max(1, _MOST_COUNTS // len(sizes))
    for begin in range(0, draws, step):
        yield generator.multinomial(units, sizes / units, size=min(step, draws - begin))


def ratio_draws(
    numerators: FloatArray,
    denominators: FloatArray,
    draws: int,
    generator: np.random.Generator,
    *,
    max_cells: int = 512,
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
    return np.concatenate(
        [
            (drawn @ numerators) / (drawn @ denominators)
            for drawn in resamples(sizes, draws, generator)
        ]
    )
