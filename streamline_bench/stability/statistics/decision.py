"""From numbers to a decision: Holm over tasks, non-inferiority, and what could have been found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.comparison import Decision, Estimate
from streamline_bench.stability.statistics.means import t_quantile
from streamline_bench.stability.statistics.paired import MID_P_BELOW, Outcomes, mcnemar, newcombe_at

__all__ = [
    "POWER",
    "decide",
    "detectable_at",
    "detectable_difference",
    "holm",
    "noninferiority",
    "noninferiority_from_draws",
]

POWER = 0.8
_MOST_ERRORS = 40.0  # standard errors; the normal tail beyond is 0 in float64

FloatArray = npt.NDArray[np.float64]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false alarm stays below the level.

    S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Needs no independence of the tests.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def noninferiority(outcomes: Outcomes, margin: float) -> float:
    """One-sided p of the hypothesis that accuracy fell by ``margin`` or more.

    Newcombe's interval inverted: below (1 - confidence) / 2 exactly where the interval's lower end
    is above -margin.
    """
    end = 0 if -margin < outcomes.difference else 1

    def beyond(z: float) -> bool:
        return (newcombe_at(outcomes, z)[end] + margin) * (1 - 2 * end) > 0

    low, high = 0.0, _MOST_ERRORS
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) else (low, middle)
    p = math.erfc(low / math.sqrt(2)) / 2
    return p if end == 0 else 1.0 - p


def noninferiority_from_draws(draws: FloatArray, margin: float) -> float:
    """The same of resampled differences [draws]: the share at or below -margin."""
    return float((1 + (draws <= -margin).sum()) / (1 + len(draws)))


def detectable_difference(outcomes: Outcomes, confidence: float) -> float | None:
    """Smallest true difference of accuracy that McNemar's test would find with 80 % power.

    At n pairs of which a share s is discordant, a difference d is found with that power from
    n = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2 pairs on (R. J. Connor, Biometrics 43 (1987)
    207-211). s is the share seen, (discordant + 1/2) / (n + 1), but at least d: a difference needs
    that many discordant pairs. Below :data:`MID_P_BELOW` pairs, where that is far off, the power is
    that of the mid-p test itself, summed over every outcome.

    Returns:
        In (0, 1]; None where n is too small to find any difference.
    """
    n = outcomes.n
    seen = (outcomes.right_to_wrong + outcomes.wrong_to_right + 0.5) / (outcomes.n + 1)
    z_level, z_power = NormalDist().inv_cdf(0.5 + confidence / 2), NormalDist().inv_cdf(POWER)
    rejected = _rejected(n, 1 - confidence) if n < MID_P_BELOW else None

    def found(difference: float) -> bool:
        share = max(seen, difference)
        if rejected is not None:
            return _power(n, share, difference, rejected) >= POWER
        root = z_level * math.sqrt(share) + z_power * math.sqrt(share - difference**2)
        return n * difference**2 >= root**2

    if not found(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _rejected(n: int, level: float) -> list[tuple[int, int]]:
    """Answers lost and gained, of at most n, at which the mid-p test finds a difference."""
    return [
        (lost, pairs - lost)
        for pairs in range(1, n + 1)
        for lost in range(pairs + 1)
        if mcnemar(Outcomes(0, lost, pairs - lost, 0), mid_p=True) < level
    ]


def _power(n: int, share: float, difference: float, rejected: list[tuple[int, int]]) -> float:
    """Chance of these outcomes where a ``share`` of n pairs is discordant."""
    more, less = (share + difference) / 2, (share - difference) / 2
    return sum(
        math.comb(n, lost) * math.comb(n - lost, gained)
        * more**lost * less**gained * (1 - share) ** (n - lost - gained)
        for lost, gained in rejected
    )  # fmt: skip


def detectable_at(error: float, confidence: float, freedom: int | None = None) -> float | None:
    """The same from the standard error of a difference; None if it is more than 1.

    Args:
        freedom: degrees of freedom of the error; None for the normal limit.
    """
    if freedom is None:
        normal = NormalDist()
        quantiles = normal.inv_cdf(0.5 + confidence / 2) + normal.inv_cdf(POWER)
    else:
        quantiles = t_quantile(confidence, freedom) + t_quantile(2 * POWER - 1, freedom)
    return quantiles * error if quantiles * error <= 1 else None


def decide(difference: Estimate, margin: float, *, significant: bool) -> Decision:
    """See :data:`streamline_bench.stability.comparison.Decision`."""
    if significant and difference.value > 0:
        return "better"
    if difference.low is not None and difference.low > -margin:
        return "no worse than margin"
    return "worse" if significant and difference.value < 0 else "cannot tell"
