"""Magnitude: removes the layers with the smallest weights, without data or building the model.

As in "Reassessing Layer Pruning in LLMs" (arXiv 2411.15558): the sum over all projections of a
layer of ``|w|`` (``l1``) or ``w²`` (``l2``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from tqdm import tqdm

from streamline_bench.core.architecture import depth_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.layer_removal import stored_linear_weights
from streamline_bench.methods.tools.selection import ProtectedEnds, RankedLayers

Norm = Literal["l1", "l2"]
_CHUNK = 1 << 22  # values held in float64 at a time


class MagnitudeParameters(ProtectedEnds):
    """Parameters of the method ``magnitude``.

    Attributes:
        norm: ``l1`` sums absolute values, ``l2`` squares.
    """

    norm: Norm = "l1"


class Magnitude(RankedLayers):
    """One-shot ranking by the size of a layer's weights."""

    name = "magnitude"
    streamed = True
    seeded = False
    parameters: ClassVar[type[BaseModel]] = MagnitudeParameters
    calibrated = False

    def scores(
        self, work: Compression, options: Any, candidates: range, tokens: object
    ) -> tuple[Mapping[str, Any], Mapping[int, float]]:
        depth = depth_of(work.config)
        sums = layer_magnitudes(work.reader, depth, options.norm, progress=work.progress)
        return {"score": f"{options.norm} magnitude"}, dict(enumerate(sums))


def layer_magnitudes(
    reader: CheckpointReader, num_layers: int, norm: Norm = "l1", *, progress: bool = True
) -> list[float]:
    """Return for each layer the sum of ``|w|`` or ``w²`` over its linear weights, in float64.

    Weights are views of the mapped file; one small piece at a time is widened.
    """
    layers = stored_linear_weights(reader, num_layers)
    total = sum(reader.entry(name).numel for layer in layers for name in layer.values())
    sums = [0.0] * len(layers)
    with tqdm(
        total=total, unit="w", unit_scale=True, desc="magnitudes", delay=2, disable=not progress
    ) as bar:
        for index, layer in enumerate(layers):
            for name in layer.values():
                flat, magnitude = reader.tensor(name).reshape(-1), 0.0
                for piece in torch.split(flat, _CHUNK):
                    wide = piece.double()
                    magnitude += float((wide.abs() if norm == "l1" else wide.square()).sum())
                sums[index] += magnitude
                bar.update(flat.numel())
    return sums
