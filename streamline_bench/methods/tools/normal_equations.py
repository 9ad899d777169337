"""Least squares from sums: rows stream by, only two ``[d, d]`` matrices are kept, in float64.

The sums also give the mean squared error of *any* affine map on the rows that went into them, so
that held-out tokens need one pass and no stored activations.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from streamline_bench.errors import CalibrationError, NumericsError

log = logging.getLogger(__name__)

_ROWS_PER_CHANNEL = 4

WIDENED_ROWS = 1 << 12
"""Rows of a weight that are held in float64 at a time: tables of words are large."""


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its device; on the CPU for MPS, which has no float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def warn_of_few_rows(rows: int, size: int) -> None:
    """Say that a ``[size, size]`` map from so few rows is close to interpolating them."""
    if rows < _ROWS_PER_CHANNEL * size:
        log.warning(
            "A map of %d channels is fitted on %d tokens, fewer than %d per channel: it follows "
            "these tokens more than the model; give more samples or longer ones.",
            size,
            rows,
            _ROWS_PER_CHANNEL,
        )


class NormalEquations:
    """Sums over rows ``x, z`` of ``[n, d]`` that decide ``min |x A - z|²``.

    Attributes:
        num_rows: rows added so far.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = 0
        self._size = size
        self._xx = widened(torch.zeros(size, size, device=device))
        self._xz = torch.zeros_like(self._xx)
        self._x = torch.zeros_like(self._xx[0])
        self._z = torch.zeros_like(self._x)
        self._zz = torch.zeros_like(self._x[0])

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add rows: inputs ``[n, d]`` and targets ``[n, d]``, any float dtype.

        An accelerator is not waited for.
        """
        x, z = widened(x), widened(z)
        self._xx.addmm_(x.T, x)
        self._xz.addmm_(x.T, z)
        self._x += x.sum(0)
        self._z += z.sum(0)
        self._zz += z.square().sum()
        self.num_rows += len(x)

    def solve(self, ridge: float = 0.0) -> Tensor:
        """Return ``A = (XᵀX + λI)⁻¹ XᵀZ``, float64 ``[d, d]``, by Cholesky.

        Args:
            ridge: λ as a share of the mean of XᵀX's diagonal, so that it has no unit.

        Raises:
            CalibrationError: there are fewer rows than unknowns per column.
            NumericsError: XᵀX is singular in spite of the ridge.
        """
        return self._cholesky_solve(self._xx, self._xz, ridge)

    def solve_affine(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return ``(A, b)`` of ``z ≈ x A + b``; the ridge is on A only, of the centred rows.

        Raises:
            CalibrationError, NumericsError: see :meth:`solve`.
        """
        count = max(self.num_rows, 1)
        centred_xx = self._xx - torch.outer(self._x, self._x) / count
        centred_xz = self._xz - torch.outer(self._x, self._z) / count
        weight = self._cholesky_solve(centred_xx, centred_xz, ridge)
        return weight, (self._z - self._x @ weight) / count

    def solve_diagonal(self, ridge: float = 0.0) -> Tensor:
        """Return the best diagonal map as a float64 ``[d, d]`` matrix: ``Σxz / (Σx² + λ)``.

        Raises:
            NumericsError: an input channel is zero on every row and there is no ridge.
        """
        squares = self._xx.diagonal()
        damped = squares + ridge * squares.mean()
        if not bool((damped > 0).all()):
            channel = int(damped.argmin())
            raise NumericsError(
                f"Channel {channel} is zero on all {self.num_rows} calibration tokens, so that its "
                "scale is undefined; give a ridge above 0."
            )
        return torch.diag(self._xz.diagonal() / damped)

    def mean_squared_error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Return the mean over rows and channels of ``(x A + b - z)²``."""
        a = weight.to(self._xx)
        b = torch.zeros_like(self._x) if bias is None else bias.to(self._x)
        total = (a * (self._xx @ a)).sum() - 2 * (a * self._xz).sum() + self._zz
        total += self.num_rows * b @ b + 2 * b @ (self._x @ a - self._z)
        # Cancellation of large sums may leave a tiny negative number for a perfect fit.
        return max(float(total), 0.0) / (self.num_rows * self._size)

    def errors(self, weight: Tensor, bias: Tensor | None = None) -> dict[str, float]:
        """Return the mean squared error without a map (``none``) and with it (``mapped``)."""
        identity = torch.eye(self._size, dtype=torch.float64)
        return {
            "none": self.mean_squared_error(identity),
            "mapped": self.mean_squared_error(weight, bias),
        }

    def _cholesky_solve(self, left: Tensor, right: Tensor, ridge: float) -> Tensor:
        if self.num_rows < self._size:
            raise CalibrationError(
                f"A map of {self._size} channels needs at least {self._size} calibration tokens to "
                f"be determined and got {self.num_rows}; give more samples or longer ones."
            )
        warn_of_few_rows(self.num_rows, self._size)
        damped = left + ridge * left.diagonal().mean() * torch.eye(self._size).to(left)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) != 0 or not bool(factor.isfinite().all()):
            raise NumericsError(
                f"The covariance of {self.num_rows} calibration tokens is singular at ridge "
                f"{ridge:g}; raise the ridge or give more varied text."
            )
        return torch.cholesky_solve(right, factor)
