"""What ``bundled`` stands for where a model is named: the model with its tasks and block length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.demo import TASKS, model
from streamline_bench.resources import BUNDLED

_OVERRIDES: Mapping[str, Any] = {"sequence_length": 128}
"""The bundled model was trained on blocks of this length."""

_TEXT: Mapping[str, Any] = {"text": str(model() / "held_out.jsonl"), "text_window": 128}
"""What ``text: bundled`` stands for: text of its language that no training has seen."""

_DEFAULTS: Mapping[str, Any] = {
    "title": "The bundled model",
    "tasks": TASKS.split(","),
    "batch_size": "32",
    # The model is too small for several threads to pay; on a busy machine they cost dearly.
    "threads": 1,
    # Everything it needs comes along.
    "environment": {"HF_HUB_OFFLINE": "1"},
}


def bundled_request(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a request for the bundled model, with what it presets filled in."""
    own = {key: value for key, value in payload.items() if value is not None}
    if own.get("text") == BUNDLED:
        own = {**_TEXT, **own, "text": _TEXT["text"]}
    overrides = {**_OVERRIDES, **(own.get("set") or {})}
    return {**_DEFAULTS, **own, "set": overrides, "model": str(model())}
