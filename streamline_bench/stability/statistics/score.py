"""The paired difference of accuracy: one score statistic gives p, interval and verdict.

A difference is excluded where its p-value is below the level, and the interval is what remains: the
two cannot contradict each other. Holm's adjustment multiplies p, and its interval is what remains
by the multiplied p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from streamline_bench.errors import SamplesError
from streamline_bench.stability.comparison import Decision
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics.intervals import t_quantile, t_tail
from streamline_bench.stability.statistics.paired import Design, Outcomes, PairedSample

POWER = 0.8
_EXACT_POWER_BELOW = 25  # documents; the normal formula is far off there


@dataclass(frozen=True)
class PairedDifference:
    """Mean over independent samples (tasks) of pruned - dense accuracy.

    T(D) = (mean difference - D) / (its standard error if D were true). The error is T. Tango's
    (Statistics in Medicine 17 (1998) 891-908), with the most likely share of lost answers at the
    difference that each sample would then have, times the design effect of clusters
    (:meth:`PairedSample.design`, which gives the degrees of freedom of T too). At D = 0 and without
    clusters, T is McNemar's (gained - lost) / sqrt(gained + lost). With several samples, they move
    from what was seen in proportion to their variances.
    """

    samples: tuple[PairedSample, ...]

    @cached_property
    def value(self) -> float:
        """Pruned - dense."""
        return sum(sample.outcomes.difference for sample in self.samples) / len(self.samples)

    @cached_property
    def designs(self) -> tuple[Design, ...]:
        """What clusters do to the difference of each sample."""
        return tuple(sample.design(dense=-1.0, pruned=1.0) for sample in self.samples)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Share of each sample in the variance of the sum; half a flip is added to each."""
        variances = [
            design.effect * (sample.outcomes.flips + 0.5) / (sample.outcomes.n + 1)
            / sample.outcomes.n
            for sample, design in zip(self.samples, self.designs, strict=True)
        ]  # fmt: skip
        return tuple(variance / sum(variances) for variance in variances)

    @cached_property
    def freedom(self) -> float:
        """Degrees of freedom (Satterthwaite's); infinite without clusters."""
        pairs = zip(self.shares, self.designs, strict=True)
        unsure = sum(share**2 / design.freedom for share, design in pairs)
        return 1 / unsure if unsure else math.inf

    def error(self, difference: float) -> float:
        """Standard error of :attr:`value` if the true mean were ``difference``."""
        count, variance = len(self.samples), 0.0
        moved = count * (difference - self.value)
        for sample, design, share in zip(self.samples, self.designs, self.shares, strict=True):
            outcomes = sample.outcomes
            at = min(1.0, max(-1.0, outcomes.difference + share * moved))
            variance += design.effect * _variance(outcomes, at) / outcomes.n
        return math.sqrt(variance) / count

    def statistic(self, difference: float) -> float:
        """T at ``difference``."""
        distance, error = self.value - difference, self.error(difference)
        if error > 0 or distance == 0.0:
            return distance and distance / error
        return math.copysign(math.inf, distance)

    def tail(self, difference: float) -> float:
        """One-sided p of the hypothesis that the true mean is ``difference`` or less."""
        return t_tail(self.statistic(difference), self.freedom)

    def p_value(self, difference: float = 0.0) -> float:
        """Two-sided p of the hypothesis that the true mean is ``difference``."""
        return 2 * t_tail(abs(self.statistic(difference)), self.freedom)

    def interval(self, confidence: float, margin: float = 0.0, comparisons: int = 1) -> Estimate:
        """The differences D whose ``comparisons * p_value(D)`` is not below 1 - confidence.

        Args:
            margin: -margin is inside or outside exactly as its p says; 0 always is.
        """

        def excluded(difference: float) -> bool:
            return comparisons * self.p_value(difference) < 1 - confidence

        ends = []
        for outer in (-1.0, 1.0):
            inner = self.value
            for decided in (outer, -margin, 0.0):
                if min(inner, outer) <= decided <= max(inner, outer):
                    inner, outer = (inner, decided) if excluded(decided) else (decided, outer)
            for _ in range(60):
                middle = (inner + outer) / 2
                inner, outer = (inner, middle) if excluded(middle) else (middle, outer)
            ends.append(inner)
        return Estimate(
            value=self.value,
            standard_error=self.error(self.value) or None,
            low=ends[0],
            high=ends[1],
            method=f"Tango's score over {self.counted}",
        )

    @property
    def counted(self) -> str:
        """What was counted, as "12 passages"."""
        first = self.samples[0]
        several = len(self.samples) > 1
        return f"{len(self.samples)} tasks" if several else f"{first.units:,} {first.kind}"

    @property
    def method(self) -> str:
        """Name of the test."""
        if len(self.samples) > 1:
            return f"score over {self.counted}"
        return f"McNemar over {self.counted}, score" if self.samples[0].strata else "McNemar, score"

    def detectable(self, confidence: float) -> float | None:
        """Smallest true difference that the test finds with 80 % power; None if none is."""
        if len(self.samples) == 1:
            return detectable_difference(self.samples[0].outcomes, confidence, self.designs[0])
        ends = self.interval(confidence)
        if ends.low is None or ends.high is None:
            return None
        quantile = t_quantile(confidence, self.freedom)
        found = (quantile + t_quantile(2 * POWER - 1, self.freedom)) / quantile
        smallest = found * (ends.high - ends.low) / 2
        return smallest if smallest <= 1 else None

    def needed(self, confidence: float, power: float = POWER) -> int | None:
        """Documents, all tasks together, at which the test would find the difference that was seen.

        Tasks keep their proportions, and discordance what was seen (:func:`documents_needed`). None
        where no difference was seen.
        """
        if self.value == 0.0:
            return None
        levels = t_quantile(confidence, self.freedom), t_quantile(2 * power - 1, self.freedom)
        root = levels[0] * self.error(0.0) + levels[1] * self.error(self.value)
        documents = sum(sample.outcomes.n for sample in self.samples)
        return math.ceil(documents * (root / self.value) ** 2)


def _variance(outcomes: Outcomes, difference: float) -> float:
    """Variance of one document's change if the true difference were this.

    Twice the share of lost answers + difference - difference²; the share is the most likely one.
    """
    n, d = outcomes.n, difference
    lost, gained = outcomes.right_to_wrong, outcomes.wrong_to_right
    linear = outcomes.flips * (1 - d) + 2 * d * (gained - n)
    root = math.sqrt(max(0.0, linear**2 + 8 * n * lost * d * (1 - d)))
    share = max((linear + root) / (4 * n), 0.0, -d)
    return max(0.0, 2 * share + d - d * d)


class Adjusted(NamedTuple):
    """Holm's adjusted p, and by how much p counts in its interval."""

    p: float
    comparisons: int


def holm(p_values: Sequence[float], level: float) -> list[Adjusted]:
    """Holm's step-down adjustment: the chance of any false alarm stays below the level.

    S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Needs no independence of the tests.
    The p of rank k of m counts (m - k + 1)-fold; from the first on that is not below the level, all
    count as that one does. Intervals at these levels exclude 0 exactly where the adjusted p is
    below the level (R. C. Serlin, Journal of Experimental Education 61 (1993) 350-360).
    """
    adjusted = [Adjusted(1.0, 1)] * len(p_values)
    largest, comparisons = 0.0, len(p_values) + 1
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if largest < level:
            comparisons = len(p_values) - rank
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = Adjusted(largest, comparisons)
    return adjusted


def documents_needed(
    difference: float,
    discordance: float,
    *,
    confidence: float = 0.95,
    power: float = POWER,
    effect: float = 1.0,
) -> int:
    """Documents at which the paired test finds a true difference with this power.

    n = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2, with s the share of documents on which exactly
    one of two models is right (R. J. Connor, Biometrics 43 (1987) 207-211).

    Args:
        difference: of accuracy, not 0; its sign does not matter.
        discordance: s; a difference needs at least as many discordant documents.
        effect: design effect of clusters.

    Raises:
        SamplesError: a share is not between 0 and 1, or the difference is 0.
    """
    size = abs(difference)
    for name, value in (("difference", size), ("discordance", discordance), ("power", power)):
        if not 0 < value <= 1 or (name == "power" and value == 1):
            raise SamplesError(
                f"The {name} {value:g} is not a share above 0 and at most 1; give 0.02 for two "
                "points."
            )
    share = max(discordance, size)
    levels = t_quantile(confidence, math.inf), t_quantile(2 * power - 1, math.inf)
    root = levels[0] * math.sqrt(share) + levels[1] * math.sqrt(share - size**2)
    return math.ceil(effect * (root / size) ** 2)


def detectable_difference(
    outcomes: Outcomes, confidence: float, design: Design | None = None
) -> float | None:
    """Smallest true difference of accuracy that the test would find with 80 % power.

    At n pairs of which a share s is discordant, a difference d is found with that power from
    n = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2 pairs on (R. J. Connor, Biometrics 43 (1987)
    207-211). s is the share seen, (discordant + 1/2) / (n + 1), but at least d: a difference needs
    that many discordant pairs. With clusters, n is the effective number and z is Student's. Below
    25 pairs, where that is far off, the power is that of the test itself, over every outcome.

    Returns:
        In (0, 1]; None where n is too small to find any difference.
    """
    n = outcomes.n
    seen = (outcomes.flips + 0.5) / (n + 1)
    effect, freedom = design or Design()
    z_level, z_power = t_quantile(confidence, freedom), t_quantile(2 * POWER - 1, freedom)
    exact = n < _EXACT_POWER_BELOW and math.isinf(freedom)
    rejected = _rejected(n, 1 - confidence) if exact else None

    def found(difference: float) -> bool:
        share = max(seen, difference)
        if rejected is not None:
            return _power(n, share, difference, rejected) >= POWER
        root = z_level * math.sqrt(share) + z_power * math.sqrt(share - difference**2)
        return n * difference**2 >= effect * root**2

    low, high = 0.0, 1.0
    if not found(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _rejected(n: int, level: float) -> list[tuple[int, int]]:
    """Answers lost and gained, of at most n, at which the test finds a difference."""
    return [
        (lost, pairs - lost)
        for pairs in range(1, n + 1)
        for lost in range(pairs + 1)
        if math.erfc(abs(pairs - 2 * lost) / math.sqrt(2 * pairs)) < level
    ]


def _power(n: int, share: float, difference: float, rejected: list[tuple[int, int]]) -> float:
    """Chance of these outcomes where a ``share`` of n pairs is discordant."""
    more, less = (share + difference) / 2, (share - difference) / 2
    return sum(
        math.comb(n, lost) * math.comb(n - lost, gained)
        * more**lost * less**gained * (1 - share) ** (n - lost - gained)
        for lost, gained in rejected
    )  # fmt: skip


def decide(difference: Estimate, margin: float, *, significant: bool) -> Decision:
    """See :data:`streamline_bench.stability.comparison.Decision`."""
    if significant and difference.value > 0:
        return "better"
    if difference.low is not None and difference.low > -margin:
        return "no worse than margin"
    return "worse" if significant and difference.value < 0 else "cannot tell"
