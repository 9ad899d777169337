"""Intervals from resampled verdicts: of a task, of clusters of documents, of tasks together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.bootstrap import (
    cluster_draws,
    outcome_draws,
    percentile_interval,
    task_generator,
)
from streamline_bench.stability.comparison import Estimate
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
    def method(self) -> str:
        """Name of the percentile interval."""
        return f"bootstrap over {self.what}, {len(self.totals)} draws"

    @property
    def differences(self) -> FloatArray:
        """Pruned - dense accuracy [draws]."""
        draws: FloatArray = (self.totals[:, 2] - self.totals[:, 1]) / self.totals[:, 0]
        return draws

    def _percentiles(self, value: float, draws: FloatArray, confidence: float) -> Estimate | None:
        """None where a bootstrap would claim certainty, or has no end."""
        draws = draws[~np.isnan(draws)]
        if len(draws) == 0 or draws.min() == draws.max():
            return None
        low, high = percentile_interval(draws, confidence)
        if not np.isfinite([low, high]).all():
            return None
        error = float(draws.std()) if np.isfinite(draws).all() else None
        return Estimate(value=value, standard_error=error, low=low, high=high, method=self.method)

    def difference(self, outcomes: Outcomes, confidence: float) -> Estimate:
        """Pruned - dense accuracy; Newcombe's interval at ``units`` where nothing varies."""
        found = self._percentiles(outcomes.difference, self.differences, confidence)
        if found is not None:
            return found
        low, high = newcombe(outcomes, confidence, effective_n=self.units)
        method = f"Newcombe paired at {self.what}"
        return Estimate(value=outcomes.difference, low=low, high=high, method=method)

    def agreement(self, outcomes: Outcomes, confidence: float) -> Estimate:
        """Share of equal verdicts; Wilson's interval at ``units`` where nothing varies."""
        draws = self.totals[:, 3] / self.totals[:, 0]
        found = self._percentiles(outcomes.agreement, draws, confidence)
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
        found = self._percentiles(value, draws, confidence)
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
