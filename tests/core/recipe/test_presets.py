"""Presets of the paper and names of the reference's quirks."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_bench.core.recipe.presets import TRAINING_PRESETS, preset_values
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.training import QUIRKS
from streamline_bench.core.training.state import learning_rate
from streamline_bench.core.training.trainer import check_quirks
from streamline_bench.errors import RecipeError

LAYER = ReplacementSpec(kind="layer")


def training_preset(name: str, **changes: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({**preset_values(name), **changes})


def test_the_papers_figures() -> None:
    mse = training_preset("paper_mse")
    assert mse.lr * mse.min_lr_ratio == pytest.approx(5e-5)  # type: ignore[operator]
    assert mse.batch_size * mse.gradient_accumulation == 128
    assert (mse.weight_decay, mse.max_grad_norm, mse.betas) == (1e-3, 5.0, (0.9, 0.999))
    assert training_preset("paper_lm").objective == "lm"
    streaming = training_preset("paper_memory_efficient")
    assert streaming.lr * streaming.min_lr_ratio == pytest.approx(5e-6)  # type: ignore[operator]
    assert (streaming.batch_size, streaming.gradient_accumulation) == (32, 2)


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_presets_are_valid_and_can_be_changed(name: str) -> None:
    assert training_preset(name, epochs=3).epochs == 3


def test_unknown_preset_is_suggested() -> None:
    with pytest.raises(RecipeError, match="did you mean 'paper_mse'"):
        preset_values("paper_msee")


def test_automatic_rate_is_the_papers_at_its_width() -> None:
    auto = TrainingSpec(lr="auto")
    assert learning_rate(auto, 4096) == pytest.approx(2e-4)
    assert learning_rate(auto, 1024) == pytest.approx(4e-4)
    assert learning_rate(auto, 1) == 2e-3
    assert learning_rate(TrainingSpec(lr=1e-5), 64) == 1e-5


def test_quirks_are_known_by_name() -> None:
    check_quirks(tuple(QUIRKS), LAYER, TrainingSpec(objective="mse"))
    with pytest.raises(RecipeError, match="did you mean 'postnorm_target'"):
        check_quirks(["postnorm_targets"], LAYER, TrainingSpec(objective="mse"))


@pytest.mark.parametrize("kind", ["ffn", "layer"])
def test_quirks_that_would_do_nothing_are_refused(kind: str) -> None:
    objective = "lm" if kind == "layer" else "mse"
    spec = ReplacementSpec.model_validate({"kind": kind})
    training = TrainingSpec.model_validate({"objective": objective})
    with pytest.raises(RecipeError, match=f"'{kind}' by '{objective}'"):
        check_quirks(["bidirectional_layer"], spec, training)
