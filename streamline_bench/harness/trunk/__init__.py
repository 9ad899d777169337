"""Scores a dense model and variants of it in one walk up the layers they share.

``score_together(request)`` writes for every label what a separate run of
``lm_eval --model streamline`` writes: same answers, same files, less computed.
``python -m streamline_bench.harness.trunk REQUEST.json`` does the same in a process of its own.
Names are imported on first use, because torch and the harness are heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.harness.trunk.request import LabelOutcome, TrunkOutcome, TrunkRequest
    from streamline_bench.harness.trunk.score import score_together

__all__ = ["LabelOutcome", "TrunkOutcome", "TrunkRequest", "score_together"]

_HOMES = {
    "LabelOutcome": "request",
    "TrunkOutcome": "request",
    "TrunkRequest": "request",
    "score_together": "score",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
