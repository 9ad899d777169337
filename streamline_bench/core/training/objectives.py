"""What the replacement is trained for: hidden states (``mse``) or next tokens (``lm``).

An objective gives, per micro-batch, a *sum* of losses and knows how many terms it has, so that
steps of several micro-batches of unequal length weigh every token alike.

The states around the block come from the teacher, anew each time, or from a file: one epoch
streams; several read what the teacher gave once, unless that would exceed the budget. The file is
keyed by weights, tokens and block, and described by a small JSON that is written last, so that a
half-written file is never taken for a whole one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files.mapped_tensors import create_mapped, open_mapped
from streamline_bench.core.files.staging import atomic_write_text, sync_path
from streamline_bench.core.training.block import (
    BlockStates,
    LayerCall,
    Passthrough,
    Student,
    Teacher,
    returns_tuple,
    slots,
)
from streamline_bench.errors import OutputError

log = logging.getLogger(__name__)

Rows = Tensor
"""Indices of sequences, int64 ``[batch]``."""


@dataclass(frozen=True)
class Batch:
    """Sequences on the model's device; columns in which all are padding are cut.

    Attributes:
        ids: int64 ``[batch, seq]``; mask: bool ``[batch, seq]``, true where there is a token.
        rows: which sequences of their set they are.
        targets: bool ``[batch, seq]``, true for the tokens to predict; None: all.
    """

    ids: Tensor
    mask: Tensor
    rows: Rows
    targets: Tensor | None = None


def make_batch(tokens: CalibrationTokens, rows: Rows, device: torch.device) -> Batch:
    """Gather sequences."""
    mask = tokens.attention_mask[rows]
    used = int(mask.any(dim=0).nonzero().max()) + 1
    ids = tokens.input_ids[rows, :used]
    targets = None if tokens.target_mask is None else tokens.target_mask[rows, :used].to(device)
    return Batch(ids.to(device), mask[:, :used].to(device), rows, targets)


class StateSource(Protocol):
    """Gives the states around the block for a batch of one set of sequences."""

    def states(self, batch: Batch) -> BlockStates: ...


class StreamedStates:
    """Asks the teacher each time; stores nothing."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def states(self, batch: Batch) -> BlockStates:
        return self._teacher.run(batch.ids, batch.mask)


class ActivationCache:
    """States of all sequences of a set, ``[2, n, T, d]`` in a memory-mapped file.

    ``[0]`` holds the states before the block, ``[1]`` those behind it, in the dtype in which the
    teacher gives them.
    """

    def __init__(self, teacher: Teacher, values: Tensor) -> None:
        self._teacher = teacher
        self._values = values

    def states(self, batch: Batch) -> BlockStates:
        used = batch.ids.shape[1]
        hidden, target = (
            part[batch.rows, :used].to(batch.ids.device) for part in self._values.unbind(0)
        )
        return BlockStates(hidden, target, self._teacher.replay_calls(batch.ids, batch.mask))

    @classmethod
    def open(
        cls,
        path: Path,
        key: str,
        tokens: CalibrationTokens,
        teacher: Teacher,
        *,
        device: torch.device,
        batch_size: int,
        progress: bool,
    ) -> ActivationCache:
        """Take up the file of an earlier attempt with the same key, or fill a new one.

        Raises:
            OutputError: the file cannot be written.
        """
        described = _read_description(path)
        if described.get("key") == key and path.is_file():
            log.info("activations: reusing %s", path.name)
            return cls(
                teacher, open_mapped(path, described["shape"], getattr(torch, described["dtype"]))
            )
        path.with_suffix(".json").unlink(missing_ok=True)
        batches = torch.split(torch.arange(len(tokens)), batch_size)
        values: Tensor | None = None
        for rows in tqdm(batches, desc="activations", unit="batch", disable=not progress):
            batch = make_batch(tokens, rows, device)
            states = teacher.run(batch.ids, batch.mask)
            if values is None:
                shape = (2, *tokens.input_ids.shape, states.hidden.shape[-1])
                values = create_mapped(path, shape, states.hidden.dtype, "lower training.cache_gb")
            used = batch.ids.shape[1]
            values[0, rows, :used] = states.hidden.cpu()
            values[1, rows, :used] = states.target.cpu()
        if values is None:
            raise OutputError(f"No sequences to store in {path}.")
        sync_path(path)
        name = str(values.dtype).removeprefix("torch.")
        description = {"key": key, "shape": list(values.shape), "dtype": name}
        atomic_write_text(path.with_suffix(".json"), json.dumps(description))
        return cls(teacher, values)


def cache_bytes(sets: Sequence[CalibrationTokens], hidden_size: int, item_size: int) -> int:
    """Return the size in bytes of the caches of several sets."""
    positions = sum(tokens.input_ids.numel() for tokens in sets)
    return 2 * positions * hidden_size * item_size


def _read_description(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


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
