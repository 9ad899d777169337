"""The last layers go, deepest first ("reverse order" of arXiv 2411.15558); nothing is looked at.

Without recovery this ruins a model, because the last layer maps to the output's basis; the paper
fine-tunes afterwards and a leaderboard shows both.
"""

from __future__ import annotations

from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan

__all__ = ["LastLayers"]


class LastLayers(Method):
    """Drop the deepest layers."""

    name = "last_layers"
    calibrated = False

    def compress(self, work: Compression) -> Compressed:
        """Drop the last n layers."""
        plan = size_plan(work)
        removed = list(range(plan.num_layers - 1, plan.num_layers - 1 - plan.n_layers, -1))
        return drop_layers(work, removed, plan, chosen={"order": removed})
