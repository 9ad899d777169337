"""From one score per layer to the layers that go: what all one-shot rankings share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from streamline_bench.errors import NumericsError, SparsityError

__all__ = ["ProtectedEnds", "record", "select_lowest"]


class ProtectedEnds(BaseModel):
    """Parameters of methods that leave the ends of the model alone.

    Attributes:
        protect_first: the first so many layers are never removed.
        protect_last: the last so many layers are never removed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(0, ge=0)

    def candidates(self, num_layers: int, n: int) -> range:
        """Return the layers that may be removed.

        Raises:
            SparsityError: they are fewer than the ``n`` that are to go.
        """
        allowed = range(self.protect_first, num_layers - self.protect_last)
        if len(allowed) < n:
            raise SparsityError(
                f"{n} of {num_layers} layers are to be removed, and with protect_first="
                f"{self.protect_first} and protect_last={self.protect_last} only {len(allowed)} "
                "may be; protect fewer layers or remove fewer."
            )
        return allowed


def select_lowest(scores: Mapping[int, float], n: int) -> list[int]:
    """Return the ``n`` layers of lowest score, lowest first; of equals the shallower first.

    Raises:
        NumericsError: a score is NaN or infinite; the layer is named.
        SparsityError: there are fewer than ``n`` layers.
    """
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise NumericsError(
                f"The score of layer {layer} is {score}; check the weights, or try another dtype."
            )
    if n > len(scores):
        raise SparsityError(f"Cannot remove {n} of {len(scores)} scored layers; remove fewer.")
    return sorted(scores, key=lambda layer: (scores[layer], layer))[:n]


def record(scores: Mapping[int, float], removed: list[int], what: str) -> dict[str, Any]:
    """Return what a manifest tells of a ranking: the scores, and the order of removal."""
    return {
        "score": what,
        "order": list(removed),
        "scores": {str(layer): float(score) for layer, score in scores.items()},
    }
