"""``leaderboard.html``: one offline file from ``reports/templates``; autoescape does the escaping.

Style and script are inlined; a content security policy allows that one script by its hash, and no
request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from streamline_bench.report import formats
from streamline_bench.report.escaping import visible_text
from streamline_bench.report.figures import curve_svg, matrix_svg
from streamline_bench.report.summary import headline
from streamline_bench.resources import resource

__all__ = ["to_html"]


def to_html(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as one self-contained page."""
    templates = resource("reports") / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in formats.__all__:
        if name.islower():
            environment.filters[name] = getattr(formats, name)
    environment.filters["pretty"] = _pretty
    environment.filters["breakable"] = _breakable
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    failed = [row for row in board["rows"] if row["failed"]]
    board = {**board, "rows": [row for row in board["rows"] if not row["failed"]]}
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        failed=failed,
        headline=headline({**board, "rows": [*board["rows"], *failed]}),
        style=Markup((templates / "leaderboard.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        forest=_forest(board["rows"]),
        heat=_heat(board["rows"]),
        scans=_scans(board["rows"]),
        curves=[(row["label"], curve_svg(row["curve"])) for row in board["rows"] if row["curve"]],
        level=f"{100 * board['method']['confidence']:g} %",
    )


def _visible(value: Any) -> Any:
    """No control characters or direction overrides in anything the template prints."""
    return (
        visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)


def _breakable(name: str) -> Markup:
    """Escaped; a long name may break after an underscore, a slash or a hyphen."""
    return Markup(re.sub(r"([_/-])", r"\1<wbr>", str(escape(visible_text(name)))))


def _forest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Positions (percent of the width) of the differences and their intervals."""
    found = [(row, row["macro"]["difference"]) for row in rows if row["macro"]]
    if not found:
        return None
    ends = [value for _, d in found for value in (d["low"], d["high"], d["value"], 0.0)]
    low, high = min(ends), max(ends)
    pad = max(0.02, 0.06 * (high - low))
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    lines = [
        {
            "label": row["label"],
            "difference": d,
            "low": place(d["low"]),
            "width": round(place(d["high"]) - place(d["low"]), 2),
            "value": place(d["value"]),
        }
        for row, d in found
    ]
    return {"lines": lines, "zero": place(0.0)}


def _heat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per task, one cell per row: accuracy, change, stability, with the strength of its colour."""
    lines = []
    for task in rows[0]["tasks"]:
        cells = [_heat_cell(row, task) for row in rows]
        name = task["task"] if task["main"] else f"{task['task']} ({task['filter']})"
        lines.append({"task": name, "n": task["n"], "verdict": task["verdict"], "cells": cells})
    return lines


def _heat_cell(row: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    key = (task["task"], task["filter"])
    found = next((t for t in row["tasks"] if (t["task"], t["filter"]) == key), None)
    if found is None:
        return {"missing": True, "is_dense": row["is_dense"]}
    comparison = found["comparison"]
    change = comparison["difference"]["value"] if comparison else None
    stability = comparison["stability"] if comparison else None
    return {
        "missing": False,
        "is_dense": row["is_dense"],
        "accuracy": found["accuracy"],
        "difference": comparison["difference"] if comparison else None,
        "stability": stability,
        "agreement": comparison["agreement"] if comparison else None,
        # Half a scale lost is full colour: beyond that a model of this task knows nothing.
        "loss": round(min(1.0, max(0.0, -(change or 0.0)) * 2), 3),
        "gain": round(min(1.0, max(0.0, change or 0.0) * 2), 3),
        "unstable": round(min(1.0, 2 * (1 - stability["value"])), 3) if stability else 0.0,
        "disagree": round(min(1.0, 2 * (1 - comparison["agreement"]["value"])), 3)
        if comparison
        else 0.0,
    }


def _scans(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each matrix and block once, with the rows that share it."""
    grouped: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["scan"] is None:
            continue
        key = json.dumps(row["scan"], sort_keys=True)
        entry = grouped.setdefault(key, {"scan": row["scan"], "labels": []})
        entry["labels"].append(row["label"])
    return [{**entry, "svg": matrix_svg(entry["scan"])} for entry in grouped.values()]
