"""Removes layers at equal distances from each other."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.layer_removal import drop_layers, size_plan


class SpreadLayersParameters(Frozen):
    """Parameters of the method ``spread_layers``.

    Attributes:
        keep_first: number of first layers that are never removed.
    """

    keep_first: int = Field(1, ge=0)


class SpreadLayers(Method):
    """Remove layers at equal distances; no data is read and no model is built."""

    name = "spread_layers"
    api: ClassVar[int] = 1
    version: ClassVar[int] = 1
    parameters: ClassVar[type[BaseModel]] = SpreadLayersParameters
    calibrated = False

    def compress(self, work: Compression) -> Compressed:
        """Choose the layers and drop them."""
        options = SpreadLayersParameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        removed = spread(range(options.keep_first, plan.num_layers), plan.n_layers)
        return drop_layers(work, removed, plan, chosen={"order": removed})


def spread(candidates: range, n: int) -> list[int]:
    """Return ``n`` of the candidates, each in the middle of one of ``n`` equal parts.

    Raises:
        SparsityError: there are fewer candidates.
    """
    if n > len(candidates):
        raise SparsityError(
            f"{n} layers are to be removed and {len(candidates)} may be; lower the sparsity or "
            "parameters.keep_first."
        )
    return [candidates[(2 * part + 1) * len(candidates) // (2 * n)] for part in range(n)]
