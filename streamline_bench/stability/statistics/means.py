"""Means per document with Student's interval, over documents or over clusters of them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.comparison import Estimate

__all__ = ["mean_estimate", "mean_per_unit", "t_quantile", "t_tail"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def t_quantile(confidence: float, freedom: float) -> float:
    """Two-sided quantile of Student's distribution."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def t_tail(distance: float, freedom: int) -> float:
    """Chance of Student's distribution above ``distance``."""
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

    With clusters the error is the cluster-robust one (sums of deviations per cluster, CR1). One
    document, or one cluster, says nothing about its error: then there is no interval.

    Args:
        values: float64 [n]; at least one is not NaN.
        clusters: int64 [n], 0-based labels; None if every document stands alone.
        floor: the interval's lower end is not below this.
    """
    counted = ~np.isnan(values)
    if not counted.all():
        values = values[counted]
        clusters = None if clusters is None else clusters[counted]
    mean = float(values.mean())
    deviations = values - mean
    if clusters is not None:
        sums = np.bincount(clusters, weights=deviations).astype(np.float64)
        deviations = sums[np.bincount(clusters) > 0]
    units = len(deviations)
    if units < 2:
        return Estimate(value=mean)
    error = math.sqrt(units / (units - 1) * float(np.square(deviations).sum())) / len(values)
    half = t_quantile(confidence, units - 1) * error
    return Estimate(
        value=mean,
        standard_error=error,
        low=max(floor, mean - half),
        high=mean + half,
        method="Student" if clusters is None else f"Student over {units} clusters",
    )


def mean_per_unit(
    totals: FloatArray,
    units: FloatArray,
    confidence: float,
    *,
    what: str = "documents",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """sum(totals) / sum(units), as nats per word of a text, with Student's interval.

    The error of this ratio is that of its linear part, totals - ratio x units, per document. One
    document has no interval.

    Args:
        totals, units: float64 [n], per document.
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
        method=f"Student over {n:,} {what}",
    )
