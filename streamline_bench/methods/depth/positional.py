"""Removal by position: the first, the last, or random layers."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import BaseModel

from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.layer_removal import ProtectedEnds, drop_layers, size_plan


class FirstLayers(Method):
    """Drop the shallowest layers."""

    name = "first_layers"
    streamed = True
    calibrated = False
    seeded = False

    def compress(self, work: Compression) -> Compressed:
        plan = size_plan(work)
        removed = list(range(plan.n_layers))
        return drop_layers(work, removed, plan, chosen={"order": removed})


class LastLayers(Method):
    """Drop the deepest layers."""

    name = "last_layers"
    streamed = True
    calibrated = False
    seeded = False

    def compress(self, work: Compression) -> Compressed:
        plan = size_plan(work)
        removed = list(range(plan.num_layers - 1, plan.num_layers - 1 - plan.n_layers, -1))
        return drop_layers(work, removed, plan, chosen={"order": removed})


class RandomLayers(Method):
    """Drop layers drawn with the recipe's seed; the ends may be protected."""

    name = "random_layers"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = ProtectedEnds
    calibrated = False

    def compress(self, work: Compression) -> Compressed:
        options = ProtectedEnds.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        removed = random.Random(work.recipe.seed).sample(candidates, plan.n_layers)
        ends = options.protected(candidates, plan.num_layers)
        return drop_layers(work, removed, plan, chosen={"order": removed, "protected": ends})
