"""The paired difference of grades: p and interval come from one set of bootstrap draws.

A difference is excluded where its p-value is below the level, and the interval is what remains, as
in :mod:`streamline_bench.stability.statistics.score`, so that the two cannot contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import FloatArray
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.intervals import (
    bootstrap_interval,
    ratio_draws,
    resamples,
    t_quantile,
    t_tail,
    task_generator,
)

_FEW = 40
_ALIKE = 1e-12  # sums of equal grades differ in their last bits


@dataclass(frozen=True)
class PairedGrades:
    """Mean over documents of pruned - dense grade.

    Units (documents, or clusters of them) are drawn with replacement. Of m draws, of which c lie
    on the far side of D or at it, D has p = 2 (c + 1) / (m + 1) (A. C. Davison and D. V. Hinkley,
    Bootstrap Methods and their Application, 1997, section 4.2). Below 40 units, D is tested
    by Student's distribution with the draws' standard deviation, as percentiles of so few units are
    too narrow (``tests/benchmarks/coverage_of_grades.py``). Where all units moved alike
    (or none did), a bootstrap would claim certainty: then see :meth:`_alike_apart`.

    Attributes:
        moved: float64 [units], sum of pruned - dense.
        sizes: float64 [units], documents.
        sampled: float64 [draws], resampled means, sorted; empty for one unit.
        bounded: grades lie between 0 and 1.
        kind: what a unit is, in the plural.
    """

    moved: FloatArray
    sizes: FloatArray
    sampled: FloatArray
    bounded: bool = True
    kind: str = "documents"

    @classmethod
    def of(
        cls,
        difference: FloatArray,
        clusters: ClusterLabels | None,
        names: tuple[str, ...],
        *,
        draws: int,
        seed: int,
        bounded: bool = True,
    ) -> PairedGrades:
        """Resample the differences of the documents, float64 [n]; ``names`` seed the draws."""
        moved, sizes, kind = difference, np.ones(len(difference)), "documents"
        if clusters is not None:
            sums = clusters.sums(difference, sizes)
            moved, sizes, kind = sums[:, 0], sums[:, 1], clusters.shown.kind
        sampled = np.zeros(0)
        if len(moved) > 1:
            sampled = np.sort(ratio_draws(moved, sizes, draws, task_generator(seed, *names)))
        return cls(moved, sizes, sampled, bounded, kind)

    @property
    def value(self) -> float:
        """Pruned - dense."""
        return float(self.moved.sum() / self.sizes.sum())

    @cached_property
    def error(self) -> float:
        """Standard deviation of the draws, without their bias; 0 where all units moved alike.

        Draws from n units vary by (n - 1) / n of what other n units would have given.
        """
        alike = np.ptp(self.moved / self.sizes) <= _ALIKE
        if alike or not len(self.sampled):
            return 0.0
        return float(self.sampled.std()) * math.sqrt(self.units / (self.units - 1))

    @property
    def units(self) -> int:
        """Clusters, or documents that stand alone."""
        return len(self.moved)

    @property
    def method(self) -> str:
        """Name of the test."""
        few = "Student with bootstrap error" if self.units < _FEW else "bootstrap"
        return f"{few} over {self.units:,} {self.kind}"

    def _alike_apart(self, difference: float) -> float:
        """Distance from ``difference`` in standard errors, where units do not differ.

        A share of at least w = n / (n + z²) of all documents moves like the n that were seen
        (Wilson's limit of n of n), and the others by at most 1: the difference lies within
        w value ± (1 - w).
        """
        distance = self.value - difference
        room = 1 + math.copysign(difference, distance * difference)
        far = math.inf if room <= 0 else math.sqrt(self.units * abs(distance) / room)
        return math.copysign(far, distance) if distance else 0.0

    def tail(self, difference: float) -> float:
        """One-sided p of the hypothesis that the true mean is ``difference`` or less."""
        if self.error == 0:
            return t_tail(self._alike_apart(difference), math.inf) if self.bounded else 1.0
        if self.units < _FEW:
            return t_tail((self.value - difference) / self.error, self.units - 1)
        below = int(np.searchsorted(self.sampled, difference, side="right"))
        return (below + 1) / (len(self.sampled) + 1)

    def worse_by(self, margin: float, *, higher: bool) -> float:
        """One-sided p of the hypothesis that the pruned model is worse by ``margin`` or more."""
        if higher:
            return self.tail(-margin)
        other = PairedGrades(-self.moved, self.sizes, -self.sampled[::-1], self.bounded, self.kind)
        return other.tail(-margin)

    def p_value(self, difference: float = 0.0) -> float:
        """Two-sided p of the hypothesis that the true mean is ``difference``."""
        if self.error == 0:
            distance = abs(self._alike_apart(difference)) if self.bounded else 0.0
            return 2 * t_tail(distance, math.inf)
        if self.units < _FEW:
            return 2 * t_tail(abs(self.value - difference) / self.error, self.units - 1)
        below = int(np.searchsorted(self.sampled, difference, side="right"))
        above = len(self.sampled) - int(np.searchsorted(self.sampled, difference, side="left"))
        return min(1.0, 2 * (min(below, above) + 1) / (len(self.sampled) + 1))

    def interval(self, confidence: float, margin: float = 0.0, comparisons: int = 1) -> Estimate:
        """The differences D whose ``comparisons * p_value(D)`` is not below 1 - confidence.

        Args:
            margin: unused; named as that of a difference of verdicts.
        """
        level = (1 - confidence) / comparisons
        reach = 1.0 if self.bounded else math.inf
        low, high, method = -reach, reach, self.method
        if self.error == 0:
            if not self.bounded:
                return Estimate(value=self.value)
            share = self.units / (self.units + t_quantile(1 - level, math.inf) ** 2)
            low, high = share * self.value - (1 - share), share * self.value + (1 - share)
            method = f"Wilson over {self.units:,} {self.kind}, all moved alike"
        elif self.units < _FEW:
            half = t_quantile(1 - level, self.units - 1) * self.error
            low, high = self.value - half, self.value + half
        elif (rank := math.ceil(level * (len(self.sampled) + 1) / 2) - 1) > 0:
            low, high = float(self.sampled[rank - 1]), float(self.sampled[-rank])
        elif not self.bounded:
            return Estimate(value=self.value, standard_error=self.error)
        return Estimate(
            value=self.value,
            standard_error=self.error or None,
            low=max(-reach, low),
            high=min(reach, high),
            method=method,
        )


def mean_ratio(
    dense: FloatArray,
    pruned: FloatArray,
    clusters: ClusterLabels | None,
    settings: Settings,
    names: Sequence[str],
) -> Estimate | None:
    """Mean of the pruned / mean of the dense, by resampling documents; None where that is 0.

    No interval where every document has the same ratio: draws say nothing then.
    """
    before, now, units, over = dense, pruned, len(dense), "documents"
    if clusters is not None:
        sums = clusters.sums(dense, pruned)
        before, now, units = sums[:, 0], sums[:, 1], clusters.shown.count
        over = clusters.shown.kind
    if before.sum() <= 0 or units < 2:
        return None if before.sum() <= 0 else Estimate(value=float(now.sum() / before.sum()))
    value = float(now.sum() / before.sum())
    generator = task_generator(settings.seed, *names)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = ratio_draws(now, before, settings.draws, generator)
    if not np.isfinite(draws).all() or np.ptp(draws) == 0:
        return Estimate(value=value)
    (low, high), method = bootstrap_interval(value, draws, units, settings.confidence)
    method = f"{method} over {units:,} {over}"
    return Estimate(value=value, low=max(0.0, low), high=high, method=method)


Pair = tuple[FloatArray, FloatArray]
"""What is summed above, and what below, float64 [n] each."""


def ratio_of_ratios(
    dense: Pair,
    pruned: Pair,
    clusters: ClusterLabels | None,
    settings: Settings,
    names: Sequence[str],
) -> Estimate | None:
    """(pruned above / pruned below) / (dense above / dense below), by resampling documents.

    Such as tokens per solved question. None where a sum is 0; no interval where that is so in a
    share of the draws that the interval would need.
    """
    arrays, units, over = [*dense, *pruned], len(dense[0]), "documents"
    if clusters is not None:
        sums = clusters.sums(*arrays)
        arrays, units, over = list(sums.T), clusters.shown.count, clusters.shown.kind
    totals = [float(array.sum()) for array in arrays]
    if min(totals) <= 0:
        return None
    value = totals[2] / totals[3] / (totals[0] / totals[1])
    if units < 2:
        return Estimate(value=value)
    table = np.stack(arrays, axis=1)
    generator = task_generator(settings.seed, *names)
    sizes = np.ones(units, dtype=np.int64)
    drawn = np.concatenate(
        [counts @ table for counts in resamples(sizes, settings.draws, generator)]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(drawn[:, 2] * drawn[:, 1]) - np.log(drawn[:, 3] * drawn[:, 0])
    if not np.isfinite(logs).all() or np.ptp(logs) == 0:
        return Estimate(value=value)
    (low, high), method = bootstrap_interval(math.log(value), logs, units, settings.confidence)
    method = f"{method} over {units:,} {over}"
    return Estimate(value=value, low=math.exp(low), high=math.exp(high), method=method)
