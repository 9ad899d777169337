"""Ridge regression across the cut (the closed form of Ghosted Layers, arXiv 2605.15491).

With X the stream before the removed block and Δ what the block added to it, the map is
``W = I + (XᵀX + λI)⁻¹ XᵀΔ``: shrinking towards the identity, which is plain removal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from streamline_bench.methods.maps.boundary_map import (
    AffineMap,
    BoundaryMap,
    BoundaryMapParameters,
    BoundaryRows,
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

    def fit(
        self, rows: Iterable[BoundaryRows], hidden: int, options: Any, device: str
    ) -> AffineMap:
        """Return W (and b).

        Raises:
            CalibrationError: there are fewer tokens than channels.
            NumericsError: XᵀX is singular in spite of the ridge.
        """
        sums = NormalEquations(hidden, device)
        for batch in rows:
            sums.add(batch.stream, widened(batch.target) - widened(batch.stream))
        change, bias = sums.solve(options.ridge), None
        if options.bias:
            change, bias = sums.solve_affine(options.ridge)
        identity = torch.eye(hidden, dtype=torch.float64)
        return AffineMap(identity + change.cpu(), bias if bias is None else bias.cpu())
