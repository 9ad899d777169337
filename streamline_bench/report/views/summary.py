"""The sentence at the head of a report: what a reader in a hurry should take away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.report.text.formats import percent, points, significant
from streamline_bench.report.views.ranking import perplexity_ratio, ranked

__all__ = ["headline"]

_GUESSING = 0.1
"""Of the way from guessing to all right; a dense model below has nothing that rows could lose."""


def headline(board: Mapping[str, Any]) -> str:
    """One or two plain sentences on the best row against the dense model. Not escaped."""
    dense = next(row for row in board["rows"] if row["is_dense"])
    failed = sum(row["failed"] is not None for row in board["rows"])
    lost = f" {failed} more failed." if failed else ""
    if dense["accuracy_macro"] is None:
        return _perplexities(board, dense) + lost
    others = [row for row in board["rows"] if row["macro"]]
    before = percent(dense["accuracy_macro"]["value"])
    if not others:
        return f"{dense['label']} answers {before} % right, averaged over tasks.{lost}"
    best = max(others, key=lambda row: row["accuracy_macro"]["value"])
    corrected = best["macro"]["dense_corrected"]
    if corrected is not None and corrected["value"] < _GUESSING:
        return _guessing(dense["label"], before, corrected["value"], len(others)) + lost
    difference = best["macro"]["difference"]
    level = f"{100 * board['method']['confidence']:g} %"
    agreement = best["macro"]["agreement"]["value"]
    return (
        f"Of {_models(len(others))}, "
        f"{best['label']} keeps most: {percent(best['accuracy_macro']['value'])} % right"
        f"{_removed(best)}, where {dense['label']} has {before} % "
        f"({points(difference['value'])} points, {level} interval {points(difference['low'])} to "
        f"{points(difference['high'])}). {percent(agreement)} % of its verdicts are "
        f"unchanged.{lost}"
    )


def _guessing(label: str, right: str, corrected: float, others: int) -> str:
    return (
        f"{label} is close to guessing on these tasks: {right} % right is {percent(corrected)} % "
        f"of the way from guessing to all right. The order of the {_models(others)} therefore says "
        "little; what their verdicts do (stability, flips) still says how much they changed."
    )


def _models(count: int) -> str:
    return f"{count} compressed {'model' if count == 1 else 'models'}"


def _removed(row: Mapping[str, Any]) -> str:
    if row["sparsity_reached"] is None:
        return ""
    return f" with {percent(row['sparsity_reached'])} % of the parameters removed"


def _perplexities(board: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """What happened to perplexity, where no task has right or wrong answers."""
    none = "No task has right or wrong answers"
    others = [row for row in ranked(board["rows"]) if not row["is_dense"] and not row["failed"]]
    ratios = [(row, perplexity_ratio(row)) for row in others]
    known = [(row, ratio) for row, ratio in ratios if ratio is not None]
    if not others:
        return f"{none}, and {dense['label']} stands alone."
    if not known:
        return f"{none}, and no model has a perplexity to compare with {dense['label']}'s."
    best, ratio = known[0]
    ends = ""
    if ratio["low"] is not None:
        level = f"{100 * board['method']['confidence']:g} %"
        ends = f" ({level} interval {significant(ratio['low'], 3)} to "
        ends += f"{significant(ratio['high'], 3)})"
    tasks = len({found["task"] for found in best["perplexities"]})
    mean = f", geometric mean over {tasks} texts" if tasks > 1 else ""
    return (
        f"{none}. Of {_models(len(others))}, {best['label']} does best{_removed(best)}: its "
        f"perplexity is {significant(ratio['value'], 3)} times {dense['label']}'s{ends}{mean}."
    )
