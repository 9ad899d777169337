"""Trains a compressed model on the next token, with the loop that trains replacements."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.schema import RecoverySpec, TrainingSpec
from streamline_bench.core.training.loop import DataSet, Loop
from streamline_bench.core.training.objectives import LmObjective
from streamline_bench.core.training.schedule import CosineSchedule, StepPlan, learning_rate
from streamline_bench.core.training.state import TrainingState, load_state
from streamline_bench.core.training.trainer import key_of
from streamline_bench.errors import OutputError
from streamline_bench.methods.recovery.trainable_parameters import (
    LoraParameters,
    TrainableParameters,
    full_parameters,
    partial_parameters,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecoveryResult:
    """A trained model, as what changed in it.

    Attributes:
        weights: name in the model -> weight, float32 on the CPU: those with the lowest validation
            loss, updates of LoRA merged. Made from the model on each access; it is kept alive.
        curve: rows with step, lr, train_loss, val_loss, tokens, seconds.
        summary: what the manifest records; JSON.
    """

    weights: Mapping[str, Tensor]
    curve: list[dict[str, Any]]
    summary: dict[str, Any]


def choose_parameters(model: Any, spec: RecoverySpec, seed: int) -> TrainableParameters:
    """Prepare a model, in place, for the training that ``spec`` names.

    Raises:
        RecipeError, ArchitectureError: what is to be trained is not there.
    """
    if spec.kind == "lora":
        return LoraParameters(model, spec, seed)
    return partial_parameters(model, spec) if spec.kind == "partial" else full_parameters(model)


def train_recovery(
    model: Any,
    trainable: TrainableParameters,
    spec: RecoverySpec,
    tokens: CalibrationTokens,
    work: Path,
    *,
    seed: int,
    weights_sha256: str,
    progress: bool = True,
) -> RecoveryResult:
    """Train the chosen parameters of ``model`` where it stands; the model is used up.

    A training that was killed continues from its last checkpoint in ``work``; on CPU the result is
    the same to the bit.

    Args:
        trainable: from :func:`choose_parameters`, of this model.
        tokens: training data; ``validation_share`` of the sequences is held out.
        weights_sha256: hash of the model's weights before the training.

    Raises:
        CalibrationError: there are fewer than two sequences.
        NumericsError: a loss or gradient is not finite; the message names the step.
        OutputError: ``work`` cannot be written.
    """
    training, validation = tokens.split(spec.training.validation_share, seed)
    plan = StepPlan.of(spec.training, len(training), seed)
    schedule = _schedule(spec.training, plan, int(model.config.hidden_size))
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {work} cannot be written: {error.strerror}.") from None
    key = _key(model, spec, tokens, seed, weights_sha256)
    state = load_state(work, key) or TrainingState()
    if state.step:
        log.info("recovery: going on after step %d of %d", state.step, plan.steps)
    loop = Loop(
        student=trainable,
        objective=LmObjective(model),
        training=spec.training,
        plan=plan,
        schedule=schedule,
        train=DataSet(training, None),
        validation=DataSet(validation, None),
        device=model.device,
        work=work,
        key=key,
        state=state,
        progress=progress,
    )
    with torch.random.fork_rng():  # steps seed the generators for their dropout
        state = loop.run()
    atomic_write_text(work / "curve.jsonl", "".join(json.dumps(r) + "\n" for r in state.curve))
    trainable.load(state.best)
    sizes = {"sequences": len(training), "validation_sequences": len(validation)}
    summary = {**_summary(spec, plan, schedule, state, trainable), **sizes}
    return RecoveryResult(trainable.merged(), state.curve, summary)


def _schedule(training: TrainingSpec, plan: StepPlan, hidden_size: int) -> CosineSchedule:
    schedule = CosineSchedule.over(
        plan.steps,
        peak=learning_rate(training, hidden_size),
        min_ratio=training.min_lr_ratio,
        warmup_ratio=training.warmup_ratio,
        warmup_steps=training.warmup_steps,
        decay=training.decay,
    )
    if schedule.warmup >= plan.steps:
        log.warning(
            "recovery: the warm-up (%d steps) is not over when the training (%d steps) ends",
            schedule.warmup,
            plan.steps,
        )
    return schedule


def _key(model: Any, spec: RecoverySpec, tokens: CalibrationTokens, seed: int, weights: str) -> str:
    settings = spec.model_dump(
        mode="json", exclude={"training": {"data", "cache_gb", "checkpoint_every"}}
    )
    return key_of(
        weights=weights,
        tokens=tokens.sha256,
        recovery=settings,
        seed=seed,
        dtype=str(model.dtype),
        device=model.device.type,
    )


def _summary(
    spec: RecoverySpec,
    plan: StepPlan,
    schedule: CosineSchedule,
    state: TrainingState,
    trainable: TrainableParameters,
) -> dict[str, Any]:
    return {
        "kind": spec.kind,
        "preset": spec.preset,
        "trained_parameters": trainable.count,
        "changed_tensors": len(trainable.weights),
        "steps": plan.steps,
        "epochs": plan.epochs,
        "tokens": state.tokens,
        "lr": schedule.peak,
        "final_lr": schedule.at(plan.steps - 1),
        "initial_loss": state.curve[0]["val_loss"],
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "seconds": round(state.seconds, 3),
    }
