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
    student_error,
    task_generator,
)
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.decision import (
    detectable_at,
    detectable_difference,
    noninferiority,
    noninferiority_from_draws,
)
from streamline_bench.stability.means import t_tail
from streamline_bench.stability.paired import Outcomes, newcombe, retention, wilson
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

    def estimate(
        self,
        value: float,
        draws: FloatArray,
        confidence: float,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ) -> Estimate | None:
        """``value`` with the interval of its draws; None where they do not vary, or are not finite.

        Where nothing varies a bootstrap would claim certainty.
        """
        if not np.isfinite(draws).all() or draws.min() == draws.max():
            return None
        (low, high), method = bootstrap_interval(value, draws, self.units, confidence)
        return Estimate(
            value=value,
            standard_error=self.error(draws),
            low=max(bounds[0], low),
            high=min(bounds[1], high),
            method=f"{method} over {self.what}, {len(draws)} draws",
        )

    def error(self, draws: FloatArray) -> float:
        """Standard error of what was drawn."""
        few = 1 < self.units < FEW_UNITS
        return student_error(draws, self.units) if few else float(draws.std())

    def noninferiority(self, outcomes: Outcomes, margin: float) -> float:
        """One-sided p of a drop of ``margin`` or more, by the interval of :meth:`difference`."""
        draws = self.differences
        if draws.min() == draws.max():
            return noninferiority(outcomes, margin, effective_n=self.units)
        if 1 < self.units < FEW_UNITS:
            distance = (outcomes.difference + margin) / self.error(draws)
            return t_tail(distance, self.units - 1)
        return noninferiority_from_draws(draws, margin)

    def detectable(self, outcomes: Outcomes, confidence: float) -> float | None:
        """Smallest true difference found with 80 % power."""
        draws = self.differences
        if draws.min() == draws.max():
            return detectable_difference(outcomes, confidence, effective_n=self.units)
        freedom = self.units - 1 if 1 < self.units < FEW_UNITS else None
        return detectable_at(self.error(draws), confidence, freedom)

    def difference(self, outcomes: Outcomes, confidence: float) -> Estimate:
        """Pruned - dense accuracy; Newcombe's interval at ``units`` where nothing varies."""
        found = self.estimate(outcomes.difference, self.differences, confidence, bounds=(-1, 1))
        if found is not None:
            return found
        low, high = newcombe(outcomes, confidence, effective_n=self.units)
        method = f"Newcombe paired at {self.what}"
        return Estimate(value=outcomes.difference, low=low, high=high, method=method)

    def agreement(self, outcomes: Outcomes, confidence: float) -> Estimate:
        """Share of equal verdicts; Wilson's interval at ``units`` where nothing varies."""
        draws = self.totals[:, 3] / self.totals[:, 0]
        found = self.estimate(outcomes.agreement, draws, confidence, bounds=(0, 1))
        if found is not None:
            return found
        low, high = wilson(outcomes.agreement * self.units, self.units, confidence)
        method = f"Wilson at {self.what}"
        return Estimate(value=outcomes.agreement, low=low, high=high, method=method)

    def retention(self, outcomes: Outcomes, confidence: float) -> Estimate | None:
        """Pruned / dense accuracy; square-and-add at ``units`` where nothing varies."""
        ends = retention(outcomes, confidence, effective_n=self.units)
        if ends is None:
            return None
        value = outcomes.pruned_accuracy / outcomes.dense_accuracy
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = self.totals[:, 2] / self.totals[:, 1]
        found = self.estimate(value, draws, confidence, bounds=(0, math.inf))
        if found is not None:
            return found
        method = f"ratio, square-and-add at {self.what}"
        return Estimate(value=value, low=ends[0], high=ends[1], method=method)


def resample_clusters(sums: FloatArray, kind: str, settings: Settings, *names: str) -> Resampled:
    """Resample clusters, given their sums [clusters, 4] in the order of ``Resampled.totals``."""
    generator = task_generator(settings.seed, *names, "clusters")
    totals = cluster_draws(np.rint(sums).astype(np.int64), settings.draws, generator)
    return Resampled(totals, len(sums), f"{len(sums):,} {kind}")


def resample_documents(outcomes: Outcomes, settings: Settings, *names: str) -> Resampled:
    """Resample documents that stand alone."""
    n = outcomes.n
    shares = outcome_draws(outcomes, settings.draws, task_generator(settings.seed, *names))
    right = shares[:, 0] + shares[:, 1], shares[:, 0] + shares[:, 2]
    columns = [np.ones(len(shares)), *right, shares[:, 0] + shares[:, 3]]
    return Resampled(n * np.stack(columns, axis=1), n, f"{n:,} documents")
