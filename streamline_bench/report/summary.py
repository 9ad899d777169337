"""The sentence at the head of a report: what a reader in a hurry should take away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.report.formats import percent, points

__all__ = ["headline"]


def headline(board: Mapping[str, Any]) -> str:
    """One or two plain sentences on the best row against the dense model. Not escaped."""
    dense = next(row for row in board["rows"] if row["is_dense"])
    others = [row for row in board["rows"] if row["macro"]]
    failed = sum(row["failed"] is not None for row in board["rows"])
    lost = f" {failed} more failed." if failed else ""
    before = percent(dense["accuracy_macro"]["value"])
    if not others:
        return f"{dense['label']} answers {before} % right, averaged over tasks.{lost}"
    best = max(others, key=lambda row: row["accuracy_macro"]["value"])
    difference = best["macro"]["difference"]
    removed = ""
    if best["sparsity_reached"] is not None:
        removed = f" with {percent(best['sparsity_reached'])} % of the parameters removed"
    level = f"{100 * board['method']['confidence']:g} %"
    agreement = best["macro"]["agreement"]["value"]
    return (
        f"Of {len(others)} compressed {'model' if len(others) == 1 else 'models'}, "
        f"{best['label']} keeps most: {percent(best['accuracy_macro']['value'])} % right"
        f"{removed}, where {dense['label']} has {before} % "
        f"({points(difference['value'])} points, {level} interval {points(difference['low'])} to "
        f"{points(difference['high'])}). {percent(agreement)} % of its verdicts are "
        f"unchanged.{lost}"
    )
