"""How much heads and MLP channels matter: sums over the weights that belong to them.

LLM-Pruner (arXiv 2305.11627), equations 3 to 6: with g the gradient of the loss and S the mean of
the squared gradients of single sequences, a weight w counts ``|w g|`` (``param_first``),
``|w² S|`` (``param_second``) or ``|w g - w² S / 2|`` (``param_mix``); ``vectorize`` takes the
absolute value only after summing over each row (column, in output projections). ``l1`` and ``l2``
count ``|w|`` and ``w²``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streamline_bench.errors import NumericsError
from streamline_bench.methods.tools.gradient_sums import GradientSums
from streamline_bench.modeling.widths import Part

__all__ = ["Criterion", "UnitScores", "needs_gradients", "salience", "score_units"]

Criterion = Literal["param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random"]


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer's units, float64 on the CPU.

    Attributes:
        query: ``[heads]``, of rows of queries and columns of the output projection.
        key_value: ``[key-value heads]``, of rows of keys and values.
        channel: ``[channels]``, of the MLP.
    """

    query: Tensor
    key_value: Tensor
    channel: Tensor

    def groups(self) -> Tensor:
        """Return ``[key-value heads]``: each with all query heads that share it."""
        return self.key_value + self.query.view(len(self.key_value), -1).sum(dim=1)

    def within_groups(self) -> Tensor:
        """Return ``[key-value heads, query heads sharing each]``: the query heads alone."""
        return self.query.view(len(self.key_value), -1)


def needs_gradients(criterion: Criterion) -> bool:
    """Whether calibration tokens are looked at."""
    return criterion not in ("l1", "l2", "random")


def salience(weight: Tensor, criterion: Criterion, sums: GradientSums | None = None) -> Tensor:
    """Return what each weight counts, with its sign, in float32 or better."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if criterion == "l1" or criterion == "l2":
        return wide if criterion == "l1" else wide.square()
    if sums is None:
        raise ValueError(f"criterion {criterion} needs gradients")
    if criterion in ("param_first", "vectorize"):
        return wide * sums.mean
    if sums.squares is None:
        raise ValueError(f"criterion {criterion} needs squared gradients")
    second = wide.square() * sums.squares
    return second if criterion == "param_second" else wide * sums.mean - second / 2


def score_units(
    layer: int, parts: Sequence[Part], counted: Callable[[str], Tensor], *, vectorize: bool = False
) -> UnitScores:
    """Return the scores of a layer's units.

    Args:
        layer: named in errors.
        parts: what belongs to whom.
        counted: path of a projection -> what its weights count, ``[out, in]``.
        vectorize: sum over each row (column) before taking the absolute value.

    Raises:
        NumericsError: a score is NaN or infinite; the layer is named.
    """
    sums = {kind: torch.zeros(_count(parts, kind), dtype=torch.float64) for kind in _KINDS}
    for module in dict.fromkeys(part.module for part in parts):
        values = counted(module)
        for part in (part for part in parts if part.module == module):
            sums[part.unit] += _sum(values, part, vectorize)
    for kind, scores in sums.items():
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                f"A {kind} score of layer {layer} is NaN or infinite; check the weights, or try "
                "another dtype."
            )
    return UnitScores(sums["query"], sums["key_value"], sums["channel"])


_KINDS = ("query", "key_value", "channel")


def _count(parts: Iterable[Part], kind: str) -> int:
    return next(part.count for part in parts if part.unit == kind)


def _sum(values: Tensor, part: Part, vectorize: bool) -> Tensor:
    own = values.narrow(part.axis, part.offset, part.count * part.size)
    if vectorize:
        lines = own.sum(dim=1 - part.axis, dtype=torch.float64).abs()
    else:
        lines = own.abs().sum(dim=1 - part.axis, dtype=torch.float64)
    return lines.view(part.count, part.size).sum(dim=1).cpu()
