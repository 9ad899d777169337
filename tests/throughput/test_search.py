"""The search finds what trying every load would find, with few tries."""

from __future__ import annotations

import pytest

from streamline_bench.throughput.search import RESOLUTION, highest


@pytest.mark.parametrize("start", [1, 40, 200])
@pytest.mark.parametrize("most", [1, 7, 256])
def test_whole_numbers(start: int, most: int) -> None:
    for limit in range(most + 3):
        tried: list[float] = []

        def holds(load: float, limit: int = limit, tried: list[float] = tried) -> bool:
            tried.append(load)
            return load <= limit

        found, above = highest(holds, start=start, least=1, most=most, whole=True)
        expected = min(limit, most)
        assert found <= expected and all(load == int(load) for load in tried)
        assert expected - found <= max(0, RESOLUTION * found), "or nothing in between was left"
        assert above is None if limit >= most else above is not None and above > limit
        assert len(tried) == len(set(tried)) <= 16


@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_rates(factor: float) -> None:
    for limit in (0.2, 0.9, 3.3, 170.0):
        found, above = highest(
            lambda load, limit=limit: load <= limit,
            start=1.0, least=0.125, most=4096.0, whole=False, factor=factor,
        )  # fmt: skip
        assert above is not None and found <= limit < above <= found * (1 + RESOLUTION) + 1e-9


def test_nothing_holds_and_everything_holds() -> None:
    how = {"start": 4.0, "least": 0.5, "most": 64.0, "whole": False}
    assert highest(lambda load: False, **how) == (0.0, 0.5)  # type: ignore[arg-type]
    assert highest(lambda load: True, **how) == (64.0, None)  # type: ignore[arg-type]
