"""Expected calibration error against a loop over bins."""

from __future__ import annotations

import numpy as np
import pytest

from streamline_bench.stability.statistics.choices import (
    ChoiceMeasures,
    calibration,
    calibration_error,
)


def by_loop(shares: np.ndarray, right: np.ndarray, bins: int) -> float:
    pairs = sorted(zip(shares.tolist(), right.tolist(), strict=True), key=lambda pair: pair[0])
    n, total = len(pairs), 0.0
    for index in range(bins):
        part = pairs[index * n // bins : (index + 1) * n // bins]
        confidence = sum(share for share, _ in part) / len(part)
        accuracy = sum(hit for _, hit in part) / len(part)
        total += len(part) / n * abs(accuracy - confidence)
    return total


def test_order_of_documents_with_equal_shares_does_not_matter() -> None:
    shares, right = np.full(300, 0.5), np.repeat([0.0, 1.0], [140, 160])
    assert calibration_error(shares, right, 15) == pytest.approx(160 / 300 - 0.5)
    alternating = np.tile([0.0, 1.0], 150)
    assert calibration_error(shares, alternating, 15) == pytest.approx(0.0)
    source = np.random.default_rng(3)
    shares = np.round(source.random(400), 1)
    right = (source.random(400) < shares).astype(float)
    found = calibration_error(shares, right, 15)
    for _ in range(5):
        order = source.permutation(400)
        assert calibration_error(shares[order], right[order], 15) == pytest.approx(found)
    # Eleven shares, some forty documents each, and bins of 27: every share is a bin of its own.
    alone = [abs((right - shares)[shares == share].sum()) for share in np.unique(shares)]
    assert found == pytest.approx(sum(alone) / 400)


@pytest.mark.parametrize(("n", "bins"), [(1, 1), (7, 3), (400, 15), (401, 15)])
def test_error_is_that_of_a_loop(n: int, bins: int) -> None:
    source = np.random.default_rng(n)
    shares = source.random(n)
    right = (source.random(n) < 0.5).astype(float)
    assert calibration_error(shares, right, bins) == pytest.approx(by_loop(shares, right, bins))


def test_a_calibrated_model_has_little_and_a_boaster_much() -> None:
    source = np.random.default_rng(0)
    shares = source.uniform(0.25, 1, size=20_000)
    right = (source.random(20_000) < shares).astype(float)
    assert calibration_error(shares, right, 15) < 0.02
    assert calibration_error(np.full(20_000, 0.99), right, 15) == pytest.approx(
        0.99 - right.mean(), abs=0.01
    )


def test_bins_hold_twenty_documents() -> None:
    expected = {1: 1, 19: 1, 39: 1, 40: 2, 299: 14, 300: 15, 10**5: 15}
    for n, bins in expected.items():
        found = calibration(ChoiceMeasures(*[np.full(n, 0.5)] * 11), 0.95)
        assert found is not None and (found.n, found.bins) == (n, bins)
