"""The next-token loss that likelihood-based selections minimise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    require_finite_states,
    sent,
    walk,
)
from streamline_bench.core.state_store import state_store, states_bytes
from streamline_bench.core.streaming import HEAD, held_layer, is_streamed
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
        targets = sent(tokens[1:length], logits.device)
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
    work: Path | None = None,
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
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: the layers of a streamed model cannot be run one by one.
        CalibrationError: no token follows another, or one sequence exceeds the memory.
        NumericsError: the model's own states, or a loss, are NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    batch_size = affordable_batch(model, tokens, len(decoder_layers(model)), activations_gb)
    batches = list(tokens.batches(batch_size, trim=True))
    losses: dict[int, list[Tensor]] = {layer: [] for layer in candidates}
    with PartialForward(model) as forward, torch.no_grad():
        if is_streamed(model):
            with _skipped_states(
                model, forward, batches, candidates, removed, work, progress
            ) as at:
                for number, (ids, mask) in enumerate(batches):
                    for layer, each in losses.items():
                        logits = forward.logits(ids, mask, **at(layer, number))
                        each.append(next_token_loss(logits, ids, mask))
        else:
            _losses_by_batch(forward, batches, removed, losses, progress, description)
    means: dict[int, float] = {}
    for layer, each in losses.items():
        # One by one in float64, and only now, so that an accelerator is not waited for.
        means[layer] = sum(torch.stack(each).cpu().tolist()) / targets
        if not abs(means[layer]) < float("inf"):
            raise NumericsError(
                f"The loss of the model without layer {layer} is {means[layer]}; check the "
                "weights, or try another dtype."
            )
    return means


def _losses_by_batch(
    forward: PartialForward,
    batches: Sequence[TokenBatch],
    removed: Collection[int],
    losses: Mapping[int, list[Tensor]],
    progress: bool,
    description: str,
) -> None:
    total = len(losses) * sum(len(ids) for ids, _ in batches)
    with tqdm(total=total, unit="seq", desc=description, delay=2, disable=not progress) as bar:
        for ids, mask in batches:
            last = forward.hidden(ids, mask, skip=removed, record=True)
            require_finite_states(forward.states, last, mask)
            del last
            for layer, each in losses.items():
                logits = forward.logits(
                    ids, mask, start=layer + 1, state=forward.states[layer],
                    handed=forward.handed[layer], skip=removed,
                )  # fmt: skip
                each.append(next_token_loss(logits, ids, mask))
                bar.update(len(ids))


_MODEL = -1  # stands for the states of the model that skips no layer but those removed


@contextmanager
def _skipped_states(
    model: Any,
    forward: PartialForward,
    batches: Sequence[TokenBatch],
    candidates: Sequence[int],
    removed: Collection[int],
    work: Path | None,
    progress: bool,
) -> Iterator[Callable[[int, int], dict[str, Any]]]:
    """Take all batches, each without one of the candidates, through a streamed model.

    Layers are outside, so that each is read once. The LM head is held inside the context.

    Yields:
        A function: candidate, batch number -> where a pass over the head begins.

    Raises:
        ArchitectureError: the layers of this model cannot be run one by one.
        NumericsError: the model's own states are NaN or infinite.
    """
    depth, device = len(decoder_layers(model)), model.get_input_embeddings().weight.device
    size = (len(candidates) + 2) * states_bytes(model, batches)
    finite: list[Tensor] = []
    with state_store(model, size, work) as store:
        for number, (ids, mask) in enumerate(batches):
            store[_MODEL, number] = state = forward.embedded(ids, mask)
            finite.append(torch.isfinite(state).all())

        def require_finite(boundary: int) -> None:
            if not bool(torch.stack(finite).all()):  # looked at once for all batches
                for number, (_, mask) in enumerate(batches):
                    state = store.load((_MODEL, number), device)
                    require_finite_states({boundary: state}, state, mask)
            finite.clear()

        running: list[int] = []
        require_finite(0)
        kept = [layer for layer in range(depth) if layer not in removed]
        try:
            for layer, number, ids, mask in walk(model, batches, kept, progress=progress):
                state = store.load((_MODEL, number), device)
                if layer in candidates:
                    store[layer, number] = state
                    running += [layer] if number == 0 else []
                for other in running:
                    if other != layer:
                        skipping = store.load((other, number), device)
                        store[other, number] = forward.layer(layer, ids, mask, skipping)
                output = forward.layer(layer, ids, mask, state)
                store[_MODEL, number] = output
                finite.append(torch.isfinite(output).all())
                if number == len(batches) - 1:
                    require_finite(layer + 1)
        except LayersEntangled:
            raise entangled(model) from None
        with held_layer(model, HEAD):
            yield lambda layer, number: {
                "start": depth, "state": store.load((layer, number), device)
            }  # fmt: skip


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
