"""The first layers go: a row that shows what choosing badly costs."""

from __future__ import annotations

from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan

__all__ = ["FirstLayers"]


class FirstLayers(Method):
    """Drop the shallowest layers."""

    name = "first_layers"
    calibrated = False

    def compress(self, work: Compression) -> Compressed:
        """Drop the first n layers."""
        plan = size_plan(work)
        removed = list(range(plan.n_layers))
        return drop_layers(work, removed, plan, chosen={"order": removed})
