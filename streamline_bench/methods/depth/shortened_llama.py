"""Shortened LLaMA (arXiv 2402.02834): scores each layer by its effect on the loss and removes the
lowest, ranked once.

``ppl`` leaves each layer out alone. Perplexity is ``exp`` of the mean loss that is compared here,
so that the order is the same. ``taylor`` estimates the effect from gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.gradients import GradientSums, gradients_by_layer
from streamline_bench.methods.tools.layer_removal import is_linear_weight
from streamline_bench.methods.tools.likelihood import skip_losses
from streamline_bench.methods.tools.selection import ProtectedEnds, RankedLayers
from streamline_bench.methods.tools.shared_scan import scores_once


class ShortenedLlamaPPLParameters(ProtectedEnds):
    """Parameters of the method ``shortened_llama_ppl``.

    Attributes:
        activations_gb: most memory for the states of a batch, in 10^9 bytes.
    """

    activations_gb: float = Field(8.0, gt=0)


class ShortenedLlamaPPL(RankedLayers):
    """One-shot ranking by the loss without each layer."""

    name = "shortened_llama_ppl"
    passes = frozenset({"losses"})
    streamed = True
    seeded = False
    parameters: ClassVar[type[BaseModel]] = ShortenedLlamaPPLParameters

    def scores(
        self, work: Compression, options: Any, candidates: range, tokens: Any
    ) -> tuple[Mapping[str, Any], Mapping[int, float]]:
        limit, progress = options.activations_gb, work.progress

        def look() -> dict[str, Tensor]:
            losses = skip_losses(
                work.model, tokens, candidates,
                activations_gb=limit, work=work.work, progress=progress,
            )  # fmt: skip
            return {
                "losses": torch.tensor([losses[each] for each in candidates], dtype=torch.float64)
            }

        found = scores_once(work, tokens, self.name, [list(candidates), limit], look)["losses"]
        facts = {"score": "nats per token without the layer"}
        return facts, dict(zip(candidates, found.tolist(), strict=True))


class ShortenedLlamaTaylor(RankedLayers):
    """One-shot ranking by first-order Taylor expansion of the loss."""

    name = "shortened_llama_taylor"
    passes = frozenset({"gradients"})
    streamed = True
    seeded = False

    def scores(
        self, work: Compression, options: Any, candidates: range, tokens: Any
    ) -> tuple[Mapping[str, Any], Mapping[int, float]]:

        def look() -> dict[str, Tensor]:
            scores = taylor_scores(work.model, tokens, work=work.work, progress=work.progress)
            return {"scores": torch.tensor(scores, dtype=torch.float64)}

        found = scores_once(work, tokens, self.name, "taylor", look)["scores"]
        return {"score": "sum of |w dL/dw|"}, dict(enumerate(found.tolist()))


def taylor_scores(
    model: Any, tokens: CalibrationTokens, *, work: Path | None = None, progress: bool = True
) -> list[float]:
    """Return ``Σ |w · dL/dw|`` for each layer; L is the mean loss per token over all sequences.

    Sequences pass one at a time. Besides the model, one float32 tensor per linear weight of one
    layer is held (see :mod:`.gradients`). Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: a gradient is NaN or infinite; the layer is named.
    """
    wanted = {
        index: [n for n, p in layer.named_parameters() if is_linear_weight(n, p.dim())]
        for index, layer in enumerate(decoder_layers(model))
    }
    scores = [0.0] * len(wanted)
    for layer, found in gradients_by_layer(model, wanted, tokens, work=work, progress=progress):
        for path in wanted[layer]:
            scores[layer] += _effect(*found[path])
    return scores


def _effect(weight: Tensor, sums: GradientSums) -> float:
    """Return ``Σ |w · dL/dw|``; what it takes goes before the next layer is read."""
    product = weight.detach().to(sums.mean.dtype) * sums.mean
    return float(product.abs_().sum(dtype=torch.float64))
