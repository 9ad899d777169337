"""How numbers are written."""

from __future__ import annotations

import pytest

from streamline_bench.report.text import (
    count,
    decimal,
    duration,
    interval,
    p_value,
    percent,
    points,
    rate,
    times,
    with_error,
)
from streamline_bench.stability.estimate import Estimate

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.8125), "81.2"),
        (percent(None), "\N{EN DASH}"),
        (points(-0.031), f"{MINUS}3.1"),
        (points(0.031), "+3.1"),
        (points(-0.0001), "0.0"),
        (p_value(0.0), "< 0.001"),
        (p_value(0.0123), "0.012"),
        (p_value(0.5), "0.50"),
        (p_value(1.0), "1.00"),
        (count(6_738_415_616), "6.74 B"),
        (count(2_400_000), "2.4 M"),
        (count(950), "950"),
        (duration(3.21), "3.2 s"),
        (duration(59), "59 s"),
        (duration(125), "2 min 05 s"),
        (duration(3725), "1 h 02 min"),
        (with_error(Estimate(value=0.5, standard_error=0.011)), "50.0 ± 1.1"),
        (with_error(Estimate(value=0.5)), "50.0"),
        (decimal(-0.0312), f"{MINUS}0.031"),
        (decimal(0.5, 2, signed=True), "+0.50"),
        (decimal(-0.0001), "0.000"),
        (decimal(None), "\N{EN DASH}"),
        (times(1.3125), "1.31\N{MULTIPLICATION SIGN}"),
        (times(None), "\N{EN DASH}"),
        (rate(1234.5), "1,234"),
        (rate(12.34), "12.3"),
        (rate(None), "\N{EN DASH}"),
        (interval(Estimate(value=0.2, low=0.1, high=0.25)), "[10.0, 25.0]"),
        (interval(Estimate(value=0.0, low=-0.1, high=0.02), signed=True), f"[{MINUS}10.0, +2.0]"),
        (interval(Estimate(value=0.2)), ""),
    ],
)
def test_written(written: str, expected: str) -> None:
    assert written == expected
