"""The next-token loss, of models without one part or the other, and the greedy search by a loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text
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
from streamline_bench.methods.tools.sublayer_removal import silenced, whole_layers
from streamline_bench.modeling.sublayers import Sublayer

log = logging.getLogger(__name__)


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


Part: TypeAlias = int | Sublayer
"""What a search leaves out: a layer, by its index, or the attention or MLP of one."""

PartT = TypeVar("PartT", bound=Part)

Measure: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""What is taken of a model's logits: logits, ids, mask, number of the batch's first sequence."""


def skip_losses(
    model: Any, tokens: CalibrationTokens, candidates: Sequence[PartT], **options: Any
) -> dict[PartT, float]:
    """Return candidate -> mean negative log-likelihood per token (nats) without it.

    Args:
        options: those of :func:`measured_without`.

    Raises:
        CalibrationError: no token follows another.
        NumericsError: a loss is NaN or infinite; the part is named.
        StreamlineBenchError: as :func:`measured_without`.
    """
    targets = count_targets(tokens)

    def loss(logits: Tensor, ids: Tensor, mask: Tensor, first: int) -> Tensor:
        return next_token_loss(logits, ids, mask)

    means: dict[PartT, float] = {}
    for each, losses in measured_without(model, tokens, candidates, loss, **options).items():
        # One by one in float64, and only now, so that an accelerator is not waited for.
        means[each] = sum(torch.stack(losses).cpu().tolist()) / targets
        require_finite_score(each, means[each])
    return means


def require_finite_score(part: Part, score: float) -> None:
    """Check what a model is worth without a part (NumericsError: NaN or infinite)."""
    if not abs(score) < float("inf"):
        named = f"layer {part}" if isinstance(part, int) else f"layer {part[0]}'s {part[1]}"
        raise NumericsError(
            f"The loss of the model without {named} is {score}; check the weights, or try another "
            "dtype."
        )


def measured_without(
    model: Any,
    tokens: CalibrationTokens,
    candidates: Sequence[PartT],
    measure: Measure,
    *,
    removed: Collection[Part] = (),
    activations_gb: float = 8.0,
    work: Path | None = None,
    progress: bool = True,
    description: str = "layers skipped",
) -> dict[PartT, list[Tensor]]:
    """Return candidate -> what is measured of the model without it, batch by batch.

    The values are those of separate passes through models without the part: the same operations
    on the same numbers. What lies below a candidate runs once for all candidates. States are not
    kept from one call to the next: that would spare one pass in as many as there are candidates,
    and hold the states of all calibration tokens.

    Args:
        model: a causal LM; neither its weights nor its mode are changed.
        candidates: parts to leave out, one at a time; the number of layers stands for none.
        removed: parts left out always.
        activations_gb: most memory for the states and logits of a batch, in 10^9 bytes.
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: the layers of a streamed model cannot be run one by one.
        CalibrationError: one sequence exceeds the memory.
        NumericsError: the model's own states are NaN or infinite.
    """
    size = affordable_batch(model, tokens, len(decoder_layers(model)), activations_gb)
    batches = list(tokens.batches(size, trim=True))
    found: dict[PartT, list[Tensor]] = {each: [] for each in candidates}
    split = any(not isinstance(part, int) for part in (*candidates, *removed))
    with ExitStack() as stack:
        gone = stack.enter_context(silenced(model)) if split else set[Sublayer]()
        forward = stack.enter_context(PartialForward(model))
        stack.enter_context(torch.no_grad())
        without = _Without(removed, gone)
        if is_streamed(model):
            logits = stack.enter_context(
                _by_layer(model, forward, batches, candidates, without, work, progress)
            )
        else:
            logits = _by_batch(forward, without)
        total = len(candidates) * len(tokens)
        bar = stack.enter_context(
            tqdm(total=total, unit="seq", desc=description, delay=2, disable=not progress)
        )
        for number, (ids, mask) in enumerate(batches):
            for each, values in found.items():
                values.append(measure(logits(each, number, ids, mask), ids, mask, number * size))
                bar.update(len(ids))
    return found


Logits: TypeAlias = Callable[[Part, int, Tensor, Tensor], Tensor]
"""Candidate, batch number, ids, mask -> the logits of the model without the candidate."""


def _by_batch(forward: PartialForward, without: _Without) -> Logits:
    """Let each candidate begin at its layer, with the states of the model that lacks none."""
    recorded = None

    def logits(part: Part, number: int, ids: Tensor, mask: Tensor) -> Tensor:
        nonlocal recorded
        if recorded != number:
            with without() as whole:
                last = forward.hidden(ids, mask, skip=whole, record=True)
            require_finite_states(forward.states, last, mask)
            del last
            recorded = number
        layer = _layer_of(part)
        state = forward.states[layer] if layer else None
        handed = forward.handed.get(layer, ())
        with without(part) as whole:
            return forward.logits(ids, mask, start=layer, state=state, handed=handed, skip=whole)

    return logits


def _layer_of(part: Part) -> int:
    return part if isinstance(part, int) else part[0]


class _Without:
    """Leaves parts out of passes: what is removed always, and a candidate.

    Args:
        gone: sub-layers in it add nothing to the stream, see :func:`.silenced`.
    """

    def __init__(self, removed: Collection[Part], gone: set[Sublayer]) -> None:
        self._removed, self._gone = removed, gone

    @contextmanager
    def __call__(self, *more: Part) -> Iterator[set[int]]:
        """Silence sub-layers meanwhile; yield the layers of which nothing is left."""
        parts = [*self._removed, *more]
        sublayers = {part for part in parts if not isinstance(part, int)}
        self._gone |= sublayers
        try:
            yield {part for part in parts if isinstance(part, int)} | whole_layers(sublayers)
        finally:
            self._gone.clear()


_MODEL = -1  # stands for the states of the model that skips nothing but what is removed


@contextmanager
def _by_layer(
    model: Any,
    forward: PartialForward,
    batches: Sequence[TokenBatch],
    candidates: Sequence[Part],
    without: _Without,
    work: Path | None,
    progress: bool,
) -> Iterator[Logits]:
    """Take all batches, each without one of the candidates, through a streamed model.

    Layers are outside, so that each is read once. The LM head is held inside the context.

    Raises:
        ArchitectureError: the layers of this model cannot be run one by one.
        NumericsError: the model's own states are NaN or infinite.
    """
    depth, device = len(decoder_layers(model)), model.get_input_embeddings().weight.device
    size = (len(candidates) + 2) * states_bytes(model, batches)
    names = {each: str(number) for number, each in enumerate(candidates)}
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

        require_finite(0)
        with without() as whole:
            kept = [layer for layer in range(depth) if layer not in whole]
        try:
            for layer, number, ids, mask in walk(model, batches, kept, progress=progress):
                state = store.load((_MODEL, number), device)
                with without():
                    output = forward.layer(layer, ids, mask, state)
                    for each, name in names.items():
                        if _layer_of(each) < layer:
                            skipping = store.load((name, number), device)
                            store[name, number] = forward.layer(layer, ids, mask, skipping)
                for each, name in names.items():
                    if _layer_of(each) == layer:
                        with without(each) as whole:
                            store[name, number] = (
                                state if layer in whole else forward.layer(layer, ids, mask, state)
                            )
                store[_MODEL, number] = output
                finite.append(torch.isfinite(output).all())
                if number == len(batches) - 1:
                    require_finite(layer + 1)
        except LayersEntangled:
            raise entangled(model) from None
        with held_layer(model, HEAD):
            places = {each: name for each, name in names.items() if _layer_of(each) < depth}

            def logits(part: Part, number: int, ids: Tensor, mask: Tensor) -> Tensor:
                state = store.load((places.get(part, _MODEL), number), device)
                return forward.logits(ids, mask, start=depth, state=state)

            yield logits


@dataclass(frozen=True)
class GreedyStep(Generic[PartT]):
    """A part that a greedy search removes, and what the rest then loses (less is better)."""

    part: PartT
    loss: float


def greedy_search(
    record: Path,
    candidates: Callable[[Sequence[PartT]], Sequence[PartT]],
    losses: Callable[[Sequence[PartT], Sequence[PartT]], Mapping[PartT, float]],
) -> list[GreedyStep[PartT]]:
    """Remove one part after another, each time the one without which the loss is lowest.

    Of equals the first candidate goes. An interrupted search continues after its last whole step,
    and so does one for more parts than the search before it.

    Args:
        record: file of the steps.
        candidates: parts removed so far -> those of which the next is one; none ends the search.
        losses: candidates and parts removed so far -> the loss without each.
    """
    steps: list[GreedyStep[PartT]] = []
    known = _recorded(record)
    while left := candidates(order := [step.part for step in steps]):
        if len(steps) < len(known):
            steps.append(known[len(steps)])
            continue
        found = losses(left, order)
        best = min(left, key=found.__getitem__)
        steps.append(GreedyStep(best, found[best]))
        atomic_write_text(record, json.dumps([[step.part, step.loss] for step in steps]))
    return steps


def _recorded(record: Path) -> list[GreedyStep[Any]]:
    if not record.exists():
        return []
    try:
        return [
            GreedyStep(tuple(part) if isinstance(part, list) else part, float(loss))
            for part, loss in json.loads(record.read_text(encoding="utf-8"))
        ]
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged and is made anew: %s", record, error)
        return []


def greedy_layers(
    record: Path, allowed: Sequence[int], n: int, losses: Callable[..., Mapping[int, float]]
) -> list[GreedyStep[int]]:
    """Remove ``n`` of the allowed layers greedily, see :func:`greedy_search`.

    Args:
        record: file of the steps.
        losses: called as ``losses(layers, removed=layers, description=text)``.
    """
    return greedy_search(
        record,
        lambda order: [each for each in allowed if each not in order] if len(order) < n else [],
        lambda left, order: losses(
            left, removed=order, description=f"layer {len(order) + 1} to remove"
        ),
    )


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
