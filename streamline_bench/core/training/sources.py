"""Where the states around the block come from: the teacher, anew each time, or a file.

One epoch streams. Several epochs read what the teacher said once from a memory-mapped file, unless
that would exceed the budget. The file is keyed by weights, tokens and block, and described by a
small JSON that is written last, so that a half-written file is never taken for a whole one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files.staging import atomic_write_text, sync_path
from streamline_bench.core.training.teacher import BlockStates, Teacher
from streamline_bench.errors import OutputError

__all__ = ["ActivationCache", "Batch", "Rows", "StateSource", "StreamedStates", "make_batch"]

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
            return cls(teacher, _map(path, described["shape"], described["dtype"]))
        path.with_suffix(".json").unlink(missing_ok=True)
        batches = torch.split(torch.arange(len(tokens)), batch_size)
        values: Tensor | None = None
        for rows in tqdm(batches, desc="activations", unit="batch", disable=not progress):
            batch = make_batch(tokens, rows, device)
            states = teacher.run(batch.ids, batch.mask)
            if values is None:
                shape = (2, *tokens.input_ids.shape, states.hidden.shape[-1])
                dtype = str(states.hidden.dtype).removeprefix("torch.")
                values = _create(path, shape, dtype)
            used = batch.ids.shape[1]
            values[0, rows, :used] = states.hidden.cpu()
            values[1, rows, :used] = states.target.cpu()
        if values is None:
            raise OutputError(f"No sequences to store in {path}.")
        sync_path(path)
        description = {"key": key, "shape": list(values.shape), "dtype": dtype}
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


def _create(path: Path, shape: Sequence[int], dtype: str) -> Tensor:
    size = torch.Size(shape).numel() * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    try:
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            # Reserved at once, so that a full disk is an error now and not a SIGBUS later.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"The activation cache {path} ({size / 1e9:.1f} GB) cannot be written: "
            f"{error.strerror}; free space or lower training.cache_gb."
        ) from error
    return _map(path, shape, dtype)


def _map(path: Path, shape: Sequence[int], dtype: str) -> Tensor:
    count = torch.Size(shape).numel()
    flat = torch.from_file(str(path), shared=True, size=count, dtype=getattr(torch, dtype))
    return flat.view(*shape)
