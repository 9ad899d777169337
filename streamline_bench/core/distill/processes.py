"""One process or several: how micro-batches are shared out and sums are formed.

Hidden-state training uses one process. LM training goes through accelerate, so that a program that
calls it directly can be spread over the GPUs of a machine by ``accelerate launch``. Recipes
(``streamline-bench compress``, ``recipe=`` in the harness) are carried out by one process, because
all the rest of a compression is; they refuse more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AcceleratedProcesses", "Processes"]


class Processes:
    """A single process."""

    count = 1
    index = 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the model whose parameters' gradients are to be shared."""
        return model

    def share(self, micro_batches: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Return this process's micro-batches with 1, or 0 where one only keeps step.

        Every process must run as many backward passes as the others, or they wait for ever.
        """
        rounds = -(-len(micro_batches) // self.count)
        mine = [(micro_batches[i], 1) for i in range(self.index, len(micro_batches), self.count)]
        return mine + [(micro_batches[0], 0)] * (rounds - len(mine))

    def own(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return this process's part, without filling up (no gradients are exchanged)."""
        return batches[self.index :: self.count]

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients only in the last backward pass of a step."""
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes."""
        return value

    def wait(self) -> None:
        """Wait for all processes."""

    def close(self) -> None:
        """Let go of the model."""


class AcceleratedProcesses(Processes):
    """The processes of ``accelerate launch``, or a single one without it."""

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.count = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self._model: Any = None

    def prepare(self, model: nn.Module) -> nn.Module:
        # A lone process keeps the model where the caller put it.
        self._model = self._accelerator.prepare_model(model, device_placement=self.count > 1)
        return self._model  # type: ignore[no-any-return]

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        if last:
            return nullcontext()
        return self._accelerator.no_sync(self._model)  # type: ignore[no-any-return]

    def sum(self, value: Tensor) -> Tensor:
        return self._accelerator.reduce(value, reduction="sum")  # type: ignore[no-any-return]

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        self._accelerator.free_memory()
        self._model = None
