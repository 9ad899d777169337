"""The highest load at which an objective is kept, by a bracket that is halved."""

from __future__ import annotations

import math
from collections.abc import Callable

RESOLUTION = 0.05
"""The search ends when the lowest load that fails is so little above the highest that holds."""


def highest(
    holds: Callable[[float], bool],
    *,
    start: float,
    least: float,
    most: float,
    whole: bool,
    factor: float = 2.0,
) -> tuple[float, float | None]:
    """Return the highest load that holds, and the lowest one above it that does not.

    From ``start``, loads are multiplied or divided by ``factor`` until one holds and another does
    not; then the geometric middle is tried until both are as close as :data:`RESOLUTION`, or next
    to each other.

    Args:
        least, most: loads between which is searched.
        whole: loads are whole numbers.

    Returns:
        0 for a ``least`` that does not hold; None for a ``most`` that does.
    """

    def near(load: float) -> float:
        return float(round(load)) if whole else load

    good, bad = 0.0, math.inf
    load = near(min(max(start, least), most))
    while True:
        if holds(load):
            good = load
        else:
            bad = load
        if good >= most:
            return good, None
        if bad <= least:
            return 0.0, bad
        if math.isinf(bad):
            load = min(most, max(near(good * factor), good + whole))
        elif good == 0:
            load = max(least, min(near(bad / factor), bad - whole))
        elif bad - good <= max(float(whole), RESOLUTION * good):
            return good, bad
        else:
            middle = near(math.sqrt(good * bad))
            load = min(max(middle, good + 1), bad - 1) if whole else middle
