"""McNemar's test when documents come in clusters."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.statistics.paired import MID_P_BELOW

__all__ = ["clustered_test", "sign_flip"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_ALL_SIGNS_UP_TO = 20  # clusters: a million sign changes are tried one by one
_MOST_STEPS = 10**8  # additions for the chance of every total; some tenths of a second


def sign_flip(net: IntArray, *, mid_p: bool = False) -> float:
    """Two-sided McNemar test whose unit is the cluster: might each have gone the other way?

    Under the hypothesis of no difference, the net change of a cluster (gained - lost) is as likely
    as its opposite. The p-value is the share of all sign changes whose total is at least as far
    from 0 as the one seen. With one document per cluster this is the exact McNemar test. Only where
    many clusters make that too much work (:func:`_exact`), its normal limit is used, the clustered
    test of Durkalski et al. (Statistics in Medicine 22 (2003) 2417-2428).

    Args:
        net: int64 [clusters].
        mid_p: count totals as far as the one seen by half.
    """
    size = np.abs(net[net != 0])
    if size.size == 0:
        return 1.0
    seen = abs(int(net.sum()))
    if not _exact(size):
        return math.erfc(seen / math.sqrt(2 * float(np.square(size.astype(np.float64)).sum())))
    if size.size <= _ALL_SIGNS_UP_TO:
        distance = _every_distance(size)
        tail = float((distance > seen).mean())
        here = float((distance == seen).mean())
    else:
        chance = _chances(size)
        distance = np.abs(2 * np.arange(len(chance)) - int(size.sum()))
        tail = float(chance[distance > seen].sum())
        here = float(chance[distance == seen].sum())
    return min(1.0, tail + (here / 2 if mid_p else here))


def _exact(size: IntArray) -> bool:
    """Whether every sign change is counted."""
    if size.size <= _ALL_SIGNS_UP_TO:
        return True
    _, times = np.unique(size, return_counts=True)
    return int(size.sum()) * int((times + 1).sum()) <= _MOST_STEPS


def _every_distance(size: IntArray) -> IntArray:
    """|total| under every change of signs, int64 [2 ** clusters]."""
    totals = np.zeros(1, dtype=np.int64)
    for value in size:
        totals = np.concatenate([totals - value, totals + value])
    return np.abs(totals)


def _chances(size: IntArray) -> FloatArray:
    """Chance of every sum of sizes with positive sign, float64 [sum of sizes + 1].

    The total is twice that sum - the sum of all sizes.
    """
    chance = np.ones(1)
    for value, times in zip(*np.unique(size, return_counts=True), strict=True):
        step, coin = int(value), _coin(int(times))
        longer = np.zeros(len(chance) + step * int(times))
        if len(chance) < len(coin):  # the shorter loop
            for place, share in enumerate(chance):
                longer[place : place + step * int(times) + 1 : step] += share * coin
        else:
            for heads, share in enumerate(coin):
                longer[step * heads : step * heads + len(chance)] += share * chance
        chance = longer
    return chance


def _coin(times: int) -> FloatArray:
    """Chances of 0..times heads of a fair coin."""
    from scipy.special import gammaln

    heads = np.arange(times + 1)
    ways = gammaln(times + 1) - gammaln(heads + 1) - gammaln(times - heads + 1)
    chances: FloatArray = np.exp(ways - times * math.log(2))
    return chances


def clustered_test(net: IntArray, kind: str) -> tuple[float, str]:
    """:func:`sign_flip`, with mid-p where few clusters changed, and its name."""
    size = np.abs(net[net != 0])
    few = len(size) < MID_P_BELOW
    method = "mid-p" if few else "exact"
    return sign_flip(net, mid_p=few), f"McNemar over {kind}, {method if _exact(size) else 'normal'}"
