"""From one score per layer to the layers that go: what all one-shot rankings share."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from streamline_bench.core.recipe.frozen import Frozen
from streamline_bench.errors import NumericsError, SparsityError

__all__ = ["ProtectedEnds", "proportional_ends", "record", "select_lowest"]

log = logging.getLogger(__name__)


def proportional_ends(depth: int) -> tuple[int, int]:
    """Return how many layers at either end stay: 4 and 2 of 32 or more, in proportion below."""
    return min(4, math.ceil(depth / 8)), min(2, math.ceil(depth / 16))


class ProtectedEnds(Frozen):
    """Parameters of methods that leave the ends of the model alone.

    Attributes:
        protect_first: the first so many layers are never removed.
        protect_last: the last so many layers are never removed.

    None is in proportion to the depth, see :func:`proportional_ends`, and gives way, the last
    layers first, where more layers are to go than that leaves.
    """

    protect_first: int | None = Field(0, ge=0)
    protect_last: int | None = Field(0, ge=0)

    def candidates(self, num_layers: int, n: int) -> range:
        """Return the layers that may be removed, and log which may not.

        Raises:
            SparsityError: they are fewer than the ``n`` that are to go.
        """
        first, last = self._ends(num_layers, n)
        allowed = range(first, num_layers - last)
        if len(allowed) < n:
            raise SparsityError(
                f"{n} of {num_layers} layers are to be removed, and with protect_first={first} and "
                f"protect_last={last} only {len(allowed)} may be; protect fewer layers or remove "
                "fewer."
            )
        if first or last:
            log.info(
                "protected: the first %d and the last %d of %d layers", first, last, num_layers
            )
        if len(allowed) == n:
            log.warning(
                "All %d layers that may be removed are to go, so that nothing is left to choose; "
                "protect fewer layers or remove fewer.",
                n,
            )
        return allowed

    @staticmethod
    def protected(candidates: range, num_layers: int) -> dict[str, int]:
        """Return what a manifest tells of the ends: how many layers of each were protected."""
        return {"first": candidates.start, "last": num_layers - candidates.stop}

    def _ends(self, num_layers: int, n: int) -> tuple[int, int]:
        first, last = proportional_ends(num_layers)
        spare = max(0, num_layers - n)
        first = min(first, spare) if self.protect_first is None else self.protect_first
        last = min(last, max(0, spare - first)) if self.protect_last is None else self.protect_last
        return first, last


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
