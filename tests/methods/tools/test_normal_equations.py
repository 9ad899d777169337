"""Sums of a stream of rows give the same maps and errors as all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from waits import Waits

from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.normal_equations import NormalEquations

D, N = 6, 40


def _rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) + 0.7
    z = x @ torch.randn(D, D, generator=generator, dtype=torch.float64) - 2.0
    return x, z + torch.randn(N, D, generator=generator, dtype=torch.float64)


def _sums(x: Tensor, z: Tensor) -> NormalEquations:
    sums = NormalEquations(x.shape[1])
    for start in range(0, len(x), 7):
        sums.add(x[start : start + 7], z[start : start + 7])
    return sums


def test_adding_rows_waits_for_nothing() -> None:
    x, z = _rows()
    sums = NormalEquations(D)
    with Waits() as waits:
        sums.add(x, z)
    assert waits.found == []


def test_least_squares() -> None:
    x, z = _rows()
    expected = torch.linalg.lstsq(x, z).solution
    torch.testing.assert_close(_sums(x, z).solve(), expected, rtol=1e-9, atol=1e-9)


def test_ridge_is_least_squares_with_rows_added() -> None:
    x, z = _rows()
    strength = 0.05 * x.square().sum() / D
    extra = strength.sqrt() * torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, extra]), torch.cat([z, 0 * extra])).solution
    torch.testing.assert_close(_sums(x, z).solve(0.05), expected, rtol=1e-9, atol=1e-9)


def test_affine_is_least_squares_with_a_column_of_ones() -> None:
    x, z = _rows()
    ones = torch.ones(N, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, ones], dim=1), z).solution
    weight, bias = _sums(x, z).solve_affine()
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=1e-8, atol=1e-8)


def test_diagonal_is_one_regression_per_channel() -> None:
    x, z = _rows()
    expected = torch.stack(
        [torch.linalg.lstsq(x[:, k : k + 1], z[:, k : k + 1]).solution[0, 0] for k in range(D)]
    )
    torch.testing.assert_close(_sums(x, z).solve_diagonal(), torch.diag(expected))


@pytest.mark.parametrize("with_bias", [False, True])
def test_error_of_any_map(with_bias: bool) -> None:
    x, z = _rows()
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(5)).double()
    bias = torch.arange(D).double() if with_bias else None
    direct = (x @ weight + (0 if bias is None else bias) - z).square().mean()
    assert _sums(x, z).mean_squared_error(weight, bias) == pytest.approx(float(direct), rel=1e-10)


def test_fewer_rows_than_channels_are_refused() -> None:
    x, z = _rows()
    with pytest.raises(CalibrationError, match=r"\b6\b.*\b5\b.*samples"):
        _sums(x[:5], z[:5]).solve(1e-6)


def test_a_singular_system_is_refused_without_a_ridge() -> None:
    x, z = _rows()
    x[:, 2] = 0
    sums = _sums(x, z)
    with pytest.raises(NumericsError, match="raise the ridge"):
        sums.solve()
    with pytest.raises(NumericsError, match=r"(?i)channel 2\b.*ridge"):
        sums.solve_diagonal()
    assert sums.solve(1e-6).isfinite().all()


def test_few_rows_per_channel_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, warned in ((32, False), (31, True)):
        sums = NormalEquations(8)
        sums.add(*torch.randn(2, rows, 8, generator=generator))
        caplog.clear()
        sums.solve(1e-6)
        assert ("fewer than 4 per channel" in caplog.text) == warned
