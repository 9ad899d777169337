"""The state of a training in one file, so that a killed training continues to the same result.

Everything is a tensor in a safetensors file or JSON in its header: never a pickle. The file is
replaced in one step, so a kill leaves the old state or the new. No generator needs saving: the
order of the data is a function of seed and step, and nothing else draws random numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_bench.core.files.staging import sync_path
from streamline_bench.errors import OutputError

_FILE = "training.safetensors"


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
    try:
        save_file(tensors, staging, metadata={"key": key, "numbers": json.dumps(numbers)})
        sync_path(staging)
        staging.replace(target)
        sync_path(folder)
    except OSError as error:
        raise OutputError(f"The training checkpoint {target} cannot be written: {error}.") from None
    finally:
        staging.unlink(missing_ok=True)


def load_state(folder: Path, key: str) -> TrainingState | None:
    """Return the state of an earlier attempt at the same training, if there is one."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            # Cloned: the mapped file is replaced by the next checkpoint.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None  # not ours, or torn by a full disk: the training starts anew
    state = TrainingState(**json.loads(metadata["numbers"]))
    state.pending = (float(state.pending[0]), int(state.pending[1]))
    for group in _TENSORS:
        setattr(state, group, _group(tensors, group))
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


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = group + "/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
