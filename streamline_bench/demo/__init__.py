"""The bundled model: a small language of our own, a Llama trained on it, tasks that test it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TASKS", "model"]

TASKS = "streamline_demo,streamline_demo_generation"
"""The lm-eval groups of the bundled tasks: multiple choice, and generation."""


def model() -> Path:
    """Return the folder of the bundled model (safetensors, config, tokenizer, calibration text)."""
    return Path(__file__).resolve().parent / "model"
