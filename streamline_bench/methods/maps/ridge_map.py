"""Ridge regression across the cut (the closed form of Ghosted Layers, arXiv 2605.15491).

With X the stream before the removed block and Δ what the block added to it, the map is
``W = I + (XᵀX + λI)⁻¹ XᵀΔ``: shrinking towards the identity, which is plain removal.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.methods.maps.boundary_map import (
    AffineMap,
    BoundaryMap,
    BoundaryMapParameters,
    MapFit,
)
from streamline_bench.methods.tools.normal_equations import NormalEquations, widened


class RidgeMapParameters(BoundaryMapParameters):
    """Parameters of the method ``ridge_map``.

    Attributes:
        ridge: λ as a share of the mean diagonal of ``XᵀX``.
        bias: also fit a shift, with rows centred.
    """

    ridge: float = Field(1e-6, ge=0)
    bias: bool = False


class RidgeMap(BoundaryMap):
    """An unconstrained linear map of the stream, fitted in closed form."""

    name = "ridge_map"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = RidgeMapParameters

    def fit(self, hidden: int, options: Any, device: str) -> MapFit:
        return _Changes(hidden, options, device)


class _Changes(MapFit):
    """The regression of what a cut added to the stream, on the stream."""

    def __init__(self, hidden: int, options: RidgeMapParameters, device: str) -> None:
        self._hidden, self._options = hidden, options
        self._sums = NormalEquations(hidden, device)

    def add(self, stream: Tensor, target: Tensor) -> None:
        self._sums.add(stream, widened(target) - widened(stream))

    def solve(self) -> AffineMap:
        """Return W (and b).

        Raises:
            CalibrationError: there are fewer tokens than channels.
            NumericsError: XᵀX is singular in spite of the ridge.
        """
        ridge = self._options.ridge
        if self._options.bias:
            change, bias = self._sums.solve_affine(ridge)
        else:
            change, bias = self._sums.solve(ridge), None
        identity = torch.eye(self._hidden, dtype=torch.float64)
        return AffineMap(identity + change.cpu(), bias if bias is None else bias.cpu())
