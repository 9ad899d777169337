"""The divergence from the dense model's logits against its definition, and trainings on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.recipe.schema import DistillationSpec, ReplacementSpec, TrainingSpec
from streamline_bench.core.training import train_replacement
from streamline_bench.core.training.batch import make_batch
from streamline_bench.core.training.distillation import KdObjective, TeacherLogits
from streamline_bench.errors import OutputError

CPU = torch.device("cpu")


def _losses(model: Any, other: Any, tokens: Any, work: Path, **settings: Any) -> torch.Tensor:
    spec = DistillationSpec(**settings)
    teacher = TeacherLogits(work / "t.bin", "key", model, tokens, spec, device=CPU, progress=False)
    batch = make_batch(tokens, torch.tensor([5, 0, 3, 11]), CPU)
    return KdObjective(other, spec).loss_sum(batch, teacher)


def _divergence(model: Any, other: Any, tokens: Any, temperature: float) -> float:
    total = 0.0
    for row in (5, 0, 3, 11):
        ids = tokens.input_ids[row, : int(tokens.attention_mask[row].sum())][None]
        with torch.no_grad():
            dense, given = (
                (each(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
                for each in (model, other)
            )
        total += float((dense.exp() * (dense - given)).sum()) * temperature**2
    return total


@pytest.fixture
def other_model(teacher_model: Any) -> Any:
    other = copy.deepcopy(teacher_model).eval()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    return other


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_it_is_the_divergence(
    teacher_model: Any, other_model: Any, padded_tokens: Any, tmp_path: Path, temperature: float
) -> None:
    model = teacher_model.eval()
    settings = {"temperature": temperature, "top_k": 1000}  # more than there are
    loss = _losses(model, other_model, padded_tokens, tmp_path, **settings)
    expected = _divergence(model, other_model, padded_tokens, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    gradient = other_model.model.layers[2].mlp.down_proj.weight.grad
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0
    assert _losses(model, model, padded_tokens, tmp_path, **settings).item() < 1e-4


def test_with_few_tokens_it_is_less_and_grows_with_their_number(
    teacher_model: Any, other_model: Any, padded_tokens: Any, tmp_path: Path
) -> None:
    model = teacher_model.eval()
    losses = [
        _losses(model, other_model, padded_tokens, tmp_path, top_k=top).item() for top in (1, 8, 99)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert losses[2] <= _divergence(model, other_model, padded_tokens, 1.0) * 1.0001


def test_the_file_is_taken_up_and_a_full_disk_is_an_error(
    teacher_model: Any, padded_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _losses(teacher_model, teacher_model, padded_tokens, tmp_path, top_k=8)
    monkeypatch.setattr(TeacherLogits, "_fill", None)  # it would be called
    again = _losses(teacher_model, teacher_model, padded_tokens, tmp_path, top_k=8)
    assert torch.equal(first, again)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="top_k"):
        _losses(teacher_model, teacher_model, padded_tokens, tmp_path, top_k=4)


def test_a_replacement_learns_the_dense_distribution(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    settings = {"objective": "kd", "min_steps": 30, "batch_size": 4, "lr": 3e-3}
    result = train_replacement(
        teacher_model, start=2, n=3, spec=ReplacementSpec(kind="layer"), tokens=tokens,
        training=TrainingSpec.model_validate({**settings, "kd": {"temperature": 2.0}}),
        work=tmp_path, seed=1, progress=False,
    )  # fmt: skip
    losses = [row["train_loss"] for row in result.curve if row["train_loss"] is not None]
    assert losses[-1] < 0.8 * losses[0]
    assert "64 largest logits" in result.summary["hidden_states"]


@pytest.mark.parametrize("kind", ["lora", "partial"])
def test_a_recovery_by_distillation(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    changes = {
        "kind": kind, "training.objective": "kd", "training.kd.top_k": 16,
        "training.data.sequence_length": 16, "training.min_steps": 6, "training.batch_size": 4,
    }  # fmt: skip
    recipe = make_recipe("last_layers", **{f"recovery.{key}": v for key, v in changes.items()})
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training["recovery"]["objective"] == "kd"
    assert manifest.training["recovery"]["best_loss"] >= 0


def test_settings_of_distillation_change_no_other_key() -> None:
    plain, other = TrainingSpec(objective="lm"), {"objective": "lm", "kd": {"top_k": 3}}
    assert TrainingSpec.model_validate(other).model_dump() == plain.model_dump()
    assert "kd" not in plain.model_dump()
    assert TrainingSpec(objective="kd").model_dump()["kd"]["top_k"] == 64
