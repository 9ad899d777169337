"""Heat map: one line per row, one column per task, with the strength of every cell's colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["heat_map"]

_FULL_COLOUR = 0.5
"""Half a scale lost is full colour: beyond that a model of two choices knows nothing."""


def heat_map(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns (tasks and filters of any row) and lines of cells; ``prefix`` is common to all."""
    tasks: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        for task in row["tasks"]:
            tasks.setdefault((task["task"], task["filter"]), task)
    prefix = _prefix([name for name, _ in tasks])
    return {
        "prefix": prefix,
        "columns": [
            {
                "name": task["task"] if task["main"] else f"{task['task']} ({task['filter']})",
                "short": task["task"][len(prefix) :],
                "filter": None if task["main"] else task["filter"],
                "verdict": task["verdict"],
                "n": task["n"],
            }
            for task in tasks.values()
        ],
        "lines": [{"row": row, "cells": _cells(row, tasks)} for row in rows],
    }


def _prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to an underscore; nothing for a single name."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    size = next((i for i, letter in enumerate(first) if letter != last[i : i + 1]), len(first))
    return first[: first.rfind("_", 0, size) + 1]


def _cells(row: Mapping[str, Any], tasks: Mapping[tuple[str, str], Any]) -> list[Any]:
    found = {(task["task"], task["filter"]): task for task in row["tasks"]}
    return [_cell(found[key]) if key in found else None for key in tasks]


def _cell(task: Mapping[str, Any]) -> dict[str, Any]:
    comparison = task["comparison"]
    if comparison is None:
        return {"accuracy": task["accuracy"], "compared": None, "shade": {}}
    change, stable = comparison["difference"]["value"], comparison["stability"]
    return {
        "accuracy": task["accuracy"],
        "compared": comparison,
        "shade": {
            "loss": _shade(-change),
            "gain": _shade(change),
            "unstable": _shade(1 - stable["value"]) if stable else 0.0,
            "disagree": _shade(1 - comparison["agreement"]["value"]),
        },
    }


def _shade(value: float) -> float:
    return round(min(1.0, max(0.0, value / _FULL_COLOUR)), 3)
