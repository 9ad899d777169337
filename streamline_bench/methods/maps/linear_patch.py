"""LinearPatch (arXiv 2505.24680): rescale channels across the cut, in a rotated basis.

Removing a block leaves channels of the stream with another magnitude than what follows expects.
``P = H diag(d) Hᵀ`` corrects it, with H a normalised Hadamard matrix that spreads outliers over all
channels, and ``d_k = mean |h_{s+n} H|_k / mean |h_s H|_k`` over the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from streamline_bench.errors import NumericsError
from streamline_bench.methods.maps.boundary_activations import BoundaryRows
from streamline_bench.methods.maps.boundary_map import AffineMap, BoundaryMap
from streamline_bench.methods.maps.hadamard import hadamard
from streamline_bench.methods.tools.normal_equations import widened

__all__ = ["LinearPatch"]


class LinearPatch(BoundaryMap):
    """A symmetric map that matches channel magnitudes across the removed block."""

    name = "linear_patch"

    def prepare(self, hidden: int) -> None:
        """Refuse hidden sizes without a known Hadamard matrix."""
        hadamard(hidden)

    def fit(
        self, rows: Iterable[BoundaryRows], hidden: int, options: Any, device: str
    ) -> AffineMap:
        """Return P, from sums of magnitudes in the rotated basis.

        Raises:
            NumericsError: a rotated channel of the stream is zero on all tokens.
        """
        rotation = hadamard(hidden)
        before = widened(torch.zeros(hidden, device=device))
        behind = torch.zeros_like(before)
        h = rotation.to(before.device)
        for batch in rows:
            before += (widened(batch.stream) @ h).abs().sum(0)
            behind += (widened(batch.target) @ h).abs().sum(0)
        if not bool((before > 0).all()):
            raise NumericsError(
                f"Rotated channel {int(before.argmin())} is zero on all calibration tokens, so "
                "that its scale is undefined; check the model's embeddings."
            )
        scale = (behind / before).cpu()
        facts = {"scale": {"min": float(scale.min()), "mean": float(scale.mean()),
                           "max": float(scale.max())}}  # fmt: skip
        return AffineMap(rotation @ torch.diag(scale) @ rotation.T, facts=facts)
