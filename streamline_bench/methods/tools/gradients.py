"""Gradients of the next-token loss, summed over calibration tokens in float32.

Layer by layer, a model goes forwards and then backwards: each layer computes its output once more
and gives the gradients of its weights and of its input. One layer's sums are held at a time, until
they are reduced to scores. Scores take absolute values of sums over all sequences, so that they
cannot be added up sequence by sequence. A streamed model always goes this way; one in memory where
the states of its tokens are fewer bytes than the sums of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    PartialForward,
    TokenBatch,
    entangled,
    evaluating,
    require_finite_states,
    walk_states,
)
from streamline_bench.core.state_store import BatchStore, state_store, states_bytes
from streamline_bench.core.streaming import HEAD, held_layer, is_streamed
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
    is there: besides the model, memory holds one float32 tensor per chosen weight (two with
    ``squares``). Gradients the model had are discarded.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: the loss or a gradient is NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    device = model.get_input_embeddings().weight.device
    with gradients_only_for(model, weights.values()), _Collector(weights, squares) as collector:
        for ids, mask in tqdm(
            tokens.batches(1, trim=True),
            total=len(tokens), unit="seq", desc="gradients", delay=2, disable=not progress,
        ):  # fmt: skip
            collector.share = (int(mask.sum()) - 1) / targets
            if collector.share <= 0:  # one token: nothing is predicted
                continue
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            loss = next_token_loss(logits, ids, mask) / targets
            if not bool(torch.isfinite(loss)):
                # Names the layer at which the way up, not the way down, left the numbers.
                with PartialForward(model) as forward:
                    logits = forward.logits(ids, mask, record=True)
                    require_finite_states(forward.states, logits, mask)
            torch.autograd.backward(loss)
    return collector.finished(len(tokens))


class _Collector:
    """Context in which gradients of weights are added up and dropped as soon as they are there.

    Attributes:
        share: of the sequence at hand in the loss.
    """

    def __init__(self, weights: Mapping[Place, nn.Parameter], squares: bool) -> None:
        self.share = 1.0
        self._weights = weights
        self._sums: dict[Place, GradientSums] = {}
        for place, weight in weights.items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            zeros = torch.zeros_like(weight, dtype=dtype)
            self._sums[place] = GradientSums(zeros, zeros.clone() if squares else None)

    def __enter__(self) -> _Collector:
        self._hooks = [
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._collect, place)
            )
            for place, weight in self._weights.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._hooks:
            handle.remove()

    def _collect(self, place: Place, weight: nn.Parameter) -> None:
        if weight.grad is not None:
            mean, squares = self._sums[place].mean, self._sums[place].squares
            mean.add_(weight.grad)
            if squares is not None:  # of the sequence's own loss, not of its share in all
                own = weight.grad.to(squares.dtype) * (1 / self.share)
                squares.addcmul_(own, own)
        weight.grad = None

    def finished(self, sequences: int) -> dict[Place, GradientSums]:
        """Return the sums over all sequences.

        Raises:
            NumericsError: one is NaN or infinite; the layer is named.
        """
        upwards = sorted(self._sums, key=lambda place: place[0])
        for each in ("mean", "squares"):
            fault = gradient_fault(
                {f"{at[0]}.{at[1]}": getattr(self._sums[at], each) for at in upwards}
            )
            if fault is not None:
                raise NumericsError(
                    f"The gradient of {fault} is NaN or infinite; check the weights there and the "
                    "calibration text, or compute in float32 or bfloat16."
                )
        for summed in self._sums.values():
            if summed.squares is not None:
                summed.squares /= sequences
        return self._sums


LayerGradients = Mapping[str, tuple[nn.Parameter, GradientSums]]
"""Path of a parameter within a layer -> the parameter and its sums."""


def gradients_by_layer(
    model: Any,
    wanted: Mapping[int, Sequence[str]],
    tokens: CalibrationTokens,
    *,
    squares: bool = False,
    work: Path | None = None,
    progress: bool = True,
) -> Iterator[tuple[int, LayerGradients]]:
    """Yield each layer with the gradients of its chosen parameters, in any order.

    Args:
        model: a causal LM, in memory or streamed. A streamed one's parameters have their weights
            until the next layer is asked for.
        wanted: layer -> paths of parameters in it.
        squares: see :class:`GradientSums`.
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: the layers of a streamed model cannot be run one by one.
        CalibrationError: no token follows another.
        NumericsError: the loss or a gradient is NaN or infinite; the layer is named.
    """
    layers = decoder_layers(model)
    weights = {
        (layer, path): layers[layer].get_parameter(path)
        for layer, paths in wanted.items()
        for path in paths
    }
    # One token: nothing is predicted.
    batches = [each for each in tokens.batches(1, trim=True) if each[0].shape[1] > 1]
    states = (len(layers) - min(wanted) + 2) * states_bytes(model, batches)
    if is_streamed(model) or states < _sums_bytes(weights.values(), squares):
        try:
            yield from _layer_by_layer(
                model, wanted, tokens, batches, states, squares, work, progress
            )
            return
        except LayersEntangled:  # before anything was yielded
            if is_streamed(model):
                raise entangled(model) from None
    sums = sum_gradients(model, weights, tokens, squares=squares, progress=progress)
    for layer, paths in wanted.items():
        yield layer, {path: (weights[layer, path], sums.pop((layer, path))) for path in paths}


def _sums_bytes(weights: Iterable[nn.Parameter], squares: bool) -> int:
    return sum(weight.numel() for weight in weights) * torch.float32.itemsize * (1 + squares)


def _layer_by_layer(
    model: Any,
    wanted: Mapping[int, Sequence[str]],
    tokens: CalibrationTokens,
    batches: Sequence[TokenBatch],
    size: int,
    squares: bool,
    work: Path | None,
    progress: bool,
) -> Iterator[tuple[int, LayerGradients]]:
    targets, depth = count_targets(tokens), len(decoder_layers(model))
    lowest = min(wanted)
    with state_store(model, size, work) as store, evaluating(model, frozen=True):
        model.zero_grad(set_to_none=True)
        walk_states(model, batches, range(lowest, depth + 1), store, progress=progress)
        with PartialForward(model) as forward:
            _backwards_through_head(model, forward, batches, targets, lowest, store)
            for layer in reversed(range(lowest, depth)):
                with held_layer(model, layer, layer - 1 if layer > lowest else None) as host:
                    host.requires_grad_(False)
                    weights = {p: host.get_parameter(p) for p in wanted.get(layer, ())}
                    found = _backwards_through_layer(
                        model, forward, layer, weights, tokens, batches, lowest, store, squares
                    )
                    weights.clear()
                    if found:
                        yield layer, found
                        found.clear()  # the caller may still hold it while the next one is made


def _backwards_through_layer(
    model: Any,
    forward: PartialForward,
    layer: int,
    weights: Mapping[str, nn.Parameter],
    tokens: CalibrationTokens,
    batches: Sequence[TokenBatch],
    lowest: int,
    store: BatchStore,
    squares: bool,
) -> dict[str, tuple[nn.Parameter, GradientSums]]:
    """Replace the gradients in the store by those with respect to the layer's input.

    Weights of the layer are held by what is returned only.
    """
    targets, device = count_targets(tokens), model.get_input_embeddings().weight.device
    places = {(layer, path): weight for path, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    with _Collector(places, squares) as collector:
        for number, (ids, mask) in enumerate(batches):
            collector.share = (ids.shape[1] - 1) / targets
            state = store.load((layer, number), device).detach()
            state.requires_grad_(layer > lowest)
            if layer > lowest or weights:
                output = forward.layer(layer, ids, mask, state, gradients=True)
                gradient = store.load(("gradient", number), device)
                torch.autograd.backward(output, gradient)
            if layer > lowest:
                assert state.grad is not None
                store["gradient", number] = state.grad
            store.drop((layer, number))
    sums = collector.finished(len(tokens))
    return {path: (weight, sums[layer, path]) for path, weight in weights.items()}


def _backwards_through_head(
    model: Any,
    forward: PartialForward,
    batches: Sequence[TokenBatch],
    targets: int,
    lowest: int,
    store: BatchStore,
) -> None:
    """Replace the last states in the store by the gradients of the mean loss with respect to them.

    Raises:
        NumericsError: the loss is NaN or infinite; the layer is named.
    """
    depth, device = len(decoder_layers(model)), model.get_input_embeddings().weight.device
    with held_layer(model, HEAD) as head:
        head.requires_grad_(False)
        for number, (ids, mask) in enumerate(batches):
            state = store.load((depth, number), device).detach().requires_grad_()
            logits = forward.logits(ids, mask, start=depth, state=state, gradients=True)
            loss = next_token_loss(logits, ids, mask) / targets
            if not bool(torch.isfinite(loss)):
                states = {b: store.load((b, number), device) for b in range(lowest, depth + 1)}
                require_finite_states(states, logits, mask)
            torch.autograd.backward(loss)
            assert state.grad is not None
            store["gradient", number] = state.grad
            store.drop((depth, number))


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
