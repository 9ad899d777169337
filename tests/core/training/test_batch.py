"""Hot loops ask nothing of an accelerator that its host would have to wait for."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from waits import Waits

from streamline_bench.core.recipe.schema import DistillationSpec, ReplacementSpec
from streamline_bench.core.training.batch import Batch, make_batch
from streamline_bench.core.training.block import Student, Teacher
from streamline_bench.core.training.distillation import KdObjective, TeacherLogits
from streamline_bench.core.training.loop import LmObjective, StateObjective

CPU = torch.device("cpu")


@pytest.fixture
def batch(padded_tokens: Any) -> Batch:
    return make_batch(padded_tokens, torch.tensor([5, 0, 3, 11]), CPU)


def test_places_are_those_of_the_masks(padded_tokens: Any, batch: Batch) -> None:
    mask = batch.mask
    assert torch.equal(batch.ids.flatten()[batch.kept], batch.ids[mask])
    follows = mask[:, 1:] & mask[:, :-1]
    assert torch.equal(batch.ids.flatten()[batch.predicting + 1], batch.ids[:, 1:][follows])


def test_errors_of_states_wait_for_nothing(teacher_model: Any, batch: Batch) -> None:
    student = Student(teacher_model, 2, ReplacementSpec(kind="layer"), seed=3)
    states = Teacher(teacher_model, 2, 3, student.num_calls).run(batch.ids, batch.mask)
    with Waits() as waits:
        StateObjective(student).loss_sum(batch, SimpleNamespace(states=lambda _: states)).backward()
    assert waits.found == []


@pytest.mark.parametrize("objective", ["lm", "kd"])
def test_losses_of_logits_wait_for_nothing_of_ours(
    objective: str, teacher_model: Any, padded_tokens: Any, batch: Batch, tmp_path: Path
) -> None:
    spec = DistillationSpec()
    source = TeacherLogits(
        tmp_path / "t.bin", "key", teacher_model, padded_tokens, spec, device=CPU, progress=False
    )
    model = copy.deepcopy(teacher_model)
    losses = LmObjective(model) if objective == "lm" else KdObjective(model, spec)
    with Waits() as alone, torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    with Waits() as waits:
        losses.loss_sum(batch, source).backward()
    # What transformers looks up in a mask is its own.
    assert waits.found == alone.found
