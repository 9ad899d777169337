"""What is minimised, errors of hidden states or of next tokens, and the training loop.

An objective gives, per micro-batch, a *sum* of losses and knows how many terms it has, so that
steps of several micro-batches of unequal length weigh every token alike. The loop is the same for
every objective: steps, validation, checkpoints.

Several processes (:mod:`streamline_bench.core.machine.ranks`) share the rows of a step and add up
the gradients of their sums, so that each takes the step that one process would take, but for the
rounding of the sums. The main one writes.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.batch import Batch, make_batch, predicted
from streamline_bench.core.training.block import StateSource, Student, recomputed
from streamline_bench.core.training.distillation import KdObjective, TeacherLogits
from streamline_bench.core.training.engine import Engine, TorchEngine
from streamline_bench.core.training.head import loss_of_logits
from streamline_bench.core.training.sharding import is_sharded, is_zero, refuse_launch
from streamline_bench.core.training.state import (
    CosineSchedule,
    StepPlan,
    TrainingState,
    load_state,
    save_state,
)
from streamline_bench.errors import NumericsError, OutputError

log = logging.getLogger(__name__)

_IN_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_SMALLEST = 1e-12  # of a norm that is divided by
_CURVE_ROWS = 400  # about so many, however long the training


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the ``d`` elements of each token (arXiv:2403.19135, eq. 4).

    Args:
        output, target: float32 ``[tokens, d]``.

    Returns:
        float32 ``[tokens]``.
    """
    return (output - target).pow(2).mean(dim=-1)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token over the squared norm of its own target.

    The next layer normalises a state before it reads it, so that an error counts in relation to
    the state. In trained models the first token is often a thousand times as large as the others,
    and holds nearly all of a plain squared error.
    """
    return (output - target).pow(2).sum(dim=-1) / target.pow(2).sum(dim=-1).clamp_min(_SMALLEST)


def direction_error(output: Tensor, target: Tensor) -> Tensor:
    """1 - cosine between output and target, plus the squared difference of their log norms."""
    cosine = nn.functional.cosine_similarity(output, target, dim=-1)
    squares = output.pow(2).sum(dim=-1), target.pow(2).sum(dim=-1)
    logs = [square.clamp_min(_SMALLEST).log() / 2 for square in squares]
    return 1 - cosine + (logs[0] - logs[1]).pow(2)


STATE_ERRORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": squared_error,
    "relative_mse": relative_error,
    "cosine": direction_error,
}
"""Objectives on the states behind the block, one term per token."""


class StateObjective:
    """Error between the student's output and the state behind the block.

    One term per token, in float32; padding has no term. The network is small: every process of a
    launch has all of it.

    Args:
        error: one of :data:`STATE_ERRORS`.
        bidirectional: let every token see every other (a quirk of the reference).
    """

    def __init__(
        self, student: Student, error: Callable[[Tensor, Tensor], Tensor] = squared_error,
        *, bidirectional: bool = False,
    ) -> None:  # fmt: skip
        self.model: nn.Module | None = None
        self._student = student
        self._error = error
        self._bidirectional = bidirectional

    def loss_sum(self, batch: Batch, source: Any) -> Tensor:
        """Return the sum of the losses of all terms of a batch, a float32 scalar."""
        if source is None:
            raise ValueError("an error of states needs the states around the block")
        states = source.states(batch)
        calls = states.calls
        if self._bidirectional:
            length = batch.mask.shape[1]
            open_mask = torch.zeros((len(batch.mask), 1, length, length), device=batch.mask.device)
            calls = tuple({**call, "attention_mask": open_mask} for call in calls)
        output = self._student.run(states.hidden, calls)
        # Not multiplied by the mask: what stands in padding may be infinite.
        output, target = (each.flatten(0, 1) for each in (output, states.target))
        return self._error(output[batch.kept].float(), target[batch.kept].float()).sum()

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        """Return the number of terms of a batch with these masks ``[batch, seq]``."""
        return int(mask.sum())


class LmObjective:
    """Next-token cross entropy of a model; a replacement's must be inside :func:`.block.pruned`.

    One term per token that has a predecessor (and is a target, where the batch names targets).
    Frozen layers before the replacement record nothing for the backward pass, because nothing
    before them asks for gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model

    def loss_sum(self, batch: Batch, source: Any) -> Tensor:
        labels = batch.ids.flatten()[batch.predicting + 1]

        def loss(logits: Tensor, numbers: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.float(), labels[numbers], reduction="sum")

        return loss_of_logits(self.model, batch.ids, batch.mask, batch.predicting, loss)

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        return int(predicted(mask, targets).sum())


Objective: TypeAlias = StateObjective | LmObjective | KdObjective


class Trainee(Protocol):
    """Float32 parameters that can be saved and put back.

    Attributes:
        label: what it is called in messages (``replacement``).
        task: what is done to it, for the progress bar (``distill``).
        draws: whether a training step draws random numbers.
    """

    label: str
    task: str
    draws: bool

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what the optimizer changes, from the bottom of the model to its top."""

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of all weights on the CPU."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights given by :meth:`state_on_cpu`."""

    def begin(self, step: int | None) -> None:
        """Prepare for a training step (0-based), or, with None, for a validation.

        Whatever is drawn at random during a step must be a function of its number, so that a
        killed training continues to the same result.
        """

    def take(self, rows: slice, of: int) -> None:
        """Draw for ``of`` rows of a micro-batch in the next pass, which has these rows of it."""


@dataclass(frozen=True)
class DataSet:
    """Sequences, and where the states around the block, or the dense logits, come from."""

    tokens: CalibrationTokens
    source: StateSource | TeacherLogits | None = None

    def terms(self, objective: Objective, rows: Tensor | slice = slice(None)) -> int:
        """Return the number of terms that an objective has for some rows (default: all)."""
        targets = self.tokens.target_mask
        mask = self.tokens.attention_mask[rows]
        return objective.terms(mask, None if targets is None else targets[rows])


def open_work_folder(work: Path) -> None:
    """Make the folder of a training.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {work} cannot be written: {error.strerror}.") from None


@dataclass
class Loop:
    """Trains a student. All that changes while it runs is in ``state`` and in the student.

    Attributes:
        work: folder of checkpoint and ``curve.jsonl``.
        key: of the training; the checkpoint of another one is left alone.
    """

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
    progress: bool = True

    def run(self) -> TrainingState:
        """Train to the end, from the last checkpoint if there is one; return the final state.

        Raises:
            NumericsError: a loss or gradient is not finite; the message names the step.
            OutputError: ``work`` cannot be written, or is not the same for all processes.
        """
        refuse_launch(self.training)
        tensors = current().main or not self._spread  # else the main one's are spread
        self.state = load_state(self.work, self.key, tensors=tensors) or TrainingState()
        if self.state.step != current().first(lambda: self.state.step):
            raise OutputError(
                f"The processes of this training do not see the same folder {self.work}; set "
                "STREAMLINE_BENCH_CACHE to one that all machines share."
            )
        self._began = time.monotonic() - self.state.seconds
        self._engine = self._new_engine()
        if self.state.step:
            log.info(
                "training the %s: continuing after step %d of %d",
                self.student.label, self.state.step, self.plan.steps,
            )  # fmt: skip
            self.state.forget_copies()
        else:
            self._validate(lr=None)
        spec = self.training
        with self._recomputing(), tqdm(
            total=self.plan.steps, initial=self.state.step, unit="step",
            desc=f"{self.student.task} ({spec.objective})", disable=not self.progress,
        ) as bar:  # fmt: skip
            while self.state.step < self.plan.steps:
                loss = self._step()
                bar.set_postfix(loss=f"{loss:.4g}", best=f"{self.state.best_loss:.4g}")
                bar.update()
                step = self.state.step
                if step % spec.checkpoint_every == 0 or step == self.plan.steps:
                    self._checkpoint()
        self._engine.close()
        del self._engine  # the moments are twice as large as what is trained
        rows = "".join(json.dumps(row) + "\n" for row in self.state.curve)
        if current().main:
            atomic_write_text(self.work / "curve.jsonl", rows)
        return self.state

    def _new_engine(self) -> Engine:
        """Prepare what takes the steps, after those of the last checkpoint."""
        model, peak = self.objective.model, self.schedule.peak
        if model is not None and is_zero():
            from streamline_bench.core.training.zero import ZeroEngine

            return ZeroEngine(
                self.student, model, self._loss, self.training, peak, self.state, self.device
            )
        divided = model if self._spread else None
        return TorchEngine(self.student, divided, self._loss, self.training, peak, self.state)

    def _recomputing(self) -> AbstractContextManager[None]:
        if self.objective.model is None or not self.training.gradient_checkpointing:
            return nullcontext()
        return recomputed(decoder_layers(self.objective.model))

    @property
    def _spread(self) -> bool:
        """Whether the model's weights are divided among the processes."""
        return self.objective.model is not None and is_sharded()

    def summary(self) -> dict[str, Any]:
        """Return what the manifest records of a finished training; JSON."""
        state = self.state
        return {
            "steps": self.plan.steps, "epochs": self.plan.epochs,
            "sequences": len(self.train.tokens),
            "validation_sequences": len(self.validation.tokens), "tokens": state.tokens,
            "lr": self.schedule.peak, "final_lr": self.schedule.at(self.plan.steps - 1),
            "initial_loss": state.curve[0]["val_loss"], "best_loss": state.best_loss,
            "best_step": state.best_step, "seconds": round(state.seconds, 3),
            **({"processes": current().count} if current().count > 1 else {}),
        }  # fmt: skip

    def _step(self) -> float:
        state = self.state
        lr = self.schedule.at(state.step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self.student.begin(state.step)
        total, terms, tokens = self._backward()
        if not math.isfinite(total / terms):
            raise NumericsError(
                f"The loss of the {self.student.label} is {total / terms} {self._at_step}; lower "
                "training.lr or use autocast 'none'."
            )
        try:
            self._engine.step()
        except RuntimeError:  # raised before anything is clipped
            self._refuse_gradients()
            raise
        except FloatingPointError:
            raise self._error_of_norm() from None
        state.step += 1
        state.tokens += tokens
        state.pending = (state.pending[0] + total, state.pending[1] + terms)
        self._record(lr)
        return total / terms

    def _backward(self) -> tuple[float, int, int]:
        """Accumulate the step's gradients; return (sum of losses, terms, tokens) of all processes.

        A loss that is not finite is so in all processes, by the sum.
        """
        micro_batches = self.plan.micro_batches_of(self.state.step)
        masks = [self.train.tokens.attention_mask[rows] for rows in micro_batches]
        terms = max(sum(self.train.terms(self.objective, rows) for rows in micro_batches), 1)
        total = torch.zeros((), device=self.device)
        for batch, weight in self._passes(micro_batches):
            loss = self._engine.loss(batch, self.train.source)
            # FSDP and ZeRO give the mean over the processes, and theirs are parts of one sum.
            times = current().count * weight if self._spread else weight
            self._engine.backward(loss * (times / terms))
            total += loss.detach() * weight
        summed = self._add_up(float(total))
        return summed, terms, sum(int(mask.sum()) for mask in masks)

    def _passes(self, micro_batches: Sequence[Tensor]) -> Iterator[tuple[Batch, int]]:
        """Yield what this process computes of a step, and whether it counts (1) or not (0).

        A step without random numbers is shared out by its rows. Else each micro-batch is, as wide
        as it is in one process and one part, and the numbers of all its rows are drawn for each
        part of it.
        """
        ranks, tokens, plan = current(), self.train.tokens, self.plan
        alone = ranks.count == 1 and plan.part == plan.batch_size
        if alone or not self.student.draws:
            shares = [
                plan.share_of(self.state.step, rank, ranks.count) for rank in range(ranks.count)
            ]
            for rows, weight in self._in_step(shares):
                yield make_batch(tokens, rows, self.device), weight
            return
        for whole in micro_batches:
            share = torch.tensor_split(torch.arange(len(whole)), ranks.count)[ranks.rank]
            count = math.ceil(math.ceil(len(whole) / ranks.count) / plan.part)  # in every process
            for number, places in enumerate(torch.tensor_split(share, count), 1):
                weight = min(len(places), 1)
                begin = int(places[0]) if weight else 0  # a row that does not count: to draw
                own = slice(begin, begin + max(len(places), 1))
                self.student.take(own, len(whole))
                with torch.random.fork_rng(enabled=number < count):  # the next one draws the same
                    yield make_batch(tokens, whole[own], self.device, among=whole), weight

    def _in_step(self, shares: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, int]]:
        """Yield this process's batches; where weights are spread, as many as in every process."""
        own = shares[current().rank]
        yield from ((rows, 1) for rows in own)
        if self._spread:
            most = max(len(share) for share in shares)
            yield from ((shares[0][0], 0) for _ in range(most - len(own)))

    def _add_up(self, total: float) -> float:
        """Add up the gradients of all processes, in place, and the sums of their losses.

        What has no gradient anywhere has none afterwards.
        """
        ranks = current()
        if ranks.count == 1:
            return total
        if self._spread:  # FSDP or ZeRO has done it
            return ranks.sum_of([total])[0]
        parameters = self._engine.parameters
        used = [float(parameter.grad is not None) for parameter in parameters]
        total, *used = ranks.sum_of([total, *used])
        counted = [each for each, times in zip(parameters, used, strict=True) if times]
        for parameter in counted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([parameter.grad for parameter in counted if parameter.grad is not None])
        return total

    def _loss(self, batch: Batch, source: StateSource | TeacherLogits | None) -> Tensor:
        enabled = self.training.autocast == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self.objective.loss_sum(batch, source)

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
        norms = [gradient.norm() for gradient in gradients]
        if norms and not bool(torch.stack(norms).norm().isfinite()):
            raise self._error_of_norm() from None

    def _error_of_norm(self) -> NumericsError:
        return NumericsError(
            f"The gradient norm of the {self.student.label} is not finite {self._at_step}; lower "
            "training.lr or use autocast 'none'."
        )

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

    @torch.no_grad()
    def _validate(self, lr: float | None) -> None:
        tokens, state = self.validation.tokens, self.state
        self.student.begin(None)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = torch.split(torch.arange(len(tokens)), self.plan.part)
        count = current().count
        for rows, weight in self._in_step([batches[rank::count] for rank in range(count)]):
            batch = make_batch(tokens, rows, self.device)
            total += self._engine.loss(batch, self.validation.source).double() * weight
        summed = current().sum_of([float(total)])[0]
        loss = summed / max(self.validation.terms(self.objective), 1)
        if not math.isfinite(loss):
            raise NumericsError(
                f"The validation loss of the {self.student.label} is {loss} after step "
                f"{state.step}; lower training.lr or check the model's weights."
            )
        if loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            state.best = {}  # let go before the next copy is made
            state.best = self.student.state_on_cpu()
        self._add_row(lr, loss)

    def _add_row(self, lr: float | None, validation_loss: float | None) -> None:
        state = self.state
        total, terms = state.pending
        row = {
            "step": state.step, "lr": lr, "train_loss": total / terms if terms else None,
            "val_loss": validation_loss, "tokens": state.tokens,
            "seconds": round(time.monotonic() - self._began, 3),
        }  # fmt: skip
        state.curve.append(row)
        state.pending = (0.0, 0)

    def _checkpoint(self) -> None:
        self.state.seconds = time.monotonic() - self._began
        if self._spread or current().main:  # spread: all of them give their parts
            self.state.weights = self.student.state_on_cpu()
            self.state.moments = self._engine.moments()
        if current().main:
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
