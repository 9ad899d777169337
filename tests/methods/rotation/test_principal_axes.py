"""Principal axes equal the right singular vectors of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.rotation.principal_axes import Covariance, turned_at_random


def _rows(count: int = 200, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(3, 0.1, size, dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return torch.randn(count, size, generator=generator).double() * scales @ mixed + 0.3


def test_axes_are_the_right_singular_vectors() -> None:
    rows = _rows()
    covariance = Covariance(12)
    for part in rows.split(37):
        covariance.add(part)
    found = covariance.axes(0.01, "here")
    _, singular, right = np.linalg.svd(rows.numpy())
    np.testing.assert_allclose(found.energies, singular**2 / 200, rtol=1e-9)
    overlaps = np.abs(np.sum(right.T * found.axes.numpy(), axis=0))
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-9)
    torch.testing.assert_close(found.axes.T @ found.axes, torch.eye(12).double())
    assert found.energies.diff().max() <= 0
    assert found.kept(4) == pytest.approx((singular[:4] ** 2).sum() / (singular**2).sum())
    assert found.kept(12) == 1.0


def test_damping_moves_no_axis() -> None:
    axes = []
    for damping in (0.0, 0.5):
        covariance = Covariance(12)
        covariance.add(_rows())
        axes.append(covariance.axes(damping, "here").axes.abs())
    torch.testing.assert_close(axes[0], axes[1])


def test_dead_channels_come_last() -> None:
    rows = _rows()
    rows[:, 3] = 0
    covariance = Covariance(12)
    covariance.add(rows.float())
    found = covariance.axes(0.01, "here")
    assert float(found.axes[3, -1].abs()) == pytest.approx(1)
    assert float(found.energies[-1]) == pytest.approx(0, abs=1e-12)


def test_a_random_orientation_spans_the_same_space() -> None:
    covariance = Covariance(12)
    covariance.add(_rows())
    axes = covariance.axes(0.01, "here").axes
    turned = turned_at_random(axes, 5, seed=3)
    torch.testing.assert_close(turned.T @ turned, torch.eye(12).double())
    torch.testing.assert_close(turned[:, 5:], axes[:, 5:])
    torch.testing.assert_close(turned[:, :5] @ turned[:, :5].T, axes[:, :5] @ axes[:, :5].T)
    assert not torch.allclose(turned[:, :5], axes[:, :5])
    assert torch.equal(turned, turned_at_random(axes, 5, seed=3))
    assert not torch.allclose(turned, turned_at_random(axes, 5, seed=4))


def test_what_has_no_axes_is_refused() -> None:
    covariance = Covariance(12)
    covariance.add(_rows(11))
    with pytest.raises(CalibrationError, match=r"12 channels need at least 12 .* got 11"):
        covariance.axes(0.01, "here")
    covariance.add(torch.full((5, 12), float("nan")))
    with pytest.raises(NumericsError, match="signal behind layer 3 holds NaN"):
        covariance.axes(0.01, "behind layer 3")
    silent = Covariance(2)
    silent.add(torch.zeros(4, 2))
    with pytest.raises(NumericsError, match="zero on all 4 calibration tokens"):
        silent.axes(0.01, "here")
