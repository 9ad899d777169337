"""The next-token loss that likelihood-based selections minimise, and its gradients.

Gradients are summed over calibration tokens in float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import PartialForward, evaluating, require_finite_states
from streamline_bench.core.training.loop import gradient_fault
from streamline_bench.errors import CalibrationError, NumericsError


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the negative log-likelihood summed over all tokens but each sequence's first, nats.

    Sequences are taken one by one, so that only one is held in float32.

    Args:
        logits: ``[batch, seq, vocabulary]``.
        ids: int64 ``[batch, seq]``, padded on the right.
        mask: bool ``[batch, seq]``; pads are neither predicted nor predicted from.

    Returns:
        A scalar: float32, float64 for float64 logits; carries gradients if the logits do.
    """
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, tokens, length in zip(logits, ids, mask.sum(dim=1).tolist(), strict=True):
        targets = tokens[1:length].to(logits.device)
        predicted = row[: length - 1].to(total.dtype)
        total = total + nn.functional.cross_entropy(predicted, targets, reduction="sum")
    return total


def count_targets(tokens: CalibrationTokens) -> int:
    """Return how many tokens :func:`next_token_loss` is a sum over.

    Raises:
        CalibrationError: none, as no sequence has a second token.
    """
    count = tokens.num_tokens - len(tokens)
    if count < 1:
        raise CalibrationError(
            f"Calibration source {tokens.source} gives {tokens.num_tokens} tokens in "
            f"{len(tokens)} sequences, so that none follows another; give more text."
        )
    return count


def skip_losses(
    model: Any,
    tokens: CalibrationTokens,
    candidates: Sequence[int],
    *,
    removed: Collection[int] = (),
    activations_gb: float = 8.0,
    progress: bool = True,
    description: str = "layers skipped",
) -> dict[int, float]:
    """Return layer -> mean negative log-likelihood per token (nats) without it.

    The values are those of separate passes through models without the layer: the same operations
    on the same numbers.

    Args:
        model: a causal LM; neither its weights nor its mode are changed.
        candidates: layers to leave out, one at a time.
        removed: layers left out always.
        activations_gb: most memory for the states and logits of a batch, in 10^9 bytes.

    Raises:
        CalibrationError: no token follows another, or one sequence exceeds the memory.
        NumericsError: the model's own states, or a loss, are NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    batch_size = affordable_batch(model, tokens, len(decoder_layers(model)), activations_gb)
    sums = dict.fromkeys(candidates, 0.0)
    total = len(sums) * len(tokens)
    with (
        PartialForward(model) as forward,
        tqdm(total=total, unit="seq", desc=description, delay=2, disable=not progress) as bar,
    ):
        for ids, mask in tokens.batches(batch_size, trim=True):
            last = forward.hidden(ids, mask, skip=removed, record=True)
            require_finite_states(forward.states, last, mask)
            del last
            for layer in sums:
                logits = forward.logits(
                    ids, mask, start=layer + 1, state=forward.states[layer], skip=removed
                )
                sums[layer] += next_token_loss(logits, ids, mask).item()
                bar.update(len(ids))
    for layer, loss in sums.items():
        if not abs(loss) < float("inf"):
            raise NumericsError(
                f"The loss of the model without layer {layer} is {loss}; check the weights, or "
                "try another dtype."
            )
    return {layer: loss / targets for layer, loss in sums.items()}


def affordable_batch(
    model: Any, tokens: CalibrationTokens, boundaries: int, activations_gb: float, limit: int = 8
) -> int:
    """Return how many sequences' states (at ``boundaries``) and logits fit into the memory.

    Raises:
        CalibrationError: not even one sequence does.
    """
    embedding = model.get_input_embeddings().weight
    vocabulary, hidden = embedding.shape
    values = (boundaries + 1) * hidden + 3 * vocabulary
    each = tokens.input_ids.shape[1] * values * max(embedding.element_size(), 4)
    if each > activations_gb * 1e9:
        raise CalibrationError(
            f"States and logits of one sequence of {tokens.input_ids.shape[1]} tokens need "
            f"{each / 1e9:.3g} GB and activations_gb is {activations_gb}; raise it or shorten "
            "sequence_length."
        )
    return int(min(limit, len(tokens), activations_gb * 1e9 // each))


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
    is there: besides the model, memory holds one float32 tensor per chosen weight (two with
    ``squares``). Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: the loss or a gradient is NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    device = model.get_input_embeddings().weight.device
    sums: dict[Place, GradientSums] = {}
    for place, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros_like(weight, dtype=dtype)
        sums[place] = GradientSums(zeros, zeros.clone() if squares else None)
    share = 1.0
    with gradients_only_for(model, weights.values()):

        def collect(place: Place, weight: nn.Parameter) -> None:
            if weight.grad is not None:
                mean, squares = sums[place].mean, sums[place].squares
                mean.add_(weight.grad)
                if squares is not None:  # of the sequence's own loss, not of its share in all
                    own = weight.grad.to(squares.dtype) * (1 / share)
                    squares.addcmul_(own, own)
            weight.grad = None

        hooks = [
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(collect, place)
            )
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
                    # Names the layer at which the way up, not the way down, left the numbers.
                    with PartialForward(model) as forward:
                        logits = forward.logits(ids, mask, record=True)
                        require_finite_states(forward.states, logits, mask)
                torch.autograd.backward(loss)
        finally:
            for handle in hooks:
                handle.remove()
    upwards = sorted(sums, key=lambda place: place[0])
    for each in ("mean", "squares"):
        fault = gradient_fault({f"{at[0]}.{at[1]}": getattr(sums[at], each) for at in upwards})
        if fault is not None:
            raise NumericsError(
                f"The gradient of {fault} is NaN or infinite; check the weights there and the "
                "calibration text, or compute in float32 or bfloat16."
            )
    for summed in sums.values():
        if summed.squares is not None:
            summed.squares /= len(tokens)
    return sums


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
