"""McNemar's test when documents come in clusters."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from streamline_bench.stability.paired import MID_P_BELOW

__all__ = ["clustered_test", "sign_flip"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_EXACT_UP_TO = 4000  # net flips; beyond, the normal limit of the same test


def sign_flip(net: IntArray, *, mid_p: bool = False) -> float:
    """Two-sided McNemar test whose unit is the cluster: might each have gone the other way?

    Under the hypothesis of no difference, the net change of a cluster (gained - lost) is as likely
    as its opposite. The p-value is the share of all sign changes whose total is at least as far
    from 0 as the one seen. With one document per cluster this is the exact McNemar test; its normal
    limit, used beyond 4000 net flips, is the clustered test of Durkalski et al. (Statistics in
    Medicine 22 (2003) 2417-2428).

    Args:
        net: int64 [clusters].
        mid_p: count totals as far as the one seen by half.
    """
    size = np.abs(net[net != 0])
    if size.size == 0:
        return 1.0
    seen, total = abs(int(net.sum())), int(size.sum())
    if total > _EXACT_UP_TO:
        return math.erfc(seen / math.sqrt(2 * float(np.square(size).sum())))
    # The total is 2 t - sum(size), t being the sum of the sizes with positive sign.
    chance = np.ones(1)
    for value, times in zip(*np.unique(size, return_counts=True), strict=True):
        step = np.zeros(int(value * times) + 1)
        step[:: int(value)] = _coin(int(times))
        chance = np.convolve(chance, step)
    distance = np.abs(2 * np.arange(total + 1) - total)
    tail = float(chance[distance > seen].sum())
    here = float(chance[distance == seen].sum())
    return min(1.0, tail + (here / 2 if mid_p else here))


def _coin(times: int) -> FloatArray:
    """Chances of 0..times heads of a fair coin."""
    from scipy.special import gammaln

    heads = np.arange(times + 1)
    ways = gammaln(times + 1) - gammaln(heads + 1) - gammaln(times - heads + 1)
    chances: FloatArray = np.exp(ways - times * math.log(2))
    return chances


def clustered_test(net: IntArray, kind: str) -> tuple[float, str]:
    """:func:`sign_flip`, with mid-p where few clusters changed, and its name."""
    few = int((net != 0).sum()) < MID_P_BELOW
    return sign_flip(net, mid_p=few), f"McNemar over {kind}, {'mid-p' if few else 'exact'}"
