"""Removal by position: the first, the last, random, or named layers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.surgery import SizePlan, block_keep
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression, Size
from streamline_bench.methods.tools.selection import (
    LayerSelection,
    ProtectedEnds,
    Selected,
    cuts_of,
)


class FirstLayers(LayerSelection):
    """Drop the shallowest layers."""

    name = "first_layers"
    streamed = True
    calibrated = False
    seeded = False

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        removed = list(range(plan.n_layers))
        return Selected(removed, {"order": removed})


class LastLayers(LayerSelection):
    """Drop the deepest layers."""

    name = "last_layers"
    streamed = True
    calibrated = False
    seeded = False

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        removed = list(range(plan.num_layers - 1, plan.num_layers - 1 - plan.n_layers, -1))
        return Selected(removed, {"order": removed})


class RandomLayers(LayerSelection):
    """Drop layers drawn with the recipe's seed; the ends may be protected."""

    name = "random_layers"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = ProtectedEnds
    calibrated = False

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        removed = random.Random(work.recipe.seed).sample(candidates, plan.n_layers)
        ends = options.protected(candidates, plan.num_layers)
        return Selected(removed, {"order": removed, "protected": ends})


class GivenLayersParameters(Frozen):
    """Parameters of the method ``given_layers``.

    Attributes:
        layers: indices of the layers to remove.
    """

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)


def _change(difference: int) -> str:
    return f"{'raise' if difference > 0 else 'lower'} n_layers by {abs(difference)}"


class GivenLayers(LayerSelection):
    """Drop the layers that the recipe lists."""

    name = "given_layers"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = GivenLayersParameters
    calibrated = False
    seeded = False

    def cuts(self, options: Any) -> int:
        """The runs of neighbours among the listed layers."""
        return len(cuts_of(options.layers))

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield the one size that the list is."""
        listed = set(GivenLayersParameters.model_validate(work.recipe.parameters).layers)
        yield from (size for size in super().sizes(work) if size.given["n_layers"] == len(listed))

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Return them.

        Raises:
            SparsityError: one is outside the model, or they are not as many as the recipe removes.
        """
        removed = sorted(set(options.layers))
        for layer in removed:
            block_keep(plan.num_layers, layer, 1)
        if len(removed) != plan.n_layers:
            raise SparsityError(
                f"The recipe lists {len(removed)} layers ({', '.join(map(str, removed))}), and "
                f"{plan.n_layers} are to go; {_change(len(removed) - plan.n_layers)}, or list as "
                "many."
            )
        return Selected(removed, {"order": removed})
