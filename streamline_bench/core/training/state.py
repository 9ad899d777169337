"""Where a training stands: its learning rate, the order of its data, and the file that it resumes
from.

Rate and order are pure functions of seed and step, and nothing else draws random numbers, so that
the file needs no generator. It is a safetensors file with JSON in its header, never a pickle, and
is replaced in one step: a kill leaves the old state or the new.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_bench.core.files import sync_path
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.errors import CheckpointError, OutputError, library_errors

log = logging.getLogger(__name__)

_FILE = "training.safetensors"


@dataclass(frozen=True)
class CosineSchedule:
    """The learning rate as a function of the step.

    Attributes:
        peak, minimum: learning rates; the last of ``steps`` has exactly ``minimum``.
        steps: optimizer steps of the whole training.
        warmup: steps of linear warm-up; the last of them has ``peak``. If there are more than
            ``steps``, the peak is never reached.
        stride, horizon: the reference's deviation: step s stands at position ``s * stride`` of
            a cosine over ``horizon`` positions, which may end early or wrap.
        decay: the fall after the warm-up: half a cosine, or a straight line.
    """

    peak: float
    minimum: float
    steps: int
    warmup: int
    stride: int = 1
    horizon: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"

    @classmethod
    def of(cls, training: TrainingSpec, steps: int, hidden_size: int) -> CosineSchedule:
        """Return the schedule of a training of ``steps`` optimizer steps."""
        peak, warmup = learning_rate(training, hidden_size), training.warmup_steps
        warmup = round(steps * training.warmup_ratio) if warmup is None else warmup
        return cls(peak, peak * training.min_lr_ratio, steps, warmup, decay=training.decay)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step`` (0-based)."""
        position = step * self.stride
        if position < self.warmup:
            return self.peak * (position + 1) / self.warmup
        last = self.steps - 1 if self.horizon is None else self.horizon
        progress = (position - self.warmup) / max(last - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        share = cosine if self.decay == "cosine" else 1 - progress
        return self.minimum + (self.peak - self.minimum) * share


def learning_rate(training: TrainingSpec, hidden_size: int) -> float:
    """Return the peak learning rate; ``auto`` scales the paper's 2e-4 at width 4096."""
    if training.lr != "auto":
        return float(training.lr)
    return min(2e-4 * math.sqrt(4096 / hidden_size), 2e-3)


@dataclass(frozen=True)
class StepPlan:
    """The order of all training sequences over all epochs.

    Attributes:
        sequences: number of training sequences.
        batch_size: sequences of a micro-batch.
        accumulation: micro-batches of an optimizer step; the last step of an epoch may have fewer.
        epochs: passes over the sequences.
        seed: decides the order, which differs between epochs.
        at_once: most sequences that the memory holds; larger micro-batches are computed in parts.
    """

    sequences: int
    batch_size: int
    accumulation: int
    epochs: int
    seed: int
    at_once: int | None = None

    @classmethod
    def of(
        cls, training: TrainingSpec, sequences: int, seed: int, at_once: int | None = None
    ) -> StepPlan:
        """Plan ``training.epochs`` epochs, or as many as ``training.min_steps`` steps need."""
        per_step = training.batch_size * training.gradient_accumulation
        per_epoch = math.ceil(sequences / per_step)
        epochs = max(training.epochs, math.ceil(training.min_steps / per_epoch))
        return cls(
            sequences, training.batch_size, training.gradient_accumulation, epochs, seed, at_once
        )

    @property
    def part(self) -> int:
        """Most sequences that are computed together."""
        return min(self.batch_size, self.at_once or self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.sequences / (self.batch_size * self.accumulation))

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the whole training."""
        return self.epochs * math.ceil(self.sequences / self.batch_size)

    def micro_batches_of(self, step: int) -> list[Tensor]:
        """Return the row indices (int64) of each micro-batch of optimizer step ``step``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation
        rows = _order(self.sequences, self.seed, epoch)[within * per_step : (within + 1) * per_step]
        return list(torch.split(rows, self.batch_size))

    def share_of(self, step: int, rank: int, count: int) -> list[Tensor]:
        """Return what one of ``count`` processes computes; a step's rows are shared out.

        No part is larger than :attr:`part`. Of few rows, some processes have none.
        """
        batches = self.micro_batches_of(step)
        if count > 1:
            batches = [torch.tensor_split(torch.cat(batches), count)[rank]]
        parts = (part for rows in batches for part in torch.split(rows, self.part))
        return [part for part in parts if len(part)]


@lru_cache(maxsize=2)
def _order(sequences: int, seed: int, epoch: int) -> Tensor:
    # An odd multiplier keeps (seed, epoch) apart for all seeds and epochs in use.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(sequences, generator=generator)


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        step: optimizer steps done.
        weights: what is trained, and moments: AdamW's state (``<parameter index>.<name>``); both
            empty but while a checkpoint is written or read, because the trainee and its optimizer
            have them.
        best: a copy of the weights with the lowest validation loss.
        best_step, best_loss: when and what the lowest validation loss was (infinite: none yet).
        tokens: training tokens seen; seconds: time spent, over all attempts.
        pending: (sum of losses, number of terms) since the last row of the curve.
        curve: rows with step, lr, train_loss, val_loss, tokens, seconds.
    """

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = math.inf
    tokens: int = 0
    seconds: float = 0.0
    pending: tuple[float, int] = (0.0, 0)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def forget_copies(self) -> None:
        """Let go of what the trainee and its optimizer hold as well."""
        self.weights, self.moments = {}, {}


_NUMBERS = ("step", "best_step", "best_loss", "tokens", "seconds", "pending", "curve")
_TENSORS = ("weights", "best", "moments")


def save_state(folder: Path, key: str, state: TrainingState) -> None:
    """Write the state, replacing the one before.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors = {
        f"{group}/{name}": tensor.contiguous()
        for group in _TENSORS
        for name, tensor in getattr(state, group).items()
    }
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    target = folder / _FILE
    staging = folder / f".{_FILE}.{os.getpid()}.partial"
    what, advice = f"The training checkpoint {target} cannot be written", "check the free space"
    try:
        with library_errors(what, advice, OutputError):
            save_file(tensors, staging, metadata={"key": key, "numbers": json.dumps(numbers)})
            sync_path(staging)
            staging.replace(target)
            sync_path(folder)
    finally:
        staging.unlink(missing_ok=True)


def load_state(folder: Path, key: str, *, tensors: bool = True) -> TrainingState | None:
    """Return the state of an earlier attempt at the same training; None: there is none.

    Args:
        tensors: with them; else only where it stands.

    A file that a full disk cut off counts as none; a warning names it.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    what = f"The training checkpoint {path} cannot be read"
    try:
        with (
            library_errors(what, "the training starts anew", CheckpointError),
            safe_open(path, framework="pt") as file,
        ):
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            # Cloned: the mapped file is replaced by the next checkpoint.
            names = file.keys() if tensors else ()
            found = {name: file.get_tensor(name).clone() for name in names}
    except CheckpointError as error:
        log.warning("%s", error)
        return None
    state = TrainingState(**json.loads(metadata["numbers"]))
    state.pending = (float(state.pending[0]), int(state.pending[1]))
    for name, tensor in found.items():
        group, _, own = name.partition("/")
        getattr(state, group)[own] = tensor
    return state


def optimizer_moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter tensors on the CPU, by position and name.

    Where they are on the CPU, these are the optimizer's own.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu()
        for index, values in state.items()
        for name, value in values.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_moments` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
