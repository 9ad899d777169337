"""A comparison as a graph of jobs that can be interrupted, continued and spread over machines."""

from __future__ import annotations

from typing import Any

__all__ = ["CompareResult", "Execution", "Request", "RowRequest", "compare"]

_WHERE = {
    "CompareResult": "run",
    "Execution": "execution.options",
    "Request": "planning.request",
    "RowRequest": "planning.request",
    "compare": "run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must answer ``--help`` without torch."""
    if name not in _WHERE:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"streamline_bench.runs.{_WHERE[name]}"), name)
