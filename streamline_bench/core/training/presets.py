"""The paper's ways of training a replacement, as :class:`TrainingSpec` fields.

``paper_mse``: hidden states, AdamW at 2e-4, 8 x 16 blocks a step, one epoch. ``paper_lm``: the
language-modelling loss of the pruned model. ``paper_memory_efficient``: the authors' streaming
example for 8B models. The cosine of ``paper_mse`` and ``paper_lm`` ends at 5e-5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.recipe.suggestions import suggest
from streamline_bench.errors import RecipeError

__all__ = ["TRAINING_PRESETS", "learning_rate", "preset_values", "training_preset"]

_COMMON = {"epochs": 1, "lr": 2e-4, "weight_decay": 1e-3, "max_grad_norm": 5.0}

TRAINING_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper_mse": {
        **_COMMON,
        "objective": "mse",
        "batch_size": 8,
        "gradient_accumulation": 16,
        "min_lr_ratio": 0.25,
        "warmup_ratio": 0.01,
        "betas": (0.9, 0.999),
    },
    "paper_lm": {
        **_COMMON,
        "objective": "lm",
        "batch_size": 8,
        "gradient_accumulation": 16,
        "min_lr_ratio": 0.25,
        "warmup_ratio": 0.01,
        "betas": (0.9, 0.95),
        "autocast": "bf16",
    },
    "paper_memory_efficient": {
        **_COMMON,
        "objective": "mse",
        "batch_size": 32,
        "gradient_accumulation": 2,
        "min_lr_ratio": 0.025,
        "warmup_ratio": 0.03,
        "betas": (0.9, 0.95),
        "autocast": "bf16",
    },
}


def preset_values(name: str) -> Mapping[str, Any]:
    """Return the fields of :class:`TrainingSpec` that a preset stands for.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in TRAINING_PRESETS:
        raise RecipeError(
            f"Unknown training preset '{name}'{suggest(name, TRAINING_PRESETS) or ';'} "
            f"known presets: {', '.join(TRAINING_PRESETS)}."
        )
    return TRAINING_PRESETS[name]


def training_preset(name: str, **changes: Any) -> TrainingSpec:
    """Return a preset, with some of its fields changed.

    Raises:
        RecipeError: there is no such preset.
    """
    return TrainingSpec.model_validate({**preset_values(name), **changes})


def learning_rate(training: TrainingSpec, hidden_size: int) -> float:
    """Return the peak learning rate; ``auto`` scales the paper's 2e-4 at width 4096."""
    if training.lr != "auto":
        return float(training.lr)
    return min(2e-4 * math.sqrt(4096 / hidden_size), 2e-3)
