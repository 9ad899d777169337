"""Leaderboards of earlier schema versions, brought to this release's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.report.published import published_numbers
from streamline_bench.report.removed_layers import block_start
from streamline_bench.stability.comparison import Estimate

__all__ = ["upgraded"]


def upgraded(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the board of version 1 or 2 as one of version 3; not validated.

    What was added since has defaults, but for two things that the board itself knows: which of its
    numbers stand beside published ones, and which layers a block was made of.
    """
    rows = payload.get("rows")
    if not isinstance(rows, list):
        return {**payload, "schema_version": 3}
    return {
        **payload,
        "schema_version": 3,
        "rows": [_row(row) if isinstance(row, Mapping) else row for row in rows],
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **_published(row), **_scan(row)}


def _published(row: Mapping[str, Any]) -> dict[str, Any]:
    if not row.get("published"):
        return {}
    accuracies = {
        name: Estimate.model_validate(found)
        for name, found in (
            *((task["task"], task["accuracy"]) for task in row["tasks"] if task["main"]),
            *((group["group"], group["pruned"]) for group in row.get("groups") or ()),
        )
    }
    macro = row.get("macro") or {}
    own = {
        name: Estimate.model_validate(macro[name]) if macro.get(name) else None
        for name in ("stability", "retention")
    }
    recipe = {"name": row.get("label"), "published": row["published"]}
    return {"published": [one.model_dump() for one in published_numbers(recipe, accuracies, **own)]}


def _scan(row: Mapping[str, Any]) -> dict[str, Any]:
    scan = row.get("scan")
    if not scan:
        return {}
    removed = sorted(
        ((row.get("provenance") or {}).get("chosen") or {}).get("removed_layers") or ()
    )
    return {"scan": {**scan, "removed": removed, "start": block_start(removed)}}
