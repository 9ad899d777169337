"""What the training loop trains: a replacement, or chosen parameters of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

__all__ = ["Trainee"]


class Trainee(Protocol):
    """Float32 parameters that can be saved and put back.

    Attributes:
        label: what it is called in messages (``replacement``).
        task: what is done to it, for the progress bar (``distill``).
    """

    label: str
    task: str

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer changes, always in the same order."""
        ...

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the same by name, from the bottom of the model to its top."""
        ...

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of all weights on the CPU."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights given by :meth:`state_on_cpu`."""
        ...

    def begin(self, step: int | None) -> None:
        """Prepare for a training step (0-based), or, with None, for a validation.

        Whatever is drawn at random during a step must be a function of its number, so that a
        training that was killed goes on as if it had not been.
        """
        ...
