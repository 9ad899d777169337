"""Paired verdicts: flips, agreement, kappa, retention, and what clusters do to their errors.

d is the dense model, p the pruned one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streamline_bench.errors import SamplesError
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics import BoolArray, FloatArray
from streamline_bench.stability.statistics.intervals import t_quantile


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
    def counts(self) -> tuple[int, int, int, int]:
        """The four counts in the order of the fields."""
        return (self.both_right, self.right_to_wrong, self.wrong_to_right, self.both_wrong)

    @property
    def n(self) -> int:
        """Number of pairs."""
        return sum(self.counts)

    @property
    def flips(self) -> int:
        """Number of pairs whose verdict changed."""
        return self.right_to_wrong + self.wrong_to_right

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


class Design(NamedTuple):
    """What clusters do to a mean over documents.

    Attributes:
        effect: design effect: its variance, relative to documents that stand alone.
        freedom: degrees of freedom of that variance; infinite for documents.
    """

    effect: float = 1.0
    freedom: float = math.inf


@dataclass(frozen=True)
class PairedSample:
    """Verdicts of both models on the same documents, and which documents belong together.

    Attributes:
        strata: of each task, float64 [clusters, 4]: documents, right by the dense model, right by
            the pruned one, same verdict. Empty where every document stands alone.
        kind: what a cluster is, in the plural.
    """

    outcomes: Outcomes
    strata: tuple[FloatArray, ...] = ()
    kind: str = "documents"

    @property
    def units(self) -> int:
        """Clusters, or documents that stand alone."""
        return sum(map(len, self.strata)) if self.strata else self.outcomes.n

    def design(self, *, dense: float = 0.0, pruned: float = 0.0, same: float = 0.0) -> Design:
        """Design effect on the mean of ``dense * right + pruned * right now + same * agrees``.

        J. N. K. Rao and A. J. Scott, Biometrics 48 (1992) 577-585: the cluster-robust variance over
        that of as many documents that stand alone. The robust variance is CR2 and its degrees of
        freedom are Satterthwaite's, in closed form for a mean, within each stratum (R. M. Bell and
        D. F. McCaffrey, Survey Methodology 28 (2002) 169-181; J. E. Pustejovsky and E. Tipton,
        Journal of Business & Economic Statistics 36 (2018) 672-683). Half a document that stands
        alone is added to both variances: clusters in which nothing varies show no effect.

        These degrees of freedom take cluster sums for normal (G. W. Imbens and M. Kolesár, Review
        of Economics and Statistics 98 (2016) 701-712). A handful of clusters that lose answers
        together often shows no loss at all: with 5 clusters and an intraclass correlation of 0.3 an
        interval of 95 % covers 88 to 93 % where nearly all flips are losses; from 20 clusters on it
        covers 93 % or more (tests/benchmarks/coverage_of_intervals.py).
        """
        if not self.strata:
            return Design()
        weights = np.array([dense, pruned, same])
        values = np.array([dense + pruned + same, dense, pruned, same])
        counts = np.array(self.outcomes.counts)
        alone = float(counts @ values**2 - (counts @ values) ** 2 / self.outcomes.n)
        variances, unsure = 0.0, 0.0
        for table in self.strata:
            sizes, sums = table[:, 0], table[:, 1:] @ weights
            if len(sizes) == 1:
                continue  # says nothing of how clusters differ
            share = sizes / sizes.sum()
            deviations, pairs = sums - share * sums.sum(), share**2 / (1 - share)
            unsure_here = float((share**2).sum() + pairs.sum() ** 2 - (pairs**2).sum())
            variance = float((deviations**2 / (1 - share)).sum())
            variance += 0.5 * float(sizes.sum()) / self.outcomes.n
            variances += variance
            unsure += variance**2 * unsure_here
        return Design(variances / (alone + 0.5), variances**2 / unsure)


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

    b, c, flips = outcomes.right_to_wrong, outcomes.wrong_to_right, outcomes.flips
    if flips == 0:
        return 1.0
    tail = float(bdtr(min(b, c), flips, 0.5))
    ways = float(gammaln(flips + 1) - gammaln(b + 1) - gammaln(c + 1))
    here = math.exp(ways - flips * math.log(2))
    if b == c:
        return 1.0 - here / 2 if mid_p else 1.0
    return min(1.0, 2 * tail - (here if mid_p else 0.0))


def wilson(p: float, n: float, confidence: float, freedom: float = math.inf) -> tuple[float, float]:
    """Wilson's score interval of a share ``p``; n need not be whole (effective sample sizes)."""
    z2 = t_quantile(confidence, freedom) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if p <= 0 else max(0.0, centre - half)
    high = 1.0 if p >= 1 else min(1.0, centre + half)
    return low, high


def wilson_estimate(p: float, n: float, confidence: float, freedom: float = math.inf) -> Estimate:
    """A share with Wilson's interval."""
    low, high = wilson(p, n, confidence, freedom)
    return Estimate(value=p, low=low, high=high, method="Wilson")


def retention(
    samples: Sequence[PairedSample], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of mean pruned accuracy / mean dense accuracy; None if the latter is 0.

    The ratio's square-and-add (A. Donner and G. Y. Zou, Statistical Methods in Medical Research 21
    (2012) 347-359): those r for which the interval of p1 - r p2 contains 0. It adds the squares of
    the distances to Wilson's limits of both accuracies, at the effective number of documents, with
    the correlation of the verdicts; squares add up over independent tasks too. It does not collapse
    without flips and needs no pruned answer right.
    """
    count = len(samples)
    p1 = sum(sample.outcomes.pruned_accuracy for sample in samples) / count
    p2 = sum(sample.outcomes.dense_accuracy for sample in samples) / count
    if p2 == 0.0:
        return None
    products = np.array([p1 * p1, p1 * p2, p2 * p2])
    squares = sum(_ratio_squares(sample, p1 / p2, confidence) / count**2 for sample in samples)
    (c, b, a), (c_high, b_high, a_high) = (products - squares).tolist()
    c = max(0.0, c)
    root = math.sqrt(max(0.0, b * b - a * c))
    root_high = math.sqrt(max(0.0, b_high * b_high - a_high * c_high))
    return c / (b + root) if b + root > 0 else 0.0, (b_high + root_high) / a_high


def _ratio_squares(sample: PairedSample, ratio: float, confidence: float) -> FloatArray:
    """Squares and product, [2, 3], of the distances that bound a ratio: its lower end, its upper.

    x², phi x y and y²: the interval of p1 - r p2 reaches sqrt(x² - 2 r phi x y + r² y²). phi is the
    correlation of the verdicts; a positive numerator is reduced by n/2, not below 0 (Newcombe,
    Statistics in Medicine 17 (1998) 2635-2650, method 10).
    """
    outcomes = sample.outcomes
    design = sample.design(dense=-ratio, pruned=1.0)
    p1, p2 = outcomes.pruned_accuracy, outcomes.dense_accuracy
    (low1, high1), (low2, high2) = (
        wilson(p, outcomes.n / design.effect, confidence, design.freedom) for p in (p1, p2)
    )
    a, b, c, d = outcomes.counts
    margins, product = (a + b) * (c + d) * (a + c) * (b + d), float(a * d - b * c)
    if product > 0:
        product = max(0.0, product - design.effect * outcomes.n / 2)
    phi = product / math.sqrt(margins) if margins else 0.0
    ends = (p1 - low1, high2 - p2), (high1 - p1, p2 - low2)
    return np.array([(x * x, phi * x * y, y * y) for x, y in ends])
