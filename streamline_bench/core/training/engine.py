"""What computes a training's losses and takes its steps with AdamW.

Here torch does it, with or without FSDP2; in :mod:`.zero` DeepSpeed does. The steps are the same:
the two differ in what each process of a launch holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.sharding import moments_on_cpu, shard, spread_moments
from streamline_bench.core.training.state import TrainingState, load_moments, optimizer_moments

if TYPE_CHECKING:
    from streamline_bench.core.training.loop import Trainee

LossSum: TypeAlias = Callable[[Any, Any], Tensor]
"""From a batch, and where its states come from, to the sum of its losses."""


class Engine(Protocol):
    """Takes the steps of one training.

    Attributes:
        parameters: what it changes.
        optimizer: whose learning rate is that of the next step.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def loss(self, batch: Any, source: Any) -> Tensor:
        """Return the sum of a batch's losses."""

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of the step."""

    def step(self) -> None:
        """Clip the gradients, change the parameters, and let go of the gradients.

        Raises:
            RuntimeError: a gradient is not finite, and parameters and gradients are as they were.
            FloatingPointError: the same, and the gradients are gone.
        """

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's whole state, see :func:`.state.optimizer_moments`.

        All processes must ask where weights are spread; the main one gets it.
        """

    def close(self) -> None:
        """Let go of what only a training needs."""


class TorchEngine:
    """Torch's own passes and AdamW, on whole weights or on those that FSDP2 divides.

    Args:
        model: to be divided; None: every process holds all of what is trained.
        state: where the training goes on, if it has taken steps.
    """

    def __init__(
        self, trainee: Trainee, model: nn.Module | None, loss: LossSum, training: TrainingSpec,
        lr: float, state: TrainingState,
    ) -> None:  # fmt: skip
        self._spread = model is not None
        if model is not None:
            shard(model)
        self._loss = loss
        self._max_norm = training.max_grad_norm
        self.parameters = list(trainee.named_parameters().values())
        device = self.parameters[0].device.type
        self.optimizer: torch.optim.Optimizer = adamw(self.parameters, training, lr, device)
        self.optimizer.zero_grad()  # from elsewhere
        if state.step:
            trainee.load(state.weights)
            given = state.moments
            load_moments(
                self.optimizer, spread_moments(given, self.parameters) if self._spread else given
            )

    def loss(self, batch: Any, source: Any) -> Tensor:
        return self._loss(batch, source)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self._max_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()  # a validation or checkpoint has its own copies

    def moments(self) -> dict[str, Tensor]:
        if self._spread:  # all of them give their parts
            return moments_on_cpu(self.optimizer)
        return optimizer_moments(self.optimizer) if current().main else {}

    def close(self) -> None:
        self.optimizer.zero_grad()  # as large as what is trained


def adamw(
    parameters: list[nn.Parameter], training: TrainingSpec, lr: float, device: str
) -> torch.optim.AdamW:
    """Return the optimizer of all trainings; fused on GPUs."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=training.betas, weight_decay=training.weight_decay,
        fused=device == "cuda" or None,
    )  # fmt: skip
