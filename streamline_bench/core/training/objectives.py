"""What the replacement is trained for: hidden states (``mse``) or next tokens (``lm``).

An objective gives, per micro-batch, a *sum* of losses and knows how many terms it has, so that
steps of several micro-batches of unequal length weigh every token alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.training.sources import Batch, StateSource
from streamline_bench.core.training.student import Student
from streamline_bench.core.training.teacher import LayerCall, Passthrough, returns_tuple, slots

__all__ = ["LmObjective", "MseObjective", "Objective", "pruned"]


class Objective(Protocol):
    """A training objective."""

    def loss_sum(self, batch: Batch, source: StateSource | None) -> Tensor:
        """Return the sum of the losses of all terms of a batch, a float32 scalar."""
        ...

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        """Return the number of terms of a batch with these masks ``[batch, seq]``."""
        ...


class MseObjective:
    """Mean squared error between the student's output and the state behind the block.

    arXiv:2403.19135, eq. 4. One term per token: the mean over its ``d`` elements, in float32;
    padding has no term.
    """

    def __init__(self, student: Student, *, bidirectional: bool = False) -> None:
        self._student = student
        self._bidirectional = bidirectional

    def loss_sum(self, batch: Batch, source: StateSource | None) -> Tensor:
        if source is None:
            raise ValueError("mse needs the states around the block")
        states = source.states(batch)
        calls = states.calls
        if self._bidirectional:
            calls = tuple(_without_mask(call, batch.mask) for call in calls)
        output = self._student.run(states.hidden, calls)
        errors = (output.float() - states.target.float()).pow(2).mean(dim=-1)
        # Not multiplied by the mask: what stands in padding may be infinite.
        return errors[batch.mask].sum()

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        return int(mask.sum())


class LmObjective:
    """Next-token cross entropy of a model; a replacement's must be inside :func:`pruned`.

    One term per token that has a predecessor (and is a target, where the batch names targets).
    Frozen layers before the replacement record nothing for the backward pass, because nothing
    before them asks for gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def loss_sum(self, batch: Batch, source: StateSource | None) -> Tensor:
        output = self._model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        counted = _predicted(batch.mask, batch.targets)
        logits = output.logits[:, :-1][counted].float()
        labels = batch.ids[:, 1:][counted]
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        return int(_predicted(mask, targets).sum())


@contextmanager
def pruned(model: nn.Module, start: int, n: int, student: Student) -> Iterator[None]:
    """Let ``model`` compute as if the block were replaced by the student.

    The student takes the first slots of the block and the others hand the states on: every layer
    keeps its index, so that per-layer masks and rotary angles stay right without a new config.
    """
    layers = decoder_layers(model)
    as_tuple = returns_tuple(model)
    replaced: dict[int, nn.Module] = {
        start + i: Passthrough(layers[start + i], as_tuple) for i in range(n)
    }
    for offset, slot in enumerate(student.slots):
        slot.as_tuple = as_tuple
        replaced[start + offset] = slot
    with slots(layers, replaced):
        yield
    for slot in student.slots:
        slot.as_tuple = False


def _predicted(mask: Tensor, targets: Tensor | None) -> Tensor:
    predicted = mask[:, 1:] & mask[:, :-1]
    return predicted if targets is None else predicted & targets[:, 1:]


def _without_mask(call: LayerCall, mask: Tensor) -> LayerCall:
    """Replace a layer's mask with one that lets every token see every other (a quirk)."""
    batch, length = mask.shape
    open_mask: Any = torch.zeros((batch, 1, length, length), device=mask.device)
    return LayerCall({**call.kwargs, "attention_mask": open_mask})
