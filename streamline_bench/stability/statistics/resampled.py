"""Intervals from resampled verdicts: of a task, of clusters of documents, of tasks together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.bootstrap import (
    FEW_UNITS,
    bootstrap_interval,
    cluster_draws,
    outcome_draws,
    task_generator,
)
from streamline_bench.stability.statistics.decision import detectable_at, noninferiority_from_draws
from streamline_bench.stability.statistics.means import t_quantile, t_tail
from streamline_bench.stability.statistics.paired import Outcomes

__all__ = ["Resampled", "resample_clusters", "resample_documents", "varies"]

FloatArray = npt.NDArray[np.float64]

_SAME = 1e-12  # rounding of equal ratios is some 1e-16, one flip in 10^6 documents moves 1e-6

_DOCUMENTS, _DENSE, _PRUNED, _SAME_VERDICT = range(4)


@dataclass(frozen=True)
class Resampled:
    """Resampled totals, and how many independent units there are.

    Draws of few clusters spread too little (see :func:`resample_clusters`). What they lack is kept
    apart and added to a *statistic*: totals that were spread themselves would give draws with
    hardly any documents, or fewer than none, and ratios without meaning.

    Attributes:
        totals: float64 [draws, 4]: documents, right by the dense model, right by the pruned one,
            same verdict.
        lacking: float64 [draws, 4]: by how much more these should deviate from ``seen``.
        seen: float64 [4]: the totals of the sample itself.
        units: documents or clusters that were drawn.
        what: the same in words, for the name of a method.
    """

    totals: FloatArray
    lacking: FloatArray
    seen: FloatArray
    units: int
    what: str

    def __add__(self, other: Resampled) -> Resampled:
        """Two tasks resampled independently; each keeps what its own draws lack."""
        units = self.units + other.units
        return Resampled(
            self.totals + other.totals,
            self.lacking + other.lacking,
            self.seen + other.seen,
            units,
            f"{units:,} clusters and documents",
        )

    def ratio(self, above: int, below: int = _DOCUMENTS) -> FloatArray:
        """Draws of the ratio of two columns [draws]; not finite where a draw has nothing below."""
        return self._ratio(self.totals[:, above], self.lacking[:, above], self.seen[above], below)

    def _ratio(
        self, drawn: FloatArray, lacking: FloatArray, seen: np.float64, below: int
    ) -> FloatArray:
        """drawn / below, spread by its linear part: lacking - value x lacking below."""
        value = seen / self.seen[below] if self.seen[below] else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: FloatArray = drawn / self.totals[:, below]
            ratio += (lacking - value * self.lacking[:, below]) / self.totals[:, below]
        return ratio

    @property
    def differences(self) -> FloatArray:
        """Pruned - dense accuracy [draws]."""
        drawn = self.totals[:, _PRUNED] - self.totals[:, _DENSE]
        lacking = self.lacking[:, _PRUNED] - self.lacking[:, _DENSE]
        return self._ratio(drawn, lacking, self.seen[_PRUNED] - self.seen[_DENSE], _DOCUMENTS)

    @property
    def varies(self) -> bool:
        """Whether the differences do; where not, a bootstrap would claim certainty."""
        return varies(self.differences)

    def difference(self, value: float, confidence: float) -> Estimate | None:
        """Pruned - dense accuracy."""
        return self.estimate(value, self.differences, confidence, bounds=(-1, 1))

    def agreement(self, value: float, confidence: float) -> Estimate | None:
        """Share of equal verdicts."""
        return self.estimate(value, self.ratio(_SAME_VERDICT), confidence, bounds=(0, 1))

    def retention(self, value: float, confidence: float) -> Estimate | None:
        """Pruned / dense accuracy."""
        draws = self.ratio(_PRUNED, _DENSE)
        return self.estimate(value, draws, confidence, bounds=(0, math.inf))

    def reach(self, ratio: float, confidence: float) -> float:
        """How far the interval of pruned - ratio x dense accuracy reaches; 0 if it cannot say."""
        draws = self.ratio(_PRUNED) - ratio * self.ratio(_DENSE)
        if not varies(draws):
            return 0.0
        freedom = self.units - 1 if self.units < FEW_UNITS else math.inf
        return t_quantile(confidence, freedom) * float(draws.std())

    def estimate(
        self, value: float, draws: FloatArray, confidence: float, *, bounds: tuple[float, float]
    ) -> Estimate | None:
        """``value`` with the interval of its draws; None if they do not vary or are not finite."""
        if not varies(draws):
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


def varies(draws: FloatArray) -> bool:
    """Whether draws are all finite and differ by more than rounding."""
    if not np.isfinite(draws).all():
        return False
    return bool(np.ptp(draws) > _SAME * max(1.0, float(np.abs(draws).max())))


def resample_clusters(sums: FloatArray, kind: str, settings: Settings, *names: str) -> Resampled:
    """Resample clusters, given their sums [clusters, 4] in the order of ``Resampled.totals``.

    Draws of n clusters spread by sqrt((n - 1) / n) too little; statistics of them are spread up.
    """
    generator = task_generator(settings.seed, *names, "clusters")
    totals = cluster_draws(np.rint(sums).astype(np.int64), settings.draws, generator)
    seen: FloatArray = np.asarray(sums, dtype=np.float64).sum(axis=0)
    units = len(sums)
    lacking = (totals - seen) * (math.sqrt(units / (units - 1)) - 1)
    return Resampled(totals, lacking, seen, units, f"{units:,} {kind}")


def resample_documents(outcomes: Outcomes, settings: Settings, *names: str) -> Resampled:
    """Resample documents that stand alone; their number makes sqrt(n / (n - 1)) nearly 1."""
    n = outcomes.n
    shares = outcome_draws(outcomes, settings.draws, task_generator(settings.seed, *names))
    right = shares[:, 0] + shares[:, 1], shares[:, 0] + shares[:, 2]
    columns = [np.ones(len(shares)), *right, shares[:, 0] + shares[:, 3]]
    totals = n * np.stack(columns, axis=1)
    both_right, lost, gained, both_wrong = outcomes.counts
    seen = np.array([n, both_right + lost, both_right + gained, both_right + both_wrong], float)
    return Resampled(totals, np.zeros_like(totals), seen, n, f"{n:,} documents")
