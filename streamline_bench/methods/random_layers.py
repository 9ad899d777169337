"""Layers drawn at random go: the row that any other choice has to beat."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import BaseModel

from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan
from streamline_bench.methods.layer_scores import ProtectedEnds

__all__ = ["RandomLayers"]


class RandomLayers(Method):
    """Drop layers drawn with the recipe's seed; the ends may be protected."""

    name = "random_layers"
    parameters: ClassVar[type[BaseModel]] = ProtectedEnds
    calibrated = False

    def compress(self, work: Compression) -> Compressed:
        """Draw n layers without replacement and drop them."""
        options = ProtectedEnds.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        removed = random.Random(work.recipe.seed).sample(candidates, plan.n_layers)
        ends = options.protected(candidates, plan.num_layers)
        return drop_layers(work, removed, plan, chosen={"order": removed, "protected": ends})
