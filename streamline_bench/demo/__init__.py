"""The bundled model: a small language of our own, a Llama trained on it, tasks that test it."""

from __future__ import annotations

from streamline_bench.core.machine.environment import bundled_model as model

__all__ = ["TASKS", "model"]

TASKS = "streamline_demo,streamline_demo_generation"
"""The lm-eval groups of the bundled tasks: multiple choice, and generation."""
