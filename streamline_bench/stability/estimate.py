"""A number with what is known of its error, and what becomes of both under a mean and under e^x."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamline_bench.core.recipe.schema import Frozen


class Estimate(Frozen):
    """A number with what is known of its error; ``method`` names the interval's."""

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    method: str | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the interval; the value twice where there is none."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high


def square_and_add(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates; distances to their intervals' ends add up by squares.

    G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008) 1693-1702. No interval where one of
    the estimates has none.
    """
    count = len(estimates)
    value = sum(item.value for item in estimates) / count
    below = [item.value - item.low for item in estimates if item.low is not None]
    above = [item.high - item.value for item in estimates if item.high is not None]
    if len(below) < count or len(above) < count:
        return Estimate(value=value)
    return Estimate(
        value=value,
        low=value - math.hypot(*below) / count,
        high=value + math.hypot(*above) / count,
        method="square-and-add over tasks",
    )


_LARGEST = 700.0  # e^709 is the largest float64


def exponential(value: float) -> float | None:
    """e^value; None where float64 does not hold it."""
    return math.exp(value) if value < _LARGEST else None


def exponentiated(log: Estimate) -> Estimate | None:
    """e to an estimate and to the ends of its interval; None where float64 does not hold it."""
    value = exponential(log.value)
    if value is None:
        return None
    if log.low is None or log.high is None or log.high >= _LARGEST:
        return Estimate(value=value)
    low, high = math.exp(log.low), math.exp(log.high)
    return Estimate(value=value, low=low, high=high, method=f"exp of: {log.method}")
