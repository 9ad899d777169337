"""Merging decoder layers in memory, to be tried and taken back (LaCo, arXiv 2402.11187).

A merge folds the layers above a base layer into it and leaves them out. Only projections are
merged: norms, biases and the norms of queries and keys stay the base layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.tools.layer_weights import is_linear_weight

__all__ = ["LayerMerger", "MergeRule", "Mixture", "merged_mixture", "require_equal_shapes"]

MergeRule: TypeAlias = Literal["reference", "rdsc"]
"""``rdsc`` is the paper's sum: ``θ_l + Σ_k (θ_{l+k} - θ_l)``. ``reference`` is what its code
computes: it adds ``θ_{l+k}`` minus the *running* θ_l, which telescopes to the last ``θ_{l+m}``."""

Mixture: TypeAlias = Mapping[int, float]
"""Layer of the source -> its coefficient in a merged layer's projections."""


def merged_mixture(base: Mixture, others: Sequence[Mixture], rule: MergeRule) -> Mixture:
    """Return the coefficients after merging ``others``, in order, into ``base``."""
    if rule == "reference":
        return dict(others[-1])
    mixture = {layer: (1 - len(others)) * share for layer, share in base.items()}
    for other in others:
        for layer, share in other.items():
            mixture[layer] = mixture.get(layer, 0.0) + share
    return mixture


class LayerMerger:
    """Merges layers of a model in place and undoes that; no copy of the model is made.

    The ``reference`` rule lets the base layer point at the other layer's weights and copies
    nothing. ``rdsc`` makes the projections of one layer for each merge not undone.
    """

    def __init__(self, model: Any, rule: MergeRule) -> None:
        self._rule = rule
        self._weights: list[dict[str, nn.Parameter]] = [
            {name: p for name, p in layer.named_parameters() if is_linear_weight(name, p.dim())}
            for layer in decoder_layers(model)
        ]
        self._undone: list[tuple[int, dict[str, Tensor]]] = []
        require_equal_shapes(
            [{name: tuple(p.shape) for name, p in layer.items()} for layer in self._weights]
        )

    @property
    def depth(self) -> int:
        """Number of merges that could be undone."""
        return len(self._undone)

    def merge(self, base: int, others: Sequence[int]) -> None:
        """Merge layers ``others`` into layer ``base``; the caller leaves them out of the pass."""
        own = self._weights[base]
        self._undone.append((base, {name: weight.data for name, weight in own.items()}))
        for name, weight in own.items():
            weight.data = self._merged(name, base, others)

    def undo(self, depth: int = 0) -> None:
        """Take back the latest merges until ``depth`` are left."""
        while len(self._undone) > depth:
            base, saved = self._undone.pop()
            for name, tensor in saved.items():
                self._weights[base][name].data = tensor

    def _merged(self, name: str, base: int, others: Sequence[int]) -> Tensor:
        if self._rule == "reference":
            return self._weights[others[-1]][name].data
        start = self._weights[base][name].data
        merged = start * (1 - len(others))
        for other in others:
            merged += self._weights[other][name].data
        return merged


def require_equal_shapes(layers: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Check that all layers have the same projections.

    Raises:
        ArchitectureError: one differs (mixtures with dense layers, for example).
    """
    for index, shapes in enumerate(layers):
        if shapes != layers[0]:
            odd = sorted(set(shapes.items()) ^ set(layers[0].items()))[0][0]
            raise ArchitectureError(
                f"Layer {index} differs from layer 0 in '{odd}', so that layers cannot be merged; "
                "use a method that drops layers."
            )
