"""Shortened LLaMA by Taylor (arXiv 2402.02834): the layers whose weights the loss feels least go.

To first order, setting a weight ``w`` to zero changes the loss by ``w · dL/dw``; a layer's score is
``Σ |w · dL/dw|`` over its projections. "Taylor+" leaves the first four and the last two layers
of 32 alone: their scores are low, and removing them ruins the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.calibration import CalibrationTokens
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan
from streamline_bench.methods.gradient_sums import Place, sum_gradients
from streamline_bench.methods.layer_scores import ProtectedEnds, record, select_lowest
from streamline_bench.methods.layer_weights import is_linear_weight

__all__ = ["ShortenedLlamaTaylor", "taylor_scores"]


class ShortenedLlamaTaylor(Method):
    """One-shot ranking by first-order Taylor expansion of the loss."""

    name = "shortened_llama_taylor"
    parameters: ClassVar[type[BaseModel]] = ProtectedEnds

    def compress(self, work: Compression) -> Compressed:
        """Accumulate gradients, score the layers and drop the lowest."""
        options = ProtectedEnds.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration)
        scores = taylor_scores(work.model, tokens, progress=work.progress)
        removed = select_lowest({layer: scores[layer] for layer in candidates}, plan.n_layers)
        chosen = record(dict(enumerate(scores)), removed, "sum of |w dL/dw|")
        chosen["protected"] = options.protected(candidates, plan.num_layers)
        return drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)


def taylor_scores(model: Any, tokens: CalibrationTokens, *, progress: bool = True) -> list[float]:
    """Return ``Σ |w · dL/dw|`` for each layer; L is the mean loss per token over all sequences.

    Sequences pass one at a time. Beside the model, one float32 tensor per linear weight is held.
    Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: a gradient is NaN or infinite; the layer is named.
    """
    layers = decoder_layers(model)
    weights: dict[Place, nn.Parameter] = {
        (index, name): parameter
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
        if is_linear_weight(name, parameter.dim())
    }
    sums = sum_gradients(model, weights, tokens, progress=progress)
    scores = [0.0] * len(layers)
    for place, weight in weights.items():
        gradient = sums.pop(place).mean
        product = weight.detach().to(gradient.dtype) * gradient
        scores[place[0]] += float(product.abs_().sum(dtype=torch.float64))
    return scores
