"""LinearPatch (arXiv 2505.24680): rescale channels across the cut, in a rotated basis.

Removing a block leaves channels of the stream with another magnitude than what follows expects.
``P = H diag(d) Hᵀ`` corrects it, with H a normalised Hadamard matrix that spreads outliers over all
channels, and ``d_k = mean |h_{s+n} H|_k / mean |h_s H|_k`` over the calibration tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamline_bench.errors import ArchitectureError, NumericsError
from streamline_bench.methods.maps.boundary_map import AffineMap, BoundaryMap, MapFit
from streamline_bench.methods.tools.normal_equations import widened


class LinearPatch(BoundaryMap):
    """A symmetric map that matches channel magnitudes across the removed block."""

    name = "linear_patch"
    streamed = True

    def prepare(self, hidden: int) -> None:
        """Refuse hidden sizes without a known Hadamard matrix."""
        hadamard(hidden)

    def fit(self, hidden: int, options: Any, device: str) -> MapFit:
        return _Magnitudes(hidden, device)


class _Magnitudes(MapFit):
    """Sums of magnitudes in the rotated basis."""

    def __init__(self, hidden: int, device: str) -> None:
        self._rotation = hadamard(hidden)
        self._before = widened(torch.zeros(hidden, device=device))
        self._behind = torch.zeros_like(self._before)
        self._h = self._rotation.to(self._before.device)

    def add(self, stream: Tensor, target: Tensor) -> None:
        self._before += (widened(stream) @ self._h).abs().sum(0)
        self._behind += (widened(target) @ self._h).abs().sum(0)

    def solve(self) -> AffineMap:
        """Return P.

        Raises:
            NumericsError: a rotated channel of the stream is zero on all tokens.
        """
        if not bool((self._before > 0).all()):
            raise NumericsError(
                f"Rotated channel {int(self._before.argmin())} is zero on all calibration tokens, "
                "so that its scale is undefined; check the model's embeddings."
            )
        scale, rotation = (self._behind / self._before).cpu(), self._rotation
        facts = {"scale": {"min": float(scale.min()), "mean": float(scale.mean()),
                           "max": float(scale.max())}}  # fmt: skip
        return AffineMap(rotation @ torch.diag(scale) @ rotation.T, facts=facts)


def hadamard(order: int) -> Tensor:
    """Return an orthogonal ``[order, order]`` float64 matrix with entries ``± order^-1/2``.

    Raises:
        ArchitectureError: none of that order is constructed here (it must be 1, 2 or a multiple of
            4 of the form above).
    """
    base = order
    while base % 2 == 0:
        base //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    if base != 1:
        while base <= order and (found := _paley(base)) is None:
            base *= 2
        if base > order or found is None:
            raise ArchitectureError(
                f"No Hadamard matrix of order {order} can be constructed here (hidden size "
                f"{order}); use ridge_map, which needs none."
            )
        matrix = found
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(step, matrix)
    normalised: Tensor = matrix / order**0.5
    return normalised


def _paley(order: int) -> Tensor | None:
    if order % 4:
        return None
    if _is_prime(order - 1):  # then it is 3 modulo 4: the first construction
        core = _bordered(order - 1, below=-1.0)
        first: Tensor = core + torch.eye(order, dtype=torch.float64)
        return first
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):  # the second construction, on a symmetric conference matrix
        core = _bordered(q, below=1.0)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)
    return None


def _bordered(q: int, below: float) -> Tensor:
    """Return the ``[q + 1, q + 1]`` conference matrix over the residues modulo a prime q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = below
    core[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return core


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))
