"""The order in which a reader sees rows: best accuracy first, failed rows last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ranked"]


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort by accuracy (mean over tasks); equal rows keep the order of the run."""
    scored = [row for row in rows if row["accuracy_macro"]]
    failed = [row for row in rows if not row["accuracy_macro"]]
    return [*sorted(scored, key=lambda row: -float(row["accuracy_macro"]["value"])), *failed]
