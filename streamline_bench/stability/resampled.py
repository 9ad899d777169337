"""Intervals from resampled verdicts: of a task, of clusters of documents, of tasks together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.bootstrap import (
    FEW_UNITS,
    bootstrap_interval,
    cluster_draws,
    outcome_draws,
    task_generator,
)
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.decision import (
    detectable_at,
    noninferiority_from_draws,
)
from streamline_bench.stability.means import t_tail
from streamline_bench.stability.paired import Outcomes
from streamline_bench.stability.settings import Settings

__all__ = ["Resampled", "resample_clusters", "resample_documents"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Resampled:
    """Resampled totals, and how many independent units there are.

    Attributes:
        totals: float64 [draws, 4]: documents, right by the dense model, right by the pruned one,
            same verdict.
        units: documents or clusters that were drawn.
        what: the same in words, for the name of a method.
    """

    totals: FloatArray
    units: int
    what: str

    def __add__(self, other: Resampled) -> Resampled:
        """Two tasks resampled independently."""
        units = self.units + other.units
        return Resampled(self.totals + other.totals, units, f"{units:,} clusters and documents")

    @property
    def differences(self) -> FloatArray:
        """Pruned - dense accuracy [draws]."""
        draws: FloatArray = (self.totals[:, 2] - self.totals[:, 1]) / self.totals[:, 0]
        return draws

    @property
    def varies(self) -> bool:
        """Whether the differences do; where not, a bootstrap would claim certainty."""
        draws = self.differences
        return bool(draws.min() < draws.max())

    def difference(self, value: float, confidence: float) -> Estimate | None:
        """Pruned - dense accuracy."""
        return self.estimate(value, self.differences, confidence, bounds=(-1, 1))

    def agreement(self, value: float, confidence: float) -> Estimate | None:
        """Share of equal verdicts."""
        draws = self.totals[:, 3] / self.totals[:, 0]
        return self.estimate(value, draws, confidence, bounds=(0, 1))

    def retention(self, value: float, confidence: float) -> Estimate | None:
        """Pruned / dense accuracy."""
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = self.totals[:, 2] / self.totals[:, 1]
        return self.estimate(value, draws, confidence, bounds=(0, math.inf))

    def estimate(
        self, value: float, draws: FloatArray, confidence: float, *, bounds: tuple[float, float]
    ) -> Estimate | None:
        """``value`` with the interval of its draws; None if they do not vary or are not finite."""
        if not np.isfinite(draws).all() or draws.min() == draws.max():
            return None
        (low, high), method = bootstrap_interval(value, draws, self.units, confidence)
        return Estimate(
            value=value,
            standard_error=float(draws.std()),
            low=max(bounds[0], low),
            high=min(bounds[1], high),
            method=f"{method} over {self.what}, {len(draws)} draws",
        )

    def noninferiority(self, value: float, margin: float) -> float:
        """One-sided p of a drop of ``margin`` or more, by the interval of :meth:`difference`."""
        draws = self.differences
        if self.units < FEW_UNITS:
            return t_tail((value + margin) / float(draws.std()), self.units - 1)
        return noninferiority_from_draws(draws, margin)

    def detectable(self, confidence: float) -> float | None:
        """Smallest true difference found with 80 % power; None if more than 1."""
        freedom = self.units - 1 if self.units < FEW_UNITS else None
        return detectable_at(float(self.differences.std()), confidence, freedom)


def resample_clusters(sums: FloatArray, kind: str, settings: Settings, *names: str) -> Resampled:
    """Resample clusters, given their sums [clusters, 4] in the order of ``Resampled.totals``.

    Draws of n clusters spread by sqrt((n - 1) / n) too little; their deviations are scaled up.
    """
    generator = task_generator(settings.seed, *names, "clusters")
    totals = cluster_draws(np.rint(sums).astype(np.int64), settings.draws, generator)
    seen, units = sums.sum(axis=0), len(sums)
    totals = seen + (totals - seen) * math.sqrt(units / (units - 1))
    return Resampled(totals, units, f"{units:,} {kind}")


def resample_documents(outcomes: Outcomes, settings: Settings, *names: str) -> Resampled:
    """Resample documents that stand alone."""
    n = outcomes.n
    shares = outcome_draws(outcomes, settings.draws, task_generator(settings.seed, *names))
    right = shares[:, 0] + shares[:, 1], shares[:, 0] + shares[:, 2]
    columns = [np.ones(len(shares)), *right, shares[:, 0] + shares[:, 3]]
    return Resampled(n * np.stack(columns, axis=1), n, f"{n:,} documents")
