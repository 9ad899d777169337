"""The bundled model: a small language of our own, a Llama trained on it, tasks that test it.

Here is what comparisons of it preset, and the demo, which is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.environment import BUNDLED
from streamline_bench.core.machine.environment import bundled_model as model
from streamline_bench.runs.planning.request import make_request
from streamline_bench.runs.run import CompareResult, compare_request

__all__ = ["DEMO_ROWS", "TASKS", "bundled_request", "model", "run_demo"]

TASKS = "streamline_demo,streamline_demo_generation"
"""The lm-eval groups of the bundled tasks: multiple choice, and generation."""

DEMO_ROWS: tuple[str, ...] = ("dense", "streamline_none", "streamline", "streamline_ffn_res")

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


def run_demo(
    output: Path,
    *,
    rows: Sequence[str] = DEMO_ROWS,
    sparsity: float = 0.25,
    limit: int | None = None,
    batch_size: int = 32,
    until: str = "report",
    overwrite: bool = False,
    progress: bool = True,
) -> CompareResult:
    """Run the demo; an interrupted one is continued (StreamlineBenchError: nothing could be run).

    Args:
        rows: recipe names; the others are compared with the dense one.
        limit: documents per task, ``None`` for all.
        until: last stage to run.
        overwrite: what an earlier demo made in ``output`` is removed first.
    """
    asked = {"recipes": list(rows), "set": {"sparsity": sparsity}, "limit": limit, "text": BUNDLED}
    request = make_request(bundled_request({**asked, "batch_size": str(batch_size)}))
    return compare_request(request, output, until=until, progress=progress, overwrite=overwrite)
