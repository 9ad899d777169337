"""Gradients of the loss over calibration tokens, summed in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import PartialForward, evaluating, require_finite_states
from streamline_bench.core.training.loop import gradient_fault
from streamline_bench.errors import NumericsError
from streamline_bench.methods.tools.likelihood import count_targets, next_token_loss

Place = tuple[int, str]
"""(layer, path of a projection in it)."""


@dataclass
class GradientSums:
    """Of one weight, float32, shaped like it.

    Attributes:
        mean: gradient of the mean loss per token over all sequences.
        squares: mean over the sequences of the squared gradient of each one's own mean loss.
    """

    mean: Tensor
    squares: Tensor | None


def sum_gradients(
    model: Any,
    weights: Mapping[Place, nn.Parameter],
    tokens: CalibrationTokens,
    *,
    squares: bool = False,
    progress: bool = True,
) -> dict[Place, GradientSums]:
    """Return the gradients of the chosen weights.

    Sequences pass one at a time, and each weight's gradient is added up and dropped as soon as it
    is there: beside the model, memory holds one float32 tensor per chosen weight (two with
    ``squares``). Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: the loss or a gradient is NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    device = model.get_input_embeddings().weight.device
    sums = {place: _zeros(weight, squares) for place, weight in weights.items()}
    share = 1.0
    with gradients_only_for(model, weights.values()):

        def collect(place: Place) -> Any:
            def hook(weight: nn.Parameter) -> None:
                _add(sums[place], weight.grad, 1 / share)
                weight.grad = None

            return hook

        hooks = [
            weight.register_post_accumulate_grad_hook(collect(place))  # type: ignore[no-untyped-call]
            for place, weight in weights.items()
        ]
        try:
            for ids, mask in tqdm(
                tokens.batches(1, trim=True),
                total=len(tokens), unit="seq", desc="gradients", delay=2, disable=not progress,
            ):  # fmt: skip
                share = (int(mask.sum()) - 1) / targets
                if share <= 0:  # one token: nothing is predicted
                    continue
                logits = model(input_ids=ids.to(device), use_cache=False).logits
                loss = next_token_loss(logits, ids, mask) / targets
                if not bool(torch.isfinite(loss)):
                    _refuse_pass(model, ids, mask)
                torch.autograd.backward(loss)
        finally:
            for handle in hooks:
                handle.remove()
    _require_finite(sums)
    for summed in sums.values():
        if summed.squares is not None:
            summed.squares /= len(tokens)
    return sums


def _refuse_pass(model: Any, ids: Tensor, mask: Tensor) -> None:
    """Name the layer at which the way up, not the way down, left the numbers."""
    with PartialForward(model) as forward:
        logits = forward.logits(ids, mask, record=True)
        require_finite_states(forward.states, logits, mask)


def _zeros(weight: Tensor, squares: bool) -> GradientSums:
    zeros = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return GradientSums(zeros, zeros.clone() if squares else None)


def _add(sums: GradientSums, gradient: Tensor | None, scale: float) -> None:
    if gradient is None:
        return
    sums.mean.add_(gradient)
    if sums.squares is not None:
        own = gradient.to(sums.squares.dtype) * scale
        sums.squares.addcmul_(own, own)


def _require_finite(sums: Mapping[Place, GradientSums]) -> None:
    upwards = sorted(sums, key=lambda place: place[0])
    for each in ("mean", "squares"):
        fault = gradient_fault({f"{at[0]}.{at[1]}": getattr(sums[at], each) for at in upwards})
        if fault is not None:
            raise NumericsError(
                f"The gradient of {fault} is NaN or infinite; check the weights there and the "
                "calibration text, or compute in float32 or bfloat16."
            )


@contextmanager
def gradients_only_for(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach the given weights only, in evaluation mode; then restore the model.

    Gradients that the model had or gets meanwhile are discarded.
    """
    with evaluating(model, frozen=True):
        model.zero_grad(set_to_none=True)
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            model.zero_grad(set_to_none=True)
