"""Trainings of the literature, as values of a recipe's ``training`` and ``recovery``.

``training``: ``paper_mse``: hidden states, AdamW at 2e-4, 8 x 16 blocks a step, one epoch;
``paper_lm``: the language-modelling loss of the pruned model; ``paper_memory_efficient``: the
authors' streaming example for 8B models. The cosine of the first two ends at 5e-5.

``recovery``:
``llm_pruner``: LoRA after LLM-Pruner (arXiv 2305.11627 and its released script). ``last_layers``:
partial fine-tuning of "Reassessing layer pruning" (arXiv 2411.15558); ``last_layers_lora``: the
LoRA it is compared with, at the same rate, which is low for LoRA; ``last_layers_lora_1e-4``: at
the usual one. ``slicegpt``: recovery fine-tuning of SliceGPT (arXiv 2401.15024 and its release).

The references train in float16 with loss scaling; here the weights that are trained are float32
and the products bfloat16. The references' default schedule falls in a straight line to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import RecipeError

_COMMON = {"epochs": 1, "lr": 2e-4, "weight_decay": 1e-3, "max_grad_norm": 5.0}

# fmt: off
TRAINING_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper_mse": {
        **_COMMON, "objective": "mse", "batch_size": 8, "gradient_accumulation": 16,
        "min_lr_ratio": 0.25, "warmup_ratio": 0.01, "betas": (0.9, 0.999),
    },
    "paper_lm": {
        **_COMMON, "objective": "lm", "batch_size": 8, "gradient_accumulation": 16,
        "min_lr_ratio": 0.25, "warmup_ratio": 0.01, "betas": (0.9, 0.95), "autocast": "bf16",
    },
    "paper_memory_efficient": {
        **_COMMON, "objective": "mse", "batch_size": 32, "gradient_accumulation": 2,
        "min_lr_ratio": 0.025, "warmup_ratio": 0.03, "betas": (0.9, 0.95), "autocast": "bf16",
    },
}

_ALPACA_ROWS, _ALPACA_VALIDATION = 51_760, 2_000

_ALPACA: Mapping[str, Any] = {
    "objective": "lm",
    "data": {"source": "yahma/alpaca-cleaned", "form": "instruction", "sequence_length": 256},
    "epochs": 2, "batch_size": 4, "gradient_accumulation": 16, "warmup_steps": 100,
    "decay": "linear", "min_lr_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "autocast": "bf16", "validation_share": _ALPACA_VALIDATION / _ALPACA_ROWS,
}

_LORA: Mapping[str, Any] = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.05}

RECOVERY_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llm_pruner": {**_LORA, "training": {**_ALPACA, "lr": 1e-4}},
    "last_layers": {"kind": "partial", "last_layers": 3, "training": {**_ALPACA, "lr": 1e-5}},
    "last_layers_lora": {**_LORA, "training": {**_ALPACA, "lr": 1e-5}},
    "last_layers_lora_1e-4": {**_LORA, "training": {**_ALPACA, "lr": 1e-4}},
    "slicegpt": {
        "kind": "lora", "rank": 32, "alpha": 10, "dropout": 0.05,
        "targets": ("q", "k", "v", "o", "gate", "up", "down"),
        "training": {
            "objective": "lm",
            "data": {"source": "tatsu-lab/alpaca", "sequence_length": 1024, "samples": 8_128},
            "epochs": 1, "batch_size": 3, "lr": 2e-4, "warmup_steps": 400, "decay": "linear",
            "min_lr_ratio": 0.0, "weight_decay": 1e-2, "betas": (0.9, 0.95), "max_grad_norm": 1.0,
            "autocast": "bf16", "validation_share": 128 / 8_128,
        },
    },
}
# fmt: on


def preset_values(name: str) -> Mapping[str, Any]:
    """Return the fields of :class:`TrainingSpec` that a preset stands for.

    Raises:
        RecipeError: there is no such preset.
    """
    return _preset("training", name, TRAINING_PRESETS)


def with_preset(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says of its recovery, completed from the preset it names.

    Raises:
        RecipeError: there is no such preset.
    """
    name = payload.get("preset")
    return _merged({} if name is None else _preset("recovery", name, RECOVERY_PRESETS), payload)


def _preset(kind: str, name: Any, known: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if name not in known:
        raise RecipeError(
            f"Unknown {kind} preset '{name}'{suggest(str(name), known) or ';'} "
            f"known presets: {', '.join(known)}."
        )
    return known[name]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
