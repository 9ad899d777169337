"""Shortened LLaMA by Taylor (arXiv 2402.02834): the layers whose weights the loss feels least go.

To first order, setting a weight ``w`` to zero changes the loss by ``w · dL/dw``; a layer's score is
``Σ |w · dL/dw|`` over its projections. "Taylor+" leaves the first four and the last two layers
alone: their scores are low, and removing them ruins the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.calibration import CalibrationTokens
from streamline_bench.errors import NumericsError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan
from streamline_bench.methods.gradient_sums import gradients_only_for
from streamline_bench.methods.layer_scores import ProtectedEnds, record, select_lowest
from streamline_bench.methods.layer_weights import is_linear_weight
from streamline_bench.methods.likelihood import count_targets, next_token_loss

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
        return drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)


def taylor_scores(model: Any, tokens: CalibrationTokens, *, progress: bool = True) -> list[float]:
    """Return ``Σ |w · dL/dw|`` for each layer; L is the mean loss per token over all sequences.

    Sequences pass one at a time. Beside the model, one gradient per linear weight is held, in the
    weight's dtype. Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: a gradient is NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    device = model.get_input_embeddings().weight.device
    weights = _linear_weights(model)
    with gradients_only_for(model, (w for layer in weights for w in layer.values())):
        for ids, mask in tqdm(
            tokens.batches(1, trim=True),
            total=len(tokens), unit="seq", desc="gradients", delay=2, disable=not progress,
        ):  # fmt: skip
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            torch.autograd.backward(next_token_loss(logits, ids, mask) / targets)
        return [_score(index, layer) for index, layer in enumerate(weights)]


def _score(index: int, weights: dict[str, nn.Parameter]) -> float:
    total = 0.0
    for name, weight in weights.items():
        if weight.grad is None:  # an expert that no token was routed to
            continue
        if not bool(torch.isfinite(weight.grad).all()):
            raise NumericsError(
                f"The gradient of '{name}' in layer {index} is NaN or infinite; compute in "
                "float32 or bfloat16, or check the calibration text."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        product = weight.detach().to(wide) * weight.grad.to(wide)
        total += float(product.abs_().sum(dtype=torch.float64))
    return total


def _linear_weights(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Return, per layer, name -> weight of its projections."""
    return [
        {name: p for name, p in layer.named_parameters() if is_linear_weight(name, p.dim())}
        for layer in decoder_layers(model)
    ]
