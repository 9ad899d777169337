"""The training loop, the same for every objective: steps, validation, checkpoints.

It runs in one process, as all of a compression does.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.objectives import Batch, Objective, StateSource, make_batch
from streamline_bench.core.training.schedule import CosineSchedule, StepPlan
from streamline_bench.core.training.state import (
    TrainingState,
    load_moments,
    optimizer_moments,
    save_state,
)
from streamline_bench.errors import NumericsError

_IN_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_CURVE_ROWS = 400  # about so many, however long the training


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
        killed training continues to the same result.
        """
        ...


@dataclass(frozen=True)
class DataSet:
    """Sequences and, for ``mse``, where the states around the block come from."""

    tokens: CalibrationTokens
    source: StateSource | None

    def terms(self, objective: Objective, rows: Tensor | slice = slice(None)) -> int:
        """Return the number of terms that an objective has for some rows (default: all)."""
        targets = self.tokens.target_mask
        mask = self.tokens.attention_mask[rows]
        return objective.terms(mask, None if targets is None else targets[rows])


@dataclass
class Loop:
    """Trains a student. All that changes while it runs is in ``state`` and in the student."""

    student: Trainee
    objective: Objective
    training: TrainingSpec
    plan: StepPlan
    schedule: CosineSchedule
    train: DataSet
    validation: DataSet
    device: torch.device
    work: Path
    key: str
    state: TrainingState
    progress: bool = True

    def run(self) -> TrainingState:
        """Train to the end and return the final state.

        Raises:
            NumericsError: a loss or gradient is not finite; the message names the step.
        """
        self._began = time.monotonic() - self.state.seconds
        parameters = self.student.parameters()
        optimizer = self._optimizer(parameters)
        if self.state.step:
            self.student.load(self.state.weights)
            load_moments(optimizer, self.state.moments)
            self.state.forget_copies()
        else:
            self._validate(lr=None)
        bar = tqdm(
            total=self.plan.steps,
            initial=self.state.step,
            desc=f"{self.student.task} ({self.training.objective})",
            unit="step",
            disable=not self.progress,
        )
        with bar:
            while self.state.step < self.plan.steps:
                loss = self._step(optimizer, parameters)
                bar.set_postfix(loss=f"{loss:.4g}", best=f"{self.state.best_loss:.4g}")
                bar.update()
                if self._checkpoint_is_due():
                    self._checkpoint(optimizer)
        optimizer.zero_grad(set_to_none=True)  # as large as what was trained
        return self.state

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=self.schedule.peak,
            betas=self.training.betas,
            weight_decay=self.training.weight_decay,
        )

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        state = self.state
        lr = self.schedule.at(state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        self.student.begin(state.step)
        total, terms, tokens = self._backward(self.plan.micro_batches_of(state.step))
        self._require_finite(total / terms)
        try:
            torch.nn.utils.clip_grad_norm_(
                parameters, self.training.max_grad_norm, error_if_nonfinite=True
            )
        except RuntimeError:  # raised before anything is clipped: gradients are as they were
            self._refuse_gradients()
            raise
        optimizer.step()
        state.step += 1
        state.tokens += tokens
        state.pending = (state.pending[0] + total, state.pending[1] + terms)
        self._record(lr)
        return total / terms

    def _backward(self, micro_batches: Sequence[Tensor]) -> tuple[float, int, int]:
        """Accumulate gradients; return (sum of losses, terms, tokens)."""
        masks = [self.train.tokens.attention_mask[rows] for rows in micro_batches]
        terms = max(sum(self.train.terms(self.objective, rows) for rows in micro_batches), 1)
        total = torch.zeros((), device=self.device)
        for rows in micro_batches:
            loss = self._loss(make_batch(self.train.tokens, rows, self.device), self.train.source)
            (loss * (1 / terms)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(total), terms, sum(int(mask.sum()) for mask in masks)

    def _loss(self, batch: Batch, source: StateSource | None) -> Tensor:
        enabled = self.training.autocast == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self.objective.loss_sum(batch, source)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NumericsError(
                f"The loss of the {self.student.label} is {loss} {self._at_step}; lower "
                "training.lr or use autocast 'none'."
            )

    def _refuse_gradients(self) -> None:
        """Name the gradient at fault, where it is one."""
        named = self.student.named_parameters()
        fault = gradient_fault({name: parameter.grad for name, parameter in named.items()})
        if fault is not None:
            raise NumericsError(
                f"The gradient of {fault} of the {self.student.label} is NaN or infinite "
                f"{self._at_step}; lower training.lr, use autocast 'none', or check the weights "
                "there."
            ) from None
        gradients = [parameter.grad for parameter in named.values() if parameter.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        if not math.isfinite(norm):
            raise NumericsError(
                f"The gradient norm of the {self.student.label} is {norm} {self._at_step}; lower "
                "training.lr or use autocast 'none'."
            ) from None

    @property
    def _at_step(self) -> str:
        return f"at step {self.state.step + 1} of {self.plan.steps}"

    def _record(self, lr: float) -> None:
        step, steps = self.state.step, self.plan.steps
        wanted = min(self.training.validations, steps)
        if step * wanted // steps > (step - 1) * wanted // steps:
            self._validate(lr)
        elif step % max(steps // _CURVE_ROWS, 1) == 0:
            self._add_row(lr, None)

    def _validate(self, lr: float | None) -> None:
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise NumericsError(
                f"The validation loss of the {self.student.label} is {loss} after step "
                f"{self.state.step}; "
                "lower training.lr or check the model's weights."
            )
        if loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            self.state.best = self.student.state_on_cpu()
        self._add_row(lr, loss)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        tokens = self.validation.tokens
        self.student.begin(None)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in torch.split(torch.arange(len(tokens)), self.training.batch_size):
            batch = make_batch(tokens, rows, self.device)
            total += self._loss(batch, self.validation.source).double()
        terms = self.validation.terms(self.objective)
        return float(total) / max(terms, 1)

    def _add_row(self, lr: float | None, validation_loss: float | None) -> None:
        state = self.state
        total, terms = state.pending
        row = {
            "step": state.step,
            "lr": lr,
            "train_loss": total / terms if terms else None,
            "val_loss": validation_loss,
            "tokens": state.tokens,
            "seconds": round(self._elapsed(), 3),
        }
        state.curve.append(row)
        state.pending = (0.0, 0)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _checkpoint_is_due(self) -> bool:
        step = self.state.step
        return step % self.training.checkpoint_every == 0 or step == self.plan.steps

    def _checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        self.state.seconds = self._elapsed()
        self.state.weights = self.student.state_on_cpu()
        self.state.moments = optimizer_moments(optimizer)
        save_state(self.work, self.key, self.state)
        self.state.forget_copies()


def gradient_fault(gradients: Mapping[str, Tensor | None]) -> str | None:
    """Return where NaN or infinity arose, as ``'self_attn.q_proj' in layer 3``; None: nowhere.

    A NaN or infinite gradient spoils the gradients of all layers below it, so that the
    topmost place is the one to look at.

    Args:
        gradients: name of a parameter (``model.layers.3.self_attn.q_proj.weight``) -> its gradient,
            from the bottom of the model to its top; None: it got none.
    """
    faulty = [
        _place(name)
        for name, gradient in gradients.items()
        if gradient is not None and not bool(torch.isfinite(gradient).all())
    ]
    if not faulty:
        return None
    topmost = faulty[-1][0]
    places = itertools.takewhile(lambda place: place[0] == topmost, reversed(faulty))
    return list(places)[-1][1]


def _place(name: str) -> tuple[str, str]:
    """Return (layer, or the name itself outside of layers; description)."""
    name = name.removesuffix(".weight")
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return name, f"'{name}'"
    return found[1], f"'{found[2]}' in layer {found[1]}"
