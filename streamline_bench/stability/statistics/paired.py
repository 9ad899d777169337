"""Statistics of paired verdicts: flips, agreement, kappa, differences with intervals, McNemar.

Everything here needs only the four counts of :class:`Outcomes`; d is the dense model, p the pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from streamline_bench.errors import SamplesError

__all__ = [
    "MID_P_BELOW",
    "Outcomes",
    "kappa",
    "mcnemar",
    "mcnemar_test",
    "mean_retention",
    "newcombe",
    "newcombe_at",
    "retention",
    "wilson",
]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

MID_P_BELOW = 25
"""With fewer discordant pairs the exact test is so conservative that its mid-p is read instead."""


@dataclass(frozen=True)
class Outcomes:
    """How often both were right, only the dense one, only the pruned one, neither."""

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int

    @classmethod
    def of(cls, dense: BoolArray, pruned: BoolArray) -> Outcomes:
        """Count verdicts (bool [n] each, same order).

        Raises:
            SamplesError: the lengths differ or there is no verdict.
        """
        if dense.shape != pruned.shape or dense.size == 0:
            raise SamplesError(
                f"Paired statistics need as many verdicts on both sides and at least one; got "
                f"{dense.size} and {pruned.size}."
            )
        code = 2 * (~dense).astype(np.int64) + (~pruned).astype(np.int64)
        return cls(*(int(count) for count in np.bincount(code, minlength=4)))

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.both_right + self.right_to_wrong + self.wrong_to_right + self.both_wrong

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """The four counts in the order of the fields."""
        return (self.both_right, self.right_to_wrong, self.wrong_to_right, self.both_wrong)

    @property
    def dense_accuracy(self) -> float:
        """Share the dense model has right."""
        return (self.both_right + self.right_to_wrong) / self.n

    @property
    def pruned_accuracy(self) -> float:
        """Share the pruned model has right."""
        return (self.both_right + self.wrong_to_right) / self.n

    @property
    def agreement(self) -> float:
        """Share with the same verdict: stability with equal weights."""
        return (self.both_right + self.both_wrong) / self.n

    @property
    def difference(self) -> float:
        """Pruned accuracy minus dense accuracy."""
        return (self.wrong_to_right - self.right_to_wrong) / self.n

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))


def kappa(outcomes: Outcomes) -> float | None:
    """Cohen's kappa of the verdicts: agreement beyond what the two accuracies give by chance.

    None where chance alone gives full agreement (one verdict only on both sides).
    """
    d, p = outcomes.dense_accuracy, outcomes.pruned_accuracy
    chance = d * p + (1 - d) * (1 - p)
    return None if chance == 1.0 else (outcomes.agreement - chance) / (1 - chance)


def mcnemar(outcomes: Outcomes, *, mid_p: bool = False) -> float:
    """Exact two-sided McNemar test: were more answers lost than gained than a fair coin explains?

    Args:
        mid_p: count outcomes as extreme as the one seen by half (Fagerland, Lydersen & Laake 2013):
            less conservative with few flips.

    Returns:
        p-value; 1.0 without flips.
    """
    from scipy.special import bdtr, gammaln  # scipy.stats takes a second to import

    b, c = outcomes.right_to_wrong, outcomes.wrong_to_right
    if b + c == 0:
        return 1.0
    tail = float(bdtr(min(b, c), b + c, 0.5))
    ways = float(gammaln(b + c + 1) - gammaln(b + 1) - gammaln(c + 1))
    here = math.exp(ways - (b + c) * math.log(2))
    if b == c:
        return 1.0 - here / 2 if mid_p else 1.0
    return min(1.0, 2 * tail - (here if mid_p else 0.0))


def mcnemar_test(outcomes: Outcomes) -> tuple[float, str]:
    """The McNemar p to read, and which it is: mid-p below :data:`MID_P_BELOW` discordant pairs."""
    few = outcomes.right_to_wrong + outcomes.wrong_to_right < MID_P_BELOW
    return mcnemar(outcomes, mid_p=few), f"McNemar, {'mid-p' if few else 'exact'}"


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; n need not be whole (effective sample sizes)."""
    return _wilson(successes / n, n, _quantile(confidence))


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    z2 = z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if p <= 0 else max(0.0, centre - half)
    high = 1.0 if p >= 1 else min(1.0, centre + half)
    return low, high


def newcombe(outcomes: Outcomes, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the paired difference (pruned - dense): Newcombe's square-and-add, method 10.

    R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650: Wilson intervals of both accuracies,
    combined with the correlation of the verdicts. Unlike Wald's it stays inside [-1, 1] and does
    not collapse when there are no flips.
    """
    return newcombe_at(outcomes, _quantile(confidence))


def newcombe_at(outcomes: Outcomes, z: float) -> tuple[float, float]:
    """:func:`newcombe` at ``z`` standard errors."""
    n = outcomes.n
    p1, p2 = outcomes.pruned_accuracy, outcomes.dense_accuracy
    low1, high1 = _wilson(p1, n, z)
    low2, high2 = _wilson(p2, n, z)
    phi = _corrected_phi(outcomes)
    below = _square_and_add(p1 - low1, high2 - p2, phi)
    above = _square_and_add(high1 - p1, p2 - low2, phi)
    return outcomes.difference - below, outcomes.difference + above


def retention(outcomes: Outcomes, confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval of pruned accuracy / dense accuracy; None if the dense model has none right.

    The ratio's square-and-add (A. Donner and G. Y. Zou, Statistical Methods in Medical Research 21
    (2012) 347-359): those r for which the interval of p1 - r p2, built as in :func:`newcombe` from
    Wilson's intervals and the correlation, contains 0. It does not collapse without flips and needs
    no pruned answer right.
    """
    return mean_retention([outcomes], confidence)


def mean_retention(
    tasks: Sequence[Outcomes], confidence: float = 0.95, reach: Sequence[float] = ()
) -> tuple[float, float] | None:
    """The same of the mean accuracies over independent tasks: squares add up over these too.

    Args:
        reach: of each task, how far the interval of p1 - r p2 reaches at least, r being the ratio
            of the means: where clusters say more than documents. Empty without clusters.
    """
    if all(task.dense_accuracy == 0.0 for task in tasks):
        return None
    z, count = _quantile(confidence), len(tasks)
    p1 = sum(task.pruned_accuracy for task in tasks) / count
    p2 = sum(task.dense_accuracy for task in tasks) / count
    lower, upper = np.zeros(3), np.zeros(3)
    for task, least in zip(tasks, reach or [0.0] * count, strict=True):
        below, above = _ratio_squares(task, z)
        lower += below * _factor(below, p1 / p2, least) / count**2
        upper += above * _factor(above, p1 / p2, least) / count**2
    a, b, c = p2 * p2 - lower[2], p1 * p2 - lower[1], max(0.0, p1 * p1 - lower[0])
    root = math.sqrt(max(0.0, b * b - a * c))
    low = float(c / (b + root)) if b + root > 0 else 0.0
    a, b, c = p2 * p2 - upper[2], p1 * p2 - upper[1], p1 * p1 - upper[0]
    root = math.sqrt(max(0.0, b * b - a * c))
    return low, float((b + root) / a)


def _ratio_squares(outcomes: Outcomes, z: float) -> tuple[FloatArray, FloatArray]:
    """Squares and product, [3], of the distances that bound a ratio: its lower end, its upper.

    x², phi x y and y²: the interval of p1 - r p2 reaches sqrt(x² - 2 r phi x y + r² y²).
    """
    n = outcomes.n
    p1, p2 = outcomes.pruned_accuracy, outcomes.dense_accuracy
    low1, high1 = _wilson(p1, n, z)
    low2, high2 = _wilson(p2, n, z)
    phi = _corrected_phi(outcomes)
    ends = (p1 - low1, high2 - p2), (high1 - p1, p2 - low2)
    lower, upper = (np.array([x * x, phi * x * y, y * y]) for x, y in ends)
    return lower, upper


def _factor(squares: FloatArray, ratio: float, least: float) -> float:
    """By how much squares must grow that they reach this far."""
    square = float(squares[0] - 2 * ratio * squares[1] + ratio**2 * squares[2])
    return max(1.0, least**2 / square) if square > 0 else 1.0


def _square_and_add(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))


def _corrected_phi(outcomes: Outcomes) -> float:
    """Correlation of the verdicts; a positive numerator is reduced by n/2 (not below 0)."""
    a, b, c, d = outcomes.counts
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    numerator = float(a * d - b * c)
    if numerator > 0:
        numerator = max(0.0, numerator - outcomes.n / 2)
    return numerator / math.sqrt(margins)
