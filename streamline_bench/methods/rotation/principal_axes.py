"""Principal axes of a signal: rows stream by, only their second moments are kept, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.normal_equations import widened

__all__ = ["Covariance", "PrincipalAxes", "require_tokens", "turned_at_random"]


@dataclass(frozen=True)
class PrincipalAxes:
    """An orthogonal basis, the axis of most energy first.

    Attributes:
        axes: float64 ``[d, d]``, one axis per column.
        energies: float64 ``[d]``, mean square of the signal along each axis, descending.
    """

    axes: Tensor
    energies: Tensor

    def kept(self, width: int) -> float:
        """Return the share of the signal's energy along the first ``width`` axes."""
        return float(self.energies[:width].sum() / self.energies.sum())


class Covariance:
    """``Σ xᵀx`` of rows ``[n, d]``; not centred (SliceGPT, arXiv 2401.15024, section 3.3).

    Attributes:
        num_rows: rows added so far.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = 0
        self._sum = widened(torch.zeros(size, size, device=device))

    def add(self, rows: Tensor) -> None:
        """Add rows ``[n, d]`` of any float dtype; leave pads out."""
        wide = widened(rows)
        self._sum.addmm_(wide.T, wide)
        self.num_rows += len(rows)

    def axes(self, damping: float, where: str) -> PrincipalAxes:
        """Return the principal axes.

        Args:
            damping: share of the mean of the diagonal that is added to it. It moves no axis and
                guards the solver where channels are dead.
            where: what the signal is, for messages.

        Raises:
            CalibrationError: there are fewer rows than axes.
            NumericsError: the signal has NaN or infinity, or is zero.
        """
        size = len(self._sum)
        require_tokens(self.num_rows, size)
        if not bool(self._sum.isfinite().all()):
            raise NumericsError(
                f"The signal {where} holds NaN or infinity, so that it has no principal axes; "
                "load the model in float32 or bfloat16 and check its weights."
            )
        level = self._sum.diagonal().mean()
        if float(level) == 0.0:
            raise NumericsError(
                f"The signal {where} is zero on all {self.num_rows} calibration tokens; check the "
                "model's weights."
            )
        shift = damping * level
        damped = self._sum + shift * torch.eye(size).to(self._sum)
        energies, axes = torch.linalg.eigh(damped)
        energies = (energies - shift).clamp_min(0) / self.num_rows
        return PrincipalAxes(axes.flip(1), energies.flip(0))


def require_tokens(tokens: int, size: int) -> None:
    """Refuse to look for ``size`` principal axes in fewer tokens.

    Raises:
        CalibrationError: there are fewer tokens than axes.
    """
    if tokens < size:
        raise CalibrationError(
            f"The principal axes of {size} channels need at least {size} calibration tokens and "
            f"got {tokens}; give more samples or longer ones."
        )


def turned_at_random(axes: Tensor, width: int, seed: int) -> Tensor:
    """Return ``axes`` with the first ``width`` columns turned at random among themselves.

    They span the same space; energy is then spread evenly, which helps quantisation.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(gaussian)
    basis = basis * upper.diagonal().sign()  # without it QR's choice of signs is no uniform one
    turned = axes.clone()
    turned[:, :width] = axes[:, :width] @ basis.to(axes)
    return turned
